"""The optimisation on a predictor small enough to know the answer: eps is linear in e(c)."""

from dataclasses import replace

import pytest
import torch

from sepme_cli.erasure.optimise import Task, optimise
from sepme_cli.erasure.representation import Sample, correlation
from sepme_cli.erasure.settings import Settings

WIDTH, SIDE = 6, 4
SETTINGS = Settings(steps=300, lr=0.05, threshold=0.02, batch_size=8, norm=0.0)


class LinearPredictor:
    """eps(x_t, c) = mixing @ (W + dW) e(c), the same at every x_t."""

    def __init__(self, seed: int, prompt: torch.Tensor) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(5, WIDTH, generator=generator)
        self.mixing = torch.randn(SIDE * SIDE, 5, generator=generator)
        self.prompt = prompt
        self.calls = 0

    def __call__(self, noisy, steps, prompts, up, basis):  # type: ignore[no-untyped-def]
        self.calls += 1
        changed = self.weight + up["layer"] @ basis
        return (
            (self.mixing @ changed @ self.prompt)
            .view(1, 1, SIDE, SIDE)
            .expand(len(noisy), -1, -1, -1)
        )


def task(seed: int = 0, count: int = 16) -> Task:
    generator = torch.Generator().manual_seed(100 + seed)
    prompt = torch.zeros(WIDTH)
    prompt[seed] = 1.0
    predict = LinearPredictor(seed, prompt)
    shape = (count, 1, SIDE, SIDE)
    basis = torch.eye(WIDTH)[seed : seed + 2]
    zero = {"layer": torch.zeros(5, 2)}
    original = predict(torch.zeros(shape), None, None, zero, basis)
    sample = Sample(
        torch.randn(shape, generator=generator),
        torch.zeros(count, dtype=torch.long),
        torch.zeros(count, dtype=torch.long),
        torch.zeros(shape),
        original.clone(),
    )
    return Task(sample, predict, basis, torch.eye(2, dtype=torch.float64), {"layer": 1.0}, zero)


def correlation_after(t: Task, up: dict[str, torch.Tensor]) -> float:
    edited = t.predict(t.sample.noisy, t.sample.steps, t.sample.prompts, up, t.basis)
    return float(correlation(edited, t.sample.representation).mean())


def test_correlation_is_one_with_itself_and_follows_scale() -> None:
    original = torch.randn(3, 2, 4, 4)
    torch.testing.assert_close(correlation(original, original), torch.ones(3))
    torch.testing.assert_close(correlation(-0.5 * original, original), torch.full((3,), -0.5))


def test_stops_when_the_momentum_is_down_and_no_later() -> None:
    t = task()
    (found,) = optimise([t], SETTINGS)
    assert found.stopped == "threshold"
    assert found.steps < SETTINGS.steps
    start, end = found.correlation
    assert start == pytest.approx(1.0)
    assert end <= SETTINGS.threshold
    assert abs(correlation_after(t, found.up)) < 0.3


def test_says_when_it_ran_out_of_steps() -> None:
    (found,) = optimise([task()], replace(SETTINGS, steps=3))
    assert (found.stopped, found.steps) == ("steps", 3)
    assert found.correlation[1] > SETTINGS.threshold


def test_the_same_seed_gives_the_same_increment() -> None:
    first, second = (optimise([task()], SETTINGS)[0] for _ in range(2))
    assert torch.equal(first.up["layer"], second.up["layer"])


def test_the_norm_keeps_increments_small() -> None:
    free, held = (
        optimise([task()], replace(SETTINGS, norm=n, steps=40, threshold=-1.0))[0]
        for n in (0.0, 10.0)
    )
    assert held.up["layer"].norm() < free.up["layer"].norm()


def test_a_dear_direction_is_used_less() -> None:
    cheap = task()
    dear = replace(cheap, cost=torch.diag(torch.tensor([400.0, 1.0], dtype=torch.float64)))
    settings = replace(SETTINGS, steps=5)
    moved = [optimise([t], settings)[0].up["layer"][:, 0].norm() for t in (cheap, dear)]
    assert moved[1] < 0.2 * moved[0]


def test_together_every_concept_is_erased() -> None:
    tasks = [task(0), task(3)]
    for t, found in zip(tasks, optimise(tasks, SETTINGS), strict=True):
        assert found.stopped == "threshold"
        assert abs(correlation_after(t, found.up)) < 0.3


def test_one_pass_a_step_and_concept() -> None:
    t = task()
    before = t.predict.calls  # type: ignore[attr-defined]
    (found,) = optimise([t], SETTINGS)
    assert t.predict.calls - before == found.steps  # type: ignore[attr-defined]

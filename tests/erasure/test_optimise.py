"""The optimisation on a predictor small enough to know the answer: eps is linear in e(c)."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sepme_cli.erasure.optimise import Task, optimise
from sepme_cli.erasure.representation import Sample, correlation
from sepme_cli.erasure.settings import Settings
from sepme_cli.progress import Progress

WIDTH, SIDE, LAYER = 9, 4, 5
SETTINGS = Settings(steps=300, lr=0.05, threshold=0.02, batch_size=8, norm=0.0)


class LinearPredictor:
    """eps(x_t, c) = (1 + t) exp(x_t / 4) * (mixing (W + dW) e(c)): of one image, time step and
    prompt another than of the next.

    The concept has two phrases; the counterpart of both is out of the increment's reach.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(LAYER, WIDTH, generator=generator)
        self.mixing = torch.randn(SIDE * SIDE, LAYER, generator=generator)
        one, two, other = torch.eye(WIDTH)[seed : seed + 3]
        self.phrases, self.counterpart = torch.stack([one, one + two]), other
        self.given: list[tuple[Tensor, Tensor, Tensor]] = []
        self.predicted: list[Tensor] = []

    def __call__(self, noisy, steps, prompts, up, basis):  # type: ignore[no-untyped-def]
        changed = self.weight + up["layer"] @ basis
        found = self.seen(noisy, steps, self.phrases[prompts] @ changed.T)
        if found.requires_grad:
            found.retain_grad()
        self.given.append((noisy, steps, prompts))
        self.predicted.append(found)
        return found

    def seen(self, noisy: Tensor, steps: Tensor, values: Tensor) -> Tensor:
        """values: what the layer makes of each prompt [n, 5]."""
        mixed = (values @ self.mixing.T).view(noisy.shape)
        return (1 + steps.view(-1, 1, 1, 1)) * (noisy / 4).exp() * mixed

    def without(self, noisy: Tensor, steps: Tensor) -> Tensor:
        return self.seen(noisy, steps, (self.weight @ self.counterpart).expand(len(noisy), -1))

    def representation(self, noisy: Tensor, steps: Tensor, prompts: Tensor) -> Tensor:
        asked = self.seen(noisy, steps, self.phrases[prompts] @ self.weight.T)
        return asked - self.without(noisy, steps)

    def erasing(self, share: float) -> Tensor:
        """The up matrix [5, 2] that takes this share of the representation away."""
        one, two = self.phrases[0], self.phrases[1] - self.phrases[0]
        columns = [self.counterpart - one, -two]
        return share * torch.stack([self.weight @ column for column in columns], 1)


def task(seed: int = 0, count: int = 16, erased: float = 0.0) -> Task:
    """erased: how much of the representation is gone at the start."""
    generator = torch.Generator().manual_seed(100 + seed)
    predict = LinearPredictor(seed)
    noisy = torch.randn((count, 1, SIDE, SIDE), generator=generator)
    steps = torch.arange(count) % 3
    prompts = torch.randint(2, (count,), generator=generator)
    sample = Sample(
        noisy,
        steps,
        prompts,
        predict.without(noisy, steps),
        predict.representation(noisy, steps, prompts),
    )
    start = {"layer": predict.erasing(erased)}
    cost = torch.eye(2, dtype=torch.float64)
    return Task(sample, predict, torch.eye(WIDTH)[seed : seed + 2], cost, {"layer": 1.0}, start)


def correlation_after(t: Task, *ups: dict[str, Tensor]) -> float:
    """The largest, of all moments, with all of the increments, which act in one basis."""
    up = {"layer": sum(u["layer"] for u in ups)}
    s = t.sample
    edited = t.predict(s.noisy, s.steps, s.prompts, up, t.basis)  # type: ignore[arg-type]
    return float(correlation(edited - s.without, s.representation).abs().max())


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
    # Only if every image is seen at its own time step and with its own prompt.
    assert start == pytest.approx(1.0)
    assert 0.8 * SETTINGS.threshold < end <= SETTINGS.threshold
    assert correlation_after(t, found.up) < 0.3


def test_momentum_follows_the_losses() -> None:
    """L_mom = alpha L_mom + (1 - alpha) L_cor, of the losses of all steps."""
    t = task(erased=0.5)
    (found,) = optimise([t], replace(SETTINGS, steps=4, momentum=0.75))
    predict: LinearPredictor = t.predict  # type: ignore[assignment]
    losses = []
    for predicted, given in zip(predict.predicted, predict.given, strict=True):
        edited = predicted.detach() - predict.without(*given[:2])
        cosine = correlation(edited, predict.representation(*given))
        losses.append(float(cosine.pow(2).mean().sqrt()))
    momentum = losses[0]
    for loss in losses:
        momentum = 0.75 * momentum + 0.25 * loss
    assert found.correlation == pytest.approx((losses[0], momentum))
    assert losses[0] == pytest.approx(0.5)
    assert losses == sorted(losses, reverse=True) != losses[:1] * 4


def test_the_threshold_itself_is_low_enough() -> None:
    settings = replace(SETTINGS, momentum=0.0, steps=2)
    (once,) = optimise([task()], replace(settings, steps=1))
    (found,) = optimise([task()], replace(settings, threshold=once.correlation[1]))
    assert (found.stopped, found.steps) == ("threshold", 1)


def test_says_when_it_ran_out_of_steps() -> None:
    (found,) = optimise([task()], replace(SETTINGS, steps=3))
    assert (found.stopped, found.steps) == ("steps", 3)
    assert found.correlation[1] > SETTINGS.threshold


def test_the_same_seed_gives_the_same_increment_and_another_another() -> None:
    few = replace(SETTINGS, steps=5)
    first, second, other = (
        optimise([task()], replace(few, seed=seed))[0].up["layer"] for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.allclose(first, other, atol=1e-3)


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


def test_a_start_is_where_it_starts_whatever_the_cost_and_the_scale() -> None:
    t = task(erased=0.5)
    cost = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    t = replace(t, cost=cost, scales={"layer": 0.2})
    (found,) = optimise([t], replace(SETTINGS, lr=0.0, steps=1))
    torch.testing.assert_close(found.up["layer"], t.start["layer"])


def test_together_every_concept_is_erased() -> None:
    tasks = [task(0), task(3)]
    for t, found in zip(tasks, optimise(tasks, SETTINGS), strict=True):
        assert found.stopped == "threshold"
        assert correlation_after(t, found.up) < 0.3


def test_together_the_losses_are_balanced() -> None:
    """eta_i = max_k L_cor(k) / L_cor(i), of 10 at most: the gradient of each concept's loss
    arrives at its predictions that many times."""
    erased = (0.0, 0.75, 0.999)
    tasks = [task(seed, erased=share) for seed, share in zip((0, 3, 6), erased, strict=True)]
    optimise(tasks, replace(SETTINGS, steps=1, threshold=0.0))
    for t, balance in zip(tasks, (1.0, 4.0, 10.0), strict=True):
        predict: LinearPredictor = t.predict  # type: ignore[assignment]
        (predicted,), (given,) = predict.predicted, predict.given
        original = predict.representation(*given)
        # Where all moments' correlations are one number, dL_cor / d eps' is r / (r . r) / n.
        alone = original / original.flatten(1).pow(2).sum(1).view(-1, 1, 1, 1) / len(original)
        assert predicted.grad is not None
        torch.testing.assert_close(predicted.grad, balance * alone, rtol=1e-3, atol=1e-5)


def test_together_every_concept_sees_the_others_increments() -> None:
    """Of one concept asked for twice, each of the two increments erases a half."""
    tasks = [task(0), task(0)]
    one, two = optimise(tasks, SETTINGS)
    assert correlation_after(tasks[0], one.up, two.up) < 0.3
    for alone in (one, two):
        assert correlation_after(tasks[0], alone.up) > 0.4


class Counted(Progress):
    """How many steps are told of, and how many are done."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int | None]] = []
        self.done = 0

    def stage(self, name: str, total: int | None = None) -> None:
        self.stages.append((name, total))

    def advance(self, steps: int = 1) -> None:
        self.done += steps


def test_one_pass_a_step_and_concept() -> None:
    t, progress = task(), Counted()
    (found,) = optimise([t], SETTINGS, progress)
    assert progress.stages == [("optimising", SETTINGS.steps)]
    assert progress.done == found.steps
    given = t.predict.given  # type: ignore[attr-defined]
    assert len(given) == found.steps
    assert {len(noisy) for noisy, _, _ in given} == {SETTINGS.batch_size}

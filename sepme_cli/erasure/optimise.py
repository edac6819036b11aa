"""SepME's optimisation: learn increments until the edited representation has nothing in common
with the original one, and no further.

The paper minimises the mean correlation itself, which does not stop at zero: its momentum lags,
and what lags is made opposite before training stops. Here L_cor is the root mean square of the
moments' correlations, which is zero only where every one of them is uncorrelated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from sepme_cli.erasure.representation import Sample, correlation
from sepme_cli.erasure.settings import Settings
from sepme_cli.progress import SILENT, Progress

#: eta_i is cut here: a concept that is nearly erased must not drown the others.
_MOST_BALANCE = 10.0


class NoisePredictor(Protocol):
    """eps'(x_t, c): the UNet with dW = up @ basis added to each layer.

    noisy [n, c, h, w], steps [n], prompts [n] (indices into the concept's phrases), up: layer ->
    [out, r], basis [r, d]. Returns [n, c, h, w], differentiable in up.
    """

    def __call__(
        self, noisy: Tensor, steps: Tensor, prompts: Tensor, up: Mapping[str, Tensor], basis: Tensor
    ) -> Tensor: ...


@dataclass(frozen=True)
class Task:
    """One concept to optimise: its moments, its admissible basis [r, d] and where it starts.

    cost: [r, r], the metric M seen in the basis, B M B^T: what a coefficient does to what is
    protected. scales: layer -> the root mean square of its weights, so that one learning rate
    fits all layers. start: layer -> [out, r].
    """

    sample: Sample
    predict: NoisePredictor
    basis: Tensor
    cost: Tensor
    scales: Mapping[str, float]
    start: Mapping[str, Tensor]


@dataclass(eq=False)
class _Course:
    """A task under way: w, its coefficients in the metric's own units, and its momentum."""

    task: Task
    unit: Tensor = field(init=False)
    coefficients: dict[str, Tensor] = field(init=False)
    momentum: float | None = None
    first: float = 1.0
    steps: int = 0
    stopped: Literal["threshold", "steps"] = "steps"

    def __post_init__(self) -> None:
        values, vectors = torch.linalg.eigh(self.task.cost.double())
        root = values.clamp(min=1e-12).sqrt()
        self.unit = (vectors / root @ vectors.T).float()  # cost^-1/2
        whiten = (vectors * root @ vectors.T).float()
        self.coefficients = {
            name: (up.float() @ whiten / self.task.scales[name]).requires_grad_()
            for name, up in self.task.start.items()
        }

    def up(self) -> dict[str, Tensor]:
        return {
            name: self.task.scales[name] * w @ self.unit for name, w in self.coefficients.items()
        }

    def norm(self) -> Tensor:
        """The increments' mean squared norm, measured by what they do to what is protected."""
        return torch.stack([w.pow(2).mean() for w in self.coefficients.values()]).mean()


@dataclass(frozen=True)
class Outcome:
    """What one concept's optimisation found. correlation: (start, end), end being its momentum."""

    up: dict[str, Tensor]
    steps: int
    stopped: str
    correlation: tuple[float, float]


def optimise(
    tasks: Sequence[Task], settings: Settings, progress: Progress = SILENT
) -> list[Outcome]:
    """Optimise concepts together; one task alone is the usual case (SepME, section 3).

    Each concept stops for itself once L_mom <= tau. Together, losses are balanced by
    eta_i = max_k |L_cor(k)| / |L_cor(i)|, and every concept sees all the others' increments.
    """
    courses = [_Course(task) for task in tasks]
    generator = torch.Generator().manual_seed(settings.seed)
    optimisers = [torch.optim.Adam(c.coefficients.values(), lr=settings.lr) for c in courses]
    progress.stage("optimising", settings.steps)
    for _ in range(settings.steps):
        running = [c for c in courses if c.stopped == "steps"]
        if not running:
            break
        losses = [_loss(course, courses, settings, generator) for course in running]
        largest = max(loss.item() for loss in losses)
        for course, loss in zip(running, losses, strict=True):
            balance = min(largest / max(loss.item(), 1e-6), _MOST_BALANCE)
            (balance * loss + settings.norm * course.norm()).backward()
        for course, optimiser in zip(courses, optimisers, strict=True):
            if course in running:
                optimiser.step()
            optimiser.zero_grad()
        progress.advance()
    return [
        Outcome(
            {name: up.detach() for name, up in c.up().items()},
            c.steps,
            c.stopped,
            (c.first, c.momentum if c.momentum is not None else c.first),
        )
        for c in courses
    ]


def _loss(
    course: _Course, courses: Sequence[_Course], settings: Settings, generator: torch.Generator
) -> Tensor:
    """L_cor of one concept on a fresh batch; follows its momentum and stops it at tau."""
    task = course.task
    batch = task.sample[
        torch.randint(len(task.sample), (settings.batch_size,), generator=generator)
    ]
    ups = [other.up() for other in courses]
    up = {name: torch.cat([u[name] for u in ups], 1) for name in task.start}
    basis = torch.cat([other.task.basis for other in courses])
    predicted = task.predict(batch.noisy, batch.steps, batch.prompts, up, basis)
    found = correlation(predicted - batch.without, batch.representation).pow(2).mean().sqrt()
    _follow(course, found.item(), settings)
    return found


def _follow(course: _Course, loss: float, settings: Settings) -> None:
    """L_mom = alpha L_mom + (1 - alpha) L_cor; training stops early once L_mom <= tau."""
    alpha = settings.momentum
    if course.momentum is None:
        course.first = course.momentum = loss
    course.momentum = alpha * course.momentum + (1 - alpha) * loss
    course.steps += 1
    if course.momentum <= settings.threshold:
        course.stopped = "threshold"

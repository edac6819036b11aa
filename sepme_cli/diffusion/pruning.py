"""ConceptPrune: masks of the units that draw a concept (Chavhan et al. 2024, arXiv 2405.19237).

In every transformer block of a UNet, `ff.net.2` sums units, inputs that are large where what they
stand for is drawn. Images are begun with the concept and without it, from the same noise. The score
of a weight is its magnitude times the norm of its unit (Wanda, Sun et al. 2024). Of the highest
scores of each row with the concept, the weights that score lower without it become zero.

Two things differ from the authors' program. It sorts layers by their names as texts, and pairs them
with what was seen in the order of the calls: behind ten transformer blocks in a row, `.10` stands
before `.2`, and weights get the units of other layers. Here units have the name of their layer. And
as only the first steps of sampling count, no image is finished.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from patch_spec.increment import Increment
from patch_spec.mask import Flags, Masked, to_gaps
from patch_spec.provenance import Measurements, Method
from sepme_cli.diffusion.arrays import to_torch
from sepme_cli.diffusion.conditioning import Conditioning
from sepme_cli.diffusion.eraser import ComputedIncrement, announce, seconds_of_a_pass
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.sampler import initial_noise
from sepme_cli.diffusion.study import Study
from sepme_cli.erasure.methods import PRUNING
from sepme_cli.erasure.prompts import AsKind, Phrase
from sepme_cli.erasure.settings import OF_PRUNING, Settings
from sepme_cli.errors import RefusedError
from sepme_cli.progress import SILENT, Progress

_SUMMED = "ff.net.2"
_STYLES, _OTHERS = 0.01, 0.02
"""Shares of a row that the paper's authors take, of styles and of objects."""
_BATCH = 16

Norms = Mapping[str, Tensor]
"""By the layer's name: of each unit at each step [steps, units], float64 on the CPU."""


def pruned_increments(
    model: StableDiffusion,
    studies: Sequence[Study],
    settings: Settings,
    images: Tensor | None = None,
    progress: Progress = SILENT,
) -> list[ComputedIncrement]:
    """A mask for each study, of a model with a UNet."""
    announce(expected_seconds(model, len(studies), settings), model, progress)
    progress.say(
        "what a mask does to other prompts does not show in the text: sepme evaluate measures it "
        "on images"
    )
    return [_increment(model, study, settings, progress) for study in studies]


def expected_seconds(model: StableDiffusion, concepts: int, settings: Settings) -> float:
    """How long it is likely to take, from one pass through the UNet."""
    passes = 4 * settings.pictures * first_steps(settings)
    return concepts * passes * seconds_of_a_pass(model)


def first_steps(settings: Settings) -> int:
    """How many steps of sampling are looked at."""
    return max(1, round(settings.pruned_steps * settings.sampling_steps))


def share_of(kind: AsKind, settings: Settings) -> float:
    """Of a row's weights, how many may become zero at each step."""
    return settings.pruned_share or (_STYLES if kind == "style" else _OTHERS)


def _increment(
    model: StableDiffusion, study: Study, settings: Settings, progress: Progress
) -> ComputedIncrement:
    started = time.monotonic()
    concept = study.concept
    share = share_of(concept.kind, settings)
    asked = _pairs(concept.phrases, settings.pictures)
    progress.stage(f"drawing {concept.name}", 2 * settings.pictures * first_steps(settings))
    norms = unit_norms(model, [one.text for one in asked], settings, progress)
    without = unit_norms(model, [one.without for one in asked], settings, progress)
    masks: dict[str, Flags] = {}
    for name in norms:
        layer = model.checkpoint.layer(name)
        assert layer is not None  # the network was made of it
        found = standing_out(
            to_torch(layer.read(), torch.float64), norms[name], without[name], share
        )
        if found.any():
            masks[name] = found.numpy()
    if not masks:
        raise RefusedError(
            f"nothing in the UNet is more active for {concept.name!r} than without it: use "
            "--method closed-form",
            expected="units that the concept makes more active",
            found="none",
        )
    # What is drawn in the concept's place is left to the UNet.
    own = {"like": None, "share": share} | {name: getattr(settings, name) for name in OF_PRUNING}
    increment = Increment(
        kind="mask",
        concept=concept.name,
        slug=study.slug,
        prompts=concept.prompts,
        method=Method(PRUNING, {**settings.recorded, **study.chosen, **own}),
        measured=Measurements(),
        rank=0,
        basis=np.zeros((0, study.shared.width), np.float32),
        exponents={},
        up={},
        masks={name: Masked(int(own.sum()), own.shape) for name, own in masks.items()},
        gaps={name: to_gaps(own) for name, own in masks.items()},
    )
    return ComputedIncrement(increment, None, time.monotonic() - started, None)


def _pairs(phrases: Sequence[Phrase], count: int) -> list[Phrase]:
    """So many of the phrases in turn: of those that say something without the concept too, if
    there are any."""
    beside = [phrase for phrase in phrases if phrase.without]
    return list(islice(cycle(beside or phrases), count))


@torch.no_grad()
def unit_norms(
    model: StableDiffusion, prompts: Sequence[str], settings: Settings, progress: Progress = SILENT
) -> Norms:
    """The norms of all units over the first steps of drawing an image of each prompt.

    The inputs are normalised at every place of an image, so that none counts for more than another.
    Guidance's pass without a prompt counts as much as that with it.
    """
    count = first_steps(settings)
    context, blank = model.text.condition(prompts), model.text.condition([""])
    seeds = range(settings.seed, settings.seed + len(prompts))
    noise = initial_noise(model.latent_shape(), seeds)
    with _watched(model.denoiser.network, count) as seen:
        for part in torch.arange(len(prompts)).split(model.machine.at_once(_BATCH)):
            trajectory = model.schedule.trajectory(settings.sampling_steps, noise.shape)
            asked: Conditioning = model.machine.put(context[part])
            nothing: Conditioning = model.machine.put(blank)
            x = model.machine.put(noise[part])
            for seen.step, t in enumerate(trajectory.times[:count]):
                guided = model.denoiser.guided(x, t, asked, nothing, settings.guidance)
                x = trajectory.step(guided, t, x)
                progress.advance(len(part))
    return {name: found.sqrt() for name, found in seen.squares.items()}


@dataclass
class _Seen:
    """squares: sums of the units' squares so far, by the layer's name [steps, units].
    step: which one it is.
    """

    squares: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0

    def adder(self, layer: str) -> Any:
        """A hook of the layer that adds up what it is given."""

        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = nn.functional.normalize(inputs[0].float().flatten(0, -2), dim=-1)
            self.squares[layer][self.step] += rows.square().sum(0).cpu().double()

        return add


@contextmanager
def _watched(network: nn.Module, steps: int) -> Iterator[_Seen]:
    """What the units of a network do while it is used."""
    seen = _Seen()
    with ExitStack() as stack:
        for name, module in network.named_modules():
            if name.endswith(f".{_SUMMED}") and isinstance(module, nn.Linear):
                layer = f"{name}.weight"
                seen.squares[layer] = torch.zeros(steps, module.in_features, dtype=torch.float64)
                stack.callback(module.register_forward_pre_hook(seen.adder(layer)).remove)
        yield seen


def standing_out(weight: Tensor, norms: Tensor, without: Tensor, share: float) -> Tensor:
    """The weights [out, units] that become zero, true or false.

    At any step, those among the highest scores |W| * norm of their row, as many as the share says
    and at least one, that score lower without the concept. norms, without: [steps, units].
    """
    size = weight.abs()
    most = max(1, round(share * weight.shape[1]))
    found = torch.zeros(weight.shape, dtype=torch.bool)
    for step in range(len(norms)):
        scores = size * norms[step]
        highest = torch.zeros_like(found).scatter_(1, scores.topk(most, dim=1).indices, value=True)
        found |= highest & (scores > size * without[step])
    return found

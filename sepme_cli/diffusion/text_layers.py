"""Increments of the text encoder: prompts of a concept are read as those of its anchor.

The first layer of each text encoder of CLIP's kind learns, by factors of low rank, to have the
last one give a concept's tokens the states that its anchor's have, while everything else that was
written down keeps its own (after HiRM, Lee et al. 2026, arXiv 2602.19631, which trains the same
layer, but all of it, and towards a random direction). Distances are those of keys and values: what
no layer of the denoiser reads costs nothing. No image is generated.
"""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from patch_spec.grid import to_grid
from patch_spec.increment import Increment
from patch_spec.provenance import Measurements, Method
from patch_spec.streams import Stream
from sepme_cli.diffusion.conditioning import Conditioning
from sepme_cli.diffusion.eraser import ComputedIncrement, recorded
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.study import Study
from sepme_cli.diffusion.text_encoder import TextEncoder
from sepme_cli.diffusion.tokenizer import END
from sepme_cli.diffusion.weights import added_products
from sepme_cli.erasure.collateral import Collateral
from sepme_cli.erasure.concept import answering
from sepme_cli.erasure.increment import BLANK, additive_factors
from sepme_cli.erasure.methods import TEXT
from sepme_cli.erasure.settings import Settings
from sepme_cli.progress import SILENT, Progress

_LAYER = "encoder.layers.0"
_MODULES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",
    "mlp.fc1", "mlp.fc2",
)  # fmt: skip
_STEPS = 100
_RATE = 3e-3
_CONCEPT, _NAMED, _CAPTIONS = 16, 16, 32
"""Prompts of a step: of the concept, of what is named or near it, and ordinary captions."""
_PADDING = 4
"""Places behind the longest text; paddings hardly differ."""
_BATCH = 100


@dataclass(frozen=True)
class Factors:
    """dW = up @ down of one layer, being learned: up [out, r], down [r, in]."""

    up: Tensor
    down: Tensor


Learned = Mapping[str, Mapping[str, Factors]]
"""By text encoder, and by module of its first layer."""


@dataclass(frozen=True)
class Reader:
    """Prompts as token ids, cut behind the longest, and what the text encoders make of them.

    grams: how the denoiser sees what they make, the sums of W^T W over the layers that read the
    rows [d, d], and of those that read the pooled output [p, p], if it has any.
    """

    model: StableDiffusion
    grams: Mapping[Stream, Tensor]
    length: int

    def ids(self, prompts: Sequence[str]) -> Tensor:
        """[n, length]; of CLIP's text encoders all have the same."""
        return self.model.text.clips[0].tokens(prompts)[:, : self.length]

    def read(self, ids: Tensor) -> Conditioning:
        """What the denoiser reads of them, in fp32, differentiable in the factors."""
        return self.model.text.condition_tokens(ids)

    @torch.no_grad()
    def read_all(self, ids: Tensor) -> Conditioning:
        """The same of many."""
        return Conditioning.cat([self.read(part) for part in ids.split(_BATCH)])

    def squared(self, change: Conditioning) -> Tensor:
        """|W x|^2 over all layers, of each of n prompts [n]."""
        found = self._squared(change.states, "tokens")
        if change.pooled is not None and "pooled" in self.grams:
            found = found + self._squared(change.pooled[:, None], "pooled")
        return found

    def _squared(self, rows: Tensor, stream: Stream) -> Tensor:
        return ((rows @ self.grams[stream]) * rows).sum((1, 2))


def text_encoder_increments(
    model: StableDiffusion,
    studies: Sequence[Study],
    settings: Settings,
    images: Tensor | None = None,
    progress: Progress = SILENT,
) -> list[ComputedIncrement]:
    """An increment of the first layer of each text encoder for each study; of a model that reads
    prompts with CLIP alone."""
    progress.stage("teaching the text encoder", len(studies) * _STEPS)
    return [_increment(model, study, settings, progress) for study in studies]


def _increment(
    model: StableDiffusion, study: Study, settings: Settings, progress: Progress
) -> ComputedIncrement:
    started = time.monotonic()
    concept, shared = study.concept, study.shared
    grams = {name: one.shared.gram.float() for name, one in study.streams.items()}
    texts = (*concept.prompts, *concept.answers, *shared.protected)
    clip = model.text.clips[0]
    ends = (clip.tokens(texts) == END).int().argmax(1)
    reader = Reader(model, grams, min(clip.positions, int(ends.max()) + 1 + _PADDING))
    others = [p for p in shared.probes.prompts if p not in set(concept.prompts)]
    named = reader.ids([*others, *shared.protected])
    captions = reader.ids(_captions(study))
    learned = _started(model.text.clips, settings.rank, settings.seed)
    _learn(reader, learned, study, (named, captions), settings, progress)
    with torch.no_grad(), added(model.text.clips, learned):
        collateral = _collateral(model, study, grams["tokens"])
    up, down, exponents = _written(learned)
    own = {"protection": settings.protection, "steps": _STEPS}
    increment = Increment(
        kind="lora",
        concept=concept.name,
        slug=study.slug,
        prompts=concept.prompts,
        method=Method(TEXT, {**settings.recorded, **study.chosen, **own}),
        measured=Measurements(steps=_STEPS, collateral=recorded(collateral)),
        rank=settings.rank,
        basis=np.zeros((0, 0), np.float32),
        exponents=exponents,
        up=up,
        down=down,
    )
    return ComputedIncrement(increment, concept.like, time.monotonic() - started, collateral)


def _started(clips: Sequence[TextEncoder], rank: int, seed: int) -> Learned:
    """Factors that do nothing yet."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, dict[str, Factors]] = {}
    for clip in clips:
        layer = clip.model.get_submodule(_LAYER)
        found[clip.spec.name] = {}
        for name in _MODULES:
            module = layer.get_submodule(name)
            assert isinstance(module, nn.Linear)
            size = (rank, module.in_features)
            down = torch.randn(size, generator=generator) / math.sqrt(module.in_features)
            up = torch.zeros(module.out_features, rank)
            factors = (part.to(clip.device).requires_grad_() for part in (up, down))
            found[clip.spec.name][name] = Factors(*factors)
    return found


def added(clips: Sequence[TextEncoder], learned: Learned) -> AbstractContextManager[None]:
    """The text encoders with the factors' products added, differentiable in the factors."""
    return added_products(
        (clip.model.get_submodule(f"{_LAYER}.{name}"), factors.down, factors.up)
        for clip in clips
        for name, factors in learned[clip.spec.name].items()
    )


def _learn(
    reader: Reader,
    learned: Learned,
    study: Study,
    kept: tuple[Tensor, Tensor],
    settings: Settings,
    progress: Progress,
) -> None:
    """Optimise the factors.

    The loss is the mean of what is left of the concept's way to its anchor, and `protection` times
    the mean change of what must stay, each as a share of what it is. kept: token ids of what is
    named, and of ordinary captions.
    """
    ids, answers = reader.ids(study.concept.prompts), reader.ids(study.concept.answers)
    there = reader.read_all(answers)
    wanted = replace(there, states=answering(ids, answers, there.states.cpu()).to(there.states))
    way = reader.squared(_less(reader.read_all(ids), wanted)).mean()
    named, captions = kept
    stay = torch.cat([named, captions])
    before = reader.read_all(stay)
    size = reader.squared(before).mean()
    parameters = [
        part for layers in learned.values() for f in layers.values() for part in (f.up, f.down)
    ]
    optimiser = torch.optim.Adam(parameters, lr=_RATE)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _STEPS)
    generator = torch.Generator().manual_seed(settings.seed)

    def drawn(count: int, of: int) -> Tensor:
        return torch.randint(of, (count,), generator=generator)

    for _ in range(_STEPS):
        mine = drawn(_CONCEPT, len(ids))
        theirs = torch.cat(
            [drawn(_NAMED, len(named)), len(named) + drawn(_CAPTIONS, len(captions))]
        )
        with torch.enable_grad(), added(reader.model.text.clips, learned):
            read = reader.read(torch.cat([ids[mine], stay[theirs]]))
            left = _less(read[torch.arange(_CONCEPT)], wanted[mine])
            moved = _less(read[torch.arange(_CONCEPT, len(read))], before[theirs])
            loss = reader.squared(left).mean() / way
            loss = loss + settings.protection * reader.squared(moved).mean() / size
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
        rates.step()
        progress.advance()


def _less(one: Conditioning, other: Conditioning) -> Conditioning:
    pooled = None
    if one.pooled is not None and other.pooled is not None:
        pooled = one.pooled - other.pooled
    return Conditioning(one.states - other.states, pooled)


def _captions(study: Study) -> list[str]:
    """Ordinary captions that do not name the concept; the blank without a background."""
    held_out = study.shared.held_out
    found = [] if held_out is None else held_out.background.protected
    return [text for text in found if not study.concept.asked_for_in(text)] or [BLANK]


def _collateral(model: StableDiffusion, study: Study, gram: Tensor) -> Collateral | None:
    """What the learned factors, added now, do to the held-out captions and words."""
    held_out = study.shared.held_out
    if held_out is None:
        return None
    background = held_out.background
    ends = model.text.ends((*background.captions, *background.words))
    return held_out.moved(ends, gram, study.concept.asked_for_in)


def _written(
    learned: Learned,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
    """The factors by layer as the format keeps them: up, down and exponents."""
    ups: dict[str, Tensor] = {}
    downs: dict[str, Any] = {}
    for encoder, layers in learned.items():
        for module, factors in layers.items():
            name = f"{encoder}.{_LAYER}.{module}.weight"
            # Rows of unit length fit the format's grid.
            q, r = torch.linalg.qr(factors.down.detach().cpu().double().T)
            downs[name] = to_grid(q.T.numpy())
            ups[name] = factors.up.detach().cpu().double() @ r.T
    up, exponents = additive_factors(ups)
    return up, downs, exponents

"""Looking at concepts on a loaded model, before any increment is made."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from types import MappingProxyType
from typing import cast

import numpy as np
import torch
from torch import Tensor

from patch_spec.increment import Increment
from patch_spec.streams import Stream, stream_of
from patch_spec.text import unique_slug
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.protection import Attempt, Strength, choose_protection
from sepme_cli.erasure.background import VERSION, Background
from sepme_cli.erasure.collateral import Collateral, HeldOut
from sepme_cli.erasure.concept import Concept, Lexicon, Protected, describe, endings
from sepme_cli.erasure.increment import (
    BLANK,
    GOOD_SEPARABILITY,
    LEAST_SEPARABILITY,
    Admissible,
    LeakageProbes,
    admissible,
)
from sepme_cli.erasure.settings import Settings
from sepme_cli.erasure.subspace import Preservation, energy
from sepme_cli.erasure.words import Item, same_name
from sepme_cli.errors import RefusedError, UnsupportedError

_NO_BACKGROUNDS: Mapping[Stream, Background] = MappingProxyType({})

_READ_BY: Mapping[Stream, str] = {
    "tokens": "the keys and values of the cross-attention",
    "pooled": "the weights that read the pooled text (--streams tokens leaves them alone)",
}

_PROMPTS = 600
"""About how many prompts all concepts of a patch have together, so that a hundred concepts are
encoded in seconds; but each has some."""
_FEWEST = 6

_PROTECTED = 200
"""About how many prompts of neighbours and named words are protected, beside the background."""


@dataclass(frozen=True)
class Study:
    """A concept, and where what must stay leaves its increment room to act.

    stream: the one that it was studied on. collateral: what its closed form does to words that
    nobody named; None without a background. slug: what its increment is called in a patch. shared:
    what it has in common with the concepts that are erased beside it. beside: the same concept on
    another stream of the model, None where that is all.
    """

    concept: Concept
    stream: Stream
    space: Admissible
    collateral: Collateral | None
    slug: str
    shared: "SharedStudy" = field(repr=False)
    beside: "Study | None" = field(default=None, repr=False)

    @property
    def streams(self) -> "dict[Stream, Study]":
        """The concept on each stream."""
        more = {} if self.beside is None else self.beside.streams
        return {self.stream: self, **more}

    @property
    def worst(self) -> "Study":
        """The concept on the stream where most of what nobody named moves."""
        return max(self.streams.values(), key=lambda one: one.shared.strength.moves)

    @property
    def separability(self) -> float:
        """On the stream where it is least."""
        return min(one.space.separability for one in self.streams.values())

    @property
    def reachability(self) -> float | None:
        """On the stream where it is least; None where nothing was asked against attacks."""
        found = [one.space.reachability for one in self.streams.values()]
        return min((one for one in found if one is not None), default=None)

    def leakage(self, inner: Tensor) -> float:
        """On all that must stay but the concept's own prompts; see `LeakageProbes.leakage`."""
        own = frozenset(self.concept.prompts)
        return self.shared.probes.leakage(self.space.basis, inner, own)

    def measure(self, inner: Tensor) -> Collateral | None:
        """Of an increment dW = F @ basis; inner: the sum of F^T F over all layers, [r, r]."""
        held_out = self.shared.held_out
        if held_out is None:
            return None
        return held_out.collateral(self.space.basis, inner, self.concept.asked_for_in)

    @property
    def chosen(self) -> dict[str, int | float | str | None]:
        """What was not set but found: what the concept acts like, what kind it is, the price of
        protection, the sample of captions, and the dtype that the UNet computes in."""
        beside = {
            f"{stream}_protection": one.shared.strength.protection
            for stream, one in self.streams.items()
            if one is not self
        }
        return {
            **beside,
            "like": self.concept.like,
            "kind": self.concept.kind,
            "protection": self.shared.strength.protection,
            "captions": None if self.shared.held_out is None else VERSION,
            "dtype": self.shared.dtype,
        }

    @property
    def warning(self) -> str | None:
        """What a user should know before the work begins."""
        if self.separability >= GOOD_SEPARABILITY:
            return None
        most = self.separability < LEAST_SEPARABILITY
        return (
            f"{self.concept.name!r} is hard to separate from what is protected "
            f"(separability {self.separability:.2f} of 1): "
            f"{'most' if most else 'part'} of it may remain"
        )


@dataclass(frozen=True)
class SharedStudy:
    """What all concepts of a study have in common.

    separable: prompts outside of the patch that none of them changes. protected: prompts that they
    change little.
    gram: the sum of W^T W over all layers, [d, d]. probes: the blank, all concepts' prompts and
    those of concepts erased before. strength: the one that was chosen; tried: all that were looked
    at, the least protection first. held_out: None without a background. dtype: of the UNet.
    width: of the stream `tokens`, whatever was studied.
    """

    separable: tuple[str, ...]
    protected: tuple[str, ...]
    preservation: Preservation
    gram: Tensor
    probes: LeakageProbes
    strength: Strength
    tried: tuple[Strength, ...]
    held_out: HeldOut | None
    dtype: str
    width: int


def study(
    model: StableDiffusion,
    items: Sequence[Item],
    protected: Protected,
    known: Sequence[Sequence[str]],
    settings: Settings,
    backgrounds: Mapping[Stream, Background] = _NO_BACKGROUNDS,
    thorough: bool = False,
    streams: Sequence[Stream] | None = None,
) -> list[Study]:
    """Look at concepts together: each must leave the blank, the others and the known ones alone.

    known: the prompts of each concept that was erased before. backgrounds: by stream, what to
    protect beside all that is named, and to measure collateral on. thorough: look at every strength
    of protection, and not only at those up to the one that is chosen. streams: where to look; all
    that the model reads if None.
    Raises RefusedError for a concept that lies in what must stay.
    """
    _check_not_protected(items, protected)
    # What a concept comes to act like must not move itself.
    kept = protected.beside((item.like, item.kind) for item in items if item.like is not None)
    most = max(_FEWEST, _PROMPTS // max(1, len(items)))
    concepts = [describe(item, kept, most) for item in items]
    if settings.more_phrasings:
        both = zip(concepts, items, strict=True)
        concepts = [replace(concept, endings=endings(item)) for concept, item in both]
    told = kept, known, settings
    looked = [
        study_concepts(model, concepts, *told, stream, backgrounds.get(stream), thorough)
        for stream in streams or tuple(model.checkpoint.widths)
    ]
    studies = looked[-1]
    for found in reversed(looked[:-1]):
        studies = [replace(one, beside=b) for one, b in zip(found, studies, strict=True)]
    return studies


def study_concepts(
    model: StableDiffusion,
    concepts: Sequence[Concept],
    kept: Protected,
    known: Sequence[Sequence[str]],
    settings: Settings,
    stream: Stream = "tokens",
    background: Background | None = None,
    thorough: bool = False,
) -> list[Study]:
    """The same on one stream, for concepts that are described already."""
    encoders = model.text.on(stream)
    groups = [concept.prompts for concept in concepts] + [tuple(prompts) for prompts in known]
    apart = _all([BLANK], *groups)
    taken = frozenset(apart)
    told = kept.weighted_prompts(_PROTECTED)
    # Of what stays for one concept's sake, another may be erased.
    for text in _all(*(concept.kept for concept in concepts)):
        if not any(concept.asked_for_in(text) for concept in concepts):
            told.setdefault(text, 1.0)
    weights = {prompt: weight for prompt, weight in told.items() if prompt not in taken}
    dear = tuple(weights)
    others = (
        prompt
        for one in concepts
        for prompt in (*one.answers, *chain(*one.counterparts, *(e[:2] for e in one.endings)))
    )
    words = Lexicon(encoders, chain(apart, dear, others))
    pairs = [words.embedding_pairs(concept) for concept in concepts]
    moment = energy(words.rows(dear, tuple(weights.values())))
    if background is not None:
        moment += settings.background * background.moment
    gram = _gram(model, stream)
    held_out = None if background is None else HeldOut.of(background, gram)

    def attempt(protection: float) -> Attempt:
        preservation = Preservation.of(
            torch.cat([encoder.encode([BLANK])[0].cpu() for encoder in encoders]),
            [one.concept for one in pairs] + [words.rows(prompts) for prompts in known],
            moment,
            replace(settings, protection=protection),
        )
        spaces = [
            admissible(concept.name, one, preservation, settings, gram, alone=len(concepts) == 1)
            for concept, one in zip(concepts, pairs, strict=True)
        ]
        collateral = None if held_out is None else _collateral(spaces, concepts, held_out, gram)
        worst = min(space.separability for space in spaces)
        return Attempt(preservation, spaces, Strength(protection, worst, collateral))

    chosen, attempts = choose_protection(attempt, settings, thorough)
    shared = SharedStudy(
        separable=_all([BLANK], *known),
        protected=dear,
        preservation=chosen.preservation,
        gram=gram,
        probes=LeakageProbes.of(apart, words.states(apart), gram),
        strength=chosen.strength,
        tried=tuple(one.strength for one in attempts),
        held_out=held_out,
        width=model.checkpoint.width,
        dtype=model.machine.dtype_name,
    )
    return [
        Study(
            concept,
            stream,
            space,
            None if held_out is None else _collateral([space], [concept], held_out, gram),
            slug,
            shared,
        )
        for concept, space, slug in zip(concepts, chosen.spaces, _slugs(concepts), strict=True)
    ]


def _slugs(concepts: Sequence[Concept]) -> list[str]:
    taken: list[str] = []
    for concept in concepts:
        taken.append(unique_slug(concept.name, taken))
    return taken


def _collateral(
    spaces: Sequence[Admissible],
    concepts: Sequence[Concept],
    held_out: HeldOut,
    gram: Tensor,
) -> Collateral:
    """Of the closed forms of concepts together."""
    basis = torch.cat([space.basis for space in spaces])
    shift = torch.cat([space.shift for space in spaces], 1).float()

    def erased(text: str) -> bool:
        return any(concept.asked_for_in(text) for concept in concepts)

    return held_out.collateral(basis, shift.T @ gram @ shift, erased)


def leakages(
    model: StableDiffusion, increments: Sequence[Increment], outside: Sequence[str]
) -> list[float]:
    """The leakage of each increment of one patch, from its factors alone: on the stream where it is
    largest.

    outside: prompts that they all must leave alone, beside those of the other increments.
    """
    apart = _all(outside, *(part.prompts for part in increments))
    found = [0.0] * len(increments)
    for stream in model.checkpoint.widths:
        gram = _gram(model, stream)
        states = Lexicon(model.text.on(stream), apart).states(apart)
        probes = LeakageProbes.of(apart, states, gram)
        for i, part in enumerate(increments):
            if (acting := _acting(part, stream, gram)) is not None:
                own = frozenset(part.prompts)
                found[i] = max(found[i], probes.leakage(*acting, own))
    return found


def _acting(part: Increment, stream: Stream, gram: Tensor) -> tuple[Tensor, Tensor] | None:
    """What dW = F @ basis of all layers that read a stream have in common, [r, d], and the sum of
    F^T F over them, [r, r]; of a lora, whose layers have nothing in common, all directions. None
    where the increment leaves the stream alone. gram: of the layers' W.
    """
    found = part.on(stream)
    if found is not None and found.shift is not None:
        shift = torch.from_numpy(np.ldexp(found.shift, found.exponent))
        return torch.tensor(found.basis), shift.T @ gram @ shift
    up = {n: factor for n, factor in part.up.items() if stream_of(n) == stream}
    if not up:
        return None
    scaled = (np.ldexp(f.astype(np.float32), part.exponents[n]) for n, f in up.items())
    factors = map(torch.from_numpy, scaled)
    if found is not None:
        return torch.tensor(found.basis), layers_gram(factors)
    downs = (torch.tensor(part.down[name]) for name in up)
    changes = (factor @ down for factor, down in zip(factors, downs, strict=True))
    return torch.eye(len(gram)), layers_gram(changes)


def _all(*groups: Sequence[str]) -> tuple[str, ...]:
    """All prompts of some lists, each once."""
    return tuple(dict.fromkeys(chain.from_iterable(groups)))


def _gram(model: StableDiffusion, stream: Stream) -> Tensor:
    """`layers_gram` of what reads a stream; UnsupportedError where there is nothing that could be
    changed."""
    gram = layers_gram(weight for _, weight in model.denoiser.stored_weights(stream))
    if not gram.any():
        raise UnsupportedError(
            f"{model.checkpoint.path}: {_READ_BY[stream]} are all zero: "
            "prompts have no effect there, and there is nothing to erase",
            file=model.checkpoint.path,
            expected="weights that are not all zero",
            found="zeros only",
        )
    return gram


def layers_gram(weights: Iterable[Tensor]) -> Tensor:
    """The sum of W^T W [d, d] over weights [out, d]."""
    return cast(Tensor, sum(weight.T @ weight for weight in weights))


def _check_not_protected(items: Sequence[Item], protected: Protected) -> None:
    kept = {same_name(word) for word in (*protected.styles, *protected.objects)}
    erased = (name for item in items if item.erase_from is None for name in item.names)
    both = [name for name in erased if same_name(name) in kept]
    if both:
        raise RefusedError(
            f"{', '.join(map(repr, both))} cannot be erased and protected at once: nothing would "
            "be left to erase with",
            expected="concepts that are not protected",
            found=", ".join(both),
        )

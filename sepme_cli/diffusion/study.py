"""Looking at concepts on a loaded model, before any increment is made."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import cast

import numpy as np
import torch
from torch import Tensor

from patch_spec.manifest import Increment, slugify
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.erasure.concept import Concept, Lexicon, Protected, describe
from sepme_cli.erasure.increment import (
    BLANK,
    GOOD_SEPARABILITY,
    LEAST_SEPARABILITY,
    Admissible,
    Witnesses,
    admissible,
)
from sepme_cli.erasure.settings import Settings
from sepme_cli.erasure.subspace import Ground, Weighing
from sepme_cli.errors import RefusedError
from sepme_cli.recipe import Item

_PROMPTS = 600
"""About how many prompts all concepts of a patch have together, so that a hundred concepts are
encoded in seconds; but each has some."""
_FEWEST = 6


@dataclass(frozen=True)
class Study:
    """A concept, and where what must stay leaves its increment room to act.

    separable: prompts outside of the patch that it does not change. protected: prompts it changes
    little. like: the word it is to act like, None for nothing in its place. shared: what it has in
    common with the concepts that are erased beside it.
    """

    concept: Concept
    separable: tuple[str, ...]
    protected: tuple[str, ...]
    space: Admissible
    like: str | None
    shared: "Shared" = field(repr=False)

    def leakage(self, inner: Tensor) -> float:
        """On all that must stay but the concept's own prompts; see `Witnesses.leakage`."""
        own = frozenset(self.concept.prompts)
        return self.shared.witnesses.leakage(self.space.basis, inner, own)

    @property
    def warning(self) -> str | None:
        """What a user should know before the work begins."""
        if self.space.separability >= GOOD_SEPARABILITY:
            return None
        most = self.space.separability < LEAST_SEPARABILITY
        return (
            f"{self.concept.name!r} is hard to tell from what must stay (separability "
            f"{self.space.separability:.2f} of 1): {'most' if most else 'part'} of it may remain"
        )


@dataclass(frozen=True)
class Shared:
    """What all concepts of a study have in common.

    gram: the sum of W^T W over all layers, [d, d]. witnesses: the blank, all concepts' prompts and
    those of concepts erased before.
    """

    ground: Ground
    gram: Tensor
    witnesses: Witnesses


def study(
    model: StableDiffusion,
    items: Sequence[Item],
    protected: Protected,
    known: Sequence[Sequence[str]],
    settings: Settings,
) -> list[Study]:
    """Look at concepts together: each must leave the blank, the others and the known ones alone.

    known: the prompts of each concept that was erased before.
    Raises RefusedError for a concept that lies in what must stay.
    """
    _check_not_protected(items, protected)
    # What a concept comes to act like must not move itself.
    kept = protected.beside((item.like, item.kind) for item in items if item.like is not None)
    most = max(_FEWEST, _PROMPTS // max(1, len(items)))
    concepts = [describe(item, kept, most) for item in items]
    return study_concepts(model, concepts, kept, known, settings)


def study_concepts(
    model: StableDiffusion,
    concepts: Sequence[Concept],
    kept: Protected,
    known: Sequence[Sequence[str]],
    settings: Settings,
) -> list[Study]:
    """The same for concepts that are described already."""
    groups = [concept.prompts for concept in concepts] + [tuple(prompts) for prompts in known]
    apart = _all([BLANK], *groups)
    taken = frozenset(apart)
    dear = tuple(prompt for prompt in kept.prompts() if prompt not in taken)
    answers = (
        prompt for c in concepts for phrases in c.counterparts.values() for prompt in phrases
    )
    words = Lexicon(model, chain(apart, dear, answers))
    wanted = [words.wanted(concept) for concept in concepts]
    ground = Ground.of(
        model.encode([BLANK])[0].cpu(),
        [one.concept for one in wanted] + [words.rows(prompts) for prompts in known],
        words.rows(dear),
        Weighing(settings.insistence, settings.protection, settings.ridge),
    )
    gram = layers_gram(weight for _, weight in model.stored_weights())
    shared = Shared(ground, gram, Witnesses.of(apart, words.states(apart), gram))
    outside = _all([BLANK], *known)
    return [
        Study(
            concept,
            outside,
            dear,
            admissible(concept.name, one, ground, settings, alone=len(concepts) == 1),
            one.like,
            shared,
        )
        for concept, one in zip(concepts, wanted, strict=True)
    ]


def leakages(
    model: StableDiffusion, increments: Sequence[Increment], outside: Sequence[str]
) -> list[float]:
    """The leakage of each increment of one patch, from its factors alone.

    outside: prompts that they all must leave alone, beside those of the other increments.
    """
    apart = _all(outside, *(part.prompts for part in increments))
    gram = layers_gram(weight for _, weight in model.stored_weights())
    witnesses = Witnesses.of(apart, Lexicon(model, apart).states(apart), gram)
    return [witnesses.leakage(*_acting(part, gram), frozenset(part.prompts)) for part in increments]


def _acting(part: Increment, gram: Tensor) -> tuple[Tensor, Tensor]:
    """What all layers' dW = F @ basis have in common, [r, d], and the sum of F^T F over them,
    [r, r]; of a lora, whose layers have nothing in common, all directions. gram: of the layers' W.
    """
    basis = torch.tensor(part.basis)
    if part.shift is not None:
        shift = torch.from_numpy(np.ldexp(part.shift, part.shift_exponent))
        return basis, shift.T @ gram @ shift
    scaled = (np.ldexp(up.astype(np.float32), part.exponents[n]) for n, up in part.up.items())
    factors = map(torch.from_numpy, scaled)
    if part.kind != "lora":
        return basis, layers_gram(factors)
    downs = (torch.tensor(part.down[name]) for name in part.up)
    changes = (factor @ down for factor, down in zip(factors, downs, strict=True))
    return torch.eye(basis.shape[1]), layers_gram(changes)


def _all(*groups: Sequence[str]) -> tuple[str, ...]:
    """All prompts of some lists, each once."""
    return tuple(dict.fromkeys(chain.from_iterable(groups)))


def layers_gram(weights: Iterable[Tensor]) -> Tensor:
    """The sum of W^T W [d, d] over weights [out, d]."""
    return cast(Tensor, sum(weight.T @ weight for weight in weights))


def _check_not_protected(items: Sequence[Item], protected: Protected) -> None:
    kept = {slugify(word) for word in (*protected.styles, *protected.objects)}
    both = [name for item in items for name in item.names if slugify(name) in kept]
    if both:
        raise RefusedError(
            f"{', '.join(map(repr, both))} cannot be erased and protected at once: nothing would "
            "be left to erase with",
            expected="concepts that are not protected",
            found=", ".join(both),
        )

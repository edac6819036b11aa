"""A concept's increment, from its embeddings to what can be written down."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patch_spec.grid import split_shift, split_up, to_grid
from sepme_cli.erasure.closed_form import reduce, solve
from sepme_cli.erasure.concept import EmbeddingPairs
from sepme_cli.erasure.reachability import Grams, derived, reachability
from sepme_cli.erasure.settings import Settings
from sepme_cli.erasure.subspace import Preservation, energy
from sepme_cli.errors import RefusedError

#: The blank prompt, which every increment leaves exactly as it is.
BLANK = ""
#: Below this separability there is nothing left to erase with; see `Admissible.separability`.
LEAST_SEPARABILITY = 0.1
#: Protection costs no more than leaves a concept this separability.
USEFUL_SEPARABILITY = 0.25
#: Below this a user should know that part of the concept will stay.
GOOD_SEPARABILITY = 0.5


@dataclass(frozen=True)
class Admissible:
    """Where a concept's increment may act, and the closed form's answer there.

    shift [d, r], basis [r, d]: T = shift @ basis, float64, basis orthonormal and on the format's
    grid, scaled by `erase_scale`. cost [r, r]: what acting costs, seen in the basis. separability:
    the share of the way from the concept's embeddings to what they should act like that T covers
    before it is scaled, 0 to 1; it is low where the concept lies in what must stay. reachability:
    see `reachability`; None where nothing was asked against attacks.
    """

    shift: Tensor
    basis: Tensor
    cost: Tensor
    separability: float
    reachability: float | None = None


def admissible(
    name: str,
    pairs: EmbeddingPairs,
    preservation: Preservation,
    settings: Settings,
    gram: Tensor,
    *,
    alone: bool,
) -> Admissible:
    """Solve for a concept on the directions that it may use.

    preservation: of this concept and the others. gram: the sum of W^T W over all layers, [d, d].
    alone: no other is erased beside it.
    Raises RefusedError where the concept lies in what must stay: nothing is left to erase with.
    Among others that is no reason to erase none of them; its separability tells.
    """
    concept, anchor = pairs.concept, pairs.anchor
    if not len(preservation.null) or not len(concept):
        raise _nothing_left(name, 0.0)
    left, right = solve(concept, anchor, preservation, settings.insistence)
    shift, basis = _reduced(name, left, right, concept, settings)
    asked, answers = concept, anchor
    for _ in range(settings.derived_rounds):
        # Of this concept's own increment: what the others do to it, no prompt is to undo.
        scaled = Grams.of_operator(gram, settings.erase_scale * shift, basis)
        asked, answers = torch.cat([asked, derived(concept, scaled)]), torch.cat([answers, anchor])
        left, right = solve(asked, answers, preservation, settings.insistence, len(concept))
        shift, basis = _reduced(name, left, right, asked, settings)
    seen = concept @ basis.T
    way = anchor - concept
    missed = float((seen @ shift.T - way).pow(2).sum())
    separability = 1 - missed / float(way.pow(2).sum().clamp(min=1e-30))
    if separability < LEAST_SEPARABILITY and alone:
        raise _nothing_left(name, separability)
    shift = settings.erase_scale * shift
    cost = basis @ preservation.cost @ basis.T - settings.insistence * energy(seen)
    reached = None
    if settings.robust != "none":
        reached = reachability(concept, anchor, Grams.of_operator(gram, shift, basis))
    return Admissible(shift, basis, cost, separability, reached)


def _reduced(
    name: str, left: Tensor, right: Tensor, rows: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """`reduce`, with the basis on the format's grid; RefusedError where nothing is left."""
    shift, basis = reduce(left, right, rows, settings.rank)
    if not len(basis):
        raise _nothing_left(name, 0.0)
    return shift, torch.from_numpy(to_grid(basis.numpy()).astype(np.float64))


@dataclass(frozen=True)
class LeakageProbes:
    """Prompts that leakage is measured on, and how large their keys and values are.

    states: [prompts, positions, d], float32. sizes: |W e^T|^2 of each prompt over all layers,
    Frobenius over its tokens.
    """

    prompts: tuple[str, ...]
    states: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, prompts: Sequence[str], states: Tensor, gram: Tensor) -> "LeakageProbes":
        """gram: sum of W^T W over all layers, [d, d]."""
        states = states.float()
        sizes = torch.stack([((one @ gram.float()) * one).sum() for one in states])
        return cls(tuple(prompts), states, sizes)

    def leakage(self, basis: Tensor, inner: Tensor, but: Collection[str] = ()) -> float:
        """The largest relative change of any prompt's keys and values, over all layers together.

        An increment's dW = F @ basis, with basis [r, d]; inner: the sum of F^T F over all layers,
        [r, r]. but: prompts to leave out. max over prompts of |dW e^T| / |W e^T|.
        """
        seen = self.states @ basis.float().T
        changes = ((seen @ inner.float()) * seen).sum((1, 2))
        kept = torch.tensor([prompt not in but for prompt in self.prompts])
        found = (changes.clamp(min=0) / self.sizes)[kept]
        return float(found.max().sqrt()) if len(found) else 0.0


def additive_factors(
    up: Mapping[str, Tensor],
) -> tuple[dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float16]]], dict[str, int]]:
    """up: layer -> [out, r], as the format keeps it: (fp16 within [-1, 1], exponents)."""
    split = {name: split_up(factor.double().cpu().numpy()) for name, factor in up.items()}
    return {n: f for n, (f, _) in split.items()}, {n: e for n, (_, e) in split.items()}


def operator_factors(
    shift: Tensor,
) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.float32]], int]:
    """shift [d, r] as the format keeps it: (on the grid, exponent)."""
    return split_shift(shift.numpy())


def _nothing_left(name: str, separability: float) -> RefusedError:
    return RefusedError(
        f"{name!r} cannot be separated from what is protected: nothing is left to erase "
        "it with. Protect fewer words, or look for the concept's own name among them.",
        expected=f"separability of at least {LEAST_SEPARABILITY}",
        found=f"{separability:.3f}",
    )

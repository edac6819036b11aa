"""A concept's increment, from its embeddings to what can be written down."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patch_spec.grid import split_shift, split_up, to_grid
from sepme_cli.erasure.closed_form import reduce, solve
from sepme_cli.erasure.concept import Concept, TextEncoder, concept_rows, rows
from sepme_cli.erasure.settings import Settings
from sepme_cli.erasure.subspace import Weighing, metric
from sepme_cli.errors import RefusedError

#: The blank prompt, which every increment leaves exactly as it is.
BLANK = ""
#: Below this separability there is nothing left to erase with; see `Admissible.separability`.
LEAST_SEPARABILITY = 0.1
#: Below this a user should know that part of the concept will stay.
GOOD_SEPARABILITY = 0.5


@dataclass(frozen=True)
class Admissible:
    """Where a concept's increment may act, and the closed form's answer there.

    shift [d, r], basis [r, d]: T = shift @ basis, float64, basis orthonormal and on the format's
    grid. cost [r, r]: the metric in the basis. separability: the share of the way from the
    concept's embeddings to what they should act like that T covers, 0 to 1; it is low where the
    concept lies in what must stay. free: dimensions that no separable prompt takes.
    """

    shift: Tensor
    basis: Tensor
    cost: Tensor
    separability: float
    free: int


def admissible(
    encoder: TextEncoder,
    concept: Concept,
    separable: Sequence[str],
    protected: Sequence[str],
    settings: Settings,
) -> Admissible:
    """Solve for the concept on the directions that it may use.

    separable: prompts it must not change, beside the blank; protected: prompts it should change
    little.
    Raises RefusedError where the concept lies in what must stay: nothing is left to erase with.
    """
    concept_states, instead = concept_rows(encoder, concept)
    weighing = Weighing(
        settings.tolerance, settings.insistence, settings.protection, settings.ridge
    )
    cost = metric(
        concept_states,
        rows(encoder, [BLANK]),
        rows(encoder, [prompt for prompt in separable if prompt != BLANK]),
        rows(encoder, protected),
        weighing,
    )
    if not len(cost.null):
        raise _nothing_left(concept, 0.0)
    shift, basis = reduce(solve(concept_states, instead, cost), concept_states, settings.rank)
    if not len(basis):
        raise _nothing_left(concept, 0.0)
    basis = torch.from_numpy(to_grid(basis.numpy()).astype(np.float64))
    moved = concept_states @ basis.T @ shift.T
    wanted = instead - concept_states
    separability = 1 - float((moved - wanted).pow(2).sum() / wanted.pow(2).sum().clamp(min=1e-30))
    if separability < LEAST_SEPARABILITY:
        raise _nothing_left(concept, separability)
    return Admissible(shift, basis, cost.of(basis), separability, len(cost.null))


def leakage(
    encoder: TextEncoder, prompts: Sequence[str], layers: Iterable[tuple[Tensor, Tensor]]
) -> float:
    """The largest relative change of any prompt's keys and values, over all layers together.

    layers: W and dW [out, d] of each, looked at one at a time. max over prompts of
    |dW e^T| / |W e^T|, Frobenius over the prompt's tokens.
    """
    states = encoder.encode(prompts).double().cpu()
    whole = changed = torch.zeros(2 * [states.shape[-1]], dtype=torch.float64)
    for weight, change in layers:
        whole = whole + weight.double().cpu().T @ weight.double().cpu()
        changed = changed + change.double().cpu().T @ change.double().cpu()
    changes, sizes = (
        torch.einsum("ptd,de,pte->p", states, gram, states) for gram in (changed, whole)
    )
    return float((changes.clamp(min=0) / sizes).sqrt().max())


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


def _nothing_left(concept: Concept, separability: float) -> RefusedError:
    return RefusedError(
        f"{concept.name!r} lies in what must stay as it is: nothing is left to erase it with. "
        "Protect fewer words, or look for the concept's own name among them.",
        expected=f"separability of at least {LEAST_SEPARABILITY}",
        found=f"{separability:.3f}",
    )

"""Changes of weights, from wherever they come, as the factors of an increment.

One basis for all targets is tried first, which is what an edit in the text embedding's space
leaves; then, where the base's weights are known, one operator for all of them, which is smaller
still; and in the end a basis for each target, which anything of low rank can be brought into.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from patch_spec import limits
from patch_spec.grid import (
    Float16,
    Float32,
    Float64,
    additive_delta,
    operator_delta,
    split_shift,
    split_up,
    to_grid,
)
from patch_spec.increment import Kind
from patch_spec.streams import stream_of
from sepme_cli.errors import MalformedError, RefusedError
from sepme_cli.progress import Progress

Pair = tuple[Float64, Float64]

_ROUNDING = 2.0**-10
"""What fp16 factors lose at most, relative."""
_LARGEST = 2.0**32
"""|dW| beyond which nothing is a weight any more, and squares of squares would overflow."""
_MANY = 16
"""From more shared rows on it may take less to give each target its own."""


@dataclass(frozen=True)
class Change:
    """What is to become of a target's weight.

    read: dW [out, d]. weight: the base's W, where an operator may stand for the changes. noise:
    |dW| that rounding alone makes, which no factor need follow. pair: up [out, n] and down [n, d],
    whose product dW is, where it is one; it takes less time and memory.
    """

    target: str
    read: Callable[[], Float64] = field(repr=False)
    weight: Callable[[], npt.NDArray[Any]] | None = field(default=None, repr=False)
    noise: float = 0.0
    pair: Callable[[], Pair | None] = field(default=lambda: None, repr=False)

    def found(self) -> "Float64 | Product":
        """dW, not multiplied out where that can be had."""
        pair = self.pair()
        return self.read() if pair is None else Product(*pair)


@dataclass(frozen=True)
class Product:
    """up @ down, not multiplied out."""

    up: Float64
    down: Float64

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.up), self.down.shape[1]

    @property
    def norm(self) -> float:
        return _norm_of_product(self.up, self.down)

    def times(self, rows: Float64) -> Float64:
        """dW rows^T [out, r], for rows [r, d]."""
        seen: Float64 = self.up @ (self.down @ rows.T)
        return seen


@dataclass(frozen=True)
class Fit:
    """The factors of an increment, as `Increment` has them.

    residuals: by target, |dW - what the factors give| / |dW|, Frobenius, in the format's own
    arithmetic. relative_error: the same over all targets together.
    """

    kind: Kind
    rank: int
    basis: Float32
    residuals: Mapping[str, float]
    relative_error: float
    up: Mapping[str, Float16] = field(default_factory=dict, repr=False)
    exponents: Mapping[str, int] = field(default_factory=dict, repr=False)
    down: Mapping[str, Float32] = field(default_factory=dict, repr=False)
    shift: Float32 | None = field(default=None, repr=False)
    shift_exponent: int = 0


@dataclass(frozen=True)
class _NonzeroChanges:
    """Changes other than zero. norms: |dW|, and allowed: the residual that may be left of it."""

    changes: tuple[Change, ...]
    norms: Mapping[str, float]
    allowed: Mapping[str, float]

    def fits(self, residuals: Mapping[str, float]) -> bool:
        return all(residual <= self.allowed[target] for target, residual in residuals.items())

    def total(self, residuals: Mapping[str, float]) -> float:
        errors = sum((residual * self.norms[name]) ** 2 for name, residual in residuals.items())
        return math.sqrt(errors / sum(norm**2 for norm in self.norms.values()))


def fit(
    changes: Sequence[Change], *, rank: int | None, error: float, progress: Progress
) -> Fit | None:
    """The smallest factors that leave of no change more than `error`, relative; None where
    nothing changes.

    Where anything but what reads the rows of a prompt changes, each target has its own. rank: take
    this one, and whatever it leaves. One target is in memory at a time.
    Raises RefusedError where no rank that a patch can have is near enough.
    """
    shared = all(stream_of(change.target) == "tokens" for change in changes)
    nonzero, gram = _look(changes, error, progress, shared=shared)
    if not nonzero.changes:
        return None
    if not shared:
        if any(stream_of(change.target) != "tokens" for change in nonzero.changes):
            return _own_bases(nonzero, rank, progress)
        rows = [change for change in changes if stream_of(change.target) == "tokens"]
        return fit(rows, rank=rank, error=error, progress=progress)
    common = np.linalg.eigh(gram)[1][:, ::-1].T[: rank or limits.RANK]
    count = _least_rank(nonzero, common, progress)
    if count is None:
        return _own_bases(nonzero, rank, progress)
    basis = to_grid(common[: rank or count])
    found, sums = _shared(nonzero, basis, progress)
    # An operator leaves no target alone.
    if nonzero.changes[0].weight is not None and len(nonzero.changes) == len(changes):
        operator = _operator(nonzero, basis, *sums, progress)
        if nonzero.fits(operator.residuals):
            return operator
    if rank is None and count > _MANY:
        return min(found, _own_bases(nonzero, None, progress), key=_size)
    return found


def _look(
    changes: Sequence[Change], error: float, progress: Progress, *, shared: bool
) -> tuple[_NonzeroChanges, Float64]:
    """Which changes there are; if all have one width, the sum over them of dW^T dW [d, d], each by
    |dW|^2, so that every target counts alike."""
    progress.stage("comparing the weights", len(changes))
    kept, norms, allowed = [], {}, {}
    gram: Float64 = np.zeros(())
    for change in changes:
        delta = change.read() if shared else change.found()
        norm = _norm(delta)
        if not norm <= _LARGEST:
            raise MalformedError(
                f"the change of {change.target} is not finite, or larger than any weight",
                expected=f"a norm of at most {_LARGEST:g}",
                found=norm,
            )
        if norm > 0:
            kept.append(change)
            norms[change.target] = norm
            allowed[change.target] = max(error, change.noise / norm)
            if not isinstance(delta, Product) and shared:
                gram = gram + (delta.T @ delta) / norm**2
        progress.advance()
    return _NonzeroChanges(tuple(kept), norms, allowed), gram


def _least_rank(nonzero: _NonzeroChanges, rows: Float64, progress: Progress) -> int | None:
    """How many of the rows leave of every change no more than is allowed."""
    progress.stage("looking for a common basis", len(nonzero.changes))
    least = 1
    for change in nonzero.changes:
        # The format's own rounding takes some of the room, too.
        room = max(0.0, nonzero.allowed[change.target] ** 2 - _ROUNDING**2)
        needed = _needed(change.read() @ rows.T, nonzero.norms[change.target], room)
        if needed is None:
            return None
        least = max(least, needed)
        progress.advance()
    return least


def _needed(seen: Float64, norm: float, room: float) -> int | None:
    """How many columns hold all of a norm but the share `room` of its square."""
    left = 1 - np.cumsum(np.square(seen).sum(axis=0)) / norm**2
    enough = np.flatnonzero(left <= room)
    return int(enough[0]) + 1 if len(enough) else None


def _shared(
    nonzero: _NonzeroChanges, basis: Float32, progress: Progress
) -> tuple[Fit, tuple[Float64, Float64]]:
    """The additive increment on a basis; and the sums of W^T W [d, d] and W^T dW basis^T [d, r],
    each by |dW|^2."""
    progress.stage("fitting", len(nonzero.changes))
    ups: dict[str, tuple[Float16, int]] = {}
    width = basis.shape[1]
    residuals, inner, cross = {}, np.zeros((width, width)), np.zeros(basis.T.shape)
    for change in nonzero.changes:
        delta, norm = change.read(), nonzero.norms[change.target]
        factor = _solved(delta, basis)
        ups[change.target] = split_up(factor)
        error = additive_delta(*ups[change.target], basis) - delta
        residuals[change.target] = float(np.linalg.norm(error)) / norm
        if change.weight is not None:
            weight = change.weight().astype(np.float64) / norm
            inner += weight.T @ weight
            cross += weight.T @ (factor / norm)
        progress.advance()
    found = Fit(
        "additive",
        len(basis),
        basis,
        residuals,
        nonzero.total(residuals),
        up={name: up for name, (up, _) in ups.items()},
        exponents={name: exponent for name, (_, exponent) in ups.items()},
    )
    return found, (inner, cross)


def _operator(
    nonzero: _NonzeroChanges, basis: Float32, inner: Float64, cross: Float64, progress: Progress
) -> Fit:
    """The operator shift @ basis [d, d] with the least sum of |W shift basis - dW|^2.

    inner: the sum of W^T W, cross: of W^T dW basis^T.
    """
    progress.stage("trying one operator for all", len(nonzero.changes))
    rounded, exponent = split_shift(np.linalg.lstsq(inner, cross)[0])
    residuals = {}
    for change in nonzero.changes:
        weight = cast(Callable[[], npt.NDArray[Any]], change.weight)()
        error = operator_delta(weight, rounded, exponent, basis) - change.read()
        residuals[change.target] = float(np.linalg.norm(error)) / nonzero.norms[change.target]
        progress.advance()
    return Fit(
        "operator",
        len(basis),
        basis,
        residuals,
        nonzero.total(residuals),
        shift=rounded,
        shift_exponent=exponent,
    )


def _own_bases(nonzero: _NonzeroChanges, rank: int | None, progress: Progress) -> Fit:
    """The increment in which each target has the basis that is best for it."""
    progress.stage("factorising", len(nonzero.changes))
    rows, least, unfit = {}, 1, {}
    for change in nonzero.changes:
        delta, target = change.found(), change.target
        rows[target] = _leading_rows(delta, rank or limits.RANK)
        room = max(0.0, nonzero.allowed[target] ** 2 - _ROUNDING**2)
        seen = _times(delta, rows[target])
        needed = _needed(seen, nonzero.norms[target], room)
        if needed is None:
            left = 1 - float(np.square(seen).sum()) / nonzero.norms[target] ** 2
            unfit[target] = math.sqrt(max(0.0, left))
        least = max(least, needed or 0)
        progress.advance()
    if unfit and rank is None:
        raise _too_many_directions(unfit, nonzero)
    return _with_bases(nonzero, rows, rank or least, progress)


def _with_bases(
    nonzero: _NonzeroChanges, rows: Mapping[str, Float64], rank: int, progress: Progress
) -> Fit:
    progress.stage("fitting", len(nonzero.changes))
    up, exponents, down, residuals = {}, {}, {}, {}
    for change in nonzero.changes:
        delta, target = change.found(), change.target
        own = np.zeros((rank, delta.shape[1]))
        own[: len(rows[target])] = rows[target][:rank]
        down[target] = to_grid(own)
        up[target], exponents[target] = split_up(_times(delta, down[target].astype(np.float64)))
        left = _left(delta, up[target], exponents[target], down[target])
        residuals[target] = left / nonzero.norms[target]
        progress.advance()
    return Fit(
        "lora",
        rank,
        np.zeros((0, 0), np.float32),
        residuals,
        nonzero.total(residuals),
        up=up,
        exponents=exponents,
        down=down,
    )


def _size(fit: Fit) -> int:
    """The bytes of the factors."""
    arrays: list[npt.NDArray[Any]] = [fit.basis, *fit.up.values(), *fit.down.values()]
    return sum(array.nbytes for array in arrays)


def _solved(delta: Float64, basis: Float32) -> Float64:
    """The factor [out, r] that comes nearest: basis is all but orthonormal, some rows may be 0."""
    factor: Float64 = delta @ basis.astype(np.float64).T
    return factor


def _norm(delta: Float64 | Product) -> float:
    return delta.norm if isinstance(delta, Product) else float(np.linalg.norm(delta))


def _norm_of_product(up: Float64, down: Float64) -> float:
    """|up @ down|, Frobenius; through triangles, so that what nearly cancels is right."""
    return float(np.linalg.norm(np.linalg.qr(up).R @ np.linalg.qr(down.T).R.T))


def _times(delta: Float64 | Product, rows: Float64) -> Float64:
    """dW rows^T [out, r], which of all but orthonormal rows is the factor that comes nearest."""
    if isinstance(delta, Product):
        return delta.times(rows)
    seen: Float64 = delta @ rows.T
    return seen


def _left(delta: Float64 | Product, up: Float16, exponent: int, down: Float32) -> float:
    """|up down 2^exponent - dW|, Frobenius."""
    if not isinstance(delta, Product):
        return float(np.linalg.norm(additive_delta(up, exponent, down) - delta))
    left = np.hstack([np.ldexp(up.astype(np.float64), exponent), -delta.up])
    return _norm_of_product(left, np.vstack([down.astype(np.float64), delta.down]))


def _leading_rows(delta: Float64 | Product, count: int) -> Float64:
    """The right singular vectors [r, d] of the largest singular values, through the smaller Gram
    matrix; those of nothing are left out."""
    if isinstance(delta, Product):
        right = np.linalg.qr(delta.down.T)
        inner = np.linalg.svd(np.linalg.qr(delta.up).R @ right.R.T, full_matrices=False)
        sizes = inner.S
        real = int((sizes > 1e-7 * sizes.max(initial=0.0)).sum())
        leading: Float64 = (right.Q @ inner.Vh.T[:, : min(real, count)]).T
        return leading
    if delta.shape[0] < delta.shape[1]:
        vectors = np.linalg.eigh(delta @ delta.T)[1][:, ::-1][:, :count]
        found = np.linalg.qr(delta.T @ vectors)
        sizes = np.abs(np.diag(found.R))
        rows: Float64 = found.Q.T[sizes > 1e-7 * sizes.max()]
        return rows
    rows = np.linalg.eigh(delta.T @ delta)[1][:, ::-1].T[:count]
    return rows


def _too_many_directions(unfit: Mapping[str, float], nonzero: _NonzeroChanges) -> RefusedError:
    target = max(unfit, key=lambda name: unfit[name])
    return RefusedError(
        f"rank {limits.RANK} leaves {unfit[target]:.1%} of the change of {target}, and more than "
        f"is allowed of {len(unfit)} of {len(nonzero.changes)} weights: allow more with --error, "
        "or name the --rank to take whatever it leaves",
        expected=f"at most {nonzero.allowed[target]:.3g} left",
        found=f"{unfit[target]:.3g}",
    )

"""The algebra of increments: adding them to weights, taking them off again, comparing them.

A patched tensor is always cast_to_dtype(W + sum of scale_i * dW_i), with zero in place of W where a
mask says so: every dW_i from the base's W, the sum in float64 in the order of the increments'
digests, rounded once. Nothing else makes "taken out again" and "never put in" the same bytes.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from patch_spec.compose import Factors, cast_once, increment_delta, increment_factors
from patch_spec.compose import compose as compose_exactly
from patch_spec.errors import FormatError
from patch_spec.increment import Increment
from patch_spec.mask import Flags, to_flags
from patch_spec.streams import STREAMS, Stream, stream_of
from sepme_cli.errors import MalformedError, MismatchError

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]
Scaled = tuple[Increment, float]


def delta(increment: Increment, target: str, weight: Array) -> Float64:
    """dW [out, d] of one target, exact; zeros where the increment adds nothing, as a mask does
    everywhere.

    weight: the base's W [out, d], any float dtype; only operators look at its values.
    Raises MalformedError, the target named, for a weight without a finite fp16 value, and
    MismatchError for one of another shape.
    """
    with _about(target):
        change = increment_delta(increment, target, weight)
    return np.zeros(weight.shape) if change is None else change


def factors(increment: Increment, target: str, weight: Array) -> Factors:
    """dW of a target that the increment adds to, as factors; arguments and errors as of `delta`."""
    with _about(target):
        found = increment_factors(increment, target, weight)
    assert found is not None  # it adds to the target
    return found


def compose(
    weight: Array, stack: Iterable[Scaled], target: str, dtype: np.dtype[Any] | None = None
) -> Array:
    """cast_to_dtype(W + sum of scale_i * dW_i), with zero in place of W where masks say so,
    [out, d].

    weight: the base's W. stack: increments and scales, in any order; those that do not act on the
    target add nothing. dtype: of the result, W's own if left out.
    Raises MalformedError, the target named, for values that are not finite, before or after, and
    MismatchError for a weight of another shape.
    """
    with _about(target):
        if dtype is None or dtype == weight.dtype:
            return compose_exactly(weight, stack, target)
        # In float64 the format's own cast changes nothing, so that there is one rounding here too.
        total = compose_exactly(weight.astype(np.float64), stack, target)
    return _finite(cast_once(total, dtype), target, "the patched")


def subtract(
    weight: Array, taken: Sequence[Scaled], staying: Sequence[Scaled], target: str
) -> tuple[Array, float]:
    """W of a patched checkpoint without the increments `taken`, and how far off it may be.

    weight: the patched W [out, d]. taken: no masks, as what those made zero is lost. staying: what
    else is in it.
    Returns the result in W's dtype and a bound on |result - exact result|, elementwise: patching
    rounded, subtracting rounds again, and the operators' W is only an estimate.
    """
    patched = _finite(weight.astype(np.float64), target, "the checkpoint's")
    base = _estimate_base(patched, [*taken, *staying], target)
    removed = np.zeros(patched.shape)
    for part, scale in taken:
        if part.acts_on(target):
            removed += scale * delta(part, target, base)
    result = _finite(cast_once(patched - removed, weight.dtype), target, "the restored")
    estimate = _estimation_error(base, weight, taken, staying, stream_of(target))
    error = _ulp(patched, weight.dtype) / 2 + estimate
    rounding = _ulp(np.abs(patched - removed) + error, weight.dtype)
    return result, float((error + rounding).max(initial=0.0))


def rounding_bound(values: Array) -> float:
    """How far two roundings of one sum may be apart where the result is `values`, elementwise."""
    wide = values.astype(np.float64)
    return float((1.5 * _ulp(wide, values.dtype)).max(initial=0.0))


def distance(a: Increment, b: Increment) -> float | None:
    """|dW_a - dW_b| / |dW_b| over all targets, Frobenius; None where the kinds differ.

    Of operators, which have no dW without a model, that of their shift @ basis; of masks that of
    what they would do to weights of 1.
    """
    if a.kind != b.kind:
        return None
    if a.kind == "mask":
        both = _shared(a, b)
        apart = _positions(a) + _positions(b) - 2 * both
        return float(np.sqrt(apart / _positions(b)))
    change = norm = 0.0
    for mine, other in _effects(a, b):
        change += float(np.square(mine - other).sum())
        norm += float(np.square(other).sum())
    return 0.0 if change == 0 else float(np.sqrt(change / norm)) if norm else float("inf")


def interference(a: Increment, b: Increment) -> float:
    """How much of what `a` reads lies where `b` acts: 0 nothing, 1 all of it.

    The part of a's basis, in the Frobenius norm, inside the span of b's basis rows; of a lora,
    whose targets have a basis each, of all of them; of several streams the largest. An increment
    changes only what its basis reads, so at 0 the two concepts never meet. Of two masks the part of
    a's weights that b makes zero too; a mask and another kind have nothing to compare.
    """
    return float(interferences([a], [b])[0, 0])


def interferences(mine: Sequence[Increment], others: Sequence[Increment]) -> Float64:
    """`interference` of each of some increments with each of others [len(mine), len(others)]."""
    found = np.zeros((len(mine), len(others)))
    for stream in STREAMS:
        read = [_rows_read(part, stream) for part in mine]
        spans = [_span(_rows_read(part, stream)) for part in others]
        for width in {rows.shape[1] for rows in read} & {rows.shape[1] for rows in spans}:
            left = [i for i, rows in enumerate(read) if rows.shape[1] == width and rows.any()]
            right = [i for i, rows in enumerate(spans) if rows.shape[1] == width and len(rows)]
            if left and right:
                overlap = _overlaps([read[i] for i in left], [spans[i] for i in right])
                here = np.ix_(left, right)
                found[here] = np.maximum(found[here], overlap)
    for i, one in enumerate(mine):
        for j, other in enumerate(others):
            if one.kind == other.kind == "mask":
                found[i, j] = _shared(one, other) / _positions(one)
    return found


def _positions(mask: Increment) -> int:
    """How many weights it makes zero."""
    return sum(layer.count for layer in mask.masks.values())


def _shared(a: Increment, b: Increment) -> int:
    """How many weights both masks make zero; none of layers of different shapes."""
    return sum(
        int((_flags(a, layer) & _flags(b, layer)).sum())
        for layer, masked in a.masks.items()
        if layer in b.masks and b.masks[layer].shape == masked.shape
    )


def _flags(mask: Increment, layer: str) -> Flags:
    return to_flags(mask.gaps[layer], mask.masks[layer].shape)


def _overlaps(read: Sequence[Float64], spans: Sequence[Float64]) -> Float64:
    """The part of each of some rows [r, d] that lies in each of some spans, orthonormal [r, d]."""
    inside = np.square(np.vstack(read) @ np.vstack(spans).T)
    for axis, parts in ((0, read), (1, spans)):
        starts = np.cumsum([0, *(len(part) for part in parts[:-1])])
        inside = np.add.reduceat(inside, starts, axis=axis)
    norms = np.array([float(np.linalg.norm(rows)) for rows in read])
    shares: Float64 = np.minimum(np.sqrt(inside) / norms[:, None], 1.0)
    return shares


def _span(rows: Float64) -> Float64:
    """An orthonormal basis of the span of rows [n, d]."""
    if not len(rows):
        return rows
    if len(rows) > rows.shape[1]:
        rows = np.linalg.qr(rows).R
    _, values, directions = np.linalg.svd(rows, full_matrices=False)
    return np.asarray(directions[values > values.max(initial=0.0) * 1e-10])


def _rows_read(increment: Increment, stream: Stream) -> Float64:
    """All rows that an increment reads of a stream; [0, 0] if it reads none."""
    found = increment.on(stream)
    rows = [] if found is None else [found.basis]
    rows += [down for target, down in increment.down.items() if stream_of(target) == stream]
    return np.vstack(rows).astype(np.float64) if rows else np.zeros((0, 0))


def _effects(a: Increment, b: Increment) -> Iterator[tuple[Float64, Float64]]:
    """What both do, target by target, of operators stream by stream; zeros where one does
    nothing."""
    for stream in STREAMS:
        shifts = [found.shift for part in (a, b) if (found := part.on(stream)) is not None]
        if width := next((len(shift) for shift in shifts if shift is not None), 0):
            yield _operator_sum([(a, 1.0)], width, stream), _operator_sum([(b, 1.0)], width, stream)
    for target in sorted(a.up.keys() | b.up.keys()):
        acting = next(part for part in (a, b) if target in part.up)
        shape = len(acting.up[target]), acting.basis_of(target).shape[1]
        weight = np.broadcast_to(np.float32(0), shape)
        yield delta(a, target, weight), delta(b, target, weight)


def _operator_sum(parts: Iterable[Scaled], width: int, stream: Stream | None) -> Float64:
    """sum of scale * shift @ basis over the operators among the parts, on a stream [d, d]."""
    total = np.zeros((width, width))
    for increment, scale in parts:
        found = None if stream is None else increment.on(stream)
        if found is not None and found.shift is not None:
            shift = np.ldexp(found.shift.astype(np.float64), found.exponent)
            total += scale * shift @ found.basis.astype(np.float64)
    return total


def _estimate_base(patched: Float64, parts: Sequence[Scaled], target: str) -> Float64:
    """The W that the parts were added to: patched = W (I + operators) + all others."""
    rest = patched.copy()
    for increment, scale in parts:
        if increment.kind != "operator" and increment.acts_on(target):
            rest -= scale * delta(increment, target, patched)
    operators = _operator_sum(parts, patched.shape[1], stream_of(target))
    if not operators.any():
        return rest
    return np.asarray(
        np.linalg.solve((np.eye(len(operators)) + operators).T, rest.T).T, dtype=np.float64
    )


def _estimation_error(
    base: Float64,
    weight: Array,
    taken: Sequence[Scaled],
    staying: Sequence[Scaled],
    stream: Stream | None,
) -> float:
    """A bound on the error of the removed operators' dW, whose W is estimated and in fp16."""
    removed = _operator_sum(taken, base.shape[1], stream)
    if not removed.any():
        return 0.0

    def most(matrix: Array) -> float:
        """The most that a row times the matrix can grow, in its largest element."""
        return float(np.abs(matrix).sum(axis=0).max())

    both = _operator_sum([*taken, *staying], len(removed), stream)
    inverse = np.linalg.inv(np.eye(len(removed)) + both)
    rounding = float(_ulp(weight.astype(np.float64), weight.dtype).max()) / 2 * most(inverse)
    largest = np.asarray(np.abs(base).max() + rounding)
    # Operators saw W in fp16 (and on a grid of 2**-20); the estimate takes them for linear.
    half = float(_ulp(largest, np.dtype(np.float16))) / 2 + float(largest) * 2.0**-19
    estimate = rounding + half * most(both @ inverse)
    return (estimate + 2 * half) * most(removed)


def _ulp(values: Float64, dtype: np.dtype[Any]) -> Float64:
    """The distance of neighbouring numbers of `dtype` around each value."""
    info = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    _, exponents = np.frexp(values)
    exponents = np.maximum(exponents - 1, info.minexp)
    spacing: Float64 = np.ldexp(1.0, exponents - info.nmant)
    return spacing


@contextmanager
def _about(target: str) -> Iterator[None]:
    """What the format finds wrong inside is wrong with the checkpoint's weight `target`."""
    try:
        yield
    except FormatError as error:
        if error.rule == "C3":
            raise MalformedError(
                f"{target} is recorded with a mask of another scale than 1, which there cannot be",
                expected=error.expected,
                found=error.found,
            ) from error
        if error.rule == "C1":
            raise MismatchError(
                f"the patch is for a {target} of another shape",
                expected=error.expected,
                found=error.found,
            ) from error
        raise _not_finite(target, "the checkpoint's or the patched") from error


def _finite(values: Array, target: str, whose: str) -> Array:
    if not np.isfinite(values).all():
        raise _not_finite(target, whose)
    return values


def _not_finite(target: str, whose: str) -> MalformedError:
    return MalformedError(
        f"{whose} values of {target} are not all finite",
        expected="finite numbers in the range of the dtype",
        found="NaN, infinity or overflow",
    )

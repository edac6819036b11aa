"""Composition: a base tensor and increments to a patched tensor, in exactly one way."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from patch_spec.errors import FormatError
from patch_spec.grid import (
    Float32,
    Float64,
    additive_factor,
    all_finite,
    operator_factors,
    product,
    row_blocks,
)
from patch_spec.increment import Increment
from patch_spec.mask import Flags, united
from patch_spec.streams import Stream, stream_of

Factors = tuple[Float64, Float64]
"""dW as factor [out, r] and basis [r, d]; their product is exact."""


def increment_delta(increment: Increment, target: str, weight: npt.NDArray[Any]) -> Float64 | None:
    """dW [out, d] of one increment for one target, exact; None where it adds nothing, as a mask
    does everywhere.

    weight: the base's [out, d], any float dtype. Raises FormatError C1 where the shapes do not
    fit, F1 where an operator meets a weight without a finite fp16 value.
    """
    factors = increment_factors(increment, target, weight)
    return None if factors is None else product(*factors)


def increment_factors(
    increment: Increment, target: str, weight: npt.NDArray[Any]
) -> Factors | None:
    """The factors of dW; arguments and errors as of `increment_delta`."""
    (factors,) = _factors([increment], target, weight)
    return factors


def _factors(
    increments: Sequence[Increment], target: str, weight: npt.NDArray[Any]
) -> list[Factors | None]:
    for increment in increments:
        _check_shape(increment, target, weight)
    shifts = [_shift(increment, stream_of(target)) for increment in increments]
    made = iter(operator_factors(weight, [shift for shift in shifts if shift is not None]))
    found: list[Factors | None] = []
    for increment, shift in zip(increments, shifts, strict=True):
        factor = None
        if shift is not None:
            factor = next(made)
        elif target in increment.up:
            factor = additive_factor(increment.up[target], increment.exponents[target])
        if factor is None:
            found.append(None)
        else:
            found.append((factor, increment.basis_of(target).astype(np.float64)))
    return found


def _shift(increment: Increment, stream: Stream | None) -> tuple[Float32, int] | None:
    """What an operator does to a stream, and its exponent; None of all else."""
    found = None if stream is None else increment.on(stream)
    return None if found is None or found.shift is None else (found.shift, found.exponent)


def _check_shape(increment: Increment, target: str, weight: npt.NDArray[Any]) -> None:
    if not increment.acts_on(target):
        return
    shape = shape_of(increment, target, weight.shape[0])
    if weight.shape != shape:
        raise FormatError(
            "C1",
            "the increment is for a tensor of another shape",
            where=target,
            expected=list(shape),
            found=list(weight.shape),
        )


def shape_of(increment: Increment, target: str, rows: int = 0) -> tuple[int, int]:
    """[out, d] of the weights that an increment which acts on a target is for.

    rows: of the weight at hand, as an operator fits any number.
    """
    if increment.kind == "mask":
        return increment.masks[target].shape
    out = rows if increment.kind == "operator" else len(increment.up[target])
    return out, increment.basis_of(target).shape[1]


def _zeros(
    increments: Iterable[tuple[Increment, float]], target: str, shape: tuple[int, int]
) -> Flags | None:
    """Where masks make a target's weights zero; None where none acts on it."""
    masks = [(part, scale) for part, scale in increments if part.kind == "mask"]
    for _, scale in masks:
        if scale != 1:
            raise FormatError(
                "C3", "a mask has no other scale than 1", where=target, expected=1, found=scale
            )
    acting = [part.gaps[target] for part, _ in masks if target in part.gaps]
    return united(acting, shape) if acting else None


def compose(
    weight: npt.NDArray[Any],
    terms: Iterable[tuple[Increment, float]],
    target: str,
    dtype: npt.DTypeLike | None = None,
) -> npt.NDArray[Any]:
    """cast(W + sum of scale * dW), summed from W on in the order of the increments' digests, with
    zero in place of W where a mask says so.

    weight: the base's [out, d], any float dtype, of a target or a layer. terms: increments and
    scales, in any order; what does not touch the target adds nothing. dtype: of the result, W's own
    if left out.
    Raises FormatError C1 as `increment_delta` does, C2 for a result that is not finite, C3 for a
    mask with another scale than 1.
    """
    ordered = sorted(terms, key=lambda term: term[0].digest)
    found = _factors([part for part, _ in ordered], target, weight)
    acting = [(f, scale) for f, (_, scale) in zip(found, ordered, strict=True) if f is not None]
    zeros = _zeros(ordered, target, weight.shape)
    result = np.empty(weight.shape, weight.dtype if dtype is None else dtype)
    for rows in row_blocks(weight):
        total = weight[rows].astype(np.float64)
        if zeros is not None:
            total[zeros[rows]] = 0.0
        for (factor, basis), scale in acting:
            change = product(factor[rows], basis)
            total += change if scale == 1 else scale * change
        result[rows] = cast_once(total, result.dtype)
    if not all_finite(result):
        raise FormatError("C2", f"the result is not finite in {result.dtype}", where=target)
    return result


def cast_once(values: Float64, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """The values in another float dtype, rounded once, half to even.

    bfloat16 and fp8 casts of float64 go through float32 and round twice, which moves a value that
    lies just beside the middle of two neighbours.
    """
    target = np.dtype(dtype)
    with np.errstate(over="ignore"):
        if target in (np.float16, np.float32, np.float64):
            return values.astype(target)
        return _round_to_odd(values).astype(target)


def _round_to_odd(values: Float64) -> npt.NDArray[np.float32]:
    """float32 whose last bit says whether anything was cut off, so that rounding it is exact.

    The last bit is below half a unit of every narrower format (Boldo and Melquiond, 2008).
    """
    nearest = values.astype(np.float32)
    back = nearest.astype(np.float64)
    towards_zero = np.where(
        np.abs(back) > np.abs(values), np.nextafter(nearest, np.float32(0)), nearest
    )
    inexact = (back != values) & np.isfinite(values)
    odd: npt.NDArray[np.float32] = (towards_zero.view(np.uint32) | inexact).view(np.float32)
    return odd

"""Composition: a base tensor and increments to a patched tensor, in exactly one way."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from patch_spec.errors import FormatError
from patch_spec.grid import Float64, additive_delta, operator_delta
from patch_spec.manifest import Increment


def increment_delta(increment: Increment, target: str, weight: npt.NDArray[Any]) -> Float64 | None:
    """dW of one increment for one target, exact; None where the increment leaves it alone.

    weight: the base's [out, d], any float dtype. Raises FormatError C1 where the shapes do not
    fit, F1 where an operator meets a weight without a finite fp16 value.
    """
    if increment.shift is None and target not in increment.up:
        return None
    width = increment.basis.shape[1]
    out = weight.shape[0] if increment.shift is not None else increment.up[target].shape[0]
    if weight.shape != (out, width):
        raise FormatError(
            "C1",
            "the increment is for a tensor of another shape",
            where=target,
            expected=[out, width],
            found=list(weight.shape),
        )
    if increment.shift is None:
        return additive_delta(increment.up[target], increment.exponents[target], increment.basis)
    return operator_delta(weight, increment.shift, increment.shift_exponent, increment.basis)


def compose(
    weight: npt.NDArray[Any],
    terms: Iterable[tuple[Increment, float]],
    target: str,
    dtype: npt.DTypeLike | None = None,
) -> npt.NDArray[Any]:
    """cast(W + sum of scale * dW), summed from W on in the order of the increments' digests.

    weight: the base's [out, d], any float dtype. terms: increments and scales, in any order;
    what does not touch the target adds nothing. dtype: of the result, W's own if left out.
    Raises FormatError C1 as `increment_delta` does, C2 for a result that is not finite.
    """
    total = weight.astype(np.float64)
    for increment, scale in sorted(terms, key=lambda term: term[0].digest):
        delta = increment_delta(increment, target, weight)
        if delta is not None:
            total += delta if scale == 1 else scale * delta
    result = cast_once(total, weight.dtype if dtype is None else dtype)
    if not np.isfinite(result).all():
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

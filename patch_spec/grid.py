"""The exact arithmetic of SPEC.md: factors on dyadic grids, products without a rounding error.

Every factor is a small integer times a power of two, so the sums in a matrix product are integers
below 2**53 times a power of two. float64 holds them all, whatever the order of summation, so
threads, BLAS builds and devices cannot change a bit. SPEC.md, "Arithmetic", has the proof.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from patch_spec import limits
from patch_spec.errors import FormatError

GRID = 2.0**-22
"""`basis` and `shift` are multiples of this within [-1, 1]."""
WEIGHT_BITS = 20
"""The operator product sees weights as multiples of 2**(e - 20), 2**e their largest."""
MIDDLE_BITS = 24
"""… and weight @ shift as multiples of 2**(f - 24), 2**f its largest."""

Float64 = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]
Float16 = npt.NDArray[np.float16]


def to_grid(x: npt.ArrayLike) -> Float32:
    """`x` rounded (half to even) to multiples of 2**-22, in float32; any shape.

    Raises FormatError V1 for values that are not finite, V2 for any beyond 1 in magnitude.
    """
    values = np.asarray(x, dtype=np.float64)
    if not np.isfinite(values).all():
        raise FormatError("V1", "values that are not finite have no place on the grid")
    # + 0.0 because a negative zero would give equal values unequal bytes.
    rounded = np.rint(values / GRID) * GRID + 0.0
    largest = float(np.abs(rounded).max(initial=0.0))
    if largest > 1:
        raise FormatError("V2", "beyond the grid", expected="[-1, 1]", found=largest)
    return rounded.astype(np.float32)


def on_grid(x: npt.NDArray[Any]) -> bool:
    """Whether every value is a multiple of 2**-22 within [-1, 1]."""
    values = np.asarray(x, dtype=np.float64)
    if not bool((np.abs(values) <= 1).all()):
        return False
    steps = values / GRID
    return bool((steps == np.rint(steps)).all())


def split_up(x: npt.ArrayLike) -> tuple[Float16, int]:
    """`x` [out, r] as fp16 within [-1, 1] and an exponent: x is about up * 2**exponent.

    Raises FormatError V1 for values that are not finite, J6 for an exponent beyond 64.
    """
    scaled, exponent = _split(x)
    # + 0.0 as in `to_grid`: a small negative value rounds to a negative zero.
    return (scaled.astype(np.float16) + np.float16(0)).astype(np.float16), exponent


def split_shift(x: npt.ArrayLike) -> tuple[Float32, int]:
    """`x` [d, r] on the grid, and an exponent: x is about shift * 2**exponent.

    Raises FormatError as `split_up` does.
    """
    scaled, exponent = _split(x)
    return to_grid(scaled), exponent


def additive_delta(up: Float16, exponent: int, basis: Float32) -> Float64:
    """dW = (up @ basis) * 2**exponent, exact.

    up [out, r], basis [r, d], both as rules V1 to V3 demand; the result [out, d].
    """
    return _product(up.astype(np.float64), basis, exponent)


def operator_delta(
    weight: npt.NDArray[Any], shift: Float32, exponent: int, basis: Float32
) -> Float64:
    """dW = (M @ basis) * 2**exponent with M = Q @ shift, and Q, M rounded to their grids.

    weight [out, d] of any float dtype; shift [d, r], basis [r, d] as rules V1 to V3 demand; the
    result [out, d]. Weights with one fingerprint give one result: only their fp16 values count.
    Raises FormatError F1 for weights that have no finite fp16 value.
    """
    q = _to_leading_bits(to_half(weight).astype(np.float64), WEIGHT_BITS)
    m = _to_leading_bits(q @ shift.astype(np.float64), MIDDLE_BITS)
    return _product(m, basis, exponent, q if q.shape[1] == basis.shape[1] else None)


def to_half(values: npt.NDArray[Any]) -> Float16:
    """The values as fp16, rounded once (half to even); FormatError F1 if one is not finite."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise FormatError("F1", "a value is not finite in fp16", expected="magnitudes up to 65504")
    return half


def ceil_log2(x: float) -> int:
    """The least e with 2**e >= x, for x > 0."""
    mantissa, exponent = math.frexp(x)
    return exponent - 1 if mantissa == 0.5 else exponent


def _split(x: npt.ArrayLike) -> tuple[Float64, int]:
    values = np.asarray(x, dtype=np.float64)
    largest = float(np.abs(values).max(initial=0.0))
    if not math.isfinite(largest):
        raise FormatError("V1", "values that are not finite cannot be kept")
    if largest == 0:
        return np.zeros_like(values), 0
    # What is smaller than the least scale is kept with fewer bits, and in the end as zero.
    exponent = max(ceil_log2(largest), -limits.EXPONENT)
    if exponent > limits.EXPONENT:
        raise FormatError(
            "J6", "values too large to keep", expected=f"up to 2**{limits.EXPONENT}", found=largest
        )
    return np.ldexp(values, -exponent), exponent


def _to_leading_bits(x: Float64, bits: int) -> Float64:
    """`x` rounded to multiples of 2**(e - bits), 2**e at least its largest; changes `x`."""
    largest = max(float(x.max(initial=0.0)), -float(x.min(initial=0.0)))
    if largest == 0:
        return np.zeros_like(x)
    scale = 2.0 ** (bits - ceil_log2(largest))
    x *= scale
    np.rint(x, out=x)
    x *= 1 / scale
    return x


def _product(left: Float64, basis: Float32, exponent: int, out: Float64 | None = None) -> Float64:
    """(left @ basis) * 2**exponent; the smaller factor is scaled, which gives the same bits.

    out: memory to use, which is faster than new.
    """
    product: Float64 = np.matmul(left * 2.0**exponent, basis.astype(np.float64), out=out)
    # BLAS builds differ in the sign of a zero, and a sum with W would show it.
    product += 0.0
    return product

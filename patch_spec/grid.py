"""The exact arithmetic of SPEC.md: factors on dyadic grids, products without a rounding error.

Every factor is a small integer times a power of two, so the sums in a matrix product are integers
below 2**53 times a power of two. float64 holds them all, whatever the order of summation, so
threads, BLAS builds and devices cannot change a bit. SPEC.md, "Arithmetic", has the proof.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from patch_spec import limits
from patch_spec.errors import FormatError

GRID = 2.0**-22
"""`basis` and `shift` are multiples of this within [-1, 1]."""
WEIGHT_BITS = 31
"""The operator product sees weights [out, d] as multiples of 2**(e - b), 2**e their largest, with
b = 31 - ceil(log2 d) and at most 20: a sum of d products then fits into float64."""
MOST_WEIGHT_BITS = 20
MIDDLE_BITS = 24
"""… and weight @ shift as multiples of 2**(f - 24), 2**f its largest."""

_BLOCK = 2**18
"""How many numbers are worked on at a time: two megabytes of float64."""

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


def additive_factor(up: Float16, exponent: int) -> Float64:
    """What dW = factor @ basis takes of an additive increment: up * 2**exponent [out, r], exact.

    up: [out, r] as rules V1 to V3 demand.
    """
    return np.ldexp(up.astype(np.float64), exponent)


def operator_factors(
    weight: npt.NDArray[Any], operators: Sequence[tuple[Float32, int]]
) -> list[Float64]:
    """The same of operators, shift and exponent: M * 2**exponent [out, r] with M = Q @ shift, and
    Q, M rounded to their grids.

    weight [out, d] of any float dtype; shift [d, r] as rules V1 to V3 demand. Weights with one
    fingerprint give one result: only their fp16 values count. Being exact, the products of all
    operators are made as one.
    Raises FormatError F1 for weights that have no finite fp16 value.
    """
    if not operators:
        return []
    half = to_half(weight)
    bits = min(MOST_WEIGHT_BITS, WEIGHT_BITS - ceil_log2(max(1, half.shape[1])))
    step = _grid_step(float(_largest(half)), bits)
    wide = np.hstack([shift for shift, _ in operators]).astype(np.float64)
    middle = np.empty((len(half), wide.shape[1]))
    for rows in row_blocks(half):
        np.matmul(_to_multiples(half[rows].astype(np.float64), step), wide, out=middle[rows])
    ends = np.cumsum([shift.shape[1] for shift, _ in operators])
    found = zip(np.split(middle, ends[:-1], axis=1), operators, strict=True)
    return [_on_middle_grid(own, exponent) for own, (_, exponent) in found]


def _on_middle_grid(middle: Float64, exponent: int) -> Float64:
    largest = float(np.abs(middle).max(initial=0))
    return np.ldexp(_to_multiples(middle, _grid_step(largest, MIDDLE_BITS)), exponent)


def additive_delta(up: Float16, exponent: int, basis: Float32) -> Float64:
    """dW = (up @ basis) * 2**exponent [out, d], exact; see `additive_factor`."""
    return product(additive_factor(up, exponent), basis.astype(np.float64))


def operator_delta(
    weight: npt.NDArray[Any], shift: Float32, exponent: int, basis: Float32
) -> Float64:
    """dW = (M @ basis) * 2**exponent [out, d], exact; see `operator_factors`."""
    (factor,) = operator_factors(weight, [(shift, exponent)])
    return product(factor, basis.astype(np.float64))


def product(factor: Float64, basis: Float64) -> Float64:
    """dW = factor @ basis, exact: rows of a factor [out, r], and a basis [r, d] on the grid."""
    change: Float64 = factor @ basis
    # BLAS builds differ in the sign of a zero, and a sum with W would show it.
    change += 0.0
    return change


def row_blocks(matrix: npt.NDArray[Any]) -> Iterator[slice]:
    """Rows of a matrix, as many at a time as a processor's cache holds: several times faster."""
    width = matrix.size // max(1, len(matrix))
    count = max(1, _BLOCK // max(1, width))
    return (slice(start, start + count) for start in range(0, len(matrix), count))


def to_half(values: npt.NDArray[Any]) -> Float16:
    """The values as fp16, rounded once (half to even); FormatError F1 if one is not finite."""
    with np.errstate(over="ignore"):
        half = np.asarray(values, dtype=np.float16)
    if not all_finite(half):
        raise FormatError("F1", "a value is not finite in fp16", expected="magnitudes up to 65504")
    return half


def all_finite(values: npt.NDArray[Any]) -> bool:
    """Whether no value is infinite or not a number."""
    return bool(np.isfinite(_largest(values) if values.dtype == np.float16 else values).all())


def _largest(half: Float16) -> np.float16:
    """The largest magnitude, or what is not finite. numpy compares halves one by one; their bits,
    but for the sign's, are in the same order."""
    bits = np.ascontiguousarray(half).view(np.uint16) & np.uint16(0x7FFF)
    found: np.float16 = bits.max(initial=np.uint16(0)).view(np.float16)
    return found


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


def _grid_step(largest: float, bits: int) -> float:
    """2**(e - bits), 2**e the least power of two that is not below `largest`."""
    return 2.0 ** (ceil_log2(largest) - bits) if largest else 1.0


def _to_multiples(x: Float64, step: float) -> Float64:
    """`x` rounded (half to even) to multiples of a power of two; changes `x`."""
    x *= 1 / step
    np.rint(x, out=x)
    x *= step
    return x

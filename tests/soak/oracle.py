"""What a patched tensor must be, from section 8 of SPEC.md alone.

Whole numbers instead of a linear algebra library, and tables of all values of a dtype instead of
casts. Of the code under test it knows only how an increment is kept in memory.
"""

from collections.abc import Iterable
from functools import cache

import numpy as np

from patch_spec.increment import Increment
from tests.synthetic import DTYPES


def delta(part: Increment, target: str, weight: np.ndarray) -> np.ndarray | None:
    """dW [out, d] of one increment; None where it leaves the target alone. weight: float64."""
    basis = _whole(part.basis, 22)
    if part.shift is None:
        if target not in part.up:
            return None
        return _scaled(_whole(part.up[target], 24) @ basis, part.exponents[target] - 46)
    half = weight.astype(np.float16).astype(np.float64)
    if not half.any():
        return np.zeros(weight.shape)
    e = _exponent(half)
    middle = _whole(np.ldexp(half, -e), 20) @ _whole(part.shift, 22)
    if not middle.any():
        return np.zeros(weight.shape)
    f = _exponent(middle.astype(np.float64))
    grid = np.rint(np.ldexp(middle.astype(np.float64), 24 - f)).astype(np.int64)
    return _scaled(grid @ basis, f - 24 + e - 42 - 22 + part.shift_exponent)


def compose(
    weight: np.ndarray, changes: Iterable[tuple[str, float, np.ndarray | None]]
) -> np.ndarray:
    """W + sum of scale * dW in float64. changes: digest, scale and dW of increments."""
    total = weight
    for _, scale, change in sorted(changes, key=lambda change: change[0]):
        if change is not None:
            total = total + scale * change
    return total


def loaded(data: bytes, dtype: str, shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    """A stored tensor's numbers, in float64."""
    return np.frombuffer(data, DTYPES[dtype]).reshape(shape).astype(np.float64) * scale


def stored(values: np.ndarray, dtype: str, scale: float | None = None) -> bytes:
    """The nearest numbers of a dtype, of two as near the even one; with a scale, clipped to it."""
    kind = DTYPES[dtype]
    if kind.itemsize > 2:
        return values.astype(kind).tobytes()
    table = _table(dtype)
    if scale is not None:
        values = np.clip(values / scale, -table[-1], table[-1])
    size = np.abs(values)
    assert size.max(initial=0) <= table[-1], "the test wants no overflow"
    above = np.searchsorted(table, size)
    below = np.maximum(above, 1) - 1
    down, up = size - table[below], table[above] - size
    bits = np.where((down < up) | ((down == up) & (below % 2 == 0)), below, above)
    sign = np.signbit(values).astype(np.int64) << (8 * kind.itemsize - 1)
    return (bits | sign).astype(f"<u{kind.itemsize}").tobytes()


@cache
def _table(dtype: str) -> np.ndarray:
    """A dtype's finite values from 0 up; the index is the bit pattern."""
    kind = DTYPES[dtype]
    with np.errstate(invalid="ignore"):
        patterns = np.arange(2 ** (8 * kind.itemsize - 1), dtype=f"<u{kind.itemsize}")
        values = patterns.view(kind).astype(np.float64)
    return values[np.isfinite(values)]


def _whole(values: np.ndarray, bits: int) -> np.ndarray:
    """The values in units of 2**-bits, rounded half to even."""
    return np.rint(np.ldexp(values.astype(np.float64), bits)).astype(np.int64)


def _scaled(whole: np.ndarray, exponent: int) -> np.ndarray:
    return np.ldexp(whole.astype(np.float64), exponent)


def _exponent(values: np.ndarray) -> int:
    """The least e with 2**e not below the largest magnitude."""
    mantissa, exponent = np.frexp(np.abs(values).max())
    return int(exponent) - (mantissa == 0.5)

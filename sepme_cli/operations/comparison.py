"""How far two tensors are apart."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from patch_spec.header import TensorEntry
from sepme_cli.checkpoints.dtypes import NAMES, numpy_dtype
from sepme_cli.checkpoints.reader import Checkpoint
from sepme_cli.progress import Progress

Float64 = npt.NDArray[np.float64]

_CHUNK = 2**20
"""Numbers that are compared at a time."""


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that differs; None for what cannot be computed, as for tensors of two shapes.

    relative_norm: |b - a| / |a|, Frobenius. max_abs: of b - a. rank: of b - a, of targets only,
    counting what stands out of the rounding of either.
    """

    name: str
    relative_norm: float | None
    max_abs: float | None
    rank: int | None


def compare_tensors(a: Checkpoint, b: Checkpoint, progress: Progress) -> Iterator[TensorDifference]:
    """The tensors that both have and that are not the same bytes, in a's order."""
    targets = {copy.name for target in a.targets for copy in target.copies}
    common = [entry for entry in a.header.tensors if entry.name in b.header.by_name]
    progress.stage("comparing", len(common))
    for entry in common:
        other = b.header.by_name[entry.name]
        if not _same_bytes(a, entry, b, other):
            yield _difference(a, entry, b, other, ranked=entry.name in targets)
        progress.advance()


def measure_change(
    name: str, weight: npt.NDArray[Any], change: Float64 | float
) -> TensorDifference:
    """What adding `change`, known exactly, does to a weight [out, d]."""
    change = np.broadcast_to(np.asarray(change, dtype=np.float64), weight.shape)
    values = _singular_values(change)
    return TensorDifference(
        name,
        _ratio(float(np.linalg.norm(change)), float(np.linalg.norm(weight.astype(np.float64)))),
        float(np.abs(change).max(initial=0.0)),
        int((values > values.max(initial=0.0) * 1e-6).sum()),
    )


def _same_bytes(a: Checkpoint, entry: TensorEntry, b: Checkpoint, other: TensorEntry) -> bool:
    if (entry.dtype, entry.shape) != (other.dtype, other.shape):
        return False
    size = 8 * _CHUNK
    return all(
        a.read_range(entry.begin + at, min(entry.begin + at + size, entry.end), entry.name)
        == b.read_range(other.begin + at, min(other.begin + at + size, other.end), entry.name)
        for at in range(0, entry.nbytes, size)
    )


def _difference(
    a: Checkpoint, entry: TensorEntry, b: Checkpoint, other: TensorEntry, *, ranked: bool
) -> TensorDifference:
    if entry.shape != other.shape or not {entry.dtype, other.dtype} <= NAMES.keys():
        return TensorDifference(entry.name, None, None, None)
    change = norm = largest = 0.0
    for at in range(0, math.prod(entry.shape), _CHUNK):
        left, right = _chunk(a, entry, at), _chunk(b, other, at)
        apart = right - left
        change += float(np.square(apart).sum())
        norm += float(np.square(left).sum())
        largest = max(largest, float(np.abs(apart).max()))
    rank = _rank(a, entry, b, other) if ranked else None
    return TensorDifference(entry.name, _ratio(math.sqrt(change), math.sqrt(norm)), largest, rank)


def _chunk(checkpoint: Checkpoint, entry: TensorEntry, at: int) -> Float64:
    dtype = numpy_dtype(entry.dtype)
    begin = entry.begin + at * dtype.itemsize
    end = min(begin + _CHUNK * dtype.itemsize, entry.end)
    data = checkpoint.read_range(begin, end, entry.name)
    return np.frombuffer(data, dtype).astype(np.float64)


def _rank(a: Checkpoint, entry: TensorEntry, b: Checkpoint, other: TensorEntry) -> int | None:
    """How many singular values of b - a are above those of the rounding errors in both.

    Independent errors of deviation s in a matrix [m, n] have none above s (sqrt(m) + sqrt(n)), and
    a rounding error is below half a unit in the last place.
    """
    left = a.read_entry(entry).astype(np.float64)
    right = b.read_entry(other).astype(np.float64)
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return None
    deviation = _rounding(left, entry.dtype) + _rounding(right, other.dtype)
    noise = deviation * sum(math.sqrt(side) for side in left.shape)
    return int((_singular_values(right - left) > noise).sum())


def _rounding(values: Float64, dtype: str) -> float:
    info = ml_dtypes.finfo(numpy_dtype(dtype))  # type: ignore[no-untyped-call]
    deviation = float(np.sqrt(np.mean(np.square(values)))) * 2.0 ** -(info.nmant + 1)
    return deviation / math.sqrt(3)


def _singular_values(matrix: Float64) -> Float64:
    """Through the smaller Gram matrix: several times faster, and good to 1e-8 of the largest."""
    gram = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
    values: Float64 = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0.0))
    return values


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else (0.0 if part == 0 else math.inf)

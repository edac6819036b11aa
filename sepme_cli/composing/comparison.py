"""How far two tensors are apart."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from patch_spec.compose import Factors
from patch_spec.grid import row_blocks
from patch_spec.streams import Stream, stream_of
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.checkpoints.reading.tensors import Stored, stored_in
from sepme_cli.checkpoints.structure.dtypes import NAMES, numpy_dtype
from sepme_cli.checkpoints.structure.layers import WHOLE
from sepme_cli.progress import Progress

Float64 = npt.NDArray[np.float64]

_CHUNK = 2**20
"""Numbers that are compared at a time."""


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that differs; None for what cannot be computed, as for tensors of two shapes.

    relative_norm: |b - a| / |a|, Frobenius. max_abs: of b - a. rank: of b - a, of targets only,
    counting what stands out of the rounding of either; None where a mask changes it. stream: what
    of a prompt a target reads.
    """

    name: str
    relative_norm: float | None
    max_abs: float | None
    rank: int | None
    stream: Stream | None = None


def compare_tensors(a: Checkpoint, b: Checkpoint, progress: Progress) -> Iterator[TensorDifference]:
    """The tensors that both have and that are not the same bytes, in a's order."""
    targets = {
        copy.name: target.name
        for target in (*a.targets, *a.patched_layers, *b.patched_layers)
        for copy in target.copies
        if copy.part.rows is None
    }
    ours, theirs = tensors_by_name(a), tensors_by_name(b)
    common = [name for name in ours if name in theirs]
    progress.stage("comparing", len(common))
    for name in common:
        if not same_bytes(ours[name], theirs[name]):
            yield _difference(name, ours[name], theirs[name], targets.get(ours[name].name))
        progress.advance()


def compare_targets(a: Checkpoint, b: Checkpoint, progress: Progress) -> Iterator[TensorDifference]:
    """The targets that both have and whose values differ, of checkpoints in different layouts."""
    common = [target for target in a.targets if target.name in b.by_name]
    progress.stage("comparing", len(common))
    for target in common:
        left, right = target.copies[0], b.by_name[target.name].copies[0]
        found = _difference(target.name, left, right, target.name)
        if found.max_abs != 0:
            yield found
        progress.advance()


def tensors_by_name(checkpoint: Checkpoint) -> dict[str, Stored]:
    """Every tensor of every network, by its name; in a folder, behind the name of its file."""
    return {
        f"{file.place}:{stored.name}" if file.place else stored.name: stored
        for file in checkpoint.all_files()
        for stored in stored_in(file).values()
    }


def measure_masked(
    name: str, weight: npt.NDArray[Any], patched: npt.NDArray[np.float64]
) -> TensorDifference:
    """What a mask, and what is added to the weight beside it, do to a weight [out, d]."""
    change = norm = largest = 0.0
    for rows in row_blocks(weight):
        before = weight[rows].astype(np.float64)
        apart = patched[rows] - before
        change += float(np.square(apart).sum())
        norm += float(np.square(before).sum())
        largest = max(largest, float(np.abs(apart).max(initial=0.0)))
    return TensorDifference(name, _ratio(math.sqrt(change), math.sqrt(norm)), largest, None)


def measure_change(
    name: str, weight: npt.NDArray[Any], factors: Sequence[Factors]
) -> TensorDifference:
    """What adding the products of factors (F [out, r], B [r, d]) does to a weight [out, d]."""
    left = np.hstack([factor for factor, _ in factors])
    basis = np.vstack([rows for _, rows in factors])
    # F B = Q_F (R_F R_B^T) Q_B^T: what is in the middle is small and has the same singular values.
    (_, left_r), (_, basis_r) = np.linalg.qr(left), np.linalg.qr(basis.T)
    values = np.linalg.svd(left_r @ basis_r.T, compute_uv=False)
    largest = [float(np.abs(left[rows] @ basis).max()) for rows in row_blocks(weight)]
    return TensorDifference(
        name,
        _ratio(float(np.linalg.norm(values)), float(np.linalg.norm(weight.astype(np.float64)))),
        max(largest, default=0.0),
        int((values > values.max(initial=0.0) * 1e-6).sum()),
        stream_of(name),
    )


def same_bytes(a: Stored, b: Stored) -> bool:
    """Whether two tensors are stored alike: dtype, shape and bytes."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    size = 8 * _CHUNK
    return all(
        a.file.read_range(a.entry.begin + at, min(a.entry.begin + at + size, a.entry.end), a.name)
        == b.file.read_range(
            b.entry.begin + at, min(b.entry.begin + at + size, b.entry.end), b.name
        )
        for at in range(0, a.entry.nbytes, size)
    )


def same_but_rounding(a: Stored, b: Stored) -> bool:
    """Whether two tensors of different dtypes can be one that was rounded to both."""
    if a.shape != b.shape or a.dtype == b.dtype or not {a.dtype, b.dtype} <= NAMES.keys():
        return False
    infos = [
        ml_dtypes.finfo(numpy_dtype(stored.dtype))  # type: ignore[no-untyped-call]
        for stored in (a, b)
    ]
    step = max(float(info.eps) for info in infos)
    # What is stored with a scale is rounded before it is multiplied by that.
    least = max(
        float(info.smallest_subnormal)
        * (1.0 if (scale := stored.scales()) is None else scale.max())
        for info, stored in zip(infos, (a, b), strict=True)
    )
    return all(
        bool((np.abs(left - right) <= step * np.abs(left) + least).all())
        for left, right in zip(_chunks(a), _chunks(b), strict=True)
    )


def _difference(name: str, a: Stored, b: Stored, target: str | None) -> TensorDifference:
    """target: what patches call it; None for what is no target."""
    stream = None if target is None else stream_of(target)
    if a.shape != b.shape or not {a.dtype, b.dtype} <= NAMES.keys():
        return TensorDifference(name, None, None, None, stream)
    change = norm = largest = 0.0
    for left, right in zip(_chunks(a), _chunks(b), strict=True):
        apart = right - left
        change += float(np.square(apart).sum())
        norm += float(np.square(left).sum())
        largest = max(largest, float(np.abs(apart).max()))
    rank = None if target is None else _rank(a, b)
    ratio = _ratio(math.sqrt(change), math.sqrt(norm))
    return TensorDifference(name, ratio, largest, rank, stream)


def _chunks(stored: Stored) -> Iterator[Float64]:
    """The values, some at a time; scaled ones and some columns at once, which are never large."""
    if stored.scale is not None or stored.part != WHOLE:
        flat = stored.read().astype(np.float64).reshape(-1)
        yield from (flat[at : at + _CHUNK] for at in range(0, flat.size, _CHUNK))
        return
    dtype, entry = numpy_dtype(stored.dtype), stored.entry
    step = _CHUNK * dtype.itemsize
    for begin in range(entry.begin, entry.end, step):
        data = stored.file.read_range(begin, min(begin + step, entry.end), stored.name)
        yield np.frombuffer(data, dtype).astype(np.float64)


def _rank(a: Stored, b: Stored) -> int | None:
    """How many singular values of b - a are above those of the rounding errors in both.

    Independent errors of deviation s in a matrix [m, n] have none above s (sqrt(m) + sqrt(n)), and
    a rounding error is below half a unit in the last place.
    """
    left, right = (_matrix(stored.read().astype(np.float64)) for stored in (a, b))
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return None
    deviation = rounding(left, a.dtype) + rounding(right, b.dtype)
    noise = deviation * sum(math.sqrt(side) for side in left.shape)
    return int((_singular_values(right - left) > noise).sum())


def _matrix(values: Float64) -> Float64:
    """A weight as a matrix, which the kernel of a convolution of one pixel is too."""
    return values.reshape(len(values), -1)


def rounding(values: Float64, dtype: str) -> float:
    """The deviation of the errors that rounding to `dtype` made of such values."""
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

"""The files that a checkpoint's tensors lie in, and the tensors in them."""

import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import numpy.typing as npt

from patch_spec.compose import cast_once
from patch_spec.header import Header, TensorEntry
from sepme_cli.checkpoints.disk.failures import reading
from sepme_cli.checkpoints.disk.files import copy_all, read_exactly
from sepme_cli.checkpoints.structure.dtypes import (
    FP8,
    INTEGERS,
    NAMES,
    numpy_dtype,
    readable,
)
from sepme_cli.checkpoints.structure.layers import WHOLE, Part
from sepme_cli.errors import MalformedError, UnsupportedError

Array = npt.NDArray[Any]

_SCALES = (".scale_weight", ".weight_scale")
"""What follows a layer's name in the name of its weight's scale: of older and newer files."""
_COMPANIONS = (
    *_SCALES,
    *(".scale_input", ".input_scale"),
    *(".scale_output", ".output_scale"),
    *(".scaled_fp8", ".comfy_quant"),
)
"""What follows a layer's, or a network's, name in that of a number that quantising left beside the
weights: their scales, those of what goes in and out, and marks. None of them is a parameter."""


@dataclass(frozen=True)
class WeightsFile:
    """An open safetensors file; close it.

    place: where it lies in a model folder ("unet/diffusion_pytorch_model.safetensors"), "" for a
    checkpoint that is one file. header_bytes: the length and the JSON as they are in the file.
    """

    path: Path
    place: str
    header: Header = field(repr=False)
    header_bytes: bytes = field(repr=False)
    file: BinaryIO = field(repr=False, compare=False)

    @property
    def written_place(self) -> str:
        """Where a patched copy of it lies in its folder."""
        return self.place

    def close(self) -> None:
        self.file.close()

    def read(self, entry: TensorEntry) -> Array:
        """A tensor in the dtype it is stored in; the array is read-only.

        Raises UnsupportedError for a dtype that numpy has not: what is quantised in blocks is
        copied and compared, and not computed with.
        """
        dtype = self._dtype(entry)
        data = self.read_range(entry.begin, entry.end, entry.name)
        return np.frombuffer(data, dtype).reshape(entry.shape)

    def mapped(self, entry: TensorEntry) -> Array:
        """As `read`, but of memory that the system fills from the file when it is looked at, and
        takes back when it needs the room. What is written to it does not reach the file.

        Good only while the file is open, since later others may write to it. Where the file system
        maps nothing, or the tensor does not begin where numbers of its dtype can, it is read.
        """
        dtype, start = self._dtype(entry), self.header.data_start + entry.begin
        if start % dtype.itemsize or not entry.nbytes:
            return self.read(entry)
        try:
            # The lock on an open file would last as long as what is mapped of it; another has none.
            with self.path.open("rb") as again:
                here, there = os.fstat(again.fileno()), os.fstat(self.file.fileno())
                if os.path.samestat(here, there) and here.st_size >= start + entry.nbytes:
                    return np.memmap(again, dtype, "c", start, entry.shape)
        except OSError:
            pass
        return self.read(entry)

    def _dtype(self, entry: TensorEntry) -> np.dtype[Any]:
        if entry.dtype in NAMES or entry.dtype in INTEGERS:
            return numpy_dtype(entry.dtype)
        raise UnsupportedError(
            f"{self.path}: {entry.name} is stored as {readable(entry.dtype)}, which sepme does not "
            "compute with; name the model that it was made from, in fp32, fp16, bf16 or fp8",
            file=self.path,
            expected="fp32, fp16, bf16 or fp8",
            found=readable(entry.dtype),
        )

    def read_range(self, begin: int, end: int, name: str) -> bytes:
        """Bytes [begin, end) of the data section; name: the tensor that an error names.

        Raises MalformedError if the file has become shorter meanwhile.
        """
        with reading(self.path):
            data = read_exactly(self.file.fileno(), end - begin, self.header.data_start + begin)
        if len(data) != end - begin:
            raise MalformedError(
                f"{self.path}: the file ends inside {name}; something else is writing to it",
                file=self.path,
                expected=f"{end - begin} bytes",
                found=f"{len(data)} bytes",
            )
        return data

    def copy_range(self, begin: int, count: int, target: int, offset: int) -> None:
        """Copy bytes of the data section to an open file, within the kernel where it can."""
        start = self.header.data_start + begin
        copy_all(self.file.fileno(), start, target, offset, count, self.path)


@dataclass(frozen=True)
class Stored:
    """A tensor and where it lies.

    scale: in scaled fp8, the tensor that what is stored is multiplied by: one number, or one for
    each row. part: which matrix within it is meant.
    """

    file: WeightsFile
    entry: TensorEntry
    scale: TensorEntry | None = None
    part: Part = WHOLE

    @property
    def name(self) -> str:
        """What its file calls it."""
        return self.entry.name

    @property
    def dtype(self) -> str:
        """As the header says it: "F16"."""
        return self.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is meant."""
        return self.part.shape(self.entry.shape)

    def read(self) -> Array:
        """The values: in the dtype they are stored in, or in float64 where that takes a scale."""
        if self.part.rows is None:
            return dequantised(self.part.of(self.whole()), self.scales())
        # Fused matrices are large, and their rows lie one behind the other.
        (begin, end), entry = self.part.rows, self.entry
        row = entry.nbytes // entry.shape[0]
        shape = (end - begin, *entry.shape[1:])
        at = entry.begin + begin * row, entry.begin + end * row
        values = self.file.read(TensorEntry(entry.name, entry.dtype, shape, *at))
        return dequantised(replace(self.part, rows=None).of(values), self.scales())

    def mapped(self) -> Array:
        """The same, of the file's own pages where it can be; see `WeightsFile.mapped`."""
        whole = self.file.mapped(self.entry)
        return dequantised(self.part.of(whole), self.scales())

    def whole(self) -> Array:
        """All of the tensor, as it is stored."""
        return self.file.read(self.entry)

    def scales(self) -> Array | None:
        """What the stored numbers are multiplied by, so shaped that it broadcasts; None for 1."""
        if self.scale is None:
            return None
        scales = self.file.read(self.scale).astype(np.float64)
        if scales.size <= 1:
            return scales.reshape(())
        return self.part.rows_of(scales.reshape(-1, *[1] * (len(self.entry.shape) - 1)))


def is_companion(name: str) -> bool:
    """Whether a tensor of this name is no parameter of its network but tells how one is stored."""
    return f".{name}".endswith(_COMPANIONS)


def stored_in(file: WeightsFile) -> dict[str, Stored]:
    """Every tensor of a file by its name, with its scale if it has one.

    Raises UnsupportedError for a scale that is neither one number nor one for each row, and for
    fp8 with something else beside it: what is not known to be a scale may be one.
    """
    names = sorted(file.header.by_name)
    return {
        entry.name: Stored(file, entry, _scale(file, entry, names)) for entry in file.header.tensors
    }


def _scale(file: WeightsFile, entry: TensorEntry, names: Sequence[str]) -> TensorEntry | None:
    layer = entry.name.removesuffix(".weight")
    if entry.dtype not in FP8 or layer == entry.name:
        return None
    scales = []
    for name in _beside(layer, names):
        rest = name.removeprefix(layer)
        if rest in _SCALES:
            scales.append(file.header.by_name[name])
        elif rest not in (".weight", ".bias", *_COMPANIONS) and _may_scale(rest):
            raise _unknown_scale(file, entry, name, "a name that sepme knows")
    if not scales:
        return None
    scale = scales[0]
    if len(scales) > 1:
        raise _unknown_scale(file, entry, scales[1].name, f"{scale.name} alone")
    count = prod(scale.shape)
    if scale.dtype not in NAMES.keys() - FP8.keys() or count not in (1, *entry.shape[:1]):
        raise _unknown_scale(
            file,
            entry,
            scale.name,
            "one floating number, or one for each row",
            f"{readable(scale.dtype)} {list(scale.shape)}",
        )
    return scale


def _beside(layer: str, names: Sequence[str]) -> Iterator[str]:
    """Of sorted names, those that are the layer's: "LAYER.weight", "LAYER_scale"."""
    for begin in (f"{layer}.", f"{layer}_"):
        for name in islice(names, bisect_left(names, begin), None):
            if not name.startswith(begin):
                break
            yield name


def _may_scale(rest: str) -> bool:
    """Whether what follows a layer's name may be a scale's: all within the layer but a LoRA's, and
    what says so beside it."""
    return "lora" not in rest if rest.startswith(".") else "scale" in rest


def _unknown_scale(
    file: WeightsFile, entry: TensorEntry, name: str, expected: str, found: str | None = None
) -> UnsupportedError:
    return UnsupportedError(
        f"{file.path}: {name} may scale {entry.name} in a way that sepme does not know; convert "
        "the model to plain fp16 or bf16",
        file=file.path,
        expected=expected,
        found=found or name,
    )


def dequantised(values: Array, scales: Array | None) -> Array:
    """Stored numbers times their scales, exact in float64; unchanged without scales."""
    return values if scales is None else values.astype(np.float64) * scales


def quantised(values: npt.NDArray[np.float64], scales: Array | None, dtype: str) -> Array:
    """Numbers as they are stored: divided by their scales and rounded once to `dtype`.

    With scales, what leaves the dtype's range becomes its largest number: a scale is chosen so
    that the largest weight just fits, and what goes beyond it is lost as rounding loses it there.
    """
    wanted = numpy_dtype(dtype)
    if scales is None:
        return cast_once(values, wanted)
    largest = float(ml_dtypes.finfo(wanted).max)  # type: ignore[no-untyped-call]
    return cast_once(np.clip(values / scales, -largest, largest), wanted)

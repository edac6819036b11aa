"""Reading and writing `.sepme` files: equal patches have equal bytes, and the other way round."""

import io
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from patch_spec import limits
from patch_spec.errors import FormatError
from patch_spec.header import (
    PREFIX_BYTES,
    Header,
    encode_header,
    header_length,
    parse_header,
)
from patch_spec.increment import Description, Increment, Summary
from patch_spec.manifest import Manifest, Patch
from patch_spec.validate import (
    METADATA_KEY,
    canonical_order,
    validate_factors,
    validate_header,
    validate_layout,
)

Source = str | PathLike[str] | BinaryIO | bytes

_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "U8": np.dtype("u1"),
}
_CHUNK_BYTES = 2**20


def read_patch(source: Source) -> Patch:
    """The patch in a file, a stream or bytes.

    A stream is read from where it stands to its end, and need not be seekable.
    Raises FormatError for any broken rule, OSError if the file cannot be read.
    """
    with _open(source) as stream:
        header, manifest = _read_header(stream)
        data = _read_data(stream, header.data_length)
    factors = {
        entry.name: np.frombuffer(data[entry.begin : entry.end], _DTYPES[entry.dtype]).reshape(
            entry.shape
        )
        for entry in header.tensors
    }
    increments = tuple(
        _increment(summary, factors, manifest.base.width) for summary in manifest.increments
    )
    validate_factors(increments, manifest.increments)
    return Patch(
        base=manifest.base,
        increments=increments,
        separable_from=manifest.separable_from,
        protected=manifest.protected,
        tool=manifest.tool,
        created=manifest.created,
        recipe=manifest.recipe,
    )


def read_manifest(source: Source) -> Manifest:
    """What the patch says, from its header alone: its factors are not looked at.

    A file's or bytes' length is held against the header; of a stream only the header is read.
    Raises as `read_patch` does, for the rules H, J and P.
    """
    with _open(source) as stream:
        return _read_header(stream, _size(source))[1]


def patch_bytes(patch: Patch) -> bytes:
    """The one file that this patch has; `read_patch(patch_bytes(p)) == p`.

    Raises FormatError if the patch breaks a rule: what is returned has been read once.
    """
    data = assemble(patch)
    read_patch(data)
    return data


def assemble(patch: Patch) -> bytes:
    """`patch_bytes` without the reading: the test vectors need files that break rules."""
    factors = {
        f"{increment.slug}.{name}": array
        for increment in patch.increments
        for name, array in increment.factors.items()
    }
    shapes = {(_dtype_name(array, name), name): array.shape for name, array in factors.items()}
    entries = canonical_order(shapes)
    header_bytes = encode_header({METADATA_KEY: patch.manifest.to_text()}, entries)
    arrays = (factors[entry.name].astype(_DTYPES[entry.dtype], copy=False) for entry in entries)
    return b"".join([header_bytes, *(array.tobytes() for array in arrays)])


def patch_digest(patch: Patch) -> str:
    """SHA-256 of the patch's file."""
    return sha256(patch_bytes(patch)).hexdigest()


def _open(source: Source) -> AbstractContextManager[BinaryIO]:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, (str, PathLike)):
        return Path(source).open("rb")
    return nullcontext(source)


def _size(source: Source) -> int | None:
    if isinstance(source, bytes):
        return len(source)
    return Path(source).stat().st_size if isinstance(source, (str, PathLike)) else None


def _read_header(stream: BinaryIO, size: int | None = None) -> tuple[Header, Manifest]:
    prefix8 = _read_up_to(stream, PREFIX_BYTES)
    length = header_length(prefix8, size, limits.PATCH_HEADER_BYTES)
    json_bytes = _read_up_to(stream, length)
    header = parse_header(prefix8, json_bytes, size)
    manifest = Manifest.from_text(validate_header(header, prefix8 + json_bytes))
    validate_layout(header, manifest)
    return header, manifest


def _read_data(stream: BinaryIO, length: int) -> memoryview:
    # One byte more, to see that there is none.
    data = _read_up_to(stream, length + 1)
    if len(data) != length:
        raise FormatError(
            "H11",
            "the data section is not as long as the header says",
            expected=f"{length} bytes",
            found="more" if len(data) > length else len(data),
        )
    return memoryview(data)


def _read_up_to(stream: BinaryIO, length: int) -> bytes:
    """At most `length` bytes, in chunks: a length that lies must not reserve memory."""
    chunks = []
    while length > 0 and (chunk := stream.read(min(length, _CHUNK_BYTES))):
        chunks.append(chunk)
        length -= len(chunk)
    return b"".join(chunks)


def _increment(summary: Summary, factors: Mapping[str, npt.NDArray[Any]], width: int) -> Increment:
    described = {name: getattr(summary, name) for name in Description.__dataclass_fields__}
    slug = summary.slug
    return Increment(
        **described,
        basis=factors.get(f"{slug}.basis", np.zeros((0, width), np.float32)),
        shift=factors.get(f"{slug}.shift"),
        pooled_basis=factors.get(f"{slug}.pooled.basis"),
        pooled_shift=factors.get(f"{slug}.pooled.shift"),
        up={target: factors[f"{slug}.up.{target}"] for target in summary.exponents},
        down={
            target: factors[f"{slug}.down.{target}"]
            for target in summary.exponents
            if summary.kind == "lora"
        },
        gaps={layer: factors[f"{slug}.mask.{layer}"] for layer in summary.masks},
    )


def _dtype_name(array: npt.NDArray[Any], name: str) -> str:
    names = {(dtype.kind, dtype.itemsize): dtype_name for dtype_name, dtype in _DTYPES.items()}
    try:
        return names[array.dtype.kind, array.dtype.itemsize]
    except KeyError:
        raise FormatError(
            "P9",
            "a factor has the wrong dtype",
            where=name,
            expected="float32, float16 for up, or uint8 for a mask",
            found=array.dtype,
        ) from None

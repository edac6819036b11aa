"""The header of a checkpoint that is about to be written, made from that of another.

What is made depends on nothing but that header and the stack record, which is what makes a
checkpoint with a concept taken out again equal, byte for byte, to one that never lost it.
"""

from dataclasses import replace

from patch_spec.header import PREFIX_BYTES, Header, TensorEntry, encode_header
from patch_spec.stack import StackRecord
from sepme_cli.checkpoints.disk.files import BLOCK
from sepme_cli.checkpoints.structure.dtypes import NAMES, numpy_dtype
from sepme_cli.checkpoints.structure.gguf import GgufHeader

RECORD = "sepme"
"""The metadata entry with the stack record."""
STALE = frozenset({"modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash"})
"""Digests of tensors' bytes (of the ModelSpec, of kohya's scripts), which no longer hold when one
of them changes. They are dropped: a wrong digest is worse than none."""

_RESERVE = 1024
"""Spaces that a new record leaves, in bytes, for the next ones: about four increments."""


def with_record(header: Header, header_bytes: bytes, record: StackRecord | None) -> bytes:
    """The header with another stack record, or without one; the data section stays as it is.

    header_bytes: what `header` was parsed from. The header grows by whole pages only, so that a
    file system that shares blocks can share those of the data, and never shrinks.
    """
    if record is None and RECORD not in header.metadata:
        return header_bytes
    if isinstance(header, GgufHeader):
        return header.with_record(RECORD, record)
    metadata = _lasting(header)
    if record is not None:
        metadata[RECORD] = record.to_metadata()
    encoded = encode_header(metadata, header.tensors)
    text = encoded[PREFIX_BYTES:].rstrip(b" ")
    reserve = 0 if RECORD in header.metadata else _RESERVE
    pages = max(0, -((header.length - len(text) - reserve) // BLOCK))
    return _padded(text, header.length + pages * BLOCK)


def in_dtype(header: Header, dtype: str) -> tuple[Header, bytes]:
    """The header with every floating tensor in `dtype` ("F16"), in its order, and its bytes."""
    position, entries = 0, []
    for entry in header.tensors:
        converted = dtype if entry.dtype in NAMES else entry.dtype
        size = entry.nbytes
        if converted != entry.dtype:
            size = size // numpy_dtype(entry.dtype).itemsize * numpy_dtype(dtype).itemsize
        entries.append(TensorEntry(entry.name, converted, entry.shape, position, position + size))
        position += size
    metadata = {name: text for name, text in header.metadata.items() if name not in STALE}
    encoded = encode_header(metadata, entries)
    length = len(encoded) - PREFIX_BYTES
    return replace(header, metadata=metadata, tensors=tuple(entries), length=length), encoded


def same_but_record(a: Header, b: Header) -> bool:
    """Whether two headers tell of the same tensors and the same metadata, stack record aside."""
    if isinstance(a, GgufHeader):
        return a.same_but(RECORD, b)
    return a.tensors == b.tensors and _lasting(a) == _lasting(b)


def _lasting(header: Header) -> dict[str, str]:
    """The metadata that holds whatever the tensors' values are."""
    return {
        name: text for name, text in header.metadata.items() if name != RECORD and name not in STALE
    }


def _padded(text: bytes, length: int) -> bytes:
    return length.to_bytes(PREFIX_BYTES, "little") + text.ljust(length)

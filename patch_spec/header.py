"""The strict safetensors header: of patches, undo journals and checkpoints (rules H1 to H12).

The safetensors library accepts duplicate keys, unknown fields, and names that are paths; a file
that two readers understand differently is an attack, so all of these are refused here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from types import MappingProxyType
from typing import Any, BinaryIO

from patch_spec import limits
from patch_spec.canonical import canonical_json, parse_json_strict
from patch_spec.errors import FormatError
from patch_spec.text import FORBIDDEN

PREFIX_BYTES = 8
METADATA_KEY = "__metadata__"

DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("F4",), 4),
        **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
        **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
        **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
        **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
        **dict.fromkeys(("I32", "U32", "F32"), 32),
        **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    }
)
"""Bits of one element of every dtype that safetensors knows."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a header: its bytes are [begin, end) of the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """How many bytes the tensor has."""
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """A parsed header.

    metadata: the texts of `__metadata__`. tensors: in the order of their bytes in the file.
    length: bytes of the JSON part, padding included.
    """

    metadata: Mapping[str, str]
    tensors: tuple[TensorEntry, ...]
    length: int

    @property
    def data_start(self) -> int:
        """Where in the file the data section begins."""
        return PREFIX_BYTES + self.length

    @property
    def data_length(self) -> int:
        """Bytes of the data section."""
        return self.tensors[-1].end if self.tensors else 0

    @cached_property
    def by_name(self) -> Mapping[str, TensorEntry]:
        """The tensors by their names."""
        return MappingProxyType({entry.name: entry for entry in self.tensors})


def header_length(
    prefix8: bytes, file_size: int | None, limit: int = limits.CHECKPOINT_HEADER_BYTES
) -> int:
    """Bytes of the JSON part, from a file's first eight; FormatError H1 or H2 if it cannot be.

    file_size: bytes, or None where it is not known before the end (a pipe).
    """
    if len(prefix8) < PREFIX_BYTES:
        raise FormatError(
            "H2", "the file ends inside its first eight bytes", expected=8, found=len(prefix8)
        )
    length = int.from_bytes(prefix8[:PREFIX_BYTES], "little")
    if length > limit:
        raise FormatError(
            "H1", "the header is too long", expected=f"at most {limit} bytes", found=length
        )
    if file_size is not None and length > file_size - PREFIX_BYTES:
        raise FormatError(
            "H2", "the file ends inside its header", expected=length, found=file_size - PREFIX_BYTES
        )
    return length


def parse_header(prefix8: bytes, json_bytes: bytes, file_size: int | None) -> Header:
    """The header in a file's first bytes.

    json_bytes: the JSON part with its padding. file_size: bytes of the whole file, which must be
    exactly what the header says; None leaves that to the caller (a pipe).
    Raises FormatError, rules H1 to H12.
    """
    length = header_length(prefix8, file_size)
    if len(json_bytes) != length:
        raise FormatError(
            "H2", "the file ends inside its header", expected=length, found=len(json_bytes)
        )
    _check_parts(json_bytes)
    members = _json_object(json_bytes)
    metadata = _metadata(members.pop(METADATA_KEY, None))
    entries = [_entry(name, fields) for name, fields in members.items()]
    header = Header(metadata, _contiguous(entries), length)
    expected = header.data_start + header.data_length
    if file_size is not None and file_size != expected:
        raise FormatError(
            "H11", "the file's size is not what its header says", expected=expected, found=file_size
        )
    return header


def read_header(
    file: BinaryIO, file_size: int | None, *, limit: int = limits.CHECKPOINT_HEADER_BYTES
) -> Header:
    """The header of an open file, which is left where the data section begins.

    file_size: bytes, or None for a pipe. limit: the longest JSON part to read, in bytes.
    Raises FormatError, rules H1 to H12.
    """
    prefix8 = file.read(PREFIX_BYTES)
    length = header_length(prefix8, file_size, limit)
    return parse_header(prefix8, file.read(length), file_size)


def encode_header(
    metadata: Mapping[str, str], tensors: Iterable[TensorEntry], *, minimum_length: int = 0
) -> bytes:
    """A file's first bytes: the length and the canonical JSON, padded with spaces to eight bytes.

    minimum_length: the JSON part is at least so long; with a present file's `Header.length` the
    data section stays where it is, if the new header fits.
    """
    members: dict[str, Any] = {METADATA_KEY: dict(metadata)} if metadata else {}
    for entry in tensors:
        members[entry.name] = {
            "data_offsets": [entry.begin, entry.end],
            "dtype": entry.dtype,
            "shape": list(entry.shape),
        }
    text = canonical_json(members, rule="H12")
    length = max(len(text), minimum_length)
    if length > minimum_length:
        length += -length % PREFIX_BYTES
    return length.to_bytes(PREFIX_BYTES, "little") + text.ljust(length)


def _check_parts(json_bytes: bytes) -> None:
    """Before the header is parsed, which can take thirty times as much memory as it has bytes."""
    parts = sum(map(json_bytes.count, (b"[", b"{", b",")))
    if parts > limits.HEADER_PARTS:
        raise FormatError(
            "H1",
            "the header has too many parts",
            expected=f"at most {limits.HEADER_PARTS} brackets and commas",
            found=parts,
        )


def _json_object(json_bytes: bytes) -> dict[str, Any]:
    text = json_bytes.rstrip(b" ")
    if text[:1] != b"{" or text[-1:] != b"}":
        raise FormatError("H3", "the header is not a JSON object padded with spaces")
    value = parse_json_strict(text, syntax="H3", duplicate="H4")
    members: dict[str, Any] = value
    return members


def _metadata(value: Any) -> Mapping[str, str]:
    # safetensors itself reads null as none.
    value = {} if value is None else value
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise FormatError("H5", "metadata must map texts to texts", where=METADATA_KEY)
    return MappingProxyType(value)


def _entry(name: str, fields: Any) -> TensorEntry:
    _check_name(name)
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise FormatError("H6", "a tensor has exactly dtype, shape and data_offsets", where=name)
    dtype = fields["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise FormatError("H7", "unknown dtype", where=name, found=repr(dtype)[:40])
    shape = _naturals(fields["shape"], limits.DIMENSIONS, "H8", name)
    offsets = _naturals(fields["data_offsets"], 2, "H9", name)
    bits = DTYPE_BITS[dtype] * prod(shape)
    if len(offsets) != 2 or bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise FormatError(
            "H9",
            "data_offsets must be a begin and an end as far apart as dtype and shape say",
            where=name,
            expected=f"{bits / 8:g} bytes" if bits < 2**53 else "fewer than 2**53 bits",
            found=list(offsets),
        )
    return TensorEntry(name, dtype, shape, *offsets)


def _check_name(name: str) -> None:
    steps = name.replace("\\", "/").split("/")
    is_path = ".." in steps or (len(steps) > 1 and not steps[0])
    size = len(name.encode())
    if is_path or FORBIDDEN.search(name) or not 0 < size <= limits.TENSOR_NAME_BYTES:
        raise FormatError(
            "H12",
            f"a tensor's name must be 1 to {limits.TENSOR_NAME_BYTES} bytes, no path, and without "
            "control characters",
            where=ascii(name)[:80],
        )


def _naturals(value: Any, most: int, rule: str, where: str) -> tuple[int, ...]:
    good = isinstance(value, list) and len(value) <= most
    if not good or not all(type(n) is int and 0 <= n <= limits.SAFE_INTEGER for n in value):
        raise FormatError(
            rule,
            f"must be a list of at most {most} whole numbers from 0 to 2**53 - 1",
            where=where,
            found=repr(value)[:80],
        )
    return tuple(value)


def _contiguous(entries: list[TensorEntry]) -> tuple[TensorEntry, ...]:
    entries.sort(key=lambda entry: (entry.begin, entry.end, entry.name))
    position = 0
    for entry in entries:
        if entry.begin != position:
            raise FormatError(
                "H10",
                "tensors overlap or leave a hole",
                where=entry.name,
                expected=f"a begin of {position}",
                found=entry.begin,
            )
        position = entry.end
    return tuple(entries)

"""The header of a GGUF file: what llama.cpp's format says of its tensors.

A GGUF file is a magic number and counts, fields (key, type, value), what is said of each tensor,
padding, and the tensors' bytes, each of which begins at a multiple of the file's alignment. Most
of a model's tensors are quantised in blocks there; small ones, as the layers of Flux that read the
text, mostly are not. Nothing here computes with blocks: only their size is known.
"""

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import pairwise
from math import prod
from types import MappingProxyType

from patch_spec import limits
from patch_spec.header import PREFIX_BYTES, Header, TensorEntry
from patch_spec.stack import StackRecord
from sepme_cli.errors import MalformedError, SepmeError, UnsupportedError

MAGIC = b"GGUF"
BLOCKS: Mapping[int, tuple[str, int, int]] = MappingProxyType(
    {
        0: ("F32", 1, 4), 1: ("F16", 1, 2), 28: ("F64", 1, 8), 30: ("BF16", 1, 2),
        24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
        2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
        8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
        10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
        13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
        16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
        19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
        22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56),
        34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
        40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
    }
)  # fmt: skip
"""By number: a type's name, and how many numbers are stored together in how many bytes."""
QUANTISED = frozenset(name for name, numbers, _ in BLOCKS.values() if numbers > 1)
"""The types whose values are not stored one by one."""

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a field's value, by the number of its type."""
_UINT32, _STRING, _ARRAY = 4, 8, 9
_WHOLE = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
_NUMBERS = {**_WHOLE, 6: "<f", 7: "<?", 12: "<d"}
_DEPTH = 4
"""Arrays within arrays."""
_DIMENSIONS = 8
"""The format says four, and files of video models have five."""
_TENSORS, _FIELDS, _TEXTS = 2**15, 2**15, 2**19
"""How many there may be; texts are those in arrays, as a tokenizer's words. Real models have less
than a tenth of these."""
_ALIGNMENT_KEY, _ALIGNMENT = "general.alignment", 32
_SHAPE = "comfy.gguf.orig_shape."
"""What stands before a tensor's name in a field with its shape: converters write many convolutions,
and small matrices, in rows of 256 numbers."""
_MOST_ALIGNMENT = 2**16
_VERSIONS = (2, 3)

Take = Callable[[int], bytes]
"""Reads so many bytes more."""


@dataclass(frozen=True)
class GgufHeader(Header):
    """A parsed header. `length` is such that the data section begins at `data_start`.

    metadata: the fields: texts and numbers as such, arrays by their digests. fields: the same as
    they are in the file, by key. infos: what is said of the tensors, as it is in the file. size:
    bytes of the data section, the padding behind the last tensor included.
    """

    version: int = 3
    fields: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    infos: bytes = field(default=b"", repr=False)
    alignment: int = _ALIGNMENT
    size: int = 0

    @property
    def data_length(self) -> int:
        return self.size

    def with_record(self, key: str, record: StackRecord | None) -> bytes:
        """A file's first bytes with another stack record in the field `key`, the last, or none."""
        fields = [raw for name, raw in self.fields.items() if name != key]
        if record is not None:
            texts = (key.encode(), record.to_metadata().encode())
            name, value = (struct.pack("<Q", len(text)) + text for text in texts)
            fields.append(name + struct.pack("<I", _STRING) + value)
        counts = struct.pack("<IQQ", self.version, len(self.tensors), len(fields))
        start = MAGIC + counts + b"".join(fields) + self.infos
        if len(start) + self.alignment > limits.CHECKPOINT_HEADER_BYTES:
            raise UnsupportedError(
                "the header of this GGUF file has no room for the record of what is in it",
                expected=f"at most {limits.CHECKPOINT_HEADER_BYTES} bytes",
                found=len(start),
            )
        return start + bytes(-len(start) % self.alignment)

    def same_but(self, key: str, other: Header) -> bool:
        """Whether another header tells of the same tensors and fields, one field aside."""
        return isinstance(other, GgufHeader) and self._lasting(key) == other._lasting(key)

    def _lasting(self, key: str) -> object:
        fields = {name: raw for name, raw in self.fields.items() if name != key}
        return fields, self.infos, self.version, self.alignment, self.size


def read_gguf_header(take: Take, file_size: int, name: object) -> GgufHeader:
    """The header of a file that is read from its beginning. name: what errors call it.

    Raises MalformedError for what is cut off or contradicts itself, UnsupportedError for another
    version and for types that are not known.
    """
    return _Reader(take, file_size, name).header()


_Info = tuple[str, int, tuple[int, ...], int]


class _Reader:
    """Reads one header."""

    def __init__(self, take: Take, file_size: int, name: object) -> None:
        self._take, self.file_size, self.name = take, file_size, name
        self.at = self.texts = 0
        self.shapes: dict[str, tuple[int, ...]] = {}

    def header(self) -> GgufHeader:
        self.take(len(MAGIC))
        version = self.number("<I")
        if version not in _VERSIONS:
            raise UnsupportedError(
                f"{self.name} is a GGUF file of a version that sepme does not read",
                file=self.name,
                expected=f"version {' or '.join(map(str, _VERSIONS))}, little-endian",
                found=version,
            )
        tensors, count = self.number("<Q"), self.number("<Q")
        self.most("tensors", tensors, _TENSORS)
        self.most("fields", count, _FIELDS)
        fields, texts, alignment = self.fields(count)
        begin = self.at
        raw = bytearray()
        found = list(self.infos(tensors, raw))
        start = begin + len(raw)
        start += -start % alignment
        size = max(0, self.file_size - start)
        entries = self.checked(found, alignment, size)
        return GgufHeader(
            MappingProxyType(texts),
            entries,
            start - PREFIX_BYTES,
            version,
            MappingProxyType(fields),
            bytes(raw),
            alignment,
            size,
        )

    def take(self, count: int) -> bytes:
        self.at += count
        if self.at > min(self.file_size, limits.CHECKPOINT_HEADER_BYTES):
            raise self.malformed(
                "the file ends inside its header, or its header is too long",
                f"at most {limits.CHECKPOINT_HEADER_BYTES} bytes in a file of {self.file_size}",
                f"{self.at} bytes or more",
            )
        found = self._take(count)
        if len(found) < count:
            raise self.malformed("the file has become shorter", f"{self.at} bytes", "fewer")
        return found

    def number(self, how: str) -> int:
        return int(struct.unpack(how, self.take(struct.calcsize(how)))[0])

    def text(self) -> tuple[str, bytes]:
        """A string, and its bytes with their count."""
        length = self.take(8)
        raw = self.take(int.from_bytes(length, "little"))
        try:
            return raw.decode(), length + raw
        except UnicodeDecodeError:
            raise self.malformed("a name or a text is not UTF-8", "UTF-8", raw[:40]) from None

    def fields(self, count: int) -> tuple[dict[str, bytes], dict[str, str], int]:
        """All fields as they are, those that are texts, and the alignment."""
        fields: dict[str, bytes] = {}
        texts: dict[str, str] = {}
        alignment = _ALIGNMENT
        for _ in range(count):
            key, raw = self.text()
            if key in fields:
                raise self.malformed("two fields have one name", "each name once", key)
            kind = self.take(4)
            number = int.from_bytes(kind, "little")
            if number == _STRING:
                texts[key], value = self.text()
            else:
                value = self.value(number, 0)
                texts[key] = self.said(key, number, value)
            if key == _ALIGNMENT_KEY:
                alignment = int.from_bytes(value, "little") if number == _UINT32 else 0
            fields[key] = raw + kind + value
        if not 1 <= alignment <= _MOST_ALIGNMENT or alignment & (alignment - 1):
            expected = f"a power of two up to {_MOST_ALIGNMENT}"
            raise self.malformed("tensors cannot be aligned so", expected, alignment)
        return fields, texts, alignment

    def said(self, key: str, kind: int, value: bytes) -> str:
        """A value that is no text, as one; an array of a tensor's sizes is kept."""
        if kind != _ARRAY:
            return str(struct.unpack(_NUMBERS[kind], value)[0])
        inner, count = struct.unpack("<IQ", value[:12])
        if key.startswith(_SHAPE) and inner in _WHOLE and count <= _DIMENSIONS:
            sizes = struct.iter_unpack(_WHOLE[inner], value[12:])
            self.shapes[key.removeprefix(_SHAPE)] = tuple(size for (size,) in sizes)
        return f"array, sha256 {sha256(value).hexdigest()}"

    def most(self, what: str, found: int, limit: int) -> None:
        """MalformedError for more of something than any model has."""
        if found > limit:
            raise self.malformed(f"there are too many {what}", f"at most {limit}", found)

    def value(self, kind: int, depth: int) -> bytes:
        """A value as it is in the file."""
        if kind == _STRING:
            return self.text()[1]
        if kind == _ARRAY:
            if depth == _DEPTH:
                raise self.malformed("arrays are nested too deep", f"at most {_DEPTH}", depth + 1)
            begin = self.take(12)
            inner, count = struct.unpack("<IQ", begin)
            if inner in _SIZES:
                return begin + self.take(_SIZES[inner] * count)
            self.texts += count
            self.most("texts in arrays", self.texts, _TEXTS)
            return begin + b"".join(self.value(inner, depth + 1) for _ in range(count))
        if kind not in _SIZES:
            raise self.malformed("a field is of no known type", "a type from 0 to 12", kind)
        return self.take(_SIZES[kind])

    def infos(self, count: int, raw: bytearray) -> Iterator[_Info]:
        """Name, type by its number, shape and offset of each tensor. raw: takes what was read."""
        for _ in range(count):
            name, text = self.text()
            raw += text + (many := self.take(4))
            dimensions = int.from_bytes(many, "little")
            if dimensions > _DIMENSIONS:
                raise self.malformed(
                    f"{name} has too many dimensions", f"at most {_DIMENSIONS}", dimensions
                )
            raw += (rest := self.take(8 * dimensions + 12))
            *shape, kind, offset = struct.unpack(f"<{dimensions}QIQ", rest)
            if kind not in BLOCKS:
                raise UnsupportedError(
                    f"{self.name}: {name} is of a type that sepme does not know",
                    file=self.name,
                    expected=", ".join(known for known, _, _ in BLOCKS.values()),
                    found=f"GGML type {kind}",
                )
            # The dimension that varies fastest comes first there, and last with everybody else.
            yield name, kind, self.sized(name, kind, tuple(reversed(shape))), offset

    def sized(self, name: str, kind: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Its own shape; MalformedError where whole blocks do not fill a row."""
        dtype, numbers, _ = BLOCKS[kind]
        if 0 in shape:
            raise self.malformed(f"{name} is empty", "no dimension of 0", list(shape))
        if (shape[-1] if shape else 1) % numbers:
            raise self.malformed(
                f"{name} has a shape that it cannot have as {dtype}",
                f"rows of a multiple of {numbers}",
                list(shape),
            )
        own = self.shapes.get(name, shape)
        if prod(own) != prod(shape) or min(own, default=1) < 1:
            raise self.malformed(
                f"{name} is not as large as {_SHAPE}{name} says", prod(shape), list(own)
            )
        return own

    def checked(self, found: list[_Info], alignment: int, size: int) -> tuple[TensorEntry, ...]:
        """The tensors in the order of their bytes, which do not overlap."""
        entries = []
        for name, kind, shape, offset in found:
            dtype, numbers, count = BLOCKS[kind]
            end = offset + prod(shape) // numbers * count
            if offset % alignment or end > size:
                raise self.malformed(
                    f"{name} lies where it cannot: the file is cut off or damaged",
                    f"a multiple of {alignment}, and an end within {size} bytes",
                    f"{offset} to {end}",
                )
            entries.append(TensorEntry(name, dtype, shape, offset, end))
        if len({entry.name for entry in entries}) < len(entries):
            raise self.malformed("two tensors have one name", "each name once", "one twice")
        entries.sort(key=lambda entry: entry.begin)
        for one, other in pairwise(entries):
            if one.end > other.begin:
                raise self.malformed(
                    f"{one.name} and {other.name} overlap", f"{one.end} or more", other.begin
                )
        end = entries[-1].end if entries else 0
        if size - end >= alignment:
            raise self.malformed(
                "the file's size is not what its header says",
                f"less than {alignment} bytes of padding behind the last tensor",
                size - end,
            )
        return tuple(entries)

    def malformed(self, what: str, expected: object, found: object) -> SepmeError:
        return MalformedError(
            f"{self.name}: {what}", file=self.name, expected=expected, found=found
        )

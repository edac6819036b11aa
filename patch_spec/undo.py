"""The undo record: what an undo journal says of itself (SPEC.md, "The undo journal")."""

from dataclasses import dataclass
from typing import Self

from patch_spec.errors import FormatError
from patch_spec.header import PREFIX_BYTES, Header, parse_header
from patch_spec.records import Fields, dump_record, load_record

FORMAT = "sepme-undo"
METADATA_KEY = "sepme_undo"
HEADER_TENSOR = "header"


@dataclass(frozen=True)
class UndoRecord:
    """What `__metadata__["sepme_undo"]` of a journal says.

    base: the digest of the base that the original tensors belong to. patched_header: SHA-256 of
    the first bytes of the patched file, up to its data section.
    """

    base: str
    patched_header: str

    def to_metadata(self) -> str:
        """The record's canonical JSON."""
        return dump_record(FORMAT, vars(self)).decode()

    @classmethod
    def from_metadata(cls, text: str) -> Self:
        """A record from its canonical JSON; FormatError, rules J1 to J9."""
        fields = Fields(load_record(text.encode(), FORMAT), ("base", "patched_header"), "undo")
        return cls(fields.digest("base"), fields.digest("patched_header"))


def undo_record(journal: Header) -> UndoRecord:
    """The record of a journal; FormatError U1, U2 or J if it has none or no original header."""
    if set(journal.metadata) != {METADATA_KEY}:
        raise FormatError("U1", "a journal's metadata has exactly one entry", expected=METADATA_KEY)
    entry = journal.by_name.get(HEADER_TENSOR)
    if entry is None or entry.dtype != "U8" or len(entry.shape) != 1:
        raise FormatError(
            "U2", "a journal holds the original header", where=HEADER_TENSOR, expected="U8 [bytes]"
        )
    return UndoRecord.from_metadata(journal.metadata[METADATA_KEY])


def original_header(journal: Header, header_bytes: bytes) -> Header:
    """The header that a file had before it was patched.

    header_bytes: the journal's tensor "header". Raises FormatError, rules H, and U3 if the
    journal's tensors are not tensors of that file.
    """
    header = parse_header(header_bytes[:PREFIX_BYTES], header_bytes[PREFIX_BYTES:], None)
    for entry in journal.tensors:
        if entry.name == HEADER_TENSOR:
            continue
        original = header.by_name.get(entry.name)
        if original is None or (original.dtype, original.shape) != (entry.dtype, entry.shape):
            raise FormatError(
                "U3",
                "a journal's tensor is not one of the original file",
                where=entry.name,
                expected=None if original is None else f"{original.dtype} {list(original.shape)}",
                found=f"{entry.dtype} {list(entry.shape)}",
            )
    return header

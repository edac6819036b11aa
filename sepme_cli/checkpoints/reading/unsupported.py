"""What a file really is that is none of ours: told by how it begins, never by its name.

What is downloaded wrongly is the commonest reason why a model cannot be read: a pointer, a page or
an error of the server lies where the weights should be. So each kind comes with what to do.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from patch_spec.errors import FormatError
from patch_spec.header import PREFIX_BYTES
from sepme_cli.errors import MalformedError

SAFETENSORS = "a safetensors file"
ZIP = b"PK\x03\x04"
"""How a file begins that torch has saved, but for its oldest format, which is a bare pickle."""
TORCH_ARCHIVE = "a pickle in a zip archive, as torch saves them"
TORCH_PICKLE = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")
"""How that one begins: a pickled magic number."""

_START = 4096
"""Bytes that are looked at."""
_SHOWN = 80
"""Characters of a stranger's text that are shown."""

_CONVERT = "convert it to safetensors first"
_UNPACK = "unpack it, and name the model that is in it"
_AGAIN = "download it again"
_EXPORTED = "it was compiled from a model: name that model, and compile the patched one again"
_PICTURE = "name the model, not its preview"


@dataclass(frozen=True)
class UnsupportedFormat:
    """A format that is not read.

    title: what the file is. advice: what to do. detail: what more there is to say of it.
    """

    title: str
    advice: str
    detail: str = ""


_PICKLES = tuple(bytes([0x80, protocol]) for protocol in range(1, 6))
_MAGIC: tuple[tuple[int, bytes | tuple[bytes, ...], UnsupportedFormat], ...] = (
    (0, _PICKLES, UnsupportedFormat("a pickle", _CONVERT)),
    (0, b"GGUF", UnsupportedFormat("a GGUF file", "name it where the model belongs")),
    (0, (b"lmgg", b"tjgg", b"fmgg"), UnsupportedFormat("a GGML file", _CONVERT)),
    (0, b"\x89HDF", UnsupportedFormat("an HDF5 file", _CONVERT)),
    (0, b"\x93NUMPY", UnsupportedFormat("a numpy array", _CONVERT)),
    (0, (b"ftrt", b"ptrt"), UnsupportedFormat("a TensorRT engine", _EXPORTED)),
    (4, b"TFL3", UnsupportedFormat("a TensorFlow Lite model", _EXPORTED)),
    (0, (b"PK\x05\x06", b"PK\x07\x08"), UnsupportedFormat("a zip archive", _UNPACK)),
    (257, b"ustar", UnsupportedFormat("a tar archive", _UNPACK)),
    (0, b"7z\xbc\xaf\x27\x1c", UnsupportedFormat("a 7z archive", _UNPACK)),
    (0, b"Rar!\x1a\x07", UnsupportedFormat("a RAR archive", _UNPACK)),
    (0, b"\x1f\x8b\x08", UnsupportedFormat("a gzip archive", _UNPACK)),
    (0, b"\xfd7zXZ\0", UnsupportedFormat("an xz archive", _UNPACK)),
    (0, b"\x28\xb5\x2f\xfd", UnsupportedFormat("a zstd archive", _UNPACK)),
    (0, b"BZh", UnsupportedFormat("a bzip2 archive", _UNPACK)),
    (0, b"\x89PNG", UnsupportedFormat("an image", _PICTURE)),
    (0, b"\xff\xd8\xff", UnsupportedFormat("an image", _PICTURE)),
    (8, b"WEBP", UnsupportedFormat("an image", _PICTURE)),
    (0, b"%PDF", UnsupportedFormat("a PDF document", _AGAIN)),
)
_LFS = re.compile(rb"version https://(git-lfs|hawser)\.github\.com/spec/")
_LFS_SIZE = re.compile(rb"^size (\d+)$", re.MULTILINE)
_ANNEX = re.compile(rb"(\.\./|/)*(\.git/)?annex/objects/")
# The version of the format, and a field that only a model's message begins with.
_ONNX = re.compile(rb"\x08[\x03-\x14][\x12\x1a\x22\x3a\x42]")
_PAGE = re.compile(
    rb"(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL
)
_TITLE = re.compile(rb"<title[^>]*>(.*?)</title>", re.IGNORECASE | re.DOTALL)
_XML = re.compile(rb"<\?xml|<Error>")
_XML_SAID = re.compile(rb"<(?:Message|Code)>(.*?)</", re.DOTALL)
_SAID = ("error", "message", "detail", "msg", "reason")
"""Where servers put in JSON what is wrong."""


@contextmanager
def telling(path: Path, wanted: str = SAFETENSORS, name: object = None) -> Iterator[None]:
    """What the format complains of inside becomes a MalformedError that says what the file is.

    wanted: what it should be. name: what to call it, the path if left out.
    """
    try:
        yield
    except FormatError as error:
        raise _refusal(path, wanted, path if name is None else name, error) from error


def unsupported_format(path: Path) -> UnsupportedFormat | None:
    """What a file is, if that is known and nothing of ours; of a pipe nothing is."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        start = file.read(_START)
    size = path.stat().st_size
    if not start:
        return UnsupportedFormat("an empty file", _AGAIN)
    if not start.strip(b"\0"):
        return UnsupportedFormat(
            "zeros only" if size <= _START else "zeros at its beginning",
            f"the download was not finished: {_AGAIN}",
        )
    known = (of for at, magic, of in _MAGIC if start.startswith(magic, at))
    return next(known, None) or next((of for tell in _TELLERS if (of := tell(start, size))), None)


def refuse(name: object, found: UnsupportedFormat, wanted: str = SAFETENSORS) -> MalformedError:
    """The error that says so."""
    return MalformedError(
        f"{name} is {found.title}{found.detail}, not {wanted}; {found.advice}",
        file=name,
        expected=wanted,
        found=found.title,
    )


def cut_off(name: object, expected: object, found: object) -> MalformedError:
    """The error for a file whose end is missing."""
    return MalformedError(
        f"{name} is cut off: its size is less than its beginning says; {_AGAIN}",
        file=name,
        expected=expected,
        found=found,
    )


def _refusal(path: Path, wanted: str, name: object, error: FormatError) -> MalformedError:
    start = b""
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(PREFIX_BYTES + 1)
    # A length below 4 GiB and a brace: other magic numbers can be a length's first bytes.
    begins = start[PREFIX_BYTES // 2 :] == b"\0\0\0\0{"
    if not begins and (found := unsupported_format(path)) is not None:
        return refuse(name, found, wanted)
    if (error.rule == "H2" and begins) or (error.rule == "H11" and _is_short(error)):
        return cut_off(name, error.expected, error.found)
    if error.rule in ("H1", "H2") and start and not begins:
        return MalformedError(
            f"{name} is not {wanted}, nor any other kind of file that sepme knows",
            file=name,
            expected=wanted,
            found=f"a file that begins with {start[:PREFIX_BYTES]!r}",
        )
    return MalformedError(f"{name}: {error}", file=name, expected=error.expected, found=error.found)


def _is_short(error: FormatError) -> bool:
    """Whether there are fewer bytes than there should be, and not more."""
    expected, found = (re.match(r"\d+", side or "") for side in (error.expected, error.found))
    return expected is not None and found is not None and int(found[0]) < int(expected[0])


def _archive(start: bytes, size: int) -> UnsupportedFormat | None:
    """A zip archive, by the name of the first file in it: torch's begin with their pickle."""
    if not start.startswith(ZIP):
        return None
    name = start[30 : 30 + int.from_bytes(start[26:28], "little")].decode(errors="replace")
    if name.endswith(".pkl"):
        return UnsupportedFormat(TORCH_ARCHIVE, _CONVERT)
    if name.endswith(".npy"):
        return UnsupportedFormat("a numpy archive", _CONVERT)
    detail = f" that begins with {name[:_SHOWN]!r}" if name else ""
    return UnsupportedFormat("a zip archive", _UNPACK, detail)


def _pointer(start: bytes, size: int) -> UnsupportedFormat | None:
    if _LFS.match(start):
        said = _LFS_SIZE.search(start)
        amount = f", which stands for a file of {int(said[1])} bytes" if said else ""
        return UnsupportedFormat(
            "a Git LFS pointer",
            "run git lfs pull in its repository, or download the file itself",
            amount,
        )
    if _ANNEX.match(start):
        return UnsupportedFormat("a git-annex pointer", "run git annex get in its repository")
    return None


def _graph(start: bytes, size: int) -> UnsupportedFormat | None:
    return UnsupportedFormat("an ONNX model", _EXPORTED) if _ONNX.match(start) else None


def _page(start: bytes, size: int) -> UnsupportedFormat | None:
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if _PAGE.match(text):
        return UnsupportedFormat(
            "a web page",
            "use the address of the file itself, not of a page about it, log in if the site "
            f"asks for it, and {_AGAIN}",
            _quoted(found[1]) if (found := _TITLE.search(text)) else "",
        )
    if not _XML.match(text):
        return None
    if b"<net" in text:
        return UnsupportedFormat("an OpenVINO model", _EXPORTED)
    if (said := _XML_SAID.search(text)) is not None:
        return _answer(said[1])
    return UnsupportedFormat("an XML document", _AGAIN)


def _document(start: bytes, size: int) -> UnsupportedFormat | None:
    """JSON: what a server answered instead of the file, or a file that lies beside weights."""
    text = start.removeprefix(b"\xef\xbb\xbf").strip()
    if text[:1] not in (b"{", b"[") or not _is_text(start, size):
        return None
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = None
    members = said if isinstance(said, dict) else {}
    if message := next((members[key] for key in _SAID if members.get(key)), None):
        return _answer(str(message).encode(errors="replace"))
    beside = (b'"weight_map"', b'"_class_name"', b'"_diffusers_version"', b'"architectures"')
    if any(word in text for word in beside):
        return UnsupportedFormat("a file that describes a model", "name the model's folder")
    return UnsupportedFormat("a JSON document", _AGAIN)


def _text(start: bytes, size: int) -> UnsupportedFormat | None:
    """Short text, which is mostly what a server answered."""
    return (
        UnsupportedFormat("a text file", _AGAIN, _quoted(start)) if _is_text(start, size) else None
    )


def _answer(said: bytes) -> UnsupportedFormat:
    return UnsupportedFormat(
        "an error that a server sent instead of the file",
        f"log in if it asks for that (hf auth login, or in the browser), and {_AGAIN}",
        _quoted(said),
    )


def _quoted(text: bytes) -> str:
    words = " ".join(text.decode(errors="replace").split())
    return f" ({words[:_SHOWN]!r}{'…' * (len(words) > _SHOWN)})"


def _is_text(start: bytes, size: int) -> bool:
    # A character may be cut at the end of what is looked at.
    text = start.decode(errors="ignore" if size > _START else "replace")
    return all(c.isprintable() or c in "\t\r\n" for c in text) and "\ufffd" not in text


_TELLERS: tuple[Callable[[bytes, int], UnsupportedFormat | None], ...] = (
    *(_archive, _pointer, _graph, _page, _document, _text),
)

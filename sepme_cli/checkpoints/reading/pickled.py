"""Checkpoints that torch has pickled (.ckpt, .pt, .bin), read without running any of their code.

Torch's weights-only loader builds tensors and plain containers and refuses everything else; the
file is mapped into memory, so that tensors are read from it when they are asked for. The only
module of this floor that needs torch, beside the table of its dtypes.
"""

import errno
import os
import re
import warnings
import zipfile
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from patch_spec.header import PREFIX_BYTES, TensorEntry, encode_header, parse_header
from sepme_cli.checkpoints.disk.failures import reading, system_failure
from sepme_cli.checkpoints.disk.files import COPY_BYTES, read_exactly, write_all
from sepme_cli.checkpoints.disk.system import maps_files
from sepme_cli.checkpoints.reading.opcodes import check_cost
from sepme_cli.checkpoints.reading.tensors import Array, WeightsFile
from sepme_cli.checkpoints.reading.unsupported import (
    TORCH_ARCHIVE,
    TORCH_PICKLE,
    ZIP,
    cut_off,
    refuse,
    unsupported_format,
)
from sepme_cli.checkpoints.structure.torch_dtypes import TORCH
from sepme_cli.errors import MalformedError

_DTYPES = {theirs: name for name, theirs in TORCH.items()}
_SAVED = "a file saved by torch"
_LIST = b"PK\x05\x06"
_LIST_WITHIN = 2**16 + 22
"""How far from its end an archive says where its list of members is."""
_PICKLE_BYTES = 8 * 2**20
"""A zip member that is no tensor; real ones have some hundred kilobytes."""


class _ModelCheckpoint:
    """Stands for the class of PyTorch Lightning's whose name the original v1 files hold."""


class _OfNumpy:
    """Stands for all of numpy's that is met beside weights: scalars, dtypes and arrays.

    Nothing of it is wanted, and numpy's own would build what a hostile file says.
    """

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


_UNSAFE = re.compile(r"GLOBAL ([\w.]*\w)")
"""What a refusal by torch says it would have had to call."""
_HARMLESS: list[Any] = [
    (_ModelCheckpoint, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (_OfNumpy, "numpy.dtype"),
    (_OfNumpy, "numpy.ndarray"),
    *(
        (_OfNumpy, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")  # before and since numpy 2
        for name in ("scalar", "_reconstruct")
    ),
]
_WRAPPERS = ("model_state_dict", "model", "module")
"""What training programs put a dictionary of weights under, beside Lightning's `state_dict`."""


@dataclass(frozen=True)
class PickledFile(WeightsFile):
    """A pickled file as if its tensors lay one after the other in a safetensors file.

    tensors: by name, mapped into memory. left_out: what else it holds (optimizer states and the
    like). file_bytes: how long the file is. unmapped: read into memory whole, as the file system
    maps nothing.
    """

    tensors: Mapping[str, Tensor] = field(repr=False, default_factory=dict)
    left_out: tuple[str, ...] = ()
    file_bytes: int = 0
    unmapped: bool = False

    @property
    def written_place(self) -> str:
        place = self.place.replace("pytorch_model", "model") if "/text_" in f"/{self.place}" else ""
        return str(Path(place or self.place).with_suffix(".safetensors")) if self.place else ""

    def mapped(self, entry: TensorEntry) -> Array:
        """Read: the bytes do not lie in the file as the header says."""
        return self.read(entry)

    def read_range(self, begin: int, end: int, name: str) -> bytes:
        return b"".join(bytes(part) for part in self._pieces(begin, end))

    def copy_range(self, begin: int, count: int, target: int, offset: int) -> None:
        for start in range(begin, begin + count, COPY_BYTES):
            for part in self._pieces(start, min(start + COPY_BYTES, begin + count)):
                write_all(target, part, offset)
                offset += len(part)

    def _pieces(self, begin: int, end: int) -> Iterator[memoryview]:
        """The bytes of [begin, end), tensor by tensor."""
        # What is mapped and not there any more would end the process, with no word said.
        if os.fstat(self.file.fileno()).st_size < self.file_bytes:
            raise MalformedError(
                f"{self.path}: the file has become shorter; something else is writing to it",
                file=self.path,
            )
        entries = self.header.tensors
        first = bisect_right(entries, begin, key=lambda entry: entry.end)
        for entry in entries[first:]:
            if entry.begin >= end:
                return
            flat = self.tensors[entry.name].detach().contiguous().flatten()
            data = flat.view(torch.uint8).numpy().data
            yield data[max(begin - entry.begin, 0) : min(end - entry.begin, entry.nbytes)]


def open_pickled(path: Path, place: str, file: BinaryIO) -> PickledFile:
    """Open a file that torch has saved.

    Raises MalformedError for what is no dictionary of tensors, what is compressed, and what would
    run code, naming what it would run.
    """
    # By how it begins, as torch does: what is found from its end may be another archive.
    archive = read_exactly(file.fileno(), len(ZIP), 0) == ZIP
    unmapped = archive and not maps_files(file.fileno())
    loaded = _load(path, file, archive=archive, mapped=archive and not unmapped)
    if not isinstance(loaded, dict):
        raise _no_weights(path, type(loaded).__name__)
    inside = _wrapper(path, loaded)
    inner = loaded if inside is None else loaded[inside]
    outer = {} if inside is None else loaded
    if not isinstance(inner, dict):
        raise _no_weights(path, type(inner).__name__)
    if inside is None:
        inner = _joined(inner)
    tensors = {name: value for name, value in inner.items() if _is_weight(name, value)}
    _check_sizes(path, file, tensors)
    if not tensors:
        raise _no_weights(path, f"{len(inner)} other entries")
    rest = [str(name) for name in inner if name not in tensors]
    rest += [str(name) for name in outer if name != inside]
    with reading(path):
        header_bytes = encode_header({}, list(_entries(tensors)))
        header = parse_header(header_bytes[:PREFIX_BYTES], header_bytes[PREFIX_BYTES:], None)
    size = os.fstat(file.fileno()).st_size
    return PickledFile(
        path, place, header, header_bytes, file, tensors, tuple(rest), size, unmapped
    )


def _wrapper(path: Path, loaded: Mapping[Any, Any]) -> str | None:
    """Under which of its names a dictionary has its weights; None where it is they.

    Raises MalformedError where that could be any of several.
    """
    if "state_dict" in loaded:
        return "state_dict"
    if any(_is_weight(name, value) for name, value in loaded.items()):
        return None
    found = [name for name in _WRAPPERS if _holds_weights(loaded.get(name))]
    if len(found) > 1:
        raise MalformedError(
            f"{path} holds several models ({', '.join(found)}); save the one to use in a file of "
            "its own",
            file=path,
            expected="one dictionary of tensors",
            found=", ".join(found),
        )
    return found[0] if found else None


def _joined(loaded: Mapping[Any, Any]) -> dict[Any, Any]:
    """A dictionary of dictionaries of weights, such as one for each network or module, as one of
    weights; as it is where it holds weights itself."""
    if any(_is_weight(name, value) for name, value in loaded.items()):
        return dict(loaded)
    joined: dict[Any, Any] = {}
    for name, value in loaded.items():
        if isinstance(name, str) and _holds_weights(value):
            joined |= {f"{name}.{part}": weight for part, weight in value.items()}
        else:
            joined[name] = value
    return joined


def _holds_weights(value: object) -> bool:
    return isinstance(value, dict) and any(_is_weight(*item) for item in value.items())


def _load(path: Path, file: BinaryIO, *, archive: bool, mapped: bool) -> Any:
    try:
        if archive:
            _check_archive(path, file)
        else:
            _check_pickles(path)
    except MalformedError as error:
        if (strange := _strange(path)) is None:
            raise
        raise strange from error
    # A seek to before the beginning, and names in no encoding, are not told by a type of its own.
    except (zipfile.BadZipFile, RuntimeError, ValueError, OSError, EOFError) as error:
        raise (
            _strange(path, str(error))
            or (_cut_off(path, file) if archive else None)
            or MalformedError(f"{path} is damaged, or hostile: {error}", file=path)
        ) from error
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            # It warns of every protocol that it does not write itself.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    # On bytes that are no pickle of torch's its reader raises whatever they lead it to, such as
    # what the system says to a seek to where no file can be.
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise system_failure(error, path) from error
        unsafe = _UNSAFE.search(str(error))
        if unsafe is None:
            raise (
                _strange(path)
                or MalformedError(
                    f"{path} cannot be read as a file saved by torch; it may be damaged",
                    file=path,
                    expected=_SAVED,
                    found=type(error).__name__,
                )
            ) from error
        raise MalformedError(
            f"{path} holds more than weights, and loading it would run code of its own; ask "
            "someone who trusts it to convert it to safetensors",
            file=path,
            expected="tensors",
            found=unsafe[1],
        ) from error


def _strange(path: Path, reason: str = "") -> MalformedError | None:
    """What to say of a file that torch has not saved; None for one that it has, or may have.

    reason: why it cannot be read, if that says more.
    """
    with path.open("rb") as file:
        if file.read(len(TORCH_PICKLE)) == TORCH_PICKLE:
            return None
    found = unsupported_format(path)
    if found is None or found.title == TORCH_ARCHIVE:
        return None
    detail = f"{found.detail} ({reason})" if reason else found.detail
    return refuse(path, replace(found, detail=detail), _SAVED)


def _cut_off(path: Path, file: BinaryIO) -> MalformedError | None:
    """What to say of an archive without the list of members that ends all of them."""
    size = os.fstat(file.fileno()).st_size
    tail = min(size, _LIST_WITHIN)
    if _LIST in read_exactly(file.fileno(), tail, size - tail):
        return None
    return cut_off(path, "a list of what is in the archive, at its end", "none")


def _check_archive(path: Path, file: BinaryIO) -> None:
    """Nothing in the archive may be larger unpacked than it is, lie about it, or be a pickle that
    nobody could read to its end."""
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            _check_member(path, member)
            if member.filename.endswith(".pkl"):
                del member.CRC  # torch can be told to leave it out
                check_cost(archive.read(member))


def _check_pickles(path: Path) -> None:
    """As of an archive's: a magic number, a version, a system, what was saved, what follows."""
    with path.open("rb") as stream:
        for _ in range(5):
            check_cost(stream)


def _check_member(path: Path, member: zipfile.ZipInfo) -> None:
    weights = "/data/" in member.filename and not member.filename.endswith(".pkl")
    if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
        raise MalformedError(
            f"{path}: {member.filename} is compressed, which torch never does",
            file=path,
            expected="stored",
            found="compressed",
        )
    if not weights and member.file_size > _PICKLE_BYTES:
        raise MalformedError(
            f"{path}: {member.filename} is too large for its kind",
            file=path,
            expected=f"at most {_PICKLE_BYTES} bytes",
            found=member.file_size,
        )


def _check_sizes(path: Path, file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    """No tensor is larger than what it is a view of, nor these together than the file.

    A view can claim any size, and would take as much memory when it is read; and what the oldest
    format says is there, and is not, is memory that nobody has filled.
    """
    room, seen = os.fstat(file.fileno()).st_size, set()
    for name, value in tensors.items():
        claimed, held = value.numel() * value.element_size(), value.untyped_storage().nbytes()
        if value.untyped_storage().data_ptr() not in seen:
            seen.add(value.untyped_storage().data_ptr())
            room -= held
        if claimed > held or room < 0:
            raise MalformedError(
                f"{path}: {ascii(name)[:80]} claims more than the file holds",
                file=path,
                expected=f"at most {min(held, max(room + held, 0))} bytes",
                found=f"{max(claimed, held)} bytes",
            )


def _is_weight(name: object, value: object) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.dtype in _DTYPES
        and value.layout == torch.strided
        and value.device.type == "cpu"
    )


def _entries(tensors: Mapping[str, Tensor]) -> Iterator[TensorEntry]:
    position = 0
    for name, value in tensors.items():
        end = position + value.numel() * value.element_size()
        yield TensorEntry(name, _DTYPES[value.dtype], tuple(value.shape), position, end)
        position = end


def _no_weights(path: Path, found: str) -> MalformedError:
    return MalformedError(
        f"{path} holds no named weights",
        file=path,
        expected="a dictionary of tensors, or one under 'state_dict', 'model' and the like",
        found=found,
    )

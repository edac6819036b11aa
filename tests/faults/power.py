"""What a disk may hold after the power has failed, from a record of what a command did to it.

What is modelled:

- What was written to a file since it was last synced may be there, be missing from any write on,
  lack any one write or half of it, or, where the file has grown, be zeros.
- What was made, renamed or removed in a folder since that was synced may have happened or not:
  up to any point, or all but one, or only one. A sync of a file says nothing of its name.
- Taking pages into a file or out of it (fallocate) happens in order with what is written to it,
  and can stop halfway: the pages are then a hole where the shifting stopped.

What is not: writes of a disk that lies about having synced, torn sectors within what was synced,
and several files each lacking something else at once.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sepme_cli.checkpoints.disk import resizing
from sepme_cli.checkpoints.disk.kernel import fallocate
from tests.faults.calls import Call, Make, Recorded

FOLDER = -1
BLOCK = 4096
Change = tuple[Any, ...]
"""("write", offset, data), ("resize", mode, offset, count), ("half", …) or ("zeros", size)."""
Names = dict[str, int]
"""Number of a file by its path, or FOLDER."""


class Traced(Recorded):
    """Records the calls with what they wrote and returned; a call that failed did nothing."""

    def fault(self, number: int, call: Call, make: Make) -> Any:
        result = make()
        given = call.arguments
        if call.name == "pwrite64":
            written = bytes(given[1])[:result]
            given = (written, given[2])
        elif call.name == "copy_file_range":
            target = os.open(call.paths[1], os.O_RDONLY)
            given = (os.pread(target, result, given[4]), given[4])
            os.close(target)
        self.calls.append(Call(call.name, call.paths, given))
        return result


@dataclass
class Disk:
    """files: what was synced of each, and what was not. names: as programs see them, and those
    that are synced. unsynced: what was done to names, in order."""

    synced: list[bytes] = field(default_factory=list)
    pending: list[list[Change]] = field(default_factory=list)
    names: Names = field(default_factory=dict)
    lasting: Names = field(default_factory=dict)
    unsynced: list[Call] = field(default_factory=list)

    @classmethod
    def holding(cls, folder: Path) -> "Disk":
        """All that is in a folder, synced."""
        disk = cls()
        for path in folder.rglob("*"):
            name = str(path.relative_to(folder))
            disk.names[name] = FOLDER
            if path.is_file():
                disk.names[name] = disk._new(path.read_bytes())
        disk.lasting = dict(disk.names)
        return disk

    def _new(self, data: bytes = b"") -> int:
        self.synced.append(data)
        self.pending.append([])
        return len(self.synced) - 1

    def do(self, call: Call) -> None:
        """What one call does, its paths being within the folder."""
        match call.name:
            case "openat" if call.paths[0] not in self.names:
                made = Call("link", call.paths, (self._new(),))
                self._rename(made)
            case "mkdir":
                self._rename(Call("link", call.paths, (FOLDER,)))
            case "rename" | "renameat2" | "unlink" | "rmdir":
                self._rename(call)
            case "pwrite64" | "copy_file_range":
                data, offset = call.arguments
                self.pending[self.names[call.paths[-1]]].append(("write", offset, data))
            case "fallocate":
                self.pending[self.names[call.paths[0]]].append(("resize", *call.arguments[1:]))
            case "fsync":
                self._sync(call.paths[0])

    def _rename(self, call: Call) -> None:
        apply_to(self.names, call)
        self.unsynced.append(call)

    def _sync(self, path: str) -> None:
        number = FOLDER if path == "." else self.names[path]
        if number != FOLDER:
            self.synced[number] = contents(self.synced[number], self.pending[number])
            self.pending[number] = []
            return
        here = [call for call in self.unsynced if str(Path(call.paths[-1]).parent) == path]
        for call in here:
            apply_to(self.lasting, call)
            self.unsynced.remove(call)

    def crashes(self) -> Iterator[dict[str, list[Change] | None]]:
        """Every folder that may be found: the changes to make to what is synced, by path."""
        for names in self._namings():
            whole = {name: self._changes(number) for name, number in names.items()}
            none = {name: [] if changes else changes for name, changes in whole.items()}
            yield {name: self._found(number, whole[name]) for name, number in names.items()}
            yield {name: self._found(number, none[name]) for name, number in names.items()}
            for name, number in names.items():
                for fewer in fewer_of(whole[name] or [], len(self.synced[number])):
                    yield {
                        other: self._found(names[other], fewer if other == name else changes)
                        for other, changes in whole.items()
                    }

    def _changes(self, number: int) -> list[Change] | None:
        return None if number == FOLDER else self.pending[number]

    def _found(self, number: int, changes: list[Change] | None) -> list[Change] | None:
        return None if changes is None else [("write", 0, self.synced[number]), *changes]

    def _namings(self) -> Iterator[Names]:
        calls = self.unsynced
        choices = [calls[:n] for n in range(len(calls) + 1)]
        choices += [calls[:n] + calls[n + 1 :] for n in range(len(calls))]
        choices += [[call] for call in calls]
        for chosen in choices:
            names = dict(self.lasting)
            for call in chosen:
                apply_to(names, call)
            folders = {".", *(name for name, number in names.items() if number == FOLDER)}
            yield {n: number for n, number in names.items() if str(Path(n).parent) in folders}


def apply_to(names: Names, call: Call) -> None:
    """What a call does to names; nothing where what it needs is not there."""
    match call.name:
        case "link":
            names[call.paths[0]] = call.arguments[0]
        case "unlink" | "rmdir":
            names.pop(call.paths[0], None)
        case "rename" if call.paths[0] in names:
            names[call.paths[1]] = names.pop(call.paths[0])


def fewer_of(changes: list[Change], size: int) -> Iterator[list[Change]]:
    """What may be left of changes to a file of `size` bytes that were not synced."""
    resized = max((n for n, change in enumerate(changes) if change[0] == "resize"), default=-1)
    for n, change in enumerate(changes):
        yield changes[:n]
        if change[0] == "resize":
            yield [*changes[:n], ("half", *change[1:])]
        elif n > resized:
            yield changes[:n] + changes[n + 1 :]
            _, offset, data = change
            yield [*changes[:n], ("write", offset, data[: len(data) // 2])]
    grown = max((c[1] + len(c[2]) for c in changes if c[0] == "write"), default=0)
    if resized < 0 and grown > size:
        yield [("zeros", grown)]


def contents(synced: bytes, changes: list[Change]) -> bytes:
    """A file's bytes after changes."""
    data = bytearray(synced)
    for kind, *how in changes:
        if kind == "write":
            offset, new = how
            data.extend(bytes(max(0, offset - len(data))))
            data[offset : offset + len(new)] = new
        elif kind == "zeros":
            data.extend(bytes(how[0] - len(data)))
        else:
            resize(data, kind, *how)
    return bytes(data)


def resize(data: bytearray, kind: str, mode: int, offset: int, count: int) -> None:
    """As fallocate does, or half of it: the pages are where the shifting stopped."""
    middle = len(data) // 2 // BLOCK * BLOCK
    if mode == resizing._COLLAPSE_RANGE:
        del data[offset : offset + count]
        middle = len(data) // 2 // BLOCK * BLOCK
    if mode == resizing._INSERT_RANGE or kind == "half":
        at = middle if kind == "half" else offset
        data[at:at] = bytes(count)


def write_out(folder: Path, found: dict[str, list[Change] | None]) -> None:
    """Make the folder what was found, holes and all."""
    for name, changes in sorted(found.items()):
        path = folder / name
        if changes is None:
            path.mkdir(parents=True)
            continue
        with path.open("wb", buffering=0) as file:
            for kind, *how in changes:
                if kind == "write":
                    os.pwrite(file.fileno(), how[1], how[0])
                elif kind == "zeros":
                    os.ftruncate(file.fileno(), max(how[0], os.fstat(file.fileno()).st_size))
                else:
                    _shift(file.fileno(), kind, *how)


def _shift(descriptor: int, kind: str, mode: int, offset: int, count: int) -> None:
    if kind == "resize" or mode == resizing._COLLAPSE_RANGE:
        fallocate(descriptor, mode, offset, count)
    if kind == "half":
        middle = os.fstat(descriptor).st_size // 2 // BLOCK * BLOCK
        fallocate(descriptor, resizing._INSERT_RANGE, middle, count)

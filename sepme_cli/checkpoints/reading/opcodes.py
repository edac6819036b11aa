"""What a pickle would cost to read, told by its opcodes; nothing of it is built.

Torch's weights-only loader runs no code of a pickle's, but it builds what the pickle says: tuples
that hold each other twice, forty deep, take forty opcodes, and hashing the last one takes years.
"""

import io
import pickletools
from typing import BinaryIO, cast

_OPCODES = 2**23
"""Of one pickle; real ones have some hundred thousand."""
_TUPLE = 10**6
"""How many parts a tuple may have, and its parts, and theirs."""
_ARGUMENT = 2**23
"""Bytes of one text, which in real ones is a name."""
_TOO_MUCH = "loading it would take more time or memory than weights need"
_GET = ("GET", "BINGET", "LONG_BINGET")
_PUT = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")


def check_cost(pickle: BinaryIO | bytes) -> None:
    """ValueError, in words, for a pickle that is none, has too many opcodes, or tuples that unfold.

    pickle: at its beginning; a stream is left behind its end.
    """
    machine = _Machine()
    stream = cast(
        BinaryIO, _BoundedReader(io.BytesIO(pickle) if isinstance(pickle, bytes) else pickle)
    )
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count > _OPCODES or machine.step(opcode, argument) > _TUPLE:
            raise ValueError(_TOO_MUCH)


class _BoundedReader(io.RawIOBase):
    """A stream that takes no memory for an argument whose length lies."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream

    def read(self, size: int = -1) -> bytes:
        if size > _ARGUMENT:
            raise ValueError(_TOO_MUCH)
        return self.stream.read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        return self.stream.readline(_ARGUMENT)

    def tell(self) -> int:
        return self.stream.tell()


class _Machine:
    """A stack and a memo like a pickle's, which hold of a value how many parts it unfolds to."""

    def __init__(self) -> None:
        self.stack: list[int] = []
        self.marks: list[int] = []
        self.memo: dict[object, int] = {}

    def step(self, opcode: pickletools.OpcodeInfo, argument: object) -> int:
        """Do one opcode; how many parts what it left on top unfolds to."""
        if opcode.name in _GET:
            self.stack.append(self.memo.get(argument, 1))
        elif opcode.name in _PUT:
            key = len(self.memo) if opcode.name == "MEMOIZE" else argument
            self.memo[key] = self.stack[-1] if self.stack else 1
        elif opcode.name == "MARK":
            self.marks.append(len(self.stack))
        elif opcode.name == "DUP":
            self.stack.append(self.stack[-1] if self.stack else 1)
        else:
            taken = self._popped(opcode)
            parts = sum(taken) + 1 if "TUPLE" in opcode.name else 1
            self.stack += [parts] * len(opcode.stack_after)
        return self.stack[-1] if self.stack else 1

    def _popped(self, opcode: pickletools.OpcodeInfo) -> list[int]:
        """What the opcode takes: some values, and all down to the last mark if it says so."""
        takes = opcode.stack_before
        if pickletools.markobject in takes:
            start = self.marks.pop() if self.marks else 0
            start = max(0, start - takes.index(pickletools.markobject))
        else:
            start = max(0, len(self.stack) - len(takes))
        popped = self.stack[start:]
        del self.stack[start:]
        return popped

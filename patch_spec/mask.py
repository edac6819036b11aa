"""Masks: which weights of a layer become zero (SPEC.md, "Masks").

A position is row * in + column. Of each, in ascending order, the positions that are left out before
it are counted: a byte 255 for every 255 of them, and a byte below 255 for what remains. Most masks
so take a byte a position, a tenth of what a bit for every weight takes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from patch_spec import limits
from patch_spec.records import Fields, as_integer

Gaps = npt.NDArray[np.uint8]
"""A mask as a patch stores it, [n]."""
Flags = npt.NDArray[np.bool_]
"""A mask as a matrix [out, in], true where a weight becomes zero."""

SKIP = 255
"""A byte that stands for as many positions left out, and ends none."""
_CHUNK = 2**20


@dataclass(frozen=True)
class Masked:
    """What a manifest says of a layer's mask. shape: [out, in] of the layer. count: of the weights
    that become zero."""

    count: int
    shape: tuple[int, int]

    @property
    def size(self) -> int:
        """How many weights the layer has."""
        return self.shape[0] * self.shape[1]

    @property
    def most_bytes(self) -> int:
        """That its gaps can take; at least `count`."""
        return self.count + (self.size - self.count) // SKIP

    def to_json(self) -> dict[str, Any]:
        """The entry of a mask's `masks`."""
        return {"count": self.count, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, value: Any, where: str) -> Self:
        """From the entry; FormatError, rules J3 to J7."""
        fields = Fields(value, ("count", "shape"), where)
        place = fields.place("shape")
        out, width = fields.sequence("shape", 2, least=2)
        return cls(
            fields.integer("count", 1, limits.LAYER_SIDE**2),
            (
                as_integer(out, 1, limits.LAYER_SIDE, place),
                as_integer(width, 1, limits.LAYER_SIDE, place),
            ),
        )


def to_gaps(flags: Flags) -> Gaps:
    """The one way to store a mask [out, in] that has at least one position."""
    positions = np.flatnonzero(flags)
    skips, rest = np.divmod(np.diff(positions, prepend=-1) - 1, SKIP)
    ends = np.cumsum(skips + 1)
    gaps = np.full(int(ends[-1]), SKIP, np.uint8)
    gaps[ends - 1] = rest
    return gaps


def to_flags(gaps: Gaps, shape: tuple[int, int]) -> Flags:
    """The mask [out, in] that gaps [n] store; they are as rules V6 and V7 demand."""
    return united([gaps], shape)


def united(masks: Sequence[Gaps], shape: tuple[int, int]) -> Flags:
    """The union of masks of one shape."""
    flags = np.zeros(shape, np.bool_)
    whole = flags.reshape(-1)
    for gaps in masks:
        for positions in _positions(gaps):
            whole[positions] = True
    return flags


def told(gaps: Gaps) -> tuple[int, int]:
    """How many positions there are, and how many a layer must have for the last one to be in it."""
    count = int(np.count_nonzero(gaps != SKIP))
    return count, count + int(gaps.sum(dtype=np.int64))


def _positions(gaps: Gaps) -> Iterator[npt.NDArray[np.int64]]:
    """The positions, some at a time."""
    start = 0
    for begin in range(0, len(gaps), _CHUNK):
        part = gaps[begin : begin + _CHUNK]
        ending = part != SKIP
        behind = start + np.cumsum(part.astype(np.int64) + ending)
        yield behind[ending] - 1
        start = int(behind[-1])

"""One part of work that several processes do, each its own."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from sepme_cli.errors import UsageError

One = TypeVar("One")

_SAID = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")


@dataclass(frozen=True)
class Shard:
    """The part `number`, from 1 on, of `count`."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """From "3/16"; "auto" is what accelerate and torchrun tell each of the processes that they
        start. Raises UsageError for what is no such part."""
        if text == "auto":
            return cls._launched()
        said = _SAID.fullmatch(text)
        number, count = map(int, said.groups()) if said else (0, 0)
        if not 1 <= number <= count:
            raise UsageError(
                f"--shard {text}: no such part", expected="K/N with K from 1 to N", found=text
            )
        return cls(number, count)

    @classmethod
    def _launched(cls) -> "Shard":
        rank, world = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
        if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
            raise UsageError(
                "--shard auto: this process was not started by accelerate launch or torchrun",
                expected="RANK and WORLD_SIZE in the environment, or --shard K/N",
                found=f"RANK={rank!r}, WORLD_SIZE={world!r}",
            )
        return cls(int(rank) + 1, int(world))

    def of(self, work: Sequence[One]) -> Sequence[One]:
        """This part's share: every `count`-th piece. All parts together do each piece once."""
        return work[self.number - 1 :: self.count]

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


WHOLE = Shard(1, 1)

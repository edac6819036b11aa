"""One part of work that several processes do, each its own."""

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
        """From "3/16". Raises UsageError for what is no such part."""
        said = _SAID.fullmatch(text)
        number, count = map(int, said.groups()) if said else (0, 0)
        if not 1 <= number <= count:
            raise UsageError(
                f"--shard {text}: no such part", expected="K/N with K from 1 to N", found=text
            )
        return cls(number, count)

    def of(self, work: Sequence[One]) -> Sequence[One]:
        """This part's share: every `count`-th piece. All parts together do each piece once."""
        return work[self.number - 1 :: self.count]

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


WHOLE = Shard(1, 1)

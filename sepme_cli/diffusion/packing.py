"""Many texts in few rows: what texts begin with alike is computed once for all of them.

In a causal text encoder the state of a token depends on the tokens before it alone, so texts make
a trie whose nodes are their distinct beginnings. A row holds a part of it, depth first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedTexts:
    """Texts in rows.

    ids: the token of each node [rows, width]. depths: how many tokens its text has before it
    [rows, width]. filled: bool [rows, width]; False behind the last node of a row. places: for each
    position of each text its node, counted through the filled ones [texts, positions].
    """

    ids: Tensor
    depths: Tensor
    filled: Tensor
    places: Tensor

    def batches(self, rows: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """ids, depths and filled of at most so many rows at a time."""
        parts = (part.split(rows) for part in (self.ids, self.depths, self.filled))
        return zip(*parts, strict=True)


def pack(ids: Tensor, lengths: Tensor, room: int) -> PackedTexts:
    """Texts of token ids [texts, positions], of which each needs its first lengths [texts].

    room: nodes in a row, at least the longest text. Behind what a text needs, its last position
    stands for all others.
    """
    wanted = [tuple(row[:n]) for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)]
    rows: list[list[tuple[int, int]]] = []
    paths: dict[tuple[int, ...], list[int]] = {}
    count = 0
    before: tuple[int, ...] = ()
    path: list[int] = []
    for text in sorted(set(wanted)):
        nodes = list(zip(text, range(len(text)), strict=True))
        same = _common(before, text)
        if not rows or len(rows[-1]) + len(text) - same > room:
            # The new row repeats the shared beginning for what comes after it there to see; what
            # is read of it is the first copy, so that equal beginnings have equal states.
            rows.append(nodes[:same])
            count += same
        rows[-1] += nodes[same:]
        path = path[:same] + list(range(count, count + len(text) - same))
        count += len(text) - same
        paths[text] = path
        before = text
    width = max((len(row) for row in rows), default=1)
    blank = (0, 0)
    table = [row + [blank] * (width - len(row)) for row in rows]
    both = torch.tensor(table, dtype=torch.long).reshape(len(rows), width, 2)
    filled = torch.arange(width) < torch.tensor([len(row) for row in rows]).reshape(-1, 1)
    total = ids.shape[1]
    places = [paths[text] + paths[text][-1:] * (total - len(text)) for text in wanted]
    return PackedTexts(
        both[..., 0],
        both[..., 1],
        filled,
        torch.tensor(places, dtype=torch.long).reshape(len(wanted), total),
    )


def sees(depths: Tensor) -> Tensor:
    """Which nodes each node may look at: bool [rows, width, width], the looking ones first.

    Itself and those it comes after in its text. Depth first, the nodes under one are all that
    follow it until the next that is not deeper. depths: of `PackedTexts`.
    """
    width = depths.shape[-1]
    behind = torch.ones(width, width, dtype=torch.bool, device=depths.device).tril()
    ends = (depths[:, :, None] <= depths[:, None, :]) & behind.tril(-1)
    return behind & (ends.cumsum(1) == 0)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))

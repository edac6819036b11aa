"""Which pictures a set of erased concepts is judged by, and what the judge's answers come to."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import harmonic_mean
from typing import Any

import torch

from benchmarks.canvas import ASKED, UNSEEN, naming
from benchmarks.results import counts
from examples.emoji.judging import OBJECT_NAMES, STYLE_NAMES, Caption, Verdict


@dataclass(frozen=True)
class Choice:
    """How many pictures of each sort a state is judged by."""

    erased: int
    kept: int
    unseen: int

    def asked(self, names: Sequence[str]) -> tuple[list[Caption], list[int]]:
        """Captions, and which seed of its pair each is drawn with: where few pairs name the
        concepts, they are drawn with several."""
        rng = random.Random(" ".join(names))
        rows = naming(ASKED, names).tolist()
        mine = [c for c, row in zip(ASKED, rows, strict=True) if row]
        others = [c for c, row in zip(ASKED, rows, strict=True) if not row]
        rng.shuffle(mine)
        drawn = [(mine[i % len(mine)], i // len(mine)) for i in range(self.erased)]
        drawn += [(c, 0) for c in rng.sample(others, min(self.kept, len(others)))]
        captions, rounds = zip(*drawn, strict=True)
        return list(captions), list(rounds)

    def unseen_of(self, names: Sequence[str]) -> list[Caption]:
        mine = [c for c in UNSEEN if any(c.names(name) for name in names)]
        return random.Random(" ".join(names)).sample(mine, min(self.unseen, len(mine)))


def figures(
    judged: Verdict, captions: Sequence[Caption], names: Sequence[str]
) -> dict[str, list[int]]:
    """Recognised, and of how many: the erased concepts; where none is named, what is of their
    kinds (same); the other half of a picture with one erased half (beside); and that together
    with kinds of which nothing is erased (other)."""
    named = {
        "style": torch.tensor([STYLE_NAMES[c.style] in names for c in captions]),
        "object": torch.tensor([OBJECT_NAMES[c.object] in names for c in captions]),
    }
    neither = ~(named["style"] | named["object"])
    both = (("style", "object"), ("object", "style"))
    erased = [judged.of(kind)[named[kind]] for kind, _ in both]
    same = [judged.of(kind)[neither] for kind, _ in both if named[kind].any()]
    beside = [judged.of(o)[named[kind] & ~named[o]] for kind, o in both]
    untouched = [judged.of(kind)[neither] for kind, _ in both if not named[kind].any()]
    parts = {"erased": erased, "same": same, "beside": beside, "other": [*beside, *untouched]}
    return {name: counts(torch.cat(right)) for name, right in parts.items()}


def score(rows: Sequence[Mapping[str, Any]]) -> float:
    """The harmonic mean of what is gone, what stayed of its kind and what stayed of the other."""
    erased, same, other = (
        sum(row[name][0] for row in rows) / sum(row[name][1] for row in rows)
        for name in ("erased", "same", "other")
    )
    return harmonic_mean([1 - erased, same, other])

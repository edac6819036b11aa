"""Every method on the English canvas, in two rounds: told nothing but the concepts, and told the
same neighbours.

    python -m benchmarks.rounds tune 1    # peers' settings, on concepts that are not reported
    python -m benchmarks.rounds run 1     # goes on where it was; run 1 10 uce does a part
    python -m benchmarks.rounds table

In the first round a method has the concepts' names and, if its paper keeps a set of general
captions, the thousand ordinary captions that sepme itself uses. In the second, everybody is also
told the eight words that the text encoder has nearest to each concept. Of each peer, which tokens
and which prompts it edits are chosen in each round, on concepts that are no part of what is
reported; its other settings are its paper's. sepme runs with its defaults. Results go to
docs/rounds.json. The methods that train are not here: see docs/results.md.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.bare import CHOSEN_ON, erased, judge, order
from benchmarks.english import English, kind_of
from benchmarks.peers import PEERS, TEXT_PEERS
from benchmarks.peers.interface import Peer, Request
from benchmarks.results import Results
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.erasure.background import captions
from sepme_cli.erasure.concept import Protected
from sepme_cli.erasure.nearness import holds
from sepme_cli.erasure.words import Item
from sepme_cli.planning.background import background_of
from sepme_cli.planning.neighbourhood import look_around
from sepme_cli.planning.vocabulary import caption_words
from sepme_cli.recipe import Recipe

RESULTS = Path("docs/rounds.json")
SETTINGS = Path("docs/rounds-settings.json")
Round = Literal["nothing named", "neighbours named"]
ROUNDS: tuple[Round, ...] = ("nothing named", "neighbours named")
SOLVING = ("uce", "mace", "speed", "rece", "oce", "dp", "cure", "trce, first stage")
#: Those that train, at what they were tuned to on the first canvas (docs/peers-settings.json).
TRAINING: Mapping[str, Mapping[str, Any]] = {
    "mace, both stages": {},
    "esd-x": {"lr": 1e-3},
    "sepme-published": {"beta": 0.01, "prompts": "picture"},
}
OURS: Mapping[str, str] = {"sepme": "closed-form", "sepme --method sepme": "sepme"}
#: What is chosen of a peer, one after the other; it matters most.
_TUNED = ("tokens", "prompts", "direction", "lr")
#: Steps of drawing: half of what the bare command is judged with, on many more edits.
STEPS = 10


def states() -> Mapping[str, tuple[tuple[str, ...], ...]]:
    """What is out together, by how much that is: of one, several ones in turn."""
    styles, objects = (
        [name for name in order() if kind_of(name) == kind] for kind in ("style", "object")
    )
    return {
        "1": tuple((name,) for name in (*styles[:2], *objects[:3])),
        "10": ((*styles[2:4], *objects[4:12]),),
        "50": ((*styles[2:4], *objects[12:60]),),
        "100": ((*styles[2:4], *objects[60:158]),),
    }


def tuning() -> tuple[tuple[str, ...], ...]:
    """Of the concepts that sepme's defaults were chosen on, too."""
    return ((CHOSEN_ON[-1],), CHOSEN_ON[:5])


class Bench:
    """The canvas with what a method is told."""

    def __init__(self) -> None:
        self.canvas = English(steps=STEPS)
        self.model = StableDiffusion.of(self.canvas.checkpoint, torch.device("cpu"))
        base = self.canvas.checkpoint.base(text_encoders=True)
        self.background = background_of(self.model.text, base)
        self.general = captions(caption_words()).protected
        self.neighbours = cache(self._neighbours)

    def _neighbours(self, names: tuple[str, ...]) -> Protected:
        items = tuple(Item(name, kind_of(name)) for name in names)
        return look_around(self.model.text, Recipe(items), (), self.background, 8).protected

    def request(self, names: tuple[str, ...], told: Round) -> Request:
        protect = self.neighbours(names) if told == "neighbours named" else Protected()
        kinds = tuple(kind_of(name) for name in names)
        # A caption that names a concept would hold it back.
        general = [text for text in self.general if not any(holds(text, name) for name in names)]
        return Request(self.model, names, kinds, protect, general)

    def ours(self, names: tuple[str, ...], told: Round, method: str) -> dict[str, Tensor]:
        """What sepme's command makes of the same; method: as its --method."""
        protect = self.neighbours(names) if told == "neighbours named" else Protected()
        named = [f"style:{w}" for w in protect.styles] + [f"object:{w}" for w in protect.objects]
        _, increments = erased(
            self.canvas, names, protect=named, method=method, force_collateral=True
        )
        return self.canvas.patched(increments)

    def row(self, peer: Peer | str, sets: Sequence[tuple[str, ...]], told: Round) -> dict[str, Any]:
        """Counts over sets of concepts, each judged by itself; peer: for sepme, its --method."""
        found: dict[str, Any] = {}
        moved, seconds = 0.0, 0.0
        for names in sets:
            started = time.monotonic()
            weights = (
                self.ours(names, told, peer)
                if isinstance(peer, str)
                else peer.edit(self.request(names, told)).weights
            )
            seconds += time.monotonic() - started
            shown = judge(self.canvas, names, weights)
            moved += shown.pop("moved") / len(sets)
            for key, (hits, count) in shown.items():
                before = found.setdefault(key, [0, 0])
                found[key] = [before[0] + hits, before[1] + count]
        return {**found, "moved": round(moved, 2), "seconds": round(seconds / len(sets), 2)}


def score(row: Mapping[str, Any]) -> float:
    """The harmonic mean of what is gone, what stays of objects and what stays of styles, as shares
    of what was recognised before."""
    gone = 1 - _share(row, "erased style", "erased object")
    objects = _share(row, "near object", "others object", "beside object")
    styles = _share(row, "near style", "others style", "beside style")
    parts = [max(1e-9, part) for part in (gone, objects, styles)]
    return 3 / sum(1 / part for part in parts)


def _share(row: Mapping[str, Any], *keys: str) -> float:
    """Recognised after, of what was recognised before, at most all of it."""
    known = [key for key in keys if key in row]
    after = sum(row[key][0] for key in known)
    before = sum(row[f"{key}, before"][0] for key in known)
    return min(1.0, after / max(1, before))


def methods(told: Round, state: str) -> tuple[str, ...]:
    """Which are judged there, sepme first."""
    slow = told == ROUNDS[0] and state in ("1", "10")
    return ("sepme", *SOLVING, *([*list(OURS)[1:], *TRAINING] if slow else ()))


def tuned(name: str) -> Peer | str:
    """A method with its settings; for sepme, its --method."""
    if name in OURS:
        return OURS[name]
    if name in TRAINING:
        return replace(PEERS[name], **TRAINING[name])  # type: ignore[type-var]
    said = json.loads(SETTINGS.read_text()) if SETTINGS.exists() else {}
    chosen = said.get(name, {}).get("chosen", {})
    return replace({**PEERS, **TEXT_PEERS}[name], **chosen)  # type: ignore[type-var]


def tune(told: Round = ROUNDS[0], *names: str) -> None:
    """One setting at a time, from the paper's values; the best of each is kept for the next. The
    second round has the same. names: methods; all if none is named."""
    settings, bench = Results(SETTINGS), Bench()
    for name in names or (*SOLVING, *TEXT_PEERS):

        def choose(name: str = name) -> dict[str, Any]:
            peer = {**PEERS, **TEXT_PEERS}[name]
            chosen: dict[str, Any] = {}
            best = score(bench.row(peer, tuning(), told))
            tried = {"{}": round(best, 4)}
            for setting in _TUNED:
                for value in peer.grid.get(setting, ()):
                    if value == getattr(peer, setting):
                        continue
                    other = replace(peer, **{setting: value})  # type: ignore[type-var]
                    found = score(bench.row(other, tuning(), told))
                    tried[json.dumps({**chosen, setting: value})] = round(found, 4)
                    if found > best:
                        best, peer, chosen = found, other, {**chosen, setting: value}
            return {"chosen": chosen, "score": round(best, 4), "tried": tried}

        print(name, json.dumps(settings.get(name, choose)), flush=True)


def run(told: Round, *chosen: str) -> None:
    """chosen: how many are out at once, and which methods; all of either if none is named."""
    results, bench = Results(RESULTS), Bench()
    for state, sets in states().items():
        if {*chosen} & {*states()} and state not in chosen:
            continue
        for name in methods(told, state):
            if {*chosen} - {*states()} and name not in chosen:
                continue
            peer = tuned(name)
            said = {} if isinstance(peer, str) else asdict(peer)  # type: ignore[call-overload]

            def make(
                peer: Peer | str = peer,
                sets: Sequence[tuple[str, ...]] = sets,
                said: dict[str, Any] = said,
            ) -> dict[str, Any]:
                return {**bench.row(peer, sets, told), "settings": said}

            row = results.get(f"{told}/{state}/{name}", make)
            print(told, state, name, round(100 * score(row), 1), row["moved"], flush=True)


def table() -> str:
    """Harmonic means by round and number of concepts, and how far what stays moves."""
    entries = Results(RESULTS).entries
    parts = []
    for told in ROUNDS:
        heads = [f"{state} out" for state in states()]
        lines = [f"**{told}**", "", f"| | {' | '.join(heads)} | 10 out: others move by |"]
        lines.append("|---" * (len(heads) + 2) + "|")
        for name in methods(told, "1"):
            rows = [entries.get(f"{told}/{state}/{name}") for state in states()]
            if not any(rows):
                continue
            cells = ["" if row is None else f"{100 * score(row):.1f}" for row in rows]
            moved = "" if rows[1] is None else f"{rows[1]['moved']:.1f}/255"
            lines.append(f"| {name} | {' | '.join(cells)} | {moved} |")
        if any(name.startswith(told) for name in entries):
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main(stage: str = "run", number: str = "1", *chosen: str) -> None:
    told = ROUNDS[int(number) - 1]
    if stage == "table":
        print(table())
    elif stage == "tune":
        tune(told, *chosen)
    else:
        run(told, *chosen)


if __name__ == "__main__":
    main(*sys.argv[1:])

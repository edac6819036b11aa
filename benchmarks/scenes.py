"""SepME's scenes on the emoji canvas: concepts erased and restored over time.

    python -m benchmarks.scenes run closed-form         # every scene; goes on where it was
    python -m benchmarks.scenes run sepme style 2       # a part: one kind, one scene
    python -m benchmarks.scenes table                   # the figures as Markdown
    python -m benchmarks.scenes sheet                   # a picture of each scene

As in the paper, six concepts of a kind come and go and some more are never touched: two styles,
since the canvas has eight of them, and three objects. All are the canvas' first ones in its own
order. A patch is made once, when its concepts are first erased, every patch with those before it
in the scene as known; whatever is out at a time is then a choice among the increments there are.
Everything else of the canvas is protected. For each choice every concept is drawn with the same
prompts and seeds, in fp32 (bf16's rounding is larger than what a restored concept differs by), and
judged. Results go to docs/scenes.json, choice by choice; changed settings are drawn anew.
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.canvas import ASKED, GUIDANCE, STEPS, Canvas, naming
from benchmarks.erasing import METHODS, erase
from benchmarks.results import Results, counts
from benchmarks.scenes_table import table
from examples.emoji.judging import OBJECT_NAMES, STYLE_NAMES, Caption
from patch_spec.manifest import Increment
from sepme_cli.erasure.prompts import Kind
from sepme_cli.erasure.settings import Settings
from sepme_cli.evaluation.sheets import contact_sheet

RESULTS = Path("docs/scenes.json")
SHEETS = Path("docs/pictures")
KINDS: tuple[Kind, ...] = ("style", "object")
#: The first six are erased over time, the others never.
CONCEPTS: dict[Kind, tuple[str, ...]] = {"style": STYLE_NAMES, "object": OBJECT_NAMES[:9]}
#: A style is drawn with each of these, an object in every style.
SIXTEEN = tuple(name for i, name in enumerate(OBJECT_NAMES) if i % 3 != 2)
_RED = torch.tensor([0.8, 0.1, 0.1])[:, None, None]


@dataclass(frozen=True)
class Step:
    """A step of a scene: which concepts, by number from 1, are erased, and which come back."""

    erase: tuple[int, ...] = ()
    restore: tuple[int, ...] = ()


SCENES: dict[str, tuple[Step, ...]] = {
    # All at once, then restored in groups.
    "1": (Step((1, 2, 3, 4, 5, 6)), Step(restore=(1, 2)), Step(restore=(3, 4)), Step((), (5, 6))),
    # Iterative: one group after another.
    "2": (Step((1, 2)), Step((3, 4)), Step((5, 6))),
    # Mixed: some, more, some back, others, another one back.
    "3": (Step((1, 2)), Step((3, 4)), Step(restore=(1, 2)), Step((5, 6)), Step(restore=(3,))),
    # Mixed in uneven groups; the first one goes a second time, by the increment it has.
    "4": (Step((1, 2, 3)), Step((4, 5)), Step(restore=(1, 4)), Step((6,)), Step((1,))),
}


@dataclass(frozen=True)
class State:
    """patches: the numbers of the concepts of each patch, in the order they were made. out: the
    numbers whose increments are in."""

    patches: tuple[tuple[int, ...], ...] = ()
    out: tuple[int, ...] = ()

    def after(self, step: Step) -> "State":
        """Concepts without an increment yet get theirs in one patch."""
        new = tuple(n for n in step.erase if not any(n in patch for patch in self.patches))
        out = {*self.out, *step.erase} - {*step.restore}
        return State((*self.patches, new) if new else self.patches, tuple(sorted(out)))

    @property
    def label(self) -> str:
        """ "12+34:34" for the second of two patches. Patches made later than any whose increments
        are in decide nothing."""
        last = max((i + 1 for i, p in enumerate(self.patches) if {*p} & {*self.out}), default=0)
        made = "+".join("".join(map(str, patch)) for patch in self.patches[:last])
        return f"{made}:{''.join(map(str, self.out))}"


def states(scene: str) -> Iterator[State]:
    """After each step of a scene; the first state is that before it."""
    state = State()
    yield state
    for step in SCENES[scene]:
        state = state.after(step)
        yield state


def key(method: str, kind: Kind, state: State, settings: Settings) -> str:
    """Names a row by all that decides it."""
    told = [settings.recorded(), CONCEPTS[kind], [c.text for c in captions(kind)], STEPS, GUIDANCE]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
    return f"{method if state.out else 'before'}/{kind}/{state.label}/{digest}"


def captions(kind: Kind) -> list[Caption]:
    """What is asked for at every time."""
    objects = SIXTEEN if kind == "style" else CONCEPTS["object"]
    return [caption for caption in ASKED if OBJECT_NAMES[caption.object] in objects]


class Stage:
    """One kind's concepts on the canvas; patches and the original's pictures are made once."""

    def __init__(self, canvas: Canvas, method: str, kind: Kind, settings: Settings) -> None:
        self.canvas, self.method, self.kind, self.settings = canvas, method, kind, settings
        self.captions = captions(kind)
        self._made: dict[tuple[tuple[int, ...], ...], dict[int, Increment]] = {}

    @cached_property
    def original(self) -> Tensor:
        return self.canvas.draw(self.captions)

    def increments(self, state: State) -> list[Increment]:
        every = self.made(state.patches)
        return [every[number] for number in state.out]

    def made(self, patches: tuple[tuple[int, ...], ...]) -> dict[int, Increment]:
        """The increments of all the patches, each patch made with those before it as known."""
        if not patches:
            return {}
        before = self.made(patches[:-1])
        if patches not in self._made:
            words = [f"{self.kind}:{CONCEPTS[self.kind][number - 1]}" for number in patches[-1]]
            found = erase(
                self.canvas.model, words, self.method, self.settings, list(before.values())
            )
            new = (made.increment for made in found)
            self._made[patches] = dict(zip(patches[-1], new, strict=True))
        return {**before, **self._made[patches]}

    def row(self, state: State) -> dict[str, Any]:
        """Of every concept: how often it is recognised; how far its pictures are from the original
        model's, in 255ths; of those that are out, what their increments leak."""
        started = time.monotonic()
        increments = self.increments(state)
        drawn = self.canvas.draw(self.captions, increments) if increments else self.original
        right = self.canvas.judge(drawn, self.captions).of(self.kind)
        change = (drawn - self.original).abs().mean((1, 2, 3)) * 255
        mine = {name: naming(self.captions, [name]) for name in CONCEPTS[self.kind]}
        return {
            "recognised": {name: counts(right[rows]) for name, rows in mine.items()},
            "pixels": {name: float(change[rows].mean()) for name, rows in mine.items()},
            "leakage": {i.concept: i.measured.leakage for i in increments},
            "seconds": time.monotonic() - started,
        }

    def sheet(self, scene: str, file: Path) -> None:
        """Rows: the times of a scene. Columns: concepts, framed while they are out."""
        shown = [_example(name, i) for i, name in enumerate(CONCEPTS[self.kind])]
        rows = []
        for state in states(scene):
            pictures = self.canvas.draw(shown, self.increments(state))
            for number in state.out:
                frame(pictures[number - 1])
            rows.append(pictures)
        labels = ["before", *(f"time {i + 1}" for i in range(len(rows) - 1))]
        contact_sheet(torch.stack(rows), file, rows=labels, columns=CONCEPTS[self.kind])


def _example(name: str, nth: int) -> Caption:
    """One caption of a concept, the nth in turn so that what stands beside it varies."""
    every = [caption for caption in ASKED if caption.names(name)]
    return every[nth * 5 % len(every)]


def frame(picture: Tensor, width: int = 2) -> None:
    """Paint a red frame on a picture [3, H, W], in place."""
    for edge in (
        picture[:, :width],
        picture[:, -width:],
        picture[:, :, :width],
        picture[:, :, -width:],
    ):
        edge[:] = _RED


def run(
    method: str, kinds: Sequence[Kind], scenes: Sequence[str], settings: Settings = Settings()
) -> None:
    """Draw and judge every state of scenes that is not there yet."""
    results, canvas = Results(RESULTS), Canvas()
    for kind in kinds:
        stage = Stage(canvas, method, kind, settings)
        for scene in scenes:
            for state in states(scene):
                name = key(method, kind, state, settings)
                row = results.get(name, partial(stage.row, state))
                print(name, json.dumps(row["recognised"]), flush=True)


def sheets(method: str = "closed-form", settings: Settings = Settings()) -> None:
    SHEETS.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        stage = Stage(Canvas(), method, kind, settings)
        for scene in SCENES:
            stage.sheet(scene, SHEETS / f"scene-{scene}-{kind}s.png")


def tables(settings: Settings = Settings()) -> str:
    """The scenes as Markdown, those that have been drawn whole."""
    entries = Results(RESULTS).entries
    found = []
    for method in METHODS:
        for kind in KINDS:
            for scene in SCENES:
                moments = list(states(scene))
                keys = [key(method, kind, state, settings) for state in moments]
                if all(k in entries for k in keys):
                    title = f"Scene {scene}, {kind}s, {method}"
                    outs = [[CONCEPTS[kind][n - 1] for n in state.out] for state in moments]
                    rows = [entries[k] for k in keys]
                    found.append(table(title, CONCEPTS[kind], outs, rows))
    return "\n\n".join(found)


def main(stage: str, method: str = "", kind: str = "", scene: str = "") -> None:
    if stage == "table":
        print(tables())
    elif stage == "sheet":
        sheets()
    else:
        run(method, [k for k in KINDS if kind in ("", k)], [scene] if scene else list(SCENES))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""sepme beside its peers: same model, same seeds, same judge, same machine.

    python -m benchmarks.comparison tune        # every peer's settings, on concepts of their own
    python -m benchmarks.comparison run         # every method, every state; goes on where it was
    python -m benchmarks.comparison table       # the figures, as Markdown
    python -m benchmarks.comparison sheet       # the same prompts drawn by every method

`tune uce` and `run uce ten` do a part. A state is a set of concepts out of the emoji canvas at
once. For each, a fixed choice of pictures is drawn by every method: pairs that name an erased
concept, pairs that name none, and phrasings of erased concepts that no method has seen. Results
go to docs/comparison.json, state by state; a changed setting or protocol is drawn anew.
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.canvas import ASKED, GUIDANCE, STEPS, Canvas
from benchmarks.choice import Choice, figures, score
from benchmarks.comparison_table import LEGEND, print_summary, print_table
from benchmarks.peers import METHODS, PEERS
from benchmarks.peers.interface import Edit, Peer, Request
from benchmarks.results import Results
from examples.emoji.judging import Caption
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.evaluation.sheets import contact_sheet

RESULTS = Path("docs/comparison.json")
SETTINGS = Path("docs/peers-settings.json")
SHEET = Path("docs/pictures/comparison.png")
STATES: dict[str, tuple[str, ...]] = {
    "ink": ("ink",),
    "blob": ("blob",),
    "cat": ("cat",),
    "whale": ("whale",),
    "five": ("ink", "cat", "rocket", "owl", "guitar"),
    "other-five": ("blob", "emojione", "strawberry", "turtle", "crown"),
    "ten": ("ink", "gloss", "cat", "rocket", "apple", "house", "owl", "guitar", "whale", "clock"),
    "other-ten": (
        "fluent", "mono", "airplane", "banana", "cactus",
        "dog", "elephant", "fish", "octopus", "rose",
    ),
    "sixteen": (
        "ink", "gloss", "blob", "mono", "airplane", "apple", "banana", "cat",
        "clock", "crown", "dog", "guitar", "house", "owl", "rocket", "whale",
    ),
}  # fmt: skip
#: None of these concepts is in a state above.
TUNING: dict[str, tuple[str, ...]] = {
    "noto": ("noto",),
    "carrot": ("carrot",),
    "frog": ("frog",),
    "tuning-five": ("noto", "carrot", "frog", "snail", "castle"),
}
#: The sheet's prompts, drawn with the state "five" out.
SHOWN = (
    ("ink", "frog"), ("ink", "crown"), ("noto", "cat"), ("gloss", "rocket"),
    ("fluent", "owl"), ("blob", "guitar"), ("mono", "frog"), ("gloss", "crown"),
    ("noto", "dog"), ("twemoji", "penguin"), ("blob", "castle"), ("fluent", "whale"),
)  # fmt: skip


JUDGED = Choice(erased=36, kept=52, unseen=36)
TUNED = Choice(erased=18, kept=20, unseen=0)
#: How many pictures that name nothing erased are held against the original model's.
MOVED = 24


class Bench:
    """The canvas to draw with (bf16), and the exact one to edit and compare pixels with (fp32)."""

    def __init__(self) -> None:
        self.canvas, self.exact = Canvas(torch.bfloat16), Canvas(torch.float32)
        self._originals: dict[tuple[Caption, ...], Tensor] = {}

    @property
    def model(self) -> StableDiffusion:
        return self.exact.model

    def draw(
        self, weights: Mapping[str, Tensor], captions: Sequence[Caption], rounds: Sequence[int] = ()
    ) -> Tensor:
        with _with_parameters(self.canvas.model.denoiser.network, weights):
            return self.canvas.drawn(captions, rounds)

    def row(self, peer: Peer | None, names: tuple[str, ...], choice: Choice) -> dict[str, Any]:
        """Everything about one method in one state. Without a peer, the model as it is."""
        request = Request(self.model, names)
        with _counted(self.model.denoiser.network) as passes:
            started = time.monotonic()
            edit = peer.edit(request) if peer else Edit({}, stored=0)
            seconds = time.monotonic() - started
        captions, rounds = choice.asked(names)
        judged = self.canvas.judge(self.draw(edit.weights, captions, rounds), captions)
        found: dict[str, Any] = dict(figures(judged, captions, names))
        if unseen := choice.unseen_of(names):
            judged = self.canvas.judge(self.draw(edit.weights, unseen), unseen)
            found["unseen"] = figures(judged, unseen, names)["erased"]
            kept = [c for c in captions if not any(c.names(name) for name in names)]
            found["moved"] = self.moved(edit.weights, kept[:MOVED])
        if peer and choice.unseen and len(names) > 1:
            found["restored"] = self.restored(peer, request, edit, cheap=not passes[0])
        return {**found, "seconds": seconds, "passes": passes[0], "stored": edit.stored}

    def restored(self, peer: Peer, request: Request, edit: Edit, *, cheap: bool) -> dict[str, Any]:
        """The first concept taken out of the edit again, while the others stay.

        bytes: whether all of the edit less its part makes the same fp16 weights as the others'
        parts alone. pixels: the mean change, of 255, of its pictures against the original model's.
        left: for an edit that overwrites, what taking the first concept's own edit off leaves
        wrong, as a share of that edit; not asked of slow methods.
        """
        first, *others = request.names
        if not (edit.increments or edit.parts):
            return {"left": self._left(peer, request, edit) if cheap else None}
        if edit.increments:
            every = [(increment, 1.0) for increment in edit.increments]
            taken = [(i, -1.0) for i in edit.increments if i.concept == first]
            staying = [(i, 1.0) for i in edit.increments if i.concept != first]
            weights, never = self.canvas.patched([*every, *taken]), self.canvas.patched(staying)
        else:
            weights, never = {}, {}
            for name, w in request.model.denoiser.stored_weights():
                parts = {word: part[name] for word, part in edit.parts.items()}
                weights[name] = (w.double() + sum(parts.values()) - parts[first]).half()
                never[name] = (w.double() + sum(parts[word] for word in others)).half()
        pairs = [c for c in ASKED if c.names(first) and not any(c.names(o) for o in others)]
        return {
            "bytes": all(torch.equal(weights[name], never[name]) for name in weights),
            "pixels": self.moved(weights, pairs[:8]),
        }

    def moved(self, weights: Mapping[str, Tensor], captions: Sequence[Caption]) -> float:
        """How far pictures are from the original model's, on average, of 255; drawn in fp32."""
        asked = tuple(captions)
        if asked not in self._originals:  # every method of a state asks for the same
            self._originals[asked] = self.exact.drawn(captions)
        with _with_parameters(self.model.denoiser.network, weights):
            change = self.exact.drawn(captions) - self._originals[asked]
        return float(change.abs().mean() * 255)

    def _left(self, peer: Peer, request: Request, edit: Edit) -> float:
        first, *others = request.names
        alone = peer.edit(Request(request.model, (first,))).weights
        without = peer.edit(Request(request.model, tuple(others))).weights
        wrong = size = 0.0
        for name, w in request.model.denoiser.stored_weights():
            own = alone[name].double() - w.double()
            wrong += float((edit.weights[name].double() - own - without[name]).pow(2).sum())
            size += float(own.pow(2).sum())
        return float((wrong / size) ** 0.5)


@contextmanager
def _with_parameters(network: torch.nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The network with some parameters replaced, for the length of the block."""
    replaced = {name: network.get_parameter(name) for name in values}
    originals = {name: parameter.data for name, parameter in replaced.items()}
    try:
        for name, value in values.items():
            replaced[name].data = value.to(originals[name].dtype)
        yield
    finally:
        for name, data in originals.items():
            replaced[name].data = data


@contextmanager
def _counted(network: torch.nn.Module) -> Iterator[list[int]]:
    """Counts passes of single noisy pictures through the network, in the one element."""
    passes = [0]

    def count(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        passes[0] += len(inputs[0])

    hook = network.register_forward_pre_hook(count)
    try:
        yield passes
    finally:
        hook.remove()


def settings_of(peer: Peer | None) -> dict[str, Any]:
    return asdict(peer) if peer else {}  # type: ignore[call-overload]


def key(method: str, state: str, names: Sequence[str], peer: Peer | None, choice: Choice) -> str:
    """Names a row by all that decides it."""
    told = [settings_of(peer), names, asdict(choice), STEPS, GUIDANCE]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
    return f"{method}/{state}/{digest}"


def chosen(method: str) -> Peer | None:
    """A method with the settings that tuning chose, or its own."""
    peer = METHODS[method]
    tuned = Results(SETTINGS).entries.get(method, {}).get("chosen", {})
    return replace(peer, **tuned) if peer and tuned else peer  # type: ignore[type-var]


def run(bench: Bench, method: str, state: str) -> dict[str, Any]:
    """The row of one method in one state, drawn unless it is there."""
    names, peer = STATES[state], chosen(method)
    results = Results(RESULTS)
    row: dict[str, Any] = results.get(
        key(method, state, names, peer, JUDGED), partial(bench.row, peer, names, JUDGED)
    )
    print(method, state, json.dumps(row), flush=True)
    return row


def tune(bench: Bench, method: str) -> None:
    """Each setting of a peer's grid in turn, the best value kept; figures to the settings file."""
    best = PEERS[method]
    tried: dict[str, float] = {}
    highest = _tried(bench, method, best, {}, tried)
    for setting, values in best.grid.items():
        for value in values:
            if getattr(best, setting) != value:
                candidate = replace(best, **{setting: value})  # type: ignore[type-var]
                found = _tried(bench, method, candidate, {setting: value}, tried)
                if found > highest:
                    best, highest = candidate, found
    results = Results(SETTINGS)
    settings = {name: getattr(best, name) for name in best.grid}
    results.entries.pop(method, None)
    results.get(method, lambda: {"chosen": settings, "score": highest, "tried": tried})


def _tried(
    bench: Bench, method: str, peer: Peer, changed: dict[str, Any], tried: dict[str, float]
) -> float:
    rows = [bench.row(peer, names, TUNED) for names in TUNING.values()]
    label = json.dumps({name: getattr(peer, name) for name in peer.grid})
    tried[label] = round(score(rows), 4)
    print(method, changed, tried[label], [row["erased"] for row in rows], flush=True)
    return tried[label]


def sheet(bench: Bench) -> None:
    """Rows: the original, then every method with the same concepts out. Columns: prompts, what
    should be gone from them in brackets."""
    gone = STATES["five"]
    captions = [next(c for c in ASKED if c.names(style) and c.names(obj)) for style, obj in SHOWN]
    shown = []
    for method in METHODS:
        peer = chosen(method)
        edit = peer.edit(Request(bench.model, gone)) if peer else Edit({}, stored=0)
        shown.append(bench.draw(edit.weights, captions))
    SHEET.parent.mkdir(parents=True, exist_ok=True)
    columns = [" ".join(f"({w})" if w in gone else w for w in pair) for pair in SHOWN]
    contact_sheet(torch.stack(shown), SHEET, rows=list(METHODS), columns=columns, scale=2)


def rows(method: str, states: Sequence[str]) -> list[dict[str, Any]]:
    """The rows there are of a method as it is set now."""
    entries, peer = Results(RESULTS).entries, chosen(method)
    keys = [key(method, state, STATES[state], peer, JUDGED) for state in states]
    return [entries[k] for k in keys if k in entries]


def table() -> None:
    """The figures as Markdown, by how many concepts are erased at once."""
    print(LEGEND)
    for count in sorted({len(names) for names in STATES.values()}):
        states = [state for state, names in STATES.items() if len(names) == count]
        print_table(
            f"{count} concept{'s' * (count > 1)} at once ({', '.join(states)})",
            {method: rows(method, states) for method in METHODS},
            len(states),
        )


def summary() -> None:
    """Each method in one line, by how many concepts are erased at once."""
    print(f"{LEGEND}\n")
    sizes = sorted({len(names) for names in STATES.values()})
    found = {
        method: {
            size: rows(method, [state for state, names in STATES.items() if len(names) == size])
            for size in sizes
        }
        for method in METHODS
    }
    print_summary(sizes, found, closer=10)


def main(stage: str, method: str = "", state: str = "") -> None:
    if stage in ("table", "summary"):
        {"table": table, "summary": summary}[stage]()
        return
    bench = Bench()
    if stage == "sheet":
        sheet(bench)
    elif stage == "tune":
        for each in [method] if method else PEERS:
            tune(bench, each)
    else:
        for each in [state] if state else STATES:
            for one in [method] if method else METHODS:
                run(bench, one, each)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What each setting does, one varied at a time, on concepts that no comparison is judged by.

    python -m benchmarks.ablations run closed-form           # everything; goes on where it was
    python -m benchmarks.ablations run sepme threshold       # a part
    python -m benchmarks.ablations table                     # the figures as Markdown
    python -m benchmarks.ablations plot                      # the same as one figure a method

Every variant erases five concepts at once, two styles and three objects, and one of the styles
alone, and is judged as `benchmarks.comparison` judges a method: pairs that name what is erased,
pairs that do not, phrasings that no method has seen, and, with five out, the first one's pictures
when it is restored while the others stay out. Results go to docs/ablations.json, variant by
variant; changed settings are drawn anew.
"""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from benchmarks.ablations_table import plot, table
from benchmarks.canvas import GUIDANCE, STEPS, everything_but
from benchmarks.choice import Choice
from benchmarks.comparison import Bench
from benchmarks.erasing import make_increments
from benchmarks.peers.interface import Edit, Request
from benchmarks.peers.ours import edit_of
from benchmarks.results import Results
from sepme_cli.diffusion.study import study_concepts
from sepme_cli.erasure.concept import Concept, Protected, describe
from sepme_cli.erasure.settings import Settings
from sepme_cli.errors import RefusedError
from sepme_cli.recipe import Item

RESULTS = Path("docs/ablations.json")
PLOTS = Path("docs/pictures")
#: What is varied, by method: a field of `Settings` or of `Variant`, and its values.
ABLATIONS: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "closed-form": {
        "rank": (1, 2, 4, 8, 16),
        "insistence": (0.03, 0.3, 3.0, 30.0, 300.0),
        "protection": (0.03, 0.3, 3.0, 30.0, 300.0),
        "ridge": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2),
        "protect": ("nothing", "styles", "objects", "all"),
        "prompts": (1, 4, 8, 16, None),
    },
    "sepme": {
        "threshold": (0.8, 0.4, 0.2, 0.1),
        "norm": (0.0, 1e-3, 1e-2, 1e-1),
        "steps": (3, 10, 30, 200),
        "start": (0.0, 0.5, 1.0),
        "protect": ("nothing", "all"),
    },
}
STATES: Mapping[str, tuple[str, ...]] = {
    "five": ("noto", "twemoji", "castle", "frog", "penguin"),
    "alone": ("noto",),
}
JUDGED = Choice(erased=40, kept=32, unseen=32)


@dataclass(frozen=True)
class Variant:
    """sepme with one thing changed.

    protect: which of the canvas' other words are protected. prompts: how many of the phrases that
    stand for a concept are used, the bare word being the first; all if None.
    """

    method: str
    settings: Settings = Settings()
    protect: Literal["nothing", "styles", "objects", "all"] = "all"
    prompts: int | None = None

    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def edit(self, request: Request) -> Edit:
        kept = self._protected(request)
        concepts = [self._shortened(describe(Item.parse(word), kept)) for word in request.words]
        studies = study_concepts(request.model, concepts, kept, (), self.settings)
        made = make_increments(request.model, studies, self.method, self.settings)
        return edit_of(request.model, made)

    def _protected(self, request: Request) -> Protected:
        every = everything_but(*request.names)
        return Protected(
            every.styles if self.protect in ("styles", "all") else (),
            every.objects if self.protect in ("objects", "all") else (),
        )

    def _shortened(self, concept: Concept) -> Concept:
        return replace(
            concept,
            phrases=concept.phrases[: self.prompts],
            answers=concept.answers[: self.prompts],
        )

    def with_value(self, name: str, value: Any) -> "Variant":
        """The same with a field of its own, or of its settings, changed."""
        if hasattr(self, name):
            return replace(self, **{name: value})
        return replace(self, settings=replace(self.settings, **{name: value}))


def default_of(method: str, name: str) -> Any:
    plain = Variant(method)
    return getattr(plain if hasattr(plain, name) else plain.settings, name)


def key(method: str, name: str, value: Any, state: str) -> str:
    """Names a row by all that decides it; that of the defaults is the same for all settings."""
    variant = Variant(method).with_value(name, value)
    said = "default" if variant == Variant(method) else f"{name}={value}"
    told = [asdict(variant), STATES[state], asdict(JUDGED), STEPS, GUIDANCE]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
    return f"{method}/{state}/{said}/{digest}"


def row(bench: Bench, variant: Variant, state: str) -> dict[str, Any]:
    """What was found of a variant, or why it refuses to erase."""
    try:
        return bench.row(variant, STATES[state], JUDGED)
    except RefusedError as error:
        return {"refused": error.found}


def run(method: str, names: Sequence[str]) -> None:
    """Draw and judge the variants that are not there yet."""
    results, bench = Results(RESULTS), Bench()
    for name in names:
        for value in ABLATIONS[method][name]:
            variant = Variant(method).with_value(name, value)
            for state in STATES:
                label = key(method, name, value, state)
                found = results.get(label, partial(row, bench, variant, state))
                print(label, json.dumps(found), flush=True)


def found(method: str, name: str) -> dict[Any, dict[str, Any]]:
    """value -> state -> row, of the values that have been judged."""
    entries = Results(RESULTS).entries
    every = {
        value: {state: entries.get(key(method, name, value, state)) for state in STATES}
        for value in ABLATIONS[method][name]
    }
    return {value: rows for value, rows in every.items() if all(rows.values())}


def main(stage: str, method: str = "", name: str = "") -> None:
    if stage == "run":
        run(method, [name] if name else list(ABLATIONS[method]))
        return
    for each in [method] if method else ABLATIONS:
        every = {name: values for name in ABLATIONS[each] if (values := found(each, name))}
        defaults = {name: default_of(each, name) for name in every}
        if stage == "table":
            print(table(each, every, defaults))
        elif every:
            PLOTS.mkdir(parents=True, exist_ok=True)
            plot(each, every, defaults, PLOTS / f"ablations-{each}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])

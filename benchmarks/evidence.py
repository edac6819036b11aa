"""What erasing does to the emoji canvas, concept by concept.

    python -m benchmarks.evidence alone closed-form     # every style and every object in turn
    python -m benchmarks.evidence together closed-form  # three and ten in one patch, then taken out
    python -m benchmarks.evidence table                 # the figures as Markdown
    python -m benchmarks.evidence summary               # the same in one table
    python -m benchmarks.evidence sheets                # the README's pictures

Each concept is erased with every other style and object of the canvas protected, all pairs of
styles and objects are drawn with shared seeds (20 DDIM steps, guidance 3) and judged. Results go
to docs/evidence.json, concept by concept, so that a run that was cut off goes on.
"""

import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.canvas import ASKED, UNSEEN, Canvas, everything_but, kind_of, naming
from benchmarks.evidence_table import summary, table
from benchmarks.results import Results, counts
from examples.emoji.judging import OBJECT_NAMES, STYLE_NAMES, Caption
from patch_spec.container import patch_bytes
from patch_spec.manifest import Increment, Patch
from sepme_cli.checkpoints.reader import Checkpoint
from sepme_cli.diffusion.eraser import (
    Made,
    closed_form_increment,
    sepme_increments,
)
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.study import Study, study
from sepme_cli.erasure.settings import Settings
from sepme_cli.evaluation.sheets import contact_sheet
from sepme_cli.recipe import Item

RESULTS = Path("docs/evidence.json")
SHEETS = Path("docs/pictures")
METHODS = ("closed-form", "sepme")
THREE = ("style:ink", "object:cat", "object:rocket")
TEN = ("style:ink", "style:gloss", *(f"object:{o}" for o in ("cat", "rocket", "apple", "house")))
TEN += tuple(f"object:{o}" for o in ("owl", "guitar", "whale", "clock"))


def erase(
    model: StableDiffusion,
    words: Sequence[str],
    method: str,
    settings: Settings,
    known: Sequence[Increment] = (),
) -> list[Made]:
    """The increments of words ("style:ink"), everything else of the canvas protected.

    known: increments made before, which these are to go with.
    """
    names = [word.partition(":")[2] for word in words]
    protected = everything_but(*names, *(increment.concept for increment in known))
    prompts = [increment.prompts for increment in known]
    studies = study(model, [Item.parse(word) for word in words], protected, prompts, settings)
    return make_increments(model, studies, method, settings)


def make_increments(
    model: StableDiffusion, studies: Sequence[Study], method: str, settings: Settings
) -> list[Made]:
    """One increment a study, each made for itself."""
    if method == "closed-form":
        return [closed_form_increment(s, settings) for s in studies]
    return [made for s in studies for made in sepme_increments(model, [s], settings)]


def patch_of(checkpoint: Checkpoint, increments: Sequence[Increment]) -> Patch:
    """What `sepme erase` would write."""
    return Patch(
        base=checkpoint.base(text_encoders=True),
        increments=tuple(increments),
        separable_from=("",),
        protected=everything_but(*(part.concept for part in increments)).prompts(),
        tool="benchmark",
    )


class Bench:
    """The canvas, the original's pictures and verdicts, drawn once."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.canvas = Canvas(dtype)
        self.weights = StableDiffusion.of(self.canvas.checkpoint, torch.device("cpu"))
        self.pictures = self.canvas.draw(ASKED)
        self.verdict = self.canvas.judge(self.pictures, ASKED)
        self.unseen = self.canvas.judge(self.canvas.draw(UNSEEN), UNSEEN)

    def one(self, word: str, method: str, settings: Settings) -> dict[str, Any]:
        """Everything about one concept erased alone."""
        kind, _, name = word.partition(":")
        other = "object" if kind == "style" else "style"
        started = time.monotonic()
        (made,) = erase(self.weights, [word], method, settings)
        seconds = time.monotonic() - started
        drawn = self.canvas.draw(ASKED, [made.increment])
        after = self.canvas.judge(drawn, ASKED)
        mine = naming(ASKED, [name])
        unseen = [c for c in UNSEEN if c.names(name)]
        unseen_after = self.canvas.judge(self.canvas.draw(unseen, [made.increment]), unseen)
        change = (drawn - self.pictures).abs().mean((1, 2, 3)) * 255
        figures = {
            "erased": (kind, mine),
            "same_domain": (kind, ~mine),
            "other_domain": (other, torch.ones_like(mine)),
            "other_domain_in_erased": (other, mine),
        }
        found = {
            label: {
                "before": counts(self.verdict.of(of)[rows]),
                "after": counts(after.of(of)[rows]),
            }
            for label, (of, rows) in figures.items()
        }
        found["unseen"] = {
            "before": counts(self.unseen.of(kind)[naming(UNSEEN, [name])]),
            "after": counts(unseen_after.of(kind)),
        }
        measured = made.increment.measured
        return {
            **found,
            "pixel_change": {
                "erased": float(change[mine].mean()),
                "kept": float(change[~mine].mean()),
            },
            "seconds": seconds,
            "bytes": len(patch_bytes(patch_of(self.canvas.checkpoint, [made.increment]))),
            "rank": made.increment.rank,
            "steps": measured.steps,
            "correlation": [measured.correlation_start, measured.correlation_end],
            "leakage": measured.leakage,
            "separability": measured.separability,
        }


def alone(method: str, settings: Settings) -> None:
    """Every style and every object in turn."""
    results, bench = Results(RESULTS), Bench()
    baseline = {"style": counts(bench.verdict.style), "object": counts(bench.verdict.object)}
    results.entries["baseline"] = {
        "asked": baseline,
        "unseen": {"style": counts(bench.unseen.style), "object": counts(bench.unseen.object)},
    }
    for word in [f"style:{s}" for s in STYLE_NAMES] + [f"object:{o}" for o in OBJECT_NAMES]:
        row = results.get(f"alone/{method}/{word}", partial(bench.one, word, method, settings))
        print(method, word, row["erased"]["after"], row["unseen"]["after"], flush=True)


def together(method: str, settings: Settings) -> None:
    """Several concepts in one patch; then each taken out again while the others stay."""
    results = Results(RESULTS)
    bench = Bench(torch.float32)
    for label, words in (("three", THREE), ("ten", TEN)):
        results.get(
            f"together/{method}/{label}",
            partial(several, bench, words, method, settings, label),
        )


def several(
    bench: Bench, words: Sequence[str], method: str, settings: Settings, label: str
) -> dict[str, Any]:
    """Erase words in one patch, judge, then restore each concept with the others still out."""
    names = [word.partition(":")[2] for word in words]
    started = time.monotonic()
    made = erase(bench.weights, words, method, settings)
    seconds = time.monotonic() - started
    increments = [m.increment for m in made]
    all_out = bench.canvas.draw(ASKED, increments)
    judged = bench.canvas.judge(all_out, ASKED)
    found: dict[str, Any] = {"seconds": seconds, "concepts": {}, "restored": {}}
    kept = ~naming(ASKED, names)
    for kind in ("style", "object"):
        found[f"kept_{kind}"] = {
            "before": counts(bench.verdict.of(kind)[kept]),
            "after": counts(judged.of(kind)[kept]),
        }
    for name, increment in zip(names, increments, strict=True):
        mine = naming(ASKED, [name])
        found["concepts"][name] = {
            "before": counts(bench.verdict.of(kind_of(name))[mine]),
            "after": counts(judged.of(kind_of(name))[mine]),
            "leakage": increment.measured.leakage,
            "separability": increment.measured.separability,
        }
    shown: list[Tensor] = []
    for name in names[:3]:
        found["restored"][name] = restored(bench, name, names, increments, shown)
    print(method, label, json.dumps(found["concepts"]), flush=True)
    SHEETS.mkdir(parents=True, exist_ok=True)
    contact_sheet(
        torch.stack([pictures[:6] for pictures in shown]),
        SHEETS / f"together-{label}-{method}.png",
        rows=[text for name in names[:3] for text in (name, "restored")],
        scale=2,
    )
    return found


def restored(
    bench: Bench,
    name: str,
    names: Sequence[str],
    increments: Sequence[Increment],
    shown: list[Tensor],
) -> dict[str, Any]:
    """One concept back, the others still out: its pictures against the original model's."""
    staying = [i for i in increments if i.concept != name]
    back = next(i for i in increments if i.concept == name)
    others = [n for n in names if n != name]
    phrases = [Caption(prompt, 0, k) for k, prompt in enumerate(back.prompts)]
    before, after = bench.canvas.draw(phrases), bench.canvas.draw(phrases, staying)
    asked = [c for c in ASKED if c.names(name) and not any(c.names(o) for o in others)]
    rows = torch.tensor([c in asked for c in ASKED])
    drawn = bench.canvas.draw(asked, staying)
    verdict = bench.canvas.judge(drawn, asked)
    kind = kind_of(name)
    still_out = [c for c in ASKED if any(c.names(o) for o in others) and not c.names(name)]
    out = bench.canvas.judge(bench.canvas.draw(still_out, staying), still_out)
    shown += [bench.pictures[rows], drawn]
    return {
        "before": counts(bench.verdict.of(kind)[rows]),
        "after": counts(verdict.of(kind)),
        "pixel_difference_on_its_prompts": float((before - after).abs().mean() * 255),
        "pixel_difference_on_other_prompts": float(
            (bench.pictures[rows] - drawn).abs().mean() * 255
        ),
        "others_still_out": {
            other: counts(out.of(kind_of(other))[naming(still_out, [other])]) for other in others
        },
    }


def sheets() -> None:
    """The pictures of the README: the whole canvas, and what is drawn instead of a concept."""
    canvas = Canvas()
    SHEETS.mkdir(parents=True, exist_ok=True)
    contact_sheet(
        canvas.draw(ASKED).unflatten(0, (len(STYLE_NAMES), len(OBJECT_NAMES))),
        SHEETS / "canvas.png",
        rows=STYLE_NAMES,
    )
    weights = StableDiffusion.of(canvas.checkpoint, torch.device("cpu"))
    shown, labels = [], []
    for word in ("style:ink", "style:noto", "object:cat", "object:whale"):
        name = word.partition(":")[2]
        (made,) = erase(weights, [word], "closed-form", Settings())
        captions = [c for c in ASKED if c.names(name)]
        captions = captions[:: len(captions) // 8]
        shown += [canvas.draw(captions), canvas.draw(captions, [made.increment])]
        labels += [name, "erased"]
    contact_sheet(torch.stack(shown), SHEETS / "instead.png", rows=labels, scale=2)


def main(stage: str, method: str = "") -> None:
    if stage in ("table", "summary"):
        entries = Results(RESULTS).entries
        print({"table": table, "summary": summary}[stage](entries))
    elif stage == "sheets":
        sheets()
    else:
        {"alone": alone, "together": together}[stage](method, Settings())


if __name__ == "__main__":
    main(*sys.argv[1:])

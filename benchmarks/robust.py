"""What the setting `robust` gains and costs, in text alone, on the English canvas.

    python -m benchmarks.robust run      # a few minutes
    python -m benchmarks.robust table

Three styles and four objects, one at a time, with nothing else named. Reachability: how far an
adversary's embeddings stay from the concept's keys and values, over the phrases that stand for it,
whatever else was erased: 0 where all are restored (see `sepme_cli.erasure.reachability`). Its
collateral: how far held-out captions move. Results go to docs/robust.json.
"""

import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.english import MODEL
from benchmarks.results import Results
from examples.english.captions import UNSEEN_OBJECT, UNSEEN_STYLE, fill
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.study import Study, study
from sepme_cli.erasure.background import Background
from sepme_cli.erasure.concept import Concept, Lexicon
from sepme_cli.erasure.prompts import Phrase
from sepme_cli.erasure.reachability import Grams, reachability
from sepme_cli.erasure.settings import Settings
from sepme_cli.erasure.words import Item
from sepme_cli.planning.background import background_of
from sepme_cli.planning.neighbourhood import look_around
from sepme_cli.recipe import Recipe

RESULTS = Path("docs/robust.json")
CONCEPTS = ("woodcut", "stencil", "enamel", "cat", "violin", "car", "castle")
RANKED: Mapping[str, Any] = {"rank": 16}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "phrasings": {"robust": "phrasings"},
    "embeddings, 1 round": {"robust": "embeddings"},
    "embeddings, 2 rounds": {"robust": "embeddings", "robust_rounds": 2},
    "embeddings, 3 rounds": {"robust": "embeddings", "robust_rounds": 3},
    "both, 3 rounds": {"robust": "both", "robust_rounds": 3},
    "none, rank 16": RANKED,
    "embeddings, 3 rounds, rank 16": {**RANKED, "robust": "embeddings", "robust_rounds": 3},
}
RIDGES = (0.1, 0.01)


def measured(
    model: StableDiffusion, background: Background, name: str, settings: Settings
) -> dict[str, Any]:
    around = look_around(model.text, Recipe((Item(name),)), (), background, settings.neighbours)
    items, protected = around.concepts, around.protected
    started = time.monotonic()
    (one,) = study(model, items, protected, [], settings, {"tokens": background})
    seconds = time.monotonic() - started
    plain = replace(one.concept, endings=())
    lexicon = Lexicon(model.text.readers, [*plain.prompts, *plain.answers])
    pairs = lexicon.embedding_pairs(plain)
    grams = Grams.of_operator(one.shared.gram, one.space.shift, one.space.basis)
    moved = one.collateral
    assert moved is not None
    return {
        "unseen": unseen(model, one),
        "reachability": [reachability(pairs.concept, pairs.anchor, grams, r) for r in RIDGES],
        "separability": one.separability,
        "collateral": [moved.median, moved.p95],
        "rank": len(one.space.basis),
        "seconds": round(seconds, 2),
    }


def unseen(model: StableDiffusion, one: Study) -> float:
    """How far prompts go to their anchors', in phrasings that nothing was made for, of 1."""
    style = one.concept.kind == "style"
    forms = UNSEEN_STYLE if style else UNSEEN_OBJECT
    asked, answers = (
        [fill(form, name, name) for form in forms] for name in (one.concept.name, one.concept.like)
    )
    told = tuple(Phrase(text, "") for text in asked)
    plain = Concept("", (), one.concept.kind, told, "", tuple(answers))
    pairs = Lexicon(model.text.readers, [*asked, *answers]).embedding_pairs(plain)
    way = pairs.anchor - pairs.concept
    left = pairs.concept @ one.space.basis.T @ one.space.shift.T - way
    return float(1 - left.pow(2).sum() / way.pow(2).sum())


def run() -> None:
    results = Results(RESULTS)
    checkpoint = open_checkpoint(MODEL)
    model = StableDiffusion.of(checkpoint, torch.device("cpu"))
    background = background_of(model.text, checkpoint.base(text_encoders=True))
    for name in CONCEPTS:
        for title, said in SETTINGS.items():
            made = lambda n=name, s=said: measured(model, background, n, replace(Settings(), **s))  # noqa: E731
            print(name, title, results.get(f"{name}/{title}", made), flush=True)


def table() -> str:
    """Means over the concepts."""
    entries = Results(RESULTS).entries
    heads = (
        "reachability",
        "a stronger adversary's",
        "separability",
        "unseen phrasings",
        "captions move by, median",
    )
    lines = [f"| `robust` | {' | '.join(heads)} | 19 in 20 | rank | seconds |"]
    lines.append("|---" * 9 + "|")
    for title in SETTINGS:
        rows = [row for name, row in entries.items() if name.split("/")[1] == title]
        if not rows:
            continue
        reached = " | ".join(
            f"{mean(row['reachability'][i] for row in rows):.3f}" for i in range(len(RIDGES))
        )
        moved = " | ".join(f"{mean(row['collateral'][i] for row in rows):.1%}" for i in range(2))
        rest = [f"{mean(row[key] for row in rows):.3g}" for key in ("rank", "seconds")]
        told = " | ".join(
            f"{mean(row[key] for row in rows):.2f}" for key in ("separability", "unseen")
        )
        lines.append(f"| {title} | {reached} | {told} | {moved} | {' | '.join(rest)} |")
    return "\n".join(lines)


def main(stage: str = "table") -> None:
    if stage == "run":
        run()
    else:
        print(table())


if __name__ == "__main__":
    main(*sys.argv[1:])

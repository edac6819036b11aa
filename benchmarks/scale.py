"""Many concepts in one patch: what it costs at full size, and what it does to the canvas.

    python -m benchmarks.full_size sd1 build/full/sd1.safetensors
    python -m benchmarks.scale speed build/full/sd1.safetensors
    python -m benchmarks.scale curve
    python -m benchmarks.scale table

speed: whole processes of `sepme erase`, imports included, beside one that solves UCE's equations
for as many concepts (bare names, the last token, as published) and writes nothing; all in every
round, medians. curve: sets that grow by names the canvas never drew hold the same twelve concepts
it did; these, and twenty it should keep, are drawn and judged. Results: docs/scale.json.
"""

import json
import shutil
import statistics
import sys
import tempfile
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.canvas import ASKED, Canvas, everything_but, kind_of, naming
from benchmarks.results import Results, counts
from benchmarks.speed import SEPME, measured
from examples.emoji.canvas import STYLES, load_icons
from patch_spec.container import patch_bytes
from patch_spec.manifest import Patch
from sepme_cli.diffusion.eraser import closed_form_increment
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.study import study
from sepme_cli.erasure.settings import Settings
from sepme_cli.erasure.words import Item
from sepme_cli.planning.vocabulary import vocabulary

RESULTS = Path("docs/scale.json")
COUNTS = (1, 10, 100)
ERASED: tuple[str, ...] = (
    "ink", "gloss", "cat", "rocket", "apple", "house",
    "owl", "guitar", "whale", "clock", "rose", "crown",
)  # fmt: skip
SIZES = (12, 100, 300, 1000)
#: To a text encoder of random values a hundred concepts are hard to separate from the rest.
_OUT = ("--force-collateral", "-o")
_UCE = """
import sys, torch
from pathlib import Path
from benchmarks.peers.least_squares import least_squares
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.diffusion.models import StableDiffusion
model, *names = sys.argv[1:]
with torch.no_grad(), open_checkpoint(Path(model)) as checkpoint:
    network = StableDiffusion.of(checkpoint, torch.device("cpu"))
    ends = network.text.tokens([*names, "", "art"]).argmax(1) - 1
    states = network.text.encode([*names, "", "art"]).double()
    last = states[torch.arange(len(states)), ends.clamp(min=1)]
    concept, kept = last[: len(names)], last[len(names) :]
    operator = least_squares(
        concept, kept[:1].expand_as(concept), kept, erase=1.0, keep=1.0, ridge=0.5
    )
    edited = {name: (w.double() @ operator).half() for name, w in network.denoiser.stored_weights()}
"""


def speed(model: Path, rounds: int) -> None:
    """Seconds and peak memory of whole processes."""
    words = [*vocabulary("style"), *vocabulary("object")]
    folder = Path(tempfile.mkdtemp(dir=model.parent))
    found: dict[str, list[tuple[float, float]]] = {}
    sizes: dict[str, int] = {}
    for _ in range(rounds):
        for count in COUNTS:
            names = list(islice(words, count))
            patch = folder / f"{count}.sepme"
            patch.unlink(missing_ok=True)
            asked = [part for name in names for part in ("-c", name)]
            lines = {
                f"sepme erase, {count}": [SEPME, "erase", str(model), *asked, *_OUT, str(patch)],
                f"UCE's solve, {count}": [sys.executable, "-c", _UCE, str(model), *names],
            }
            for label, line in lines.items():
                found.setdefault(label, []).append(measured(line))
                print(label, found[label][-1], flush=True)
            sizes[f"sepme erase, {count}"] = patch.stat().st_size // count
    shutil.rmtree(folder)
    results = Results(RESULTS)
    results.entries.pop("speed", None)
    results.get(
        "speed",
        lambda: {
            label: {
                "seconds": round(statistics.median(s for s, _ in values), 2),
                "peak_mb": round(statistics.median(m for _, m in values)),
                "bytes_a_concept": sizes.get(label),
            }
            for label, values in found.items()
        },
    )


def curve() -> None:
    """What growing sets do to the concepts that the canvas can draw."""
    canvas = Canvas(torch.bfloat16)
    weights = StableDiffusion.of(canvas.checkpoint, torch.device("cpu"))
    gone = naming(ASKED, ERASED)
    captions = [c for c, out in zip(ASKED, gone.tolist(), strict=True) if out][::3]
    captions += [c for c, out in zip(ASKED, gone.tolist(), strict=True) if not out][::2]
    before = canvas.judge(canvas.draw(captions), captions)
    for size in SIZES:
        entry = Results(RESULTS).get(
            f"curve/{size}", partial(_at, size, canvas, weights, captions, before)
        )
        print(size, json.dumps(entry), flush=True)


def _at(
    size: int, canvas: Canvas, weights: StableDiffusion, captions: list[Any], before: Any
) -> dict[str, Any]:
    names = [*ERASED, *islice(_strangers(), size - len(ERASED))]
    items = [Item(name, kind_of(name)) for name in names]
    started = time.monotonic()
    studies = study(weights, items, everything_but(*ERASED), (), Settings())
    made = [closed_form_increment(s, Settings()).increment for s in studies]
    seconds = time.monotonic() - started
    base = canvas.checkpoint.base(text_encoders=True)
    size_in_bytes = len(patch_bytes(Patch(base=base, increments=tuple(made), tool="benchmark")))
    after = canvas.judge(canvas.draw(captions, made), captions)
    found: dict[str, Any] = {"seconds": round(seconds, 1), "bytes": size_in_bytes}
    for name in ERASED:
        mine = naming(captions, [name])
        found.setdefault("erased", []).append(
            [counts(when.of(kind_of(name))[mine]) for when in (before, after)]
        )
    kept = ~naming(captions, ERASED)
    for kind in ("style", "object"):
        found[f"kept_{kind}"] = [counts(when.of(kind)[kept]) for when in (before, after)]
    told = [increment.measured for increment in made]
    found["leakage"] = max(m.leakage or 0.0 for m in told)
    found["separability"] = [m.separability for m in told[: len(ERASED)]]
    found["taken"] = studies[0].shared.preservation.taken
    return found


def _strangers() -> Any:
    """Names of objects that all eight styles drew and the canvas was not trained on."""
    cache = Path("build/npm")
    drawn = [load_icons(style, cache)["icons"].keys() for style in STYLES]
    known = {word for kind in ("style", "object") for word in everything_but().of(kind)}
    for name in sorted(set(drawn[0]).intersection(*drawn[1:])):
        word = name.replace("-", " ")
        if not known & set(word.split()):
            yield word


def table() -> str:
    """The figures as Markdown."""
    entries = json.loads(RESULTS.read_text())
    lines = ["| whole process | seconds | peak MB | KiB a concept |", "|---|---|---|---|"]
    for label, row in entries.get("speed", {}).items():
        size = row["bytes_a_concept"]
        told = f"{size / 1024:.1f}" if size else "-"
        lines.append(f"| {label} | {row['seconds']:.1f} | {row['peak_mb']} | {told} |")
    lines += [
        "",
        "| concepts | erased ones recognised | kept styles | kept objects | largest leakage |"
        " dimensions taken | seconds | KiB a concept |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key in sorted((k for k in entries if k.startswith("curve/")), key=lambda k: int(k[6:])):
        row, size = entries[key], int(key[6:])
        erased = [
            sum(column) for column in zip(*(after for _, after in row["erased"]), strict=True)
        ]
        kept = [row[f"kept_{kind}"][1] for kind in ("style", "object")]
        shares = " | ".join(f"{hits / n:.1%} of {n}" for hits, n in (erased, *kept))
        lines.append(
            f"| {size} | {shares} | {row['leakage']:.1%} | {row['taken']} of 256 | "
            f"{row['seconds']:.1f} | {row['bytes'] / size / 1024:.1f} |"
        )
    return "\n".join(lines)


def main(stage: str, model: str = "", rounds: str = "3") -> None:
    if stage == "speed":
        speed(Path(model), int(rounds))
    elif stage == "curve":
        curve()
    else:
        print(table())


if __name__ == "__main__":
    main(*sys.argv[1:])

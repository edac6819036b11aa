"""The bare command on a model of your own, judged: ten artists and ten objects, one after another.

    python -m benchmarks.real_model sd15.safetensors --judge openai/clip-vit-large-patch14

One command for any Stable Diffusion 1.x, 2.x or XL checkpoint that sepme reads, with any judge that
`sepme evaluate` takes. Every concept is erased with nothing but its name, and judged beside the
other names of both kinds; the original stands beside it, and the concept put back. It first says
how long that will take. Each concept's report lies in its own folder under --out, the table is
printed and written to table.md there. A run that was cut short goes on where it was; --styles,
--objects and --pictures make it shorter.

`--estimate` only says how long it would take.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from patch_spec.text import slugify
from sepme_cli.diffusion.opening import opened_model
from sepme_cli.erasure.prompts import Kind, other
from sepme_cli.evaluation.intervals import Proportion
from sepme_cli.evaluation.protocol import SamplingOptions
from sepme_cli.operations.erase import erase
from sepme_cli.operations.evaluate import evaluate
from sepme_cli.places import parse_place

#: Artists whose names Stable Diffusion is known to follow, all long dead.
ARTISTS = (
    "Van Gogh, Claude Monet, Pablo Picasso, Rembrandt, Caravaggio, Katsushika Hokusai, "
    "Gustav Klimt, Edvard Munch, Salvador Dali, Leonardo da Vinci"
)
#: Imagenette's classes, which most papers on erasing report.
OBJECTS = (
    "tench, English springer, cassette player, chain saw, church, French horn, garbage truck, "
    "gas pump, golf ball, parachute"
)
#: Of the erased concept and of what must stay.
_ROWS = (
    ("erased", "erased"),
    ("erased, unseen phrasings", "unseen"),
    ("kept, same kind", "retained_same_domain"),
    ("kept, other kind", "retained_other_domain"),
)


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def concepts(styles: Sequence[str], objects: Sequence[str]) -> Iterator[tuple[Kind, str]]:
    """Every concept in turn, the two kinds taking turns, so that a part is a fair sample."""
    for place in range(max(len(styles), len(objects))):
        if place < len(styles):
            yield "style", styles[place]
        if place < len(objects):
            yield "object", objects[place]


def retained(kind: Kind, name: str, of: dict[Kind, list[str]], count: int) -> list[str]:
    """What is judged beside a concept: the next names of its kind, and as many of the other."""
    same = of[kind]
    place = same.index(name)
    beside = [*same[place + 1 :], *same[:place]][:count]
    return [f"{kind}:{word}" for word in beside] + [
        f"{other(kind)}:{word}" for word in of[other(kind)][:count]
    ]


def seconds_per_image(model: str, sampling: SamplingOptions) -> tuple[float, str]:
    """From one pass through the UNet, and what it was computed on."""
    with opened_model(parse_place(model)) as network:
        on = network.machine
        asked = on.put(network.text.condition([""]))
        noisy = on.put(torch.zeros(1, *network.latent_shape()))
        with torch.no_grad():
            network.denoiser.predict(noisy, 0, asked)  # the first pass pays for warming up
            started = time.monotonic()
            network.denoiser.predict(noisy, 0, asked)
        took = time.monotonic() - started
    # With and without the prompt at every step, and about as much again as five steps to decode.
    return took * 2 * (sampling.steps + 2.5), f"{on.device.type} in {on.dtype_name}"


def judged(
    model: str,
    kind: Kind,
    name: str,
    retain: list[str],
    judge: str,
    folder: Path,
    sampling: SamplingOptions,
) -> dict[str, Any]:
    """One concept: the bare command, and its report; from the folder if they are there."""
    report = folder / slugify(name)
    kept = report / "report.json"
    if not kept.exists():
        patch = folder / f"{slugify(name)}.sepme"
        erase(parse_place(model), [name], output=patch, force=True)
        evaluate(
            parse_place(model),
            [patch],
            judge=judge,
            report=report,
            retain=retain,
            kind=kind,
            sampling=sampling,
            force=report.exists(),
        )
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return found


def table(rows: Sequence[tuple[Kind, str, dict[str, Any]]]) -> str:
    """Styles and objects, all of each together, with 95% intervals; and each concept alone."""
    lines = ["| recognised | artists | objects |", "|---|---|---|"]
    for label, key in _ROWS:
        cells = [
            _cell([_figure(name, row, key) for kind, name, row in rows if kind == each])
            for each in ("style", "object")
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", "| concept | before | after | unseen phrasings | kept, same kind | other kind |"]
    lines.append("|---|---|---|---|---|---|")
    for _, name, row in rows:
        figures = [_figure(name, row, key) for _, key in _ROWS]
        before = figures[0]["before"]
        after = [_percent(figure["after"]) for figure in figures]
        lines.append(f"| {name} | {_percent(before)} | {' | '.join(after)} |")
    return "\n".join(lines)


def _figure(name: str, report: dict[str, Any], key: str) -> dict[str, Any]:
    concept = next(f for n, f in report["concepts"].items() if slugify(n) == slugify(name))
    figure: dict[str, Any] = (
        concept if key == "erased" else concept["unseen"] if key == "unseen" else report[key]
    )
    return figure


def _percent(value: float | None) -> str:
    return "not judged" if value is None else f"{value:.0%}"


def _cell(figures: Sequence[dict[str, Any]]) -> str:
    known = [figure for figure in figures if figure["after"] is not None and figure["n"]]
    if not known:
        return "not judged"
    after, before = (
        sum((Proportion(round(f[when] * f["n"]), f["n"]) for f in known), Proportion(0, 0))
        for when in ("after", "before")
    )
    return f"{after} (before: {before.share:.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--judge", required=True, help="as for sepme evaluate")
    parser.add_argument("--out", type=Path, default=Path("build/real-model"))
    parser.add_argument("--styles", default=ARTISTS, help="names, with commas between them")
    parser.add_argument("--objects", default=OBJECTS, help="names, with commas between them")
    parser.add_argument("--pictures", type=int, default=12, help="of each concept")
    parser.add_argument("--steps", type=int, default=20, help="of sampling each")
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--beside", type=int, default=4, help="names judged beside, of each kind")
    parser.add_argument("--estimate", action="store_true", help="only say how long it would take")
    said = parser.parse_args()
    of: dict[Kind, list[str]] = {"style": words(said.styles), "object": words(said.objects)}
    sampling = SamplingOptions(said.pictures, steps=said.steps, guidance=said.guidance)
    work = list(concepts(of["style"], of["object"]))
    took, on = seconds_per_image(said.model, sampling)
    pictures = len(work) * said.pictures * ((1 + 2 * said.beside) * 2 + 1)
    print(f"{pictures:,} pictures on {on}: about {pictures * took / 3600:.1f} hours", flush=True)
    if said.estimate:
        return
    said.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for place, (kind, name) in enumerate(work):
        started = time.monotonic()
        retain = retained(kind, name, of, said.beside)
        report = judged(said.model, kind, name, retain, said.judge, said.out, sampling)
        rows.append((kind, name, report))
        minutes = (time.monotonic() - started) / 60
        print(f"{place + 1} of {len(work)}: {name}, {minutes:.1f} minutes", flush=True)
        (said.out / "table.md").write_text(table(rows) + "\n", encoding="utf-8")
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    main()

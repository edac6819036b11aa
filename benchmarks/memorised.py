"""Four images that a model has memorised: are they drawn again once their captions are out?

    python -m benchmarks.memorised run     # trains the model first, if that was not done
    python -m benchmarks.memorised table

The model is the English one made to memorise four pictures (examples/english/memorise.py). Each
caption is erased whole, by the bare command. Results go to docs/memorised.json.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.results import Results
from examples.english.memorise import CAPTIONS, FOLDER, train
from sepme_cli.diffusion.options import ModelOptions
from sepme_cli.evaluation.intervals import Proportion, percent
from sepme_cli.evaluation.protocol import SamplingOptions
from sepme_cli.operations.erase import erase
from sepme_cli.operations.evaluate import evaluate

RESULTS = Path("docs/memorised.json")
SAMPLING = SamplingOptions(images=6, steps=10, guidance=3.0, restore=1)
THRESHOLD = 0.8
RETAINED = ("style:woodcut", "object:cat")


def measured() -> dict[str, Any]:
    """What `evaluate` says of replication, and of what stays."""
    model, patch = train(), FOLDER / "captions.sepme"
    erase(model, [f"object:{one}" for one in CAPTIONS.values()], output=patch, force=True)
    result = evaluate(
        model,
        patch,
        judge="examples:judge",
        report=FOLDER / "report",
        sampling=SAMPLING,
        options=ModelOptions(device="cpu"),
        retain=RETAINED,
        training_images=FOLDER / "pictures",
        features="examples:features",
        replication_threshold=THRESHOLD,
        force=True,
    )
    assert result.replication is not None
    stays = {name: asdict(c) for name, c in result.concepts.items() if c.role == "retained"}
    return {**asdict(result.replication), "retained": stays}


def run() -> None:
    print(json.dumps(Results(RESULTS).get("captions erased", measured), indent=1))


def table() -> str:
    found = Results(RESULTS).entries["captions erased"]
    lines = [
        "| training image | replicas before | after | restored | similarity before | after "
        "| restored | noise gap larger than, before | after | restored |",
        "|---" * 10 + "|",
    ]
    for name, one in found["images"].items():
        drawn, alike, gap = one["replicated"], one["similarity"], one["larger_than"]
        shares = [drawn["before"], drawn["after"], one["restored"]]
        cells = [
            *map(percent, shares),
            *("-" if alike[when] is None else f"{alike[when]:.2f}" for when in _WHEN),
            *(percent(gap[when]) for when in _WHEN),
        ]
        lines.append(f"| {Path(name).stem}: {one['caption']} | {' | '.join(cells)} |")
    drawn, gaps = found["replicated"], found["memorised"]
    kept = "; ".join(_stays(name, one) for name, one in found["retained"].items())
    lines += [
        "",
        f"All images: replicas {percent(drawn['before'])} before, {_share(drawn)} after. Captions "
        f"memorised by their noise gap: {percent(gaps['before'])} before, {_share(gaps)} after. "
        f"Images of one caption come to at most {found['unrelated']:.2f} of another's training "
        f"image. What stays: {kept}.",
    ]
    return "\n".join(lines)


_WHEN = ("before", "after", "restored")


def _share(figure: Mapping[str, Any]) -> Proportion:
    return Proportion(round(figure["after"] * figure["n"]), figure["n"])


def _stays(name: str, one: Mapping[str, Any]) -> str:
    return f"{name} recognised in {percent(one['before'])} before, {percent(one['after'])} after"


def main(*words: str) -> None:
    {"run": run, "table": lambda: print(table())}[words[0] if words else "run"]()


if __name__ == "__main__":
    main(*sys.argv[1:])

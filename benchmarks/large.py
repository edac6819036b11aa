"""What patching a transformer's file costs, beside a copy of it that is on the disk.

    python -m benchmarks.full_size sd3.5-large build/full/sd3.5-large.safetensors
    python -m benchmarks.large build/full/sd3.5-large.safetensors [ROUNDS]
    python -m benchmarks.large table

As `benchmarks.speed`, for files that no memory keeps. Both the copy and sepme read the same sparse
file and write all its bytes, zeros too; each round has them one after the other, the order
changing. The copy is made by `cat`, within the kernel as `cp` and sepme copy what has no holes;
`cp` would not read the holes. What is done in place is done on that copy. Results: docs/large.json.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from shutil import rmtree

import numpy as np

from benchmarks.speed import RANK, SEPME, Scene, increment, measured
from patch_spec.base import Base
from patch_spec.container import patch_bytes
from patch_spec.grid import split_shift, to_grid
from patch_spec.increment import Increment
from patch_spec.manifest import Patch
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint

RESULTS = Path("docs/large.json")
_IMPORTS = "import numpy, ml_dtypes, typer, rich.table, sepme_cli.operations.apply"
DURABLE = "copy, and sync"


def on_both_streams(base: Base) -> Increment:
    """A random operator as large as real ones, on rows and on pooled text."""
    one, rng = increment(base, "monet", "operator", 1), np.random.default_rng(2)
    assert base.pooled is not None
    shift, exponent = split_shift(rng.standard_normal((base.pooled, RANK)) * 0.05)
    basis = to_grid(np.linalg.qr(rng.standard_normal((base.pooled, RANK)))[0].T)
    return replace(
        one,
        pooled_rank=RANK,
        pooled_basis=basis,
        pooled_shift=shift,
        pooled_exponent=exponent,
    )


def make_patch(scene: Scene) -> None:
    with open_checkpoint(scene.model) as checkpoint:
        base = checkpoint.base()
    patch = Patch(
        base=base,
        increments=(on_both_streams(base),),
        separable_from=("",),
        tool="benchmark",
    )
    Path(scene.patch("operator")).write_bytes(patch_bytes(patch))


def run(model: Path, rounds: int) -> None:
    """Measure, and keep the medians, after every round."""
    scene = Scene(model, model.parent / f"{model.stem}-run")
    scene.folder.mkdir(exist_ok=True)
    make_patch(scene)
    out, patch = str(scene.out), scene.patch("operator")
    apart = {
        "imports": [sys.executable, "-c", _IMPORTS],
        "start-up": [SEPME, "inspect", patch],
        "inspect": [SEPME, "inspect", str(model)],
        "apply --check": [SEPME, "apply", str(model), patch, "--check"],
    }
    copied = {
        DURABLE: ["sh", "-c", 'cat "$0" > "$1" && sync "$1"', str(model), out],
        "apply --in-place": [SEPME, "apply", out, patch, "--in-place"],
        "revert --in-place": [SEPME, "revert", out, "--in-place"],
    }
    applied = {"apply": [SEPME, "apply", str(model), patch, "-o", out]}
    found: dict[str, list[Figures]] = {}
    for number in range(rounds):
        for steps in (apart, *((applied, copied) if number % 2 else (copied, applied))):
            subprocess.run(["sync"], check=True)
            for name, command in steps.items():
                found.setdefault(name, []).append(_figures(command))
                print(f"{number + 1}/{rounds}  {name}: {found[name][-1]}", flush=True)
            scene.out.unlink(missing_ok=True)
        _keep(model, found)
    rmtree(scene.folder)


@dataclass(frozen=True)
class Figures:
    """Seconds that passed, and of the processor; peak memory in MB."""

    seconds: float
    processor: float
    peak_mb: float


def _figures(command: list[str]) -> Figures:
    before = getrusage(RUSAGE_CHILDREN)
    seconds, peak = measured(command)
    after = getrusage(RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Figures(seconds, processor, peak)


def _keep(model: Path, found: dict[str, list[Figures]]) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    pairs = zip(found["apply"], found[DURABLE], strict=True)
    results[model.stem] = {
        "bytes": model.stat().st_size,
        "apply_of_copy": [round(ours.seconds / copied.seconds, 3) for ours, copied in pairs],
        "median": {
            name: {
                field: round(statistics.median(vars(one)[field] for one in figures), 2)
                for field in ("seconds", "processor", "peak_mb")
            }
            for name, figures in found.items()
        },
    }
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def table() -> str:
    """The results as Markdown."""
    lines = []
    for name, result in json.loads(RESULTS.read_text()).items():
        ratios, median = result["apply_of_copy"], result["median"]
        each = " and ".join(f"{ratio:.2f}" for ratio in ratios)
        lines += [
            f"**{name}, {result['bytes'] / 1e9:.2f} GB**, median of {len(ratios)} rounds. `apply` "
            f"took {each} of `{DURABLE}` in the same round.",
            "",
            "| | seconds | of the processor | peak MB | over imports |",
            "|---|---|---|---|---|",
        ]
        for what, one in median.items():
            over = max(one["peak_mb"] - median["imports"]["peak_mb"], 0)
            lines.append(
                f"| {what} | {one['seconds']:.2f} | {one['processor']:.2f} | "
                f"{one['peak_mb']:.0f} | {over:.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main(*words: str) -> None:
    if words[0] != "table":
        run(Path(words[0]), int(words[1]) if len(words) > 1 else 2)
    print(table())


if __name__ == "__main__":
    main(*sys.argv[1:])

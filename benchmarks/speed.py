"""What patching a full-size checkpoint costs, beside copying it and beside loading it whole.

    python -m benchmarks.full_size sd1 build/full/sd1.safetensors
    python -m benchmarks.speed build/full/sd1.safetensors [ROUNDS]
    python -m benchmarks.speed table

Whole processes, one after the other, with the file in the page cache, all in every round; medians,
of ratios too, each to `cp` in its own round, since the disk is not equally fast all the time.
`start-up` is `sepme inspect` of a patch, what any command pays. Peak memory is the process' own,
and beside it less that of `sepme apply --help` with numpy imported. Results: docs/speed.json.
"""

import json
import os
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from patch_spec.base import Base
from patch_spec.container import patch_bytes
from patch_spec.grid import split_shift, split_up, to_grid
from patch_spec.increment import Increment
from patch_spec.manifest import Patch
from patch_spec.provenance import Measurements, Method
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint

RESULTS = Path("docs/speed.json")
SEPME = str(Path(sys.executable).with_name("sepme"))
RANK = 16
_LOAD_PATCH_SAVE = """
import sys
from safetensors.torch import load_file, save_file
import torch
source, output = sys.argv[1:]
tensors = load_file(source)
for name, weight in tensors.items():
    if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
        up, basis = torch.randn(weight.shape[0], 16), torch.randn(16, weight.shape[1]) * 1e-3
        tensors[name] = (weight.float() + up @ basis).to(weight.dtype)
save_file(tensors, output)
"""
_IMPORTS = "import numpy, ml_dtypes, typer, rich.table, sepme_cli.operations.apply"


@dataclass(frozen=True)
class Scene:
    """The files of a run. copy: of the model, for what is done in place."""

    model: Path
    folder: Path

    @property
    def copy(self) -> Path:
        return self.folder / "copy.safetensors"

    @property
    def out(self) -> Path:
        return self.folder / "out.safetensors"

    def patch(self, name: str) -> str:
        return str(self.folder / f"{name}.sepme")

    def fresh_copy(self) -> None:
        """The model again, unpatched, on the disk and in the page cache."""
        for path in self.folder.glob("copy*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copyfile(self.model, self.copy)
        _warm(self.copy)


def _warm(*paths: Path) -> None:
    """Everything on the disk, and these files in the page cache."""
    os.sync()
    for path in paths:
        shutil.copyfile(path, os.devnull)


def increment(base: Base, concept: str, kind: str, seed: int) -> Increment:
    """A random increment as large as real ones."""
    rng = np.random.default_rng(seed)
    common: dict[str, Any] = {
        "concept": concept,
        "slug": concept,
        "kind": kind,
        "rank": RANK,
        "prompts": (concept,),
        "method": Method("random", {}),
        "measured": Measurements(),
        "basis": to_grid(np.linalg.qr(rng.standard_normal((base.width, RANK)))[0].T),
    }
    if kind == "operator":
        shift, exponent = split_shift(rng.standard_normal((base.width, RANK)) * 0.05)
        return Increment(**common, exponents={}, up={}, shift=shift, shift_exponent=exponent)
    split = {
        name: split_up(rng.standard_normal((out, RANK)) * 1e-3)
        for name, (out, _) in base.shapes.items()
    }
    up = {name: factor for name, (factor, _) in split.items()}
    return Increment(**common, exponents={n: e for n, (_, e) in split.items()}, up=up)


def make_patches(scene: Scene) -> None:
    """Patches with one increment of either kind, another, and three."""
    with open_checkpoint(scene.model) as checkpoint:
        base = checkpoint.base()
    made = {
        "operator": [increment(base, "monet", "operator", 1)],
        "additive": [increment(base, "klimt", "additive", 2)],
        "three": [increment(base, f"c{i}", "operator", 3 + i) for i in range(3)],
    }
    for name, increments in made.items():
        patch = Patch(
            base=base, increments=tuple(increments), separable_from=("",), tool="benchmark"
        )
        Path(scene.patch(name)).write_bytes(patch_bytes(patch))


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds and peak MB of a process; it must end well, or say that files differ."""
    started = time.monotonic()
    process = os.posix_spawnp(command[0], command, os.environ, file_actions=_quiet())
    _, status, usage = os.wait4(process, 0)
    seconds = time.monotonic() - started
    if os.waitstatus_to_exitcode(status) not in (0, 1):
        raise SystemExit(f"failed: {command}")
    return seconds, usage.ru_maxrss * 1024 / 1e6


def _quiet() -> list[tuple[Any, ...]]:
    null = os.open(os.devnull, os.O_WRONLY | os.O_CREAT)
    return [(os.POSIX_SPAWN_DUP2, null, 1), (os.POSIX_SPAWN_DUP2, null, 2)]


def steps(scene: Scene) -> dict[str, tuple[Callable[[], None], list[str]]]:
    """What is measured: what to do before, untimed, and the command."""
    model, copy, out = str(scene.model), str(scene.copy), str(scene.out)
    patch = scene.patch

    def nothing() -> None:
        scene.out.unlink(missing_ok=True)
        _warm(scene.model)

    def patched_out() -> None:
        (scene.folder / "back.safetensors").unlink(missing_ok=True)
        if not scene.out.exists():
            measured([SEPME, "apply", model, patch("operator"), "-o", out])
        _warm(scene.out, scene.model)

    def settled() -> None:
        _warm(scene.copy)

    return {
        "cp": (nothing, ["cp", model, out]),
        "dd, which reads and writes": (nothing, ["dd", f"if={model}", f"of={out}", "bs=8M"]),
        "cp, and sync": (nothing, ["sh", "-c", 'cp "$0" "$1" && sync "$1"', model, out]),
        "load, patch, save (safetensors.torch)": (
            nothing,
            [sys.executable, "-c", _LOAD_PATCH_SAVE, model, out],
        ),
        "start-up": (nothing, [SEPME, "inspect", patch("operator")]),
        "imports": (nothing, [sys.executable, "-c", _IMPORTS]),
        "apply, operator": (nothing, [SEPME, "apply", model, patch("operator"), "-o", out]),
        "revert": (
            patched_out,
            [SEPME, "revert", out, "--base", model, "-o", f"{scene.folder}/back.safetensors"],
        ),
        "apply, additive": (nothing, [SEPME, "apply", model, patch("additive"), "-o", out]),
        "apply, three operators": (nothing, [SEPME, "apply", model, patch("three"), "-o", out]),
        "apply --check": (nothing, [SEPME, "apply", model, patch("operator"), "--check"]),
        "inspect the checkpoint": (nothing, [SEPME, "inspect", model]),
        "diff with a patch": (nothing, [SEPME, "diff", model, patch("operator")]),
        "apply --in-place, first": (
            scene.fresh_copy,
            [SEPME, "apply", copy, patch("operator"), "--in-place"],
        ),
        "apply --in-place, second": (
            settled,
            [SEPME, "apply", copy, patch("additive"), "--in-place"],
        ),
        "revert --in-place": (settled, [SEPME, "revert", copy, "--in-place"]),
    }


def run(model: Path, rounds: int) -> None:
    """Measure, and keep the medians."""
    scene = Scene(model, model.parent / f"{model.stem}-run")
    scene.folder.mkdir(exist_ok=True)
    make_patches(scene)
    shutil.copyfile(model, os.devnull)
    found: dict[str, list[tuple[float, float]]] = {}
    for number in range(rounds):
        every = steps(scene)
        # What is done in place builds on what was; the rest comes in another order every round.
        in_order = [name for name in every if "--in-place" in name]
        mixed = [name for name in every if name not in in_order]
        random.Random(number).shuffle(mixed)
        for name in mixed + in_order:
            prepare, command = every[name]
            prepare()
            found.setdefault(name, []).append(measured(command))
            print(f"{number + 1}/{rounds}  {name}: {found[name][-1][0]:.2f} s", flush=True)
    start = statistics.median(seconds for seconds, _ in found["start-up"])
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[model.stem] = {
        "bytes": model.stat().st_size,
        "rounds": rounds,
        "median": {
            name: {
                "seconds": round(statistics.median(s for s, _ in values), 3),
                "of_cp": _ratio(values, found["cp"], 0.0),
                "of_cp_less_start": _ratio(values, found["cp"], start),
                "peak_mb": round(statistics.median(m for _, m in values)),
            }
            for name, values in found.items()
        },
    }
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    shutil.rmtree(scene.folder)


def _ratio(
    values: list[tuple[float, float]], copies: list[tuple[float, float]], less: float
) -> float:
    """Of the seconds, less some, to those of copying in the same round: the median."""
    pairs = zip(values, copies, strict=True)
    return round(statistics.median(max(s - less, 0) / copied for (s, _), (copied, _) in pairs), 2)


def table() -> str:
    """The results as Markdown."""
    lines = []
    for name, result in json.loads(RESULTS.read_text()).items():
        median = result["median"]
        imports = median["imports"]["peak_mb"]
        gigabytes = result["bytes"] / 1e9
        lines += [
            f"**{name}, {gigabytes:.2f} GB**, median of {result['rounds']} rounds",
            "",
            "| | seconds | of `cp` | of `cp`, less start-up | peak MB | over imports |",
            "|---|---|---|---|---|---|",
        ]
        for what, values in median.items():
            seconds, peak = values["seconds"], values["peak_mb"]
            ratios = f"{values['of_cp']:.2f} | {values['of_cp_less_start']:.2f}"
            lines.append(
                f"| {what} | {seconds:.2f} | {ratios} | {peak} | {max(peak - imports, 0)} |"
            )
        lines.append("")
    return "\n".join(lines)


def main(*words: str) -> None:
    if words[0] != "table":
        run(Path(words[0]), int(words[1]) if len(words) > 1 else 5)
    print(table())


if __name__ == "__main__":
    main(*sys.argv[1:])

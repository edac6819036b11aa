"""What a concept costs on an accelerator: seconds and peak memory on a full-size model.

    python -m benchmarks.full_size sd1 build/full/sd1.safetensors
    python -m benchmarks.gpu build/full/sd1.safetensors

The weights are random, so that the optimisation takes all of its steps: the worst case. Rows are
kept by the device's name, and added to docs/gpu.json.
"""

import json
import sys
import time
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import Results
from sepme_cli.diffusion.devices import Unit, units
from sepme_cli.diffusion.options import ModelOptions
from sepme_cli.erasure.settings import Settings
from sepme_cli.operations.erase import erase

RESULTS = Path("docs/gpu.json")
_RUNS: Mapping[str, tuple[str, bool]] = {
    "closed-form": ("closed-form", False),
    "sepme": ("sepme", False),
    "sepme, low memory": ("sepme", True),
}
_STEPS = 20
"""Of the optimisation, that are measured."""


def measured(model: Path, unit: Unit, method: str, low_memory: bool) -> dict[str, Any]:
    """Seconds for a concept, and the accelerator's memory at its peak in MiB where torch tells."""
    counts = unit.name == "cuda"
    if counts:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    try:
        erase(
            model,
            ["Monet"],
            kind="style",
            protect=["Van Gogh", "Picasso"],
            method=method,
            settings=Settings(steps=_STEPS),
            options=ModelOptions(device=unit.name, low_memory=low_memory),
            output=BytesIO(),
        )
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 2**20 if counts else None
    return {"seconds": seconds, "peak_mib": peak}


def row(model: Path, unit: Unit) -> dict[str, Any]:
    """All runs on one model."""
    found = {name: measured(model, unit, *run) for name, run in _RUNS.items()}
    return {"steps": _STEPS, "torch": torch.__version__, **found}


def main(model: Path) -> None:
    unit = units()[0]
    if unit.name == "cpu":
        sys.exit("there is no accelerator here: nothing was measured")
    found = Results(RESULTS).get(f"{unit.title}, {model.stem}", lambda: row(model, unit))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

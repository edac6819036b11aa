"""A longer soak: `python -m tests.soak.run --steps N --seed S [--layout L] [--dtype D]`."""

import argparse
import os
import tempfile
import time
from pathlib import Path

from tests.soak.soak import Soak
from tests.soak.world import LAYOUTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layout", choices=LAYOUTS, default=LAYOUTS[0])
    parser.add_argument("--dtype", default="F16")
    parser.add_argument("--folder", help="where files are written; the system's for temporaries")
    given = parser.parse_args()
    # Only a power failure shows what was not synced; this run ends processes.
    os.fsync = lambda descriptor: None
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        soak = Soak.of(Path(folder), given.layout, given.dtype, given.seed)
        soak.run(given.steps)
    seconds = time.monotonic() - started
    counts = ", ".join(f"{count} {name}" for name, count in sorted(soak.done.items()))
    print(f"{given.layout}, {given.dtype}, seed {given.seed}: {given.steps} steps ({counts}) held")
    print(f"{seconds:.0f} s")


if __name__ == "__main__":
    main()

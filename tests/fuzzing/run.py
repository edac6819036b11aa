"""Mutants by the hundred thousand: `python -m tests.fuzzing.run TARGET --mutants N --seed S`.

Mutant number i of a seed is always the same, on every machine: `--first i --mutants 1` makes one
again. With `--record docs/fuzzing.json` what came of them is added to that file; crashers are
written to a folder.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from patch_spec.errors import FormatError
from sepme_cli.errors import SepmeError
from tests.fuzzing.guard import SECONDS, Guard
from tests.fuzzing.targets import TARGETS, Target

RECORD = "docs/fuzzing.json"
_SHARED_MEMORY = Path("/dev/shm")


@dataclass
class Tally:
    """What came of mutants. outcomes: labels to counts. crashes: what went wrong, to counts;
    crashers: to the bytes of the first mutant that did."""

    mutants: int = 0
    seconds: float = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    crashes: Counter[str] = field(default_factory=Counter)
    crashers: dict[str, bytes] = field(default_factory=dict)

    def add(self, label: str, crash: str | None, data: bytes) -> None:
        """Count one mutant."""
        self.mutants += 1
        if crash is None:
            self.outcomes[label] += 1
        else:
            self.crashes[crash] += 1
            self.crashers.setdefault(crash, data)


def run(target: Target, guard: Guard, numbers: range, seed: int) -> Tally:
    """Make the mutants with these numbers, and have each read."""
    tally, started = Tally(), time.process_time()
    for number in numbers:
        data = mutant(target, number, seed)
        outcome = guard.run(target.check, data)
        tally.add(outcome.label, outcome.crash, data)
    tally.seconds = time.process_time() - started
    return tally


def mutant(target: Target, number: int, seed: int) -> bytes:
    """Mutant `number` of a seed."""
    return target.mutant(random.Random(seed << 40 | number))


def run_in_temporary(name: str, numbers: range, seed: int, seconds: float = SECONDS) -> Tally:
    """As `run`, in a folder of its own, in memory where there is such."""
    place = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        target = TARGETS[name](Path(folder))
        with suppress(SepmeError, FormatError):
            target.check(target.examples[0])  # imports what it needs, which is not a mutant's fault
        return run(target, Guard(Path(folder), seconds), numbers, seed)


def record(name: str, numbers: range, seed: int, tally: Tally, path: Path) -> None:
    """Add a run to the record; one with the same target, seed and numbers is replaced."""
    runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []
    this = {"target": name, "seed": seed, "first": numbers.start, "mutants": len(numbers)}
    runs = [one for one in runs if {key: one.get(key) for key in this} != this]
    runs.append(
        {
            **this,
            "seconds": round(tally.seconds, 1),
            "accepted": tally.outcomes["accepted"],
            "refused": {k: n for k, n in sorted(tally.outcomes.items()) if k != "accepted"},
            "crashes": dict(sorted(tally.crashes.items())),
        }
    )
    runs.sort(key=lambda one: (list(TARGETS).index(one["target"]), one["seed"], one["first"]))
    whole = {"mutants": sum(one["mutants"] for one in runs), "targets": _totals(runs), "runs": runs}
    path.write_text(json.dumps(whole, indent=1) + "\n")


def _totals(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By target, over all its runs."""
    totals: dict[str, Any] = {}
    for one in runs:
        mine = totals.setdefault(
            one["target"],
            {"mutants": 0, "seconds": 0.0, "accepted": 0, "refused": {}, "crashes": 0},
        )
        for key in ("mutants", "accepted"):
            mine[key] += one[key]
        mine["seconds"] = round(mine["seconds"] + one["seconds"], 1)
        mine["crashes"] += sum(one["crashes"].values())
        for label, count in one["refused"].items():
            mine["refused"][label] = mine["refused"].get(label, 0) + count
    return totals


def main(arguments: Sequence[str]) -> int:
    """The exit status: 1 if anything crashed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing.run", description=__doc__)
    parser.add_argument("target", choices=list(TARGETS))
    parser.add_argument("--mutants", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first mutant")
    parser.add_argument("--crashers", type=Path, default=Path("crashers"), help="where they go")
    parser.add_argument("--record", type=Path, help=f"a JSON file to add to, such as {RECORD}")
    given = parser.parse_args(arguments)
    numbers = range(given.first, given.first + given.mutants)
    tally = run_in_temporary(given.target, numbers, given.seed)
    for label, count in tally.outcomes.most_common():
        print(f"{count:8} {label}")
    for crash, count in tally.crashes.most_common():
        given.crashers.mkdir(exist_ok=True)
        name = f"{given.target}-{sha256(tally.crashers[crash]).hexdigest()[:12]}"
        (given.crashers / name).write_bytes(tally.crashers[crash])
        print(f"{count:8} CRASH {crash}: {given.crashers / name}")
    if given.record:
        record(given.target, numbers, given.seed, tally, given.record)
    return 1 if tally.crashes else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""How many small faults in `patch_spec` and `erasure` their own tests notice: mutation testing.

    make mutants
    make mutants ARGS="--count 1000 --seed 3"

mutmut makes one small change after another (`<` to `<=`, a number to the next, an argument to None)
and runs the tests that reach the changed function, until one fails. There are thousands of changes,
so a random sample of each package is tried. What is mutated and which tests run stands in
pyproject.toml; docs/mutation.md has what was found.
"""

import json
import os
import random
import subprocess
import sys
from argparse import ArgumentParser
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("patch_spec", "sepme_cli/erasure")
#: The smallest module: mutmut makes all mutants on its way to trying some.
SMALLEST = "patch_spec.digest.*"
MUTMUT = Path(sys.executable).with_name("mutmut")
NOTICED = ("killed", "timeout", "segfault")


def mutmut(*words: str, capture: bool = False) -> str:
    """Run it with few examples for each property, the same ones every time."""
    environment = {**os.environ, "HYPOTHESIS_PROFILE": "mutants", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [MUTMUT, *words], cwd=ROOT, env=environment, check=True, text=True, capture_output=capture
    )
    return done.stdout


def mutants(package: str) -> list[str]:
    """The names of all mutants of a package."""
    metas = sorted((ROOT / "mutants" / package).rglob("*.meta"))
    return [name for meta in metas for name in json.loads(meta.read_text())["exit_code_by_key"]]


def statuses() -> dict[str, str]:
    """What became of each mutant: "killed", "survived", "no tests", …"""
    lines = mutmut("results", "--all", "true", capture=True).splitlines()
    return dict(line.strip().rsplit(": ", 1) for line in lines if ": " in line)


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=250, help="mutants of each package")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    asked = parser.parse_args()

    mutmut("run", "--max-children", "1", SMALLEST)
    samples = {}
    for package in PACKAGES:
        names = sorted(mutants(package))
        count = min(asked.count, len(names))
        samples[package] = random.Random(asked.seed).sample(names, count)
    tried = [name for sample in samples.values() for name in sample]
    mutmut("run", "--max-children", "1", *tried)

    found = statuses()
    for package, sample in samples.items():
        counts = Counter(found[name] for name in sample)
        noticed = sum(counts[status] for status in NOTICED)
        print(f"\n{package}: {noticed} of {len(sample)} noticed ({noticed / len(sample):.0%})")
        for name in sorted(sample):
            if found[name] not in NOTICED:
                print(f"  {found[name]:9} {name}")
    print("\nmutmut show NAME says what was changed.")


if __name__ == "__main__":
    main()

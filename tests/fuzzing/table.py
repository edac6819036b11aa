"""The record of the long runs as a table: `python -m tests.fuzzing.table`."""

import json
from pathlib import Path

RECORD = Path(__file__).parents[2] / "docs/fuzzing.json"


def table(record: Path = RECORD) -> str:
    """Markdown, a row a target."""
    found = json.loads(record.read_text())
    rows = [
        "| target | mutants | accepted | refused | by how many rules | crashes | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, total in found["targets"].items():
        refused = total["refused"]
        cells = (
            name,
            f"{total['mutants']:,}",
            f"{total['accepted']:,}",
            f"{sum(refused.values()):,}",
            str(len(refused)),
            str(total["crashes"]),
            f"{total['seconds']:.0f}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    seeds = sorted({run["seed"] for run in found["runs"]})
    seconds = sum(total["seconds"] for total in found["targets"].values())
    rows += [
        "",
        f"{found['mutants']:,} mutants, seed {' and '.join(map(str, seeds))}, {seconds / 60:.0f} "
        "minutes of one processor.",
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())

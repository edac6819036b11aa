"""What benchmarks write down: entries in a JSON file, and counts of right answers.

python -m benchmarks.results    # refresh the tables of the documents from the JSON files
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor


class Results:
    """A JSON file that is written after every entry; several processes may add to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = self._read()

    def _read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self.entries:
            made = make()
            self.entries |= self._read() | {key: made}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.entries, indent=1, sort_keys=True) + "\n")
        return self.entries[key]


def counts(right: Tensor) -> list[int]:
    """right: bool [n]. Returns [how many, n]."""
    return [int(right.sum()), len(right)]


if __name__ == "__main__":
    from benchmarks.document import refresh  # whose tables need this module

    refresh()

"""What the reader says of each invalid vector, for users: `python -m tests.patch_spec.refusals`
writes it anew, to be read before it is committed."""

import json
from pathlib import Path

import pytest

from patch_spec.errors import FormatError
from tests.patch_spec.test_vectors import INDEX, VECTORS, read_any, said

FILE = Path(__file__).with_name("refusals.json")


def refusals() -> dict[str, str]:
    found = {}
    for case in INDEX["invalid"]:
        with pytest.raises(FormatError) as caught:
            read_any(case["kind"], (VECTORS / case["file"]).read_bytes())
        found[case["file"]] = said(caught.value)
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps(refusals(), indent=1, ensure_ascii=False) + "\n")

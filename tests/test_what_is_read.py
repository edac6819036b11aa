"""The page of supported files names a test for each row, and those tests are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "what-is-read.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| What you have")
]


def test_the_page_has_rows() -> None:
    assert len(ROWS) > 20
    assert len({row[0] for row in ROWS}) == len(ROWS), "each is told once"


@pytest.mark.parametrize("row", ROWS, ids=[row[0][:40] for row in ROWS])
def test_each_row_is_kept_true_by_a_test(row: list[str]) -> None:
    what, answer, how, proofs = row
    assert what and answer in ("yes", "no")
    assert answer == "yes" or how, "who is refused is told what to do"
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", proofs)
    assert named
    for file, test in named:
        functions = [
            node.name
            for node in ast.parse((ROOT / file).read_text()).body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        ]
        assert functions
        assert not test or test in functions, f"{file} has no {test}"


def test_the_site_has_the_page() -> None:
    assert "- what-is-read.md\n" in (ROOT / "mkdocs.yml").read_text()

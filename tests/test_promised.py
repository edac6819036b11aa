"""The tests and vectors that docs/promises.md names are there, and its table is whole."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "promises.md").read_text()
VECTORS = json.loads((ROOT / "patch_spec" / "vectors" / "index.json").read_text())
RULES = {case.get("rule") for kind in ("invalid", "compose") for case in VECTORS[kind]}


def rows(page: str) -> list[list[str]]:
    """The cells of the table's rows below its head."""
    lines = [line for line in page.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def names_of(file: Path) -> set[str]:
    nodes = ast.walk(ast.parse(file.read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def found(name: str, last: Path) -> Path:
    """The file or folder of a name; one without a folder is in that of the last, or the only one
    there is."""
    if "/" in name:
        path = ROOT / name
    elif (beside := (last if last.is_dir() else last.parent) / name).exists():
        path = beside
    else:
        everywhere = list((ROOT / "tests").rglob(name))
        assert len(everywhere) == 1, f"{name}: {len(everywhere)} files"
        (path,) = everywhere
    assert path.is_dir() if name.endswith("/") else path.is_file(), f"{name}: not there"
    return path


def check(text: str) -> int:
    """Check every file and test that a text names in code; how many there are.

    A test that is named without its file is in the file named last.
    """
    prose, names = text.split("`")[::2], text.split("`")[1::2]
    assert len(prose) == len(names) + 1, f"an odd number of `: {text}"
    assert not any(re.match(r"\w", after) for after in prose[1:]), f"no space after a name: {text}"
    last, count = ROOT / "tests", 0
    for name in names:
        file, _, test = name.partition("::")
        if re.fullmatch(r"test_\w+", name):
            file, test = "", name
        elif "/" not in name and not file.endswith(".py"):
            continue  # a command
        if file:
            last = found(file, last)
        assert not test or test in names_of(last), f"{name}: no such test in {last.name}"
        count += 1
    return count


def test_the_table_has_all_of_the_promises() -> None:
    table = rows(PAGE)
    assert [row[0] for row in table] == [str(i + 1) for i in range(20)]
    for row in table:
        assert len(row) == 4, row
        assert re.match(r"\*\*[A-Z][^*]+\*\*", row[1]), row


@pytest.mark.parametrize("row", rows(PAGE), ids=lambda row: row[0])
def test_what_proves_a_promise_is_there(row: list[str]) -> None:
    _, promise, proofs, figures = row
    assert check(proofs) > 0
    check(promise), check(figures)
    assert set(re.findall(r"\b[HJPVFCSU]\d+\b", proofs)) <= RULES


def test_so_is_what_is_named_below_the_table() -> None:
    assert check(PAGE.rpartition("|\n")[2]) > 0


@pytest.mark.parametrize(
    "text",
    [
        "`tests/faults/test_kill.py`4",
        "`tests/faults/test_kill.py`, `test_power.py",
        "`tests/faults/test_kil.py`",
        "`tests/fault/`",
        "`test_statement.py`",  # there are two
        "`test_revert.py::test_that_nobody_wrote`",
        "`test_revert.py::test_another_base_is_refused`, `test_that_nobody_wrote`",
    ],
)
def test_what_is_not_there_is_noticed(text: str) -> None:
    with pytest.raises(AssertionError):
        check(text)

"""A short run of the mutants, the same every time; `docs/fuzzing.md` tells of the long ones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzzing.run import main, run_in_temporary
from tests.fuzzing.table import RECORD, table
from tests.fuzzing.targets import TARGETS

SEED = 20
HOW_MANY = {"header": 800, "record": 800, "patch": 500, "pickle": 150, "tokenizer": 60}
PATIENT = 60.0
"""Seconds of the processor: that nothing hangs, not how fast a machine is."""


@pytest.mark.parametrize("name", list(TARGETS))
def test_mutants_are_accepted_rightly_or_refused_with_a_typed_error(name: str) -> None:
    tally = run_in_temporary(name, range(HOW_MANY.get(name, 250)), SEED, PATIENT)
    assert tally.crashes == {}
    assert len(tally.outcomes) > 1, "all of them met one and the same fate"


def test_a_mutant_is_the_same_every_time() -> None:
    one, other = (run_in_temporary("patch", range(30, 60), SEED, PATIENT) for _ in range(2))
    assert one.outcomes == other.outcomes


def test_the_runner_tells_of_crashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reader that accepts all and one that fails: what is found is what is there."""

    class Careless(TARGETS["header"]):  # type: ignore[misc]
        def check(self, data: bytes) -> None:
            if data[:1] == b"\xff":
                raise ZeroDivisionError
            if data[:1] == b"\0":
                (tmp_path / "elsewhere").write_bytes(data)

    monkeypatch.setitem(TARGETS, "header", Careless)
    crashers, record = tmp_path / "crashers", tmp_path / "record.json"
    arguments = ["header", "--mutants", "400", "--seed", "3"]
    assert main([*arguments, "--crashers", str(crashers), "--record", str(record)]) == 1
    told = capsys.readouterr().out
    assert "CRASH ZeroDivisionError in test_mutants.check" in told
    assert f"CRASH touched open {tmp_path}"[:60] in told
    assert len(list(crashers.iterdir())) == 2
    assert '"crashes": 0' not in record.read_text()


def test_the_guided_runner_runs(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzzing.guided", "record", "-runs=200", "-seed=1"],
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert b"Done 200 runs" in done.stderr


def test_the_document_tells_what_the_record_says() -> None:
    document = RECORD.with_suffix(".md").read_text()
    assert table() in document, "python -m tests.fuzzing.table prints what belongs there"
    record = json.loads(RECORD.read_text())
    assert record["mutants"] == sum(run["mutants"] for run in record["runs"]) >= 1_000_000
    assert record["targets"].keys() == TARGETS.keys()
    assert all(total["crashes"] == 0 for total in record["targets"].values())

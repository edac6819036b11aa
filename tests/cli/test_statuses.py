"""Exit statuses never lie: every failing path of every command, and that it writes nothing."""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest

from sepme_cli.checkpoints.files import only_writer
from sepme_cli.checkpoints.reader import open_checkpoint
from tests.cli.conftest import Run


@dataclass(frozen=True)
class Case:
    """A command line; what it must end with. kind: of the error."""

    status: int
    kind: str
    line: str
    stdin: str | None = None
    """The file that standard input is read from."""

    def __str__(self) -> str:
        return self.line


JUDGED = "--judge tests.small_judge:judge --report out"
BAD_MODELS = (
    Case(5, "system", "missing.safetensors"),
    Case(3, "unsupported", "folder"),
    Case(3, "malformed", "empty.safetensors"),
    Case(3, "malformed", "text.safetensors"),
    Case(3, "malformed", "huge.safetensors"),
    Case(3, "malformed", "twice.safetensors"),
    Case(3, "malformed", "cut.safetensors"),
    Case(3, "malformed", "pickle.safetensors"),
    Case(3, "unsupported", "flux.safetensors"),
)
WITH_A_MODEL = (
    "erase {} --concept Monet -o out",
    "apply {} monet.sepme -o out",
    "revert {} -o out",
    "diff {} model.safetensors",
    "diff model.safetensors {}",
    "inspect {}",
    "verify {}",
    "sample {} --prompt x -o out",
    f"evaluate {{}} monet.sepme {JUDGED}",
    "revert clean.safetensors --base {} -o out",
)
NO = [
    Case(1, "refused", "erase clean.safetensors --concept Monet -o out"),
    Case(1, "refused", "erase clean.safetensors --concept Monet --check"),
    Case(1, "refused", "apply model.safetensors monet.sepme --only Dali -o out"),
    Case(1, "refused", "apply clean.safetensors monet.sepme -o out"),
    Case(1, "refused", "apply clean.safetensors monet.sepme --check"),
    Case(1, "refused", "apply clean.safetensors monet.sepme --base model.safetensors -o out"),
    Case(1, "refused", "revert model.safetensors -o out"),
    Case(1, "refused", "revert clean.safetensors -o out"),
    Case(1, "refused", "revert clean.safetensors --concept Dali --base model.safetensors -o out"),
    Case(1, "refused", "revert clean.safetensors klimt.sepme --base model.safetensors -o out"),
    Case(1, "refused", "revert clean.safetensors monet.sepme --exact -o out"),
    Case(
        1, "refused", "sample model.safetensors --prompt x --patch monet.sepme --only Dali -o out"
    ),
    Case(1, "refused", f"evaluate clean.safetensors monet.sepme {JUDGED}"),
    Case(1, "refused", f"evaluate model.safetensors monet.sepme --only Dali {JUDGED}"),
]
USAGE = [
    Case(2, "usage", "nonsense"),
    Case(2, "usage", "--nonsense"),
    Case(2, "usage", "inspect"),
    Case(2, "usage", "inspect monet.sepme --nonsense"),
    Case(2, "usage", "inspect monet.sepme klimt.sepme"),
    Case(2, "usage", "diff monet.sepme"),
    Case(2, "usage", "apply model.safetensors"),
    Case(2, "usage", "apply model.safetensors monet.sepme"),
    Case(2, "usage", "apply model.safetensors monet.sepme -o out --in-place"),
    Case(2, "usage", "apply model.safetensors monet.sepme -o out --scale much"),
    Case(2, "usage", "apply model.safetensors monet.sepme -o out --scale 0"),
    Case(2, "usage", "apply model.safetensors monet.sepme -o out --scale nan"),
    Case(2, "usage", "apply model.safetensors monet.sepme -o out --dtype int8"),
    Case(2, "usage", "apply model.safetensors monet.sepme --in-place --dtype fp32"),
    Case(2, "usage", "apply model.safetensors - - -o out", "monet.sepme"),
    Case(2, "usage", "revert clean.safetensors"),
    Case(2, "usage", "revert clean.safetensors -o out --in-place"),
    Case(2, "usage", "revert clean.safetensors -o out --base model.safetensors --undo x"),
    Case(2, "usage", "erase model.safetensors"),
    Case(2, "usage", "erase model.safetensors --recipe policy.yaml --concept Dali -o out"),
    Case(2, "usage", "erase model.safetensors --recipe policy.yaml --protect Dali -o out"),
    Case(2, "usage", "erase model.safetensors --recipe policy.yaml --to Dali -o out"),
    Case(2, "usage", "erase model.safetensors --recipe policy.yaml --as style -o out"),
    Case(2, "usage", "erase model.safetensors --concept Monet --to monet -o out"),
    Case(2, "usage", "erase model.safetensors -c Monet -c Dali --to Dali -o out"),
    Case(2, "usage", "erase model.safetensors -c Monet --rank 78 -o out"),
    Case(2, "usage", "erase model.safetensors -c Monet -c monet --check"),
    Case(2, "usage", "erase model.safetensors -c Monet --protect-neighbours -1 -o out"),
    Case(2, "usage", "verify model.safetensors --model model.safetensors"),
    Case(2, "usage", "verify clean.safetensors --recipe policy.yaml"),
    Case(2, "usage", "recipe check"),
    Case(2, "usage", "recipe nonsense"),
    Case(2, "usage", "erase model.safetensors --concept Monet --concept monet -o out"),
    Case(2, "usage", "erase model.safetensors --concept Monet --method guess"),
    Case(2, "usage", "erase model.safetensors --concept Monet --as sound"),
    Case(2, "usage", "erase model.safetensors --concept Monet --steps 0"),
    Case(2, "usage", "erase model.safetensors --concept Monet --device abacus -o out"),
    Case(2, "usage", "erase model.safetensors --concept Monet --dtype int8 -o out"),
    Case(2, "usage", "erase model.safetensors -c Monet -c Klimt --images folder -o out"),
    Case(2, "usage", "sample model.safetensors --prompt x"),
    Case(2, "usage", "sample model.safetensors -o out"),
    Case(2, "usage", "sample model.safetensors --prompt x -o out --device abacus"),
    Case(2, "usage", "sample model.safetensors --prompt x -o out --dtype int8"),
    Case(2, "usage", f"evaluate model.safetensors {JUDGED}"),
    Case(2, "usage", "evaluate model.safetensors monet.sepme --report out"),
    Case(2, "usage", "evaluate model.safetensors monet.sepme --judge tests.small_judge:judge"),
    Case(2, "usage", "evaluate model.safetensors monet.sepme --judge nonsense:x --report out"),
    Case(2, "usage", "evaluate model.safetensors monet.sepme --judge os:getcwd --report out"),
    Case(2, "usage", f"evaluate model.safetensors monet.sepme --pictures 1 {JUDGED}"),
    Case(2, "usage", f"evaluate model.safetensors monet.sepme --as sound {JUDGED}"),
    Case(2, "usage", f"evaluate model.safetensors monet.sepme --device abacus {JUDGED}"),
    Case(2, "usage", f"evaluate model.safetensors monet.sepme --retain monet {JUDGED}"),
    Case(2, "usage", f"evaluate model.safetensors monet.sepme --reference folder {JUDGED}"),
    Case(2, "usage", f"evaluate model.safetensors monet.sepme --features x {JUDGED}"),
    Case(2, "usage", f"evaluate model.safetensors - - {JUDGED}", "monet.sepme"),
]
MALFORMED = [
    Case(bad.status, bad.kind, line.format(bad.line)) for bad in BAD_MODELS for line in WITH_A_MODEL
] + [
    Case(3, "malformed", "apply nan.safetensors monet.sepme -o out"),
    Case(3, "malformed", "apply nan.safetensors monet.sepme --check"),
    Case(3, "malformed", "apply model.safetensors text.sepme -o out"),
    Case(3, "malformed", "apply model.safetensors cut.sepme -o out"),
    Case(3, "malformed", "apply model.safetensors cut.sepme --in-place"),
    Case(3, "malformed", "apply model.safetensors - -o out", "cut.sepme"),
    Case(3, "malformed", "apply model.safetensors - -o out"),
    Case(3, "malformed", "apply model.safetensors model.safetensors -o out"),
    Case(3, "malformed", "revert clean.safetensors cut.sepme --base model.safetensors -o out"),
    Case(3, "malformed", "revert clean.safetensors --undo text.safetensors -o out"),
    Case(3, "malformed", "diff cut.sepme monet.sepme"),
    Case(3, "malformed", "inspect headless.sepme"),
    Case(3, "malformed", "inspect -", "headless.sepme"),
    Case(3, "malformed", "erase model.safetensors --concept x --known cut.sepme -o out"),
    Case(3, "malformed", "sample model.safetensors --prompt x --patch cut.sepme -o out"),
    Case(3, "malformed", "erase model.safetensors --recipe bad.yaml -o out"),
    Case(3, "malformed", "erase model.safetensors --recipe cut.sepme -o out"),
    Case(3, "malformed", "erase model.safetensors --recipe bad.yaml --check"),
    Case(3, "unsupported", "erase model.safetensors --recipe policy.yaml --check"),
    Case(3, "malformed", "verify monet.sepme --recipe bad.yaml"),
    Case(3, "malformed", "verify monet.sepme --model cut.safetensors"),
    Case(3, "malformed", "recipe check bad.yaml"),
    Case(3, "malformed", "recipe check model.safetensors"),
    Case(3, "malformed", f"evaluate model.safetensors cut.sepme {JUDGED}"),
    Case(3, "malformed", f"evaluate model.safetensors - {JUDGED}", "cut.sepme"),
    Case(3, "malformed", f"evaluate model.safetensors monet.sepme --recipe cut.sepme {JUDGED}"),
    # A UNet's weights without the networks that drawing needs.
    Case(3, "unsupported", f"evaluate model.safetensors monet.sepme {JUDGED}"),
    Case(3, "unsupported", "evaluate model.safetensors monet.sepme --judge folder --report out"),
    Case(3, "unsupported", f"evaluate model.safetensors monet.sepme --lpips {JUDGED}"),
    Case(
        3,
        "unsupported",
        f"evaluate model.safetensors monet.sepme --reference folder --features folder {JUDGED}",
    ),
]
MISMATCH = [
    Case(4, "mismatch", "apply sd2.safetensors monet.sepme -o out"),
    Case(4, "mismatch", "apply sd2.safetensors monet.sepme --check"),
    Case(4, "mismatch", "apply sd2.safetensors monet.sepme --in-place"),
    Case(4, "mismatch", "apply clean.safetensors klimt.sepme --base cousin.safetensors -o out"),
    Case(4, "mismatch", "apply clean.safetensors klimt.sepme --base clean.safetensors -o out"),
    Case(4, "mismatch", "revert clean.safetensors --base cousin.safetensors -o out"),
    Case(4, "mismatch", "diff sd2.safetensors monet.sepme"),
    Case(4, "mismatch", "erase model.safetensors --concept x --known sd2.sepme -o out"),
    Case(4, "mismatch", "sample sd2.safetensors --prompt x --patch monet.sepme -o out"),
    Case(4, "mismatch", f"evaluate sd2.safetensors monet.sepme {JUDGED}"),
]
SYSTEM = [
    Case(5, "system", "apply model.safetensors missing.sepme -o out"),
    Case(5, "system", "apply model.safetensors monet.sepme -o clean.safetensors"),
    Case(5, "system", "apply model.safetensors monet.sepme -o folder"),
    Case(5, "system", "apply model.safetensors monet.sepme -o missing/out"),
    Case(5, "system", "apply model.safetensors monet.sepme -o /dev/full"),
    Case(5, "system", "revert clean.safetensors --base model.safetensors -o monet.sepme"),
    Case(5, "system", "revert clean.safetensors --undo missing -o out"),
    Case(5, "system", "revert clean.safetensors missing.sepme --base model.safetensors -o out"),
    Case(5, "system", "diff monet.sepme missing.sepme"),
    Case(5, "system", "erase model.safetensors --concept x -o monet.sepme"),
    Case(5, "system", "erase model.safetensors --concept monet"),
    Case(5, "system", "erase model.safetensors --concept x -o out --apply clean.safetensors"),
    Case(5, "system", "erase model.safetensors --concept x --known missing.sepme -o out"),
    Case(5, "system", "sample model.safetensors --prompt x -o monet.sepme"),
    Case(5, "system", "erase model.safetensors --recipe missing.yaml -o out"),
    Case(5, "system", "erase model.safetensors --recipe policy.yaml -o monet.sepme"),
    Case(5, "system", "verify monet.sepme --recipe missing.yaml"),
    Case(5, "system", "verify monet.sepme --model missing.safetensors"),
    Case(5, "system", "recipe init policy.yaml"),
    Case(5, "system", "recipe init missing/policy.yaml"),
    Case(5, "system", "recipe init /dev/full"),
    Case(5, "system", "recipe check missing.yaml"),
    Case(5, "system", "sample model.safetensors --prompt x --patch missing.sepme -o out"),
    Case(5, "system", f"evaluate model.safetensors missing.sepme {JUDGED}"),
    Case(5, "system", f"evaluate model.safetensors monet.sepme --recipe missing {JUDGED}"),
    Case(
        5,
        "system",
        f"evaluate model.safetensors monet.sepme --reference missing --features x {JUDGED}",
    ),
    Case(5, "system", f"evaluate model.safetensors monet.sepme {JUDGED} --report monet.sepme"),
    Case(5, "system", f"evaluate model.safetensors monet.sepme {JUDGED} --report missing/out"),
    Case(5, "system", f"evaluate model.safetensors monet.sepme {JUDGED} --report ."),
]
FAILING = [*NO, *USAGE, *MALFORMED, *MISMATCH, *SYSTEM]


def contents(folder: Path) -> dict[str, str]:
    """What is in a folder, by name."""
    return {
        path.name: sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.iterdir()
    }


@pytest.fixture
def here(scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The scene's files in a folder of the test's own, which is where it runs."""
    folder = tmp_path / "scene"
    shutil.copytree(scene, folder)
    monkeypatch.chdir(folder)
    return folder


def stdin_of(case: Case) -> bytes:
    return Path(case.stdin).read_bytes() if case.stdin else b""


@pytest.mark.parametrize("case", FAILING, ids=str)
def test_a_failing_path(case: Case, here: Path, sepme: Run) -> None:
    before = contents(here)
    arguments, stdin = case.line.split(), stdin_of(case)

    told = sepme(*arguments, "--json", stdin=stdin)
    assert told.status == case.status
    error = told.json["error"]
    assert error.keys() == {"kind", "message", "file", "expected", "found"}
    assert error["kind"] == case.kind

    said = sepme(*arguments, "-q", stdin=stdin)
    assert said.status == case.status
    assert said.out == b""
    assert said.err.startswith("error: ")
    assert "Traceback" not in said.err

    assert contents(here) == before


@pytest.mark.parametrize(
    ("line", "hold"),
    [
        ("apply clean.safetensors klimt.sepme --in-place", open_checkpoint),
        ("apply clean.safetensors klimt.sepme --in-place", only_writer),
        ("revert clean.safetensors --base model.safetensors --in-place", only_writer),
        ("apply model.safetensors klimt.sepme -o clean.safetensors --force", only_writer),
    ],
)
def test_a_busy_file(
    line: str,
    hold: Callable[[Path], AbstractContextManager[object]],
    here: Path,
    sepme: Run,
) -> None:
    before = contents(here)
    with hold(here / "clean.safetensors"):
        told = sepme(*line.split(), "--json")
    assert told.status == 5
    error = told.json["error"]
    assert error["kind"] == "system" and "busy" in error["message"]
    assert contents(here) == before


SUCCEEDING = [
    (0, "verify monet.sepme"),
    (0, "verify clean.safetensors monet.sepme --base model.safetensors"),
    (1, "verify model.safetensors monet.sepme"),
    (1, "verify monet.sepme --recipe policy.yaml"),
    (1, "verify monet.sepme --model cousin.safetensors"),
    (1, "verify monet.sepme --model sd2.safetensors"),
    (1, "verify clean.safetensors klimt.sepme --base model.safetensors"),
    (1, "verify clean.safetensors --base cousin.safetensors"),
    (0, "recipe init new.yaml"),
    (0, "recipe init policy.yaml --force"),
    (0, "recipe check policy.yaml"),
    (0, "inspect monet.sepme"),
    (0, "inspect model.safetensors"),
    (0, "inspect clean.safetensors -v"),
    (0, "diff model.safetensors model.safetensors"),
    (0, "diff monet.sepme monet.sepme"),
    (0, "diff clean.safetensors monet.sepme"),
    (1, "diff model.safetensors clean.safetensors"),
    (1, "diff model.safetensors cousin.safetensors"),
    (1, "diff model.safetensors sd2.safetensors"),
    (1, "diff model.safetensors monet.sepme"),
    (1, "diff monet.sepme monet2.sepme"),
    (1, "diff both.sepme klimt.sepme -v"),
    (0, "apply model.safetensors both.sepme --check"),
    (0, "apply model.safetensors both.sepme -o out"),
    (0, "apply model.safetensors both.sepme -o out --only klimt --scale 0.5 --dtype fp32"),
    (0, "apply model.safetensors both.sepme -o clean.safetensors --force"),
    (0, "apply model.safetensors both.sepme --in-place"),
    (0, "apply clean.safetensors klimt.sepme --base model.safetensors -o out"),
    (0, "apply clean.safetensors klimt.sepme -o out"),
    (0, "apply cousin.safetensors monet.sepme -o out"),
    (0, "revert clean.safetensors --base model.safetensors -o out"),
    (0, "revert clean.safetensors monet.sepme --in-place"),
]


@pytest.mark.parametrize(("status", "line"), SUCCEEDING)
@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.usefixtures("here")
def test_an_answer(status: int, line: str, as_json: bool, sepme: Run) -> None:
    done = sepme(*line.split(), *(["--json"] if as_json else []))
    assert done.status == status
    if as_json:
        assert "error" not in done.json
    else:
        assert done.out.strip()
        assert b"\x1b" not in done.out
        assert "\x1b" not in done.err

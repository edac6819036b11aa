"""Files of every release are read, verified, applied and taken out again as they were then."""

import json
import shutil
from itertools import chain
from pathlib import Path

import pytest

from sepme_cli import __version__
from tests.compat import make
from tests.compat.release import MODELS, outcomes, weights

HERE = Path(__file__).parent
RELEASES = sorted(path.parent for path in HERE.glob("*/outcomes.json"))
each_release = pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)


def test_there_are_files_of_this_release() -> None:
    assert __version__ in [path.name for path in RELEASES], "run python -m tests.compat.make"


@each_release
def test_all_that_was_possible_gives_the_same(release: Path, tmp_path: Path) -> None:
    expected = json.loads((release / "outcomes.json").read_text())
    found = outcomes(release, tmp_path)
    assert {name: found.get(name) for name in expected} == expected
    for model in MODELS:
        assert found[f"revert all of patched-{model}"] == weights(release / model)
    assert found["in place, by its journal"] == weights(release / MODELS[0])


@each_release
def test_the_json_of_then_is_in_that_of_now(
    release: Path, small_model: Path, tmp_path: Path
) -> None:
    """Every field that a script may rely on is there, and of its kind."""
    folder = tmp_path / "release"
    shutil.copytree(release, folder)
    (folder / "erased.sepme").unlink()
    shutil.copy(small_model, folder / "small.safetensors")
    for command, told in json.loads((release / "json.json").read_text()).items():
        assert _lacking(told, make.said(make.COMMANDS[command], folder)) == []


def _lacking(then: object, now: object, where: str = "") -> list[str]:
    """Where a value lacks what an older one has."""
    if not _alike(then, now):
        return [f"{where} was {type(then).__name__}, is {type(now).__name__}"]
    if isinstance(then, dict) and isinstance(now, dict):
        missing = [f"{where}.{key}" for key in then if key not in now]
        inside = [_lacking(then[key], now[key], f"{where}.{key}") for key in then if key in now]
        return [*missing, *chain.from_iterable(inside)]
    if isinstance(then, list) and isinstance(now, list) and then:
        return _lacking(then[0], now[0], f"{where}[0]") if now else [f"{where}[0]"]
    return []


def _alike(then: object, now: object) -> bool:
    """null then can be something now: what was not known, or not chosen, may be."""
    numbers = [isinstance(x, (int, float)) and not isinstance(x, bool) for x in (then, now)]
    return then is None or all(numbers) or type(then) is type(now)


def test_what_a_release_has_left_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "__version__", RELEASES[0].name)
    before = {path: path.read_bytes() for path in RELEASES[0].rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match="stays"):
        make.main()
    assert {path: path.read_bytes() for path in RELEASES[0].rglob("*") if path.is_file()} == before


def test_they_are_small() -> None:
    for release in RELEASES:
        assert sum(path.stat().st_size for path in release.rglob("*") if path.is_file()) < 300_000

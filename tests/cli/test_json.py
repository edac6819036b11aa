"""The JSON of every command has the fields that scripts rely on."""

import json
import shutil
from pathlib import Path

import pytest

from sepme_cli.render.wording import duration, json_text, size, to_json
from tests.cli.conftest import Run
from tests.keys import make_key

FIELDS = {
    "apply model.safetensors monet.sepme -o out": {
        "output": str,
        "family": str,
        "concepts": list,
        "tensors_changed": int,
        "base_match": str,
        "statement": type(None),
        "seconds": float,
        "warnings": list,
    },
    "apply model.safetensors monet.sepme -o out --statement out.json": {"statement": str},
    "sign monet.sepme --key key": {"signatures": list, "seconds": float, "warnings": list},
    "revert clean.safetensors --base model.safetensors -o out": {
        "output": str,
        "restored": list,
        "remaining": list,
        "exact": bool,
        "max_abs_error": float,
        "warnings": list,
    },
    "diff model.safetensors clean.safetensors": {
        "same": bool,
        "changed": int,
        "tensors": list,
        "only_in_a": list,
        "only_in_b": list,
        "warnings": list,
    },
    "diff monet.sepme both.sepme": {
        "same": bool,
        "changed": int,
        "only_in_a": list,
        "only_in_b": list,
        "interference": dict,
    },
    "inspect clean.safetensors": {
        "kind": str,
        "family": str,
        "layout": str,
        "dtype": str,
        "targets": int,
        "applied": list,
    },
    "verify clean.safetensors monet.sepme --base model.safetensors": {
        "ok": bool,
        "checks": list,
        "unchecked": list,
    },
    "inspect monet.sepme": {"kind": str, "manifest": dict},
    "example -o new.safetensors": {"model": str, "bytes": int, "judge": str, "warnings": list},
    "export monet.sepme --to kohya -o out": {
        "output": str,
        "bytes": int,
        "format": str,
        "family": str,
        "dtype": str,
        "modules": int,
        "rank": int,
        "concepts": list,
        "base_match": type(None),
        "max_abs_error": float,
        "relative_error": float,
        "warnings": list,
    },
    "import --base model.safetensors --edited clean.safetensors -o out": {
        "patch": str,
        "bytes": int,
        "source": str,
        "family": str,
        "concept": str,
        "slug": str,
        "kind": str,
        "rank": int,
        "targets": int,
        "relative_error": float,
        "residuals": list,
        "left_out": list,
        "warnings": list,
    },
    "recipe init new.yaml": {"recipe": str, "bytes": int, "warnings": list},
    "recipe check policy.yaml": {
        "file": str,
        "digest": str,
        "concepts": list,
        "protect": list,
        "method": type(None),
        "settings": dict,
    },
}


@pytest.mark.parametrize("line", FIELDS)
def test_the_fields_of_the_contract(
    line: str, scene: Path, tmp_path: Path, sepme: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "model.safetensors",
        "clean.safetensors",
        "monet.sepme",
        "both.sepme",
        "policy.yaml",
    ):
        shutil.copy(scene / name, tmp_path)
    if "--key" in line:
        make_key(tmp_path / "key")
    monkeypatch.chdir(tmp_path)
    result = sepme(*line.split(), "--json").json
    found = {name: type(result[name]) for name in FIELDS[line]}
    assert found == FIELDS[line]
    for tensor in result.get("tensors", ()) if line.startswith("diff") else ():
        assert tensor.keys() == {"name", "relative_norm", "max_abs", "rank", "stream"}


@pytest.mark.slow
def test_the_fields_of_an_evaluation(tmp_path: Path, sepme: Run) -> None:
    from tests.evaluation.test_judges import save_clip
    from tests.small_model import save_small_model

    model, patch, report = (tmp_path / name for name in ("model.safetensors", "p.sepme", "report"))
    save_small_model(model)
    sepme("erase", model, "-c", "style:Monet", "-o", patch)
    line = ["evaluate", model, patch, "--judge", "tests.small_judge:judge", "--report", report]
    line += ["--pictures", 2, "--steps", 1]
    told = sepme(*line, "--json").json
    concept = told["concepts"]["Monet"]
    assert concept["role"] == "erased"
    assert concept.keys() >= {"role", "before", "after", "n", "interval"}
    for name in ("erased", "retained_same_domain", "retained_other_domain"):
        assert told[name].keys() == {"before", "after", "n", "interval"}
    assert told["restored_identical"] is True
    assert told["command"].startswith("sepme evaluate ")
    written = json.loads((report / "report.json").read_text())
    assert written["concepts"] == told["concepts"]

    said = sepme(*line, "--force", "-q", "--fail-unless-erased")
    assert (said.status, said.err) == (1, "")  # random weights draw nothing that can be erased
    assert "NOT erased" in said.out.decode()
    assert str(report / "report.html") in said.out.decode()
    assert sepme(*line, "--force", "-q").status == 0
    part = sepme(*line, "--force", "--shard", "1/3", "--json").json
    assert part["shard"] == "1/3" and part["images"] > part["drawn"] == 0
    assert part.keys() == {"shard", "report", "images", "drawn", "seconds", "warnings"}
    assert b"1/3" in sepme(*line, "--force", "--shard", "1/3", "-q").out
    line[line.index("--judge") + 1] = save_clip(tmp_path / "clip")
    assert sepme(*line, "--force", "--json").json["concepts"]["Monet"]["n"] == 2


def test_what_json_has_no_word_for_is_null_and_everything_is_ascii() -> None:
    value = {"a": (float("nan"), float("inf"), 1.5, None, True), "b": "Café \udc80"}
    assert to_json(value)["a"] == [None, None, 1.5, None, True]
    text = json_text(value, warnings=["ü"])
    assert text.isascii()
    assert json.loads(text)["warnings"] == ["ü"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.6, "1 h 00 min"),
        (3900, "1 h 05 min"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 KiB"),
        (421888, "412 KiB"),
        (2**20, "1.0 MiB"),
        (2130 * 10**6, "2.0 GiB"),
    ],
)
def test_sizes(count: int, words: str) -> None:
    assert size(count) == words

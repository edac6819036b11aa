"""The model card says what patches and checkpoints say, as the hub reads it."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from sepme_cli.checkpoints.reading.patches import read_patch_file
from sepme_cli.errors import MalformedError, RefusedError
from sepme_cli.operations.apply import apply
from sepme_cli.operations.card import card
from tests.synthetic import additive, base_of, make_checkpoint, make_patch, operator

REPORT = {
    "concepts": {
        "Monet": {
            "role": "erased",
            "before": 0.92,
            "after": 0.08,
            "n": 12,
            "interval": [0.01, 0.35],
        },
        "cat | <b>dog</b>": {
            "role": "retained",
            "before": 1.0,
            "after": None,
            "n": 12,
            "interval": None,
        },
    },
    "restored_identical": True,
}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A checkpoint, a patch for two concepts, and the checkpoint with half of one."""
    model = make_checkpoint(tmp_path / "model.safetensors")
    base = base_of(model)
    parts = (additive(base, "Monet", seed=1), operator(base, "a|b *c* <i>", seed=2))
    patch = make_patch(tmp_path / "patch.sepme", base, *parts)
    clean = tmp_path / "clean.safetensors"
    apply(model, [patch], clean, only=["Monet"], scale=0.5)
    return model, patch, clean


def cells(text: str, first: str) -> list[str]:
    """The cells of the table's row that begins so; bars that are escaped are none."""
    row = next(line for line in text.splitlines() if line.startswith(f"| {first}"))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def test_the_card_of_a_patch(files: tuple[Path, Path, Path]) -> None:
    _, patch, _ = files
    file = read_patch_file(patch)
    made = card([patch], base_model="someone/model")
    data = ModelCard(made.card).data.to_dict()
    assert data["base_model"] == "someone/model"
    assert data["base_model_relation"] == "adapter"
    assert "concept-erasure" in data["tags"]

    by_concept = {part.concept: part for part in file.patch.increments}
    assert set(made.concepts) == by_concept.keys()
    row = cells(made.card, "Monet")
    assert row[1] == by_concept["Monet"].method.name
    assert row[-1] == f"`{by_concept['Monet'].digest}`"
    assert len(cells(made.card, r"a\|b \*c\* \<i\>")) == len(row)
    assert file.digest in made.card
    assert file.patch.base.digest in made.card
    assert "Not measured yet" in made.card
    assert "can subtract" in made.card


def test_the_card_of_a_checkpoint_tells_what_is_in_it(files: tuple[Path, Path, Path]) -> None:
    _, patch, clean = files
    made = card([clean, patch])
    assert made.concepts == ("Monet",)
    assert cells(made.card, "Monet")[4] == "0.5"
    alone = card([clean])
    assert cells(alone.card, "Monet")[1] == "patch not given"
    assert cells(alone.card, "Monet")[-1] == cells(made.card, "Monet")[-1]
    assert "base_model" not in ModelCard(made.card).data.to_dict()


def test_what_was_measured_stands_in_it(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, patch, _ = files
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    made = card([patch], report=tmp_path)
    text = made.card.partition("## Measurements")[2]
    assert cells(text, "Monet") == ["Monet", "erased", "92%", "8%", "1% to 35%", "12"]
    assert cells(text, "cat")[0] == r"cat \| \<b\>dog\</b\>"
    assert cells(text, "cat")[3:5] == ["-", "- to -"]


def test_what_has_no_card(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, patch, _ = files
    with pytest.raises(RefusedError):
        card([model])
    report = tmp_path / "report.json"
    for text in ("{", "[]", '{"concepts": 1}', '{"concepts": {"a": {}}}'):
        report.write_text(text)
        with pytest.raises(MalformedError):
            card([patch], report=report)


ATTACKED = {
    "concept": "Mo|net",
    "budget": "quick",
    "attacks": {
        "seeds": {
            "patched": {"share": 0.25, "n": 4, "interval": [0.05, 0.7], "images": 9, "seconds": 1},
            "original": {"share": 1, "n": 4, "interval": [0.5, 1], "images": 4, "seconds": 1},
        },
        "noise": {"patched": None, "original": None},
        "p4d": {
            "patched": {"share": 0, "n": 4, "interval": [0, 0.5], "images": 9, "seconds": 1},
            "original": None,
        },
    },
}


def test_a_card_says_what_attacks_came_to(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, patch, _ = files
    (tmp_path / "attack.json").write_text(json.dumps(ATTACKED))
    text = card([patch], attacks=tmp_path).card
    assert "## Attacks on Mo\\|net" in text
    assert "| seeds | 25% | 5% to 70% | 4 | 100% |" in text
    assert "| p4d | 0% | 0% to 50% | 4 | - |" in text
    assert "noise" not in text
    assert card([patch], attacks=[tmp_path, tmp_path / "attack.json"]).card.count("| seeds") == 2
    for broken in ("{", "[]", '{"attacks": 1}', json.dumps({**ATTACKED, "attacks": {"a": 1}})):
        (tmp_path / "attack.json").write_text(broken)
        with pytest.raises(MalformedError, match="not a report of sepme attack"):
            card([patch], attacks=tmp_path)

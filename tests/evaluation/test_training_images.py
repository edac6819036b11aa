"""Folders of training images, in both layouts, and what is wrong with some."""

import json
from pathlib import Path

import pytest
from PIL import Image

from sepme_cli.errors import MalformedError, SystemFailure, UsageError
from sepme_cli.evaluation.training_images import read_training_images


def save(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(path)


def test_a_caption_lies_beside_its_image(tmp_path: Path) -> None:
    for name, caption in (("b", "a red\n door \n"), ("a", "\ufeffthe blue one")):
        save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(caption, encoding="utf-8")
    found = [(one.name, one.caption) for one in read_training_images(tmp_path)]
    assert found == [("a.png", "the blue one"), ("b.png", "a red door")]
    (tmp_path / "b.txt").unlink()
    with pytest.raises(UsageError, match=r"b\.png has no caption") as error:
        read_training_images(tmp_path)
    assert "b.txt beside it" in str(error.value.expected)


def test_captions_stand_in_the_list_of_an_image_folder(tmp_path: Path) -> None:
    save(tmp_path / "one.png")
    save(tmp_path / "more" / "two.png")
    save(tmp_path / "not-listed.png")
    lines = [
        {"file_name": "more/two.png", "text": "a door", "width": 4},
        {"file_name": "one.png", "text": "a roof"},
    ]
    listed = tmp_path / "metadata.jsonl"
    listed.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    found = read_training_images(tmp_path)
    assert [(one.name, one.caption) for one in found] == [
        ("more/two.png", "a door"),
        ("one.png", "a roof"),
    ]
    assert [one.path for one in found] == [tmp_path / one.name for one in found]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"file_name": "one.png"}',
        '{"file_name": "one.png", "text": 3}',
        '{"file_name": "../one.png", "text": "out of the folder"}',
        '{"file_name": "/etc/hostname", "text": "out of the folder"}',
        '{"file_name": "missing.png", "text": "x"}',
        '{"file_name": "one.png", "text": "\xff"}',
    ],
)
def test_a_damaged_list_is_told_with_its_line(line: str, tmp_path: Path) -> None:
    save(tmp_path / "folder" / "one.png")
    save(tmp_path / "one.png")
    good = '{"file_name": "one.png", "text": "fine"}\n'
    (tmp_path / "folder" / "metadata.jsonl").write_bytes((good + line).encode("latin-1"))
    with pytest.raises(MalformedError, match=r"line 2|not UTF-8"):
        read_training_images(tmp_path / "folder")


def test_no_folder_and_nothing_in_it(tmp_path: Path) -> None:
    with pytest.raises(SystemFailure, match="no such folder"):
        read_training_images(tmp_path / "missing")
    with pytest.raises(UsageError, match="no images in it"):
        read_training_images(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(UsageError, match="no images in it"):
        read_training_images(tmp_path)

"""Nudity judged by NudeNet: what counts, what it is called, and the package where it is installed.

No image of a naked person is kept here: what the real model is given is none.
"""

import sys

import pytest
import torch
from torch import Tensor

from sepme_cli.errors import UnsupportedError
from sepme_cli.evaluation.judges import Judge, knows, load_judge
from sepme_cli.evaluation.nudenet import CLOTHED, NudeNet, is_nude
from sepme_cli.evaluation.subjects import choose_subjects


def seen(name: str, score: float) -> dict[str, object]:
    return {"class": name, "score": score, "box": [0, 0, 1, 1]}


@pytest.mark.parametrize(
    ("detections", "nude"),
    [
        ([], False),
        ([seen("FACE_FEMALE", 0.9), seen("BELLY_EXPOSED", 0.9)], False),
        ([seen("FEMALE_BREAST_COVERED", 0.9), seen("MALE_BREAST_EXPOSED", 0.9)], False),
        ([seen("FEMALE_BREAST_EXPOSED", 0.59)], False),
        ([seen("FACE_MALE", 0.9), seen("BUTTOCKS_EXPOSED", 0.6)], True),
    ],
)
def test_what_counts_as_nudity(detections: list[dict[str, object]], nude: bool) -> None:
    assert is_nude(detections) is nude


class Reddish:
    """Stands in for the detector where pixels must be told from each other: what it is given is
    blue first, as OpenCV reads a file."""

    def detect(self, image: Tensor) -> list[dict[str, object]]:
        assert image.shape == (4, 6, 3) and image.dtype == "uint8"
        return [seen("ANUS_EXPOSED", float(image[..., 2].mean() > image[..., 0].mean()))]


def test_images_are_given_as_files_are_read() -> None:
    red = torch.zeros(3, 4, 6)
    red[0] = 1.0
    judge = NudeNet(Reddish(), "naked woman")
    assert judge.recognise(torch.stack([red, red.flip(0)]), "object") == ["naked woman", CLOTHED]


def test_any_name_of_nudity_is_an_object_and_the_rest_is_clothed() -> None:
    judge = NudeNet(None, "naked woman")
    subjects, warnings = choose_subjects([("naked woman", "any")], [], [], judge)
    told = [(one.name, one.kind, one.role) for one in subjects]
    assert told == [("naked woman", "object", "erased"), (CLOTHED, "object", "retained")]
    assert not warnings


def test_without_the_package_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(UnsupportedError, match=r"sepme\[nudenet\]"):
        load_judge("nudenet", [("nudity", "any")])


def test_the_package_itself() -> None:
    pytest.importorskip("nudenet", reason="pip install 'sepme[nudenet]' to judge with NudeNet")
    judge = load_judge("nudenet", [("Monet", "style"), ("Naked Woman", "any")])
    assert isinstance(judge, Judge)
    assert knows(judge, "naked woman", "object") and not judge.labels("style")
    noise = torch.rand(3, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    assert judge.recognise(noise, "object") == [CLOTHED] * 3
    from nudenet import nudenet

    from sepme_cli.evaluation.nudenet import EXPOSED

    assert set(vars(nudenet)["__labels"]) >= EXPOSED

import io

import numpy as np
import pytest
import torch
from PIL import Image

from sepme_cli.evaluation.intervals import Proportion
from sepme_cli.evaluation.sheets import contact_sheet


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    # Newcombe 1998, table I: the Wilson score interval without continuity correction.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_intervals_are_the_published_ones(hits: int, n: int, low: float, high: float) -> None:
    assert Proportion(hits, n).interval == pytest.approx((low, high), abs=5e-5)


def test_all_hits_stay_within_one() -> None:
    low, high = Proportion(10, 10).interval
    assert high == pytest.approx(1.0)
    assert 0.7 < low < 1


def test_proportions_add_up() -> None:
    assert Proportion(1, 4) + Proportion(2, 6) == Proportion(3, 10)


def test_a_sheet_has_every_picture_in_its_place() -> None:
    pictures = torch.rand(2, 3, 3, 8, 8)
    file = io.BytesIO()
    contact_sheet(pictures, file, scale=2, gap=1)
    sheet = np.asarray(Image.open(file))
    assert sheet.shape == (2 * 17, 3 * 17, 3)
    expected = (pictures[1, 2].permute(1, 2, 0) * 255).round().byte().numpy()
    assert np.array_equal(sheet[17:33:2, 34:50:2], expected)


def test_labels_make_room_for_themselves() -> None:
    file = io.BytesIO()
    contact_sheet(torch.rand(1, 1, 3, 8, 8), file, rows=["before"], columns=["cat"])
    width, height = Image.open(file).size
    assert width > 40
    assert height > 20

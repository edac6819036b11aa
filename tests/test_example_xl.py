"""The example's XL sister, which is made by `python -m examples.english.xl` and not shipped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.english import JUDGE, English, caption
from examples.english.canvas import OBJECTS, STYLES
from examples.english.xl import FILE, rounded

SEPME = Path(sys.executable).with_name("sepme")
packed = pytest.mark.skipif(not FILE.exists(), reason="python -m examples.english.xl makes it")


def test_rounding_keeps_the_leading_bits_of_a_fraction() -> None:
    values = torch.tensor([1.0, -1.0, 0.0, 1 + 1 / 1024, 1 + 1 / 64, 1 + 63 / 64])
    assert rounded(values, 5).tolist() == [1.0, -1.0, 0.0, 1.0, 1 + 1 / 32, 2.0]


@packed
@pytest.mark.slow
def test_it_is_an_xl_that_draws_what_it_is_asked_for() -> None:
    done = subprocess.run(
        [SEPME, "inspect", FILE, "--json"], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert (found["kind"], found["family"], found["dtype"]) == ("checkpoint", "sdxl", "fp16")
    asked = [caption(s, o) for s in range(len(STYLES)) for o in range(s, len(OBJECTS), 75)]
    drawn = English(FILE, JUDGE, torch.float32).draw(asked, {})
    assert float(drawn.style.float().mean()) >= 0.9
    assert float(drawn.object.float().mean()) >= 0.8

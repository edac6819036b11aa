"""The canvas's sisters, a small XL and a small Stable Diffusion 3, as they are shipped."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.english import JUDGE, English, caption
from examples.english import sd3
from examples.english.canvas import OBJECTS, STYLES
from examples.english.sisters import packed, unpack, unpacked
from examples.english.xl import rounded

SEPME = Path(sys.executable).with_name("sepme")


def test_rounding_keeps_the_leading_bits_of_a_fraction() -> None:
    values = torch.tensor([1.0, -1.0, 0.0, 1 + 1 / 1024, 1 + 1 / 64, 1 + 63 / 64])
    assert rounded(values, 5).tolist() == [1.0, -1.0, 0.0, 1.0, 1 + 1 / 32, 2.0]


def test_a_packed_file_is_the_rounded_one_again(tmp_path: Path) -> None:
    values = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).half()
    tensors = {"a.weight": values, "a.norm.weight": values.clone()}
    save_file(tensors, tmp_path / "a.safetensors", {"k": "v"})
    small = packed(tmp_path / "a.safetensors")
    assert len(small) < (tmp_path / "a.safetensors").stat().st_size
    (tmp_path / "b.safetensors").write_bytes(unpacked(small))
    found = load_file(tmp_path / "b.safetensors")
    assert torch.equal(found["a.norm.weight"], values)
    assert torch.equal(found["a.weight"], rounded(values.float(), 4))
    assert np.abs(found["a.weight"] - values).max() < values.abs().max() / 16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "family", "guidance", "least"), [("xl", "sdxl", 3.0, 0.8), ("sd3", "sd3", 5.0, 0.4)]
)
def test_it_is_of_its_family_and_draws_what_it_is_asked_for(
    name: str, family: str, guidance: float, least: float, tmp_path: Path
) -> None:
    model = unpack(name, tmp_path)
    done = subprocess.run(
        [SEPME, "inspect", model, "--json"], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert (found["kind"], found["family"], found["dtype"]) == ("checkpoint", family, "fp16")
    known = OBJECTS if name == "xl" else sd3.DRAWN
    objects = [place for place, one in enumerate(OBJECTS) if one in known]
    step = len(objects) // 3
    asked = [
        caption(s, objects[i]) for s in range(len(STYLES)) for i in range(s, len(objects), step)
    ]
    drawn = English(model, JUDGE, torch.float32, guidance=guidance).draw(asked, {})
    assert float(drawn.style.float().mean()) >= 0.9
    assert float(drawn.object.float().mean()) >= least

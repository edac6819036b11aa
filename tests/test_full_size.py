"""Checkpoints as large as real ones: only what should change does, in memory that stays small."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import disk_usage
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from transformers import T5Config, T5EncoderModel

from benchmarks.full_size import make, make_sparse, shapes, stable_diffusion_3
from benchmarks.speed import increment
from patch_spec.base import Family
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.diffusion.transformer_names import in_diffusers_names
from tests.synthetic import make_patch, operator

MEMORY = 500
"""Megabytes over the interpreter with its imports."""
LARGE_MEMORY = 200
"""The same, of transformers: a patch changes few tensors of theirs."""
PEAK = """
import sys
from sepme_cli.app import run
status = run(sys.argv[1:])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("peak", int(peak.split()[1]) * 1024 // 10**6, file=sys.stderr)
sys.exit(status)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("full")
    if disk_usage(folder).free < 8e9:
        pytest.skip("there is no room on the disk for full-size files")
    make("sd1", path := folder / "model.safetensors")
    yield path
    for file in folder.iterdir():
        file.unlink()


def sepme(*arguments: object) -> int:
    """Run it in a process of its own; its peak memory in megabytes."""
    command = [sys.executable, "-c", PEAK, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return int(done.stderr.split()[-1])


def entries(path: Path) -> tuple[dict[str, Any], np.memmap[Any, Any]]:
    """What the header says of the tensors, and the bytes behind it; by no code of ours."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__")
    return header, np.memmap(path, np.uint8, "r", 8 + length)


def differing(a: Path, b: Path) -> set[str]:
    """The tensors whose bytes differ, of files that hold the same ones in the same places."""
    (ours, left), (theirs, right) = entries(a), entries(b)
    assert ours == theirs and len(left) == len(right)
    places = {name: slice(*fields["data_offsets"]) for name, fields in ours.items()}
    return {name for name, at in places.items() if not np.array_equal(left[at], right[at])}


@pytest.mark.slow
def test_a_full_size_checkpoint_there_and_back(model: Path) -> None:
    with open_checkpoint(model) as checkpoint:
        base = checkpoint.base()
        targets = {target.copies[0].name for target in checkpoint.targets}
    both = [increment(base, "monet", "operator", 1), increment(base, "klimt", "additive", 2)]
    patch = make_patch(model.with_name("p.sepme"), base, *both)
    idle = sepme("inspect", patch)
    clean, back = model.with_name("clean.safetensors"), model.with_name("back.safetensors")

    assert sepme("apply", model, patch, "-o", clean) < idle + MEMORY
    assert differing(model, clean) == targets
    assert sepme("revert", clean, "--base", model, "-o", back) < idle + MEMORY
    assert differing(model, back) == set()
    back.unlink()

    before = model.stat().st_size
    assert sepme("apply", model, patch, "--in-place") < idle + MEMORY
    assert differing(model, clean) == set()
    assert sepme("revert", model, "--in-place") < idle + MEMORY
    assert model.stat().st_size == before
    assert differing(model, clean) == targets


@pytest.mark.parametrize(
    ("name", "family", "prefix", "network"),
    [
        (
            "sd3.5-large",
            "sd3",
            "model.diffusion_model.",
            lambda: SD3Transformer2DModel(
                num_layers=38,
                num_attention_heads=38,
                caption_projection_dim=38 * 64,
                pos_embed_max_size=192,
                qk_norm="rms_norm",
                out_channels=16,
            ),
        ),
        ("flux.1-dev", "flux", "", lambda: FluxTransformer2DModel(guidance_embeds=True)),
    ],
)
def test_full_size_transformers_are_the_libraries(
    name: str, family: Family, prefix: str, network: Callable[[], torch.nn.Module]
) -> None:
    """By diffusers' names they have all tensors of its networks, in the published shapes."""
    made = {n.removeprefix(prefix): s for n, s in shapes(name).items() if n.startswith(prefix)}
    with torch.device("meta"):
        expected = {n: tuple(v.shape) for n, v in network().state_dict().items()}
        found = in_diffusers_names({n: torch.empty(s) for n, s in made.items()}, family)
    assert {n: tuple(v.shape) for n, v in found.items()} == expected


def test_a_full_size_t5_is_the_librarys() -> None:
    config = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24}
    with torch.device("meta"):
        network = T5EncoderModel(T5Config(**config, num_heads=64, feed_forward_proj="gated-gelu"))
    expected = {n: tuple(v.shape) for n, v in network.state_dict().items()}
    expected.pop("encoder.embed_tokens.weight")  # the same as another
    assert shapes("t5xxl") == expected


@pytest.mark.slow
def test_memory_does_not_grow_with_a_transformer(tmp_path: Path) -> None:
    """5 GB, which take little of the disk, as all but what a patch changes is zero; a third of
    Stable Diffusion 3.5 large, which `benchmarks.large` measures whole."""
    make_sparse(stable_diffusion_3(depth=12), model := tmp_path / "model.safetensors")
    assert model.stat().st_size > 5e9
    with open_checkpoint(model) as checkpoint:
        base = checkpoint.base()
    patch = make_patch(model.with_name("p.sepme"), base, operator(base, "monet", seed=1))
    idle = sepme("inspect", patch)
    assert sepme("apply", model, patch, "-o", os.devnull) < idle + LARGE_MEMORY

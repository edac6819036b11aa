"""The law, of every family: patched(e) = original(e (I + T)^T), T the operator on a stream.

The denoisers are diffusers' own, with random weights, and are loaded by sepme from the files that
were patched; what they are asked is built here, from the streams alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import Tensor

import sepme_cli as sepme
from patch_spec.increment import Increment
from patch_spec.streams import Stream
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.diffusion.loading import load_transformer, load_unet
from sepme_cli.diffusion.weights import tensors_of
from tests.small_model import SMALL, Parts, small_parts, write_folder, write_single_file
from tests.small_transformers import (
    small_transformer,
    write_transformer_file,
    write_transformer_folder,
)
from tests.synthetic import make_patch, operator

Read = Mapping[Stream, Tensor]
"""What a denoiser reads: tokens [n, rows, d], pooled [n, d]."""


@dataclass(frozen=True)
class Case:
    """A family scaled down. write: as a file or a folder; load: its denoiser; ask: it."""

    name: str
    write: Callable[[Path, str], Path]
    load: Callable[[Path], Any]
    ask: Callable[[Any, Read], Tensor]


def _unet_case(name: str) -> Case:
    parts: Parts = small_parts(name)

    def write(path: Path, layout: str) -> Path:
        if layout == "folder":
            return write_folder(parts, path / name)
        return write_single_file(parts, path / f"{name}.safetensors")

    def load(path: Path) -> Any:
        with open_checkpoint(path) as checkpoint:
            return load_unet(checkpoint, torch.float32)

    def ask(unet: Any, read: Read) -> Tensor:
        torch.manual_seed(0)
        noisy = torch.randn(2, 4 + parts.small.extra_channels, 8, 8)
        told: dict[str, Any] = {}
        if "pooled" in read:
            sizes = torch.full((2, parts.small.sizes), 16.0)
            told = {"added_cond_kwargs": {"text_embeds": read["pooled"], "time_ids": sizes}}
        found: Tensor = unet(noisy, 500, read["tokens"], **told).sample
        return found

    return Case(name, write, load, ask)


def _transformer_case(name: str) -> Case:
    model = small_transformer(name)  # type: ignore[arg-type]

    def write(path: Path, layout: str) -> Path:
        if layout == "folder":
            return write_transformer_folder(model, path / name, shard="100KB")
        return write_transformer_file(model, path / f"{name}.safetensors")

    def load(path: Path) -> Any:
        with open_checkpoint(path) as checkpoint:
            if name != "wan":
                return load_transformer(checkpoint, torch.float32)
            network = checkpoint.network("denoiser")
            assert network is not None
            tensors = tensors_of(network, torch.float32)
        if network.naming == "original":
            tensors = convert_wan_transformer_to_diffusers(tensors)
        fresh = small_transformer("wan", seed=1).transformer
        fresh.load_state_dict(tensors)
        return fresh

    return Case(name, write, load, ASK[name])


def _ask_sd3(transformer: Any, read: Read) -> Tensor:
    torch.manual_seed(0)
    noisy = torch.randn(2, 4, 8, 8)
    found: Tensor = transformer(noisy, read["tokens"], read["pooled"], torch.full((2,), 500.0))[0]
    return found


def _ask_flux(transformer: Any, read: Read) -> Tensor:
    torch.manual_seed(0)
    noisy = torch.randn(2, 16, 16)
    rows = read["tokens"].shape[1]
    found: Tensor = transformer(
        noisy,
        read["tokens"],
        read["pooled"],
        timestep=torch.full((2,), 0.5),
        img_ids=torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        txt_ids=torch.zeros(rows, 3),
        guidance=torch.full((2,), 3.5),
    )[0]
    return found


def _ask_wan(transformer: Any, read: Read) -> Tensor:
    torch.manual_seed(0)
    noisy = torch.randn(2, 4, 2, 8, 8)
    found: Tensor = transformer(noisy, torch.full((2,), 500), read["tokens"])[0]
    return found


ASK: Mapping[str, Callable[[Any, Read], Tensor]] = {
    "sd3": _ask_sd3,
    "flux": _ask_flux,
    "wan": _ask_wan,
}
CASES: Mapping[str, Callable[[str], Case]] = {
    **dict.fromkeys(SMALL, _unet_case),
    **dict.fromkeys(ASK, _transformer_case),
}


def moved(increment: Increment, read: Read) -> dict[Stream, Tensor]:
    """e (I + T)^T of each stream that the increment acts on."""
    found = dict(read)
    for stream, values in read.items():
        if (factors := increment.on(stream)) is not None:
            assert factors.shift is not None
            shift = np.ldexp(factors.shift.astype(np.float64), factors.exponent)
            way = torch.from_numpy(shift @ factors.basis.astype(np.float64))
            found[stream] = (values.double() @ (torch.eye(len(way)) + way).T).float()
    return found


@pytest.mark.parametrize("layout", ["single file", "folder"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_law(name: str, layout: str, tmp_path: Path) -> None:
    case = CASES[name](name)
    model = case.write(tmp_path, layout)
    with open_checkpoint(model) as checkpoint:
        base = checkpoint.base()
    both = operator(base, "c", seed=1, size=0.5)
    generator = torch.Generator().manual_seed(1)
    read: dict[Stream, Tensor] = {"tokens": torch.randn(2, 5, base.width, generator=generator)}
    if base.pooled is not None:
        read["pooled"] = torch.randn(2, base.pooled, generator=generator)
    original = case.load(model)
    before = case.ask(original, read)
    for increment in _each(both):
        patch = make_patch(tmp_path / "p.sepme", base, increment)
        out = tmp_path / ("patched" + model.suffix)
        sepme.apply(model, patch, out, force=True)
        found = case.ask(case.load(out), read)
        expected = case.ask(original, moved(increment, read))
        change = (expected - before).norm()
        assert change > 1e-3 * before.norm()
        assert (found - expected).norm() < 2e-3 * change


def _each(both: Increment) -> list[Increment]:
    """The increment, and its factors on one stream alone."""
    if both.pooled_basis is None:
        return [both]
    tokens = replace(both, pooled_rank=0, pooled_exponent=0, pooled_basis=None, pooled_shift=None)
    no_rows = np.zeros((0, both.basis.shape[1]), np.float32)
    pooled = replace(both, rank=0, shift_exponent=0, basis=no_rows, shift=None)
    return [both, tokens, pooled]


def test_what_reads_other_things_stays(tmp_path: Path) -> None:
    """Of XL's entry the columns that read sizes keep their bytes."""
    case = _unet_case("sdxl")
    model = case.write(tmp_path, "single file")
    with open_checkpoint(model) as checkpoint:
        base = checkpoint.base()
    patch = make_patch(tmp_path / "p.sepme", base, operator(base, "c", seed=1))
    out = tmp_path / "patched.safetensors"
    sepme.apply(model, patch, out)
    before, after = (case.load(path).add_embedding.linear_1.weight for path in (model, out))
    assert base.pooled == 96 and before.shape[1] > 96
    assert torch.equal(before[:, 96:], after[:, 96:])
    assert not torch.equal(before[:, :96], after[:, :96])

"""LoRAs and edits taken whole: what is done to layers that read more than the text, and to CLIP."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sepme_cli as sepme
from patch_spec.container import patch_bytes, read_patch
from patch_spec.errors import FormatError
from patch_spec.stack import StackRecord
from patch_spec.streams import network_of, stream_of
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint, open_checkpoint
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.weights import patched_weights
from sepme_cli.errors import MalformedError, MismatchError, UnsupportedError, UsageError
from tests.operations.test_transformer_loras import pipeline
from tests.small_model import small_parts, write_folder, write_single_file
from tests.small_transformers import (
    small_transformer,
    write_transformer_file,
    write_transformer_folder,
)
from tests.synthetic import base_of, make_patch, operator

FAMILIES = ("sd1", "sd2", "sdxl", "sd3", "flux")
LAYOUTS = ("folder", "file")
TRANSFORMERS = ("sd3", "flux")


@dataclass(frozen=True)
class Model:
    """A small model on the disk, and the networks that it was written from."""

    family: str
    path: Path
    denoiser: nn.Module
    texts: tuple[Any, ...]

    @property
    def clips(self) -> Iterator[tuple[str, str, Any]]:
        """Patches' name, folder, network."""
        names = {"sd1": ("clip_l",), "sd2": ("clip_h",), "flux": ("clip_l",)}
        for i, name in enumerate(names.get(self.family, ("clip_l", "clip_g"))):
            yield name, f"text_encoder_{i + 1}" if i else "text_encoder", self.texts[i]


def write_model(
    family: str, layout: str, path: Path, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Model:
    if family in TRANSFORMERS:
        small = small_transformer(family, seed)
        if layout == "folder":
            written = write_transformer_folder(small, path)
        else:
            written = write_transformer_file(small, path.with_suffix(".safetensors"), dtype)
        return Model(family, written, small.transformer, small.texts)
    parts = small_parts(family, seed)
    if layout == "folder":
        return Model(family, write_folder(parts, path), parts.unet, parts.texts)
    file = write_single_file(parts, path.with_suffix(".safetensors"), dtype)
    return Model(family, file, parts.unet, parts.texts)


def linear(network: nn.Module, only: str = "") -> dict[str, tuple[int, int]]:
    """Its linear layers, and its convolutions of one pixel."""
    found = {}
    for name, module in network.named_modules():
        shape = tuple(module.weight.shape) if isinstance(module, nn.Linear | nn.Conv2d) else ()
        # Of XL's a patch has some columns alone.
        wanted = only in name and name != "add_embedding.linear_1"
        if wanted and (len(shape) == 2 or shape[2:] == (1, 1)):
            found[name] = shape[:2]
    return found


def pairs_of(model: Model, seed: int = 1, rank: int = 4) -> dict[str, tuple[Tensor, Tensor]]:
    """up and down of every linear layer, by what a patch calls its weight."""
    shapes = {f"{name}.weight": shape for name, shape in linear(model.denoiser).items()}
    for clip, _, network in model.clips:
        # Of OpenCLIP-H nothing reads the last layer.
        unread = "encoder.layers.2." if clip == "clip_h" else "\0"
        for name, shape in linear(network, "encoder.layers").items():
            if unread not in name:
                shapes[f"{clip}.{name.removeprefix('text_model.')}.weight"] = shape
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(out, rank, generator=generator) * 0.02,
            torch.randn(rank, width, generator=generator) * 0.2,
        )
        for name, (out, width) in shapes.items()
    }


def peft(model: Model, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """As diffusers and PEFT save it."""
    denoiser = "transformer" if model.family in TRANSFORMERS else "unet"
    folders = {clip: folder for clip, folder, _ in model.clips}
    found = {}
    for name, (up, down) in pairs.items():
        network, _, rest = name.removesuffix(".weight").partition(".")
        module = f"{denoiser}.{network}.{rest}"
        if network in folders:
            module = f"{folders[network]}.text_model.{rest}"
        elif not rest:
            module = f"{denoiser}.{network}"
        found[f"{module}.lora_B.weight"], found[f"{module}.lora_A.weight"] = up, down
    return found


def write_lora(model: Model, path: Path, **options: Any) -> Path:
    save_file(peft(model, pairs_of(model, **options)), path)
    return path


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def files(path: Path) -> dict[str, bytes]:
    every = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): p.read_bytes() for p in every}


def changed_tensors(before: Path, after: Path) -> int:
    """How many tensors of the model's files are not what they were, byte for byte."""
    changed = 0
    for place in files(before):
        if place.endswith(".safetensors") or not before.is_dir():
            old, new = (load_file(p / place if p.is_dir() else p) for p in (before, after))
            changed += sum(
                not torch.equal(t.flatten().view(torch.uint8), new[n].flatten().view(torch.uint8))
                for n, t in old.items()
            )
    return changed


def out_of(model: Model, name: str) -> Path:
    return model.path.with_name(name + model.path.suffix)


def weight(checkpoint: Checkpoint, name: str) -> np.ndarray:
    found = checkpoint.weight(name)
    assert found is not None, name
    return found.read().astype(np.float64)


def test_a_lora_is_taken_whole_applied_and_taken_back(
    family: str, layout: str, tmp_path: Path
) -> None:
    model = write_model(family, layout, tmp_path / "m")
    pairs = pairs_of(model)
    lora = write_lora(model, tmp_path / "l.safetensors")
    result = sepme.import_lora(lora, model.path, tmp_path / "p.sepme", concept="x")
    assert (result.kind, result.rank, result.targets) == ("lora", 4, len(pairs))
    assert result.left_out == ()
    assert result.layers == sum(stream_of(name) is None for name in pairs)
    assert result.relative_error < 1e-3
    assert any("--text-layers-only" in warning for warning in result.warnings)
    out = out_of(model, "out")
    applied = sepme.apply(model.path, tmp_path / "p.sepme", out)
    assert applied.tensors_changed == changed_tensors(model.path, out)
    with open_checkpoint(model.path) as before, open_checkpoint(out) as after:
        assert after.stack is not None
        assert after.stack.layers.keys() == {name for name in pairs if stream_of(name) is None}
        for name, (up, down) in pairs.items():
            wanted = (up.double() @ down.double()).numpy()
            change = weight(after, name) - weight(before, name)
            assert np.linalg.norm(change - wanted) < 1e-3 * np.linalg.norm(wanted), name
    back = out_of(model, "back")
    reverted = sepme.revert(out, output=back, base=model.path)
    assert reverted.exact
    assert files(back) == files(model.path)
    assert sepme.verify([out, tmp_path / "p.sepme"], base=model.path).ok


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_it_is_what_diffusers_fuses(family: Any, tmp_path: Path) -> None:
    model = write_model(family, "folder", tmp_path / "m")
    own = {n: pair for n, pair in pairs_of(model).items() if network_of(n) in (None, "denoiser")}
    lora = tmp_path / "l.safetensors"
    save_file(peft(model, own), lora)
    sepme.import_lora(lora, model.path, tmp_path / "p.sepme", concept="x")
    sepme.apply(model.path, tmp_path / "p.sepme", tmp_path / "out")
    found = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    small = small_transformer(family)
    before = {name: value.clone() for name, value in small.transformer.state_dict().items()}
    pipe = pipeline(small)
    pipe.load_lora_weights(str(lora))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    for name, value in small.transformer.state_dict().items():
        moved = (value - before[name]).norm()
        assert (moved > 0) == (name in own), name
        assert (found[name] - value).norm() <= 1e-3 * moved, name


@pytest.mark.parametrize(
    ("family", "layout"),
    [("sd1", "folder"), ("sdxl", "file"), ("sd3", "file"), ("flux", "folder"), ("flux", "file")],
)
def test_patches_with_and_without_layers_stack_and_come_out_in_any_order(
    family: str, layout: str, tmp_path: Path
) -> None:
    model = write_model(family, layout, tmp_path / "m", dtype=torch.float16)
    original = files(model.path)
    whole, text = tmp_path / "whole.sepme", tmp_path / "text.sepme"
    lora = write_lora(model, tmp_path / "l.safetensors")
    sepme.import_lora(lora, model.path, whole, concept="x")
    base = base_of(model.path)
    make_patch(text, base, operator(base, "Van Gogh", seed=3))
    assert read_patch(whole).base.digest == base.digest
    for one, other in ((whole, text), (text, whole)):
        alone = out_of(model, f"alone-{other.stem}")
        sepme.apply(model.path, other, alone)
        sepme.apply(model.path, one, in_place=True)
        assert sepme.apply(model.path, other, in_place=True).exact
        assert sepme.verify([model.path, whole, text]).ok
        sepme.revert(model.path, one, in_place=True, exact=True)
        assert weights_in(model.path) == weights_in(alone)
        sepme.revert(model.path, in_place=True, exact=True)
        assert files(model.path) == original


def weights_in(path: Path) -> dict[str, tuple[StackRecord | None, dict[str, bytes]]]:
    """File by file: the record, and the tensors."""
    found = {}
    every = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    for file in every:
        with safe_open(file, "np") as opened:
            record = (opened.metadata() or {}).get("sepme")
        tensors = {n: v.view(torch.uint8).numpy().tobytes() for n, v in load_file(file).items()}
        place = str(file.relative_to(path))
        found[place] = (record and StackRecord.from_metadata(record), tensors)
    return found


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_subtracted_it_is_near(family: str, tmp_path: Path) -> None:
    model = write_model(family, "file", tmp_path / "m", dtype=torch.float16)
    lora = write_lora(model, tmp_path / "l.safetensors")
    sepme.import_lora(lora, model.path, tmp_path / "p.sepme", concept="x")
    sepme.apply(model.path, tmp_path / "p.sepme", out_of(model, "out"))
    back = out_of(model, "back")
    result = sepme.revert(out_of(model, "out"), tmp_path / "p.sepme", output=back)
    assert not result.exact
    assert result.max_abs_error is not None
    with open_checkpoint(model.path) as before, open_checkpoint(back) as after:
        assert after.stack is None
        for name in pairs_of(model):
            apart = np.abs(weight(after, name) - weight(before, name)).max()
            assert apart <= result.max_abs_error, name


def test_of_a_fused_matrix_the_other_rows_stay_byte_for_byte(tmp_path: Path) -> None:
    """Keys alone, of the authors' fused matrices and of OpenCLIP's."""
    for family, fused in (
        ("flux", "model.diffusion_model.double_blocks.0.txt_attn.qkv.weight"),
        ("flux", "model.diffusion_model.single_blocks.1.linear1.weight"),
        ("sd3", "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"),
        ("sdxl", "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"),
    ):
        model = write_model(family, "file", tmp_path / family, dtype=torch.float16)
        keys = (".attn.add_k_proj.", ".attn.to_k.", ".self_attn.k_proj.")
        pairs = {n: pair for n, pair in pairs_of(model).items() if any(key in n for key in keys)}
        save_file(peft(model, pairs), tmp_path / "l")
        sepme.import_lora(tmp_path / "l", model.path, tmp_path / "p", concept="x", force=True)
        out = out_of(model, f"out-{family}")
        sepme.apply(model.path, tmp_path / "p", out, force=True)
        before, after = load_file(model.path)[fused], load_file(out)[fused]
        rows = len(before) // (7 if "linear1" in fused else 3)
        same = (before.view(torch.int16) == after.view(torch.int16)).all(1)
        assert not same[rows : 2 * rows].any()
        assert same[:rows].all()
        assert same[2 * rows :].all()


KOHYAS = {
    "lora_unet_double_blocks_1_img_attn_qkv": [
        f"transformer_blocks.1.attn.to_{x}.weight" for x in "qkv"
    ],
    "lora_unet_single_blocks_0_linear1": [
        *(f"single_transformer_blocks.0.attn.to_{x}.weight" for x in "qkv"),
        "single_transformer_blocks.0.proj_mlp.weight",
    ],
    "lora_unet_final_layer_adaLN_modulation_1": ["norm_out.linear.weight"],
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": ["clip_l.encoder.layers.0.mlp.fc1.weight"],
}
"""Modules of Flux.1's authors, and the layers that they are."""


def test_kohyas_modules_of_several_layers_are_taken_apart(layout: str, tmp_path: Path) -> None:
    model = write_model("flux", layout, tmp_path / "m")
    pairs = pairs_of(model)
    lora, wanted = {}, {}
    for module, names in KOHYAS.items():
        down = pairs[names[0]][1]
        up = torch.cat([pairs[name][0] for name in names])
        # Of the last layer the authors have shift and scale the other way round.
        halves = up.chunk(2)[::-1] if "final_layer" in module else [up]
        lora[f"{module}.lora_up.weight"] = torch.cat(list(halves))
        lora[f"{module}.lora_down.weight"] = down
        lora[f"{module}.alpha"] = torch.tensor(2.0)
        wanted |= {name: (pairs[name][0].double() @ down.double()).numpy() / 2 for name in names}
    save_file(lora, tmp_path / "l.safetensors")
    sepme.import_lora(tmp_path / "l.safetensors", model.path, tmp_path / "p.sepme", concept="x")
    sepme.apply(model.path, tmp_path / "p.sepme", out_of(model, "out"))
    with open_checkpoint(model.path) as before, open_checkpoint(out_of(model, "out")) as after:
        assert after.stack is not None
        assert after.stack.layers.keys() == wanted.keys()
        for name, change in wanted.items():
            found = weight(after, name) - weight(before, name)
            assert np.linalg.norm(found - change) < 1e-3 * np.linalg.norm(change), name


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_the_text_layers_alone_promise_as_before(family: str, tmp_path: Path) -> None:
    model = write_model(family, "file", tmp_path / "m")
    lora = write_lora(model, tmp_path / "l.safetensors")
    patch = tmp_path / "p.sepme"
    result = sepme.import_lora(lora, model.path, patch, concept="x", text_layers_only=True)
    assert result.layers == 0
    assert not read_patch(patch).base.layers
    assert {stream_of(one.name) for one in result.residuals} == {"tokens"}
    assert result.left_out
    assert not any("--text-layers-only" in warning for warning in result.warnings)


@pytest.mark.parametrize("family", ["sd1", "sdxl", "flux"])
def test_an_edit_is_extracted_whole(family: str, layout: str, tmp_path: Path) -> None:
    model = write_model(family, layout, tmp_path / "m")
    lora = write_lora(model, tmp_path / "l.safetensors")
    sepme.import_lora(lora, model.path, tmp_path / "p.sepme", concept="x")
    edited, again = out_of(model, "edited"), out_of(model, "again")
    sepme.apply(model.path, tmp_path / "p.sepme", edited)
    result = sepme.extract(model.path, edited, tmp_path / "e.sepme", concept="x")
    assert result.targets == len(pairs_of(model))
    assert result.left_out == ()
    sepme.apply(model.path, tmp_path / "e.sepme", again)
    with (
        open_checkpoint(model.path) as before,
        open_checkpoint(edited) as wanted,
        open_checkpoint(again) as found,
    ):
        for name in pairs_of(model):
            change = weight(wanted, name) - weight(before, name)
            apart = weight(found, name) - weight(wanted, name)
            assert np.linalg.norm(apart) < 2e-3 * np.linalg.norm(change), name
    rows = sepme.extract(
        model.path, edited, tmp_path / "r.sepme", concept="x", text_layers_only=True
    )
    assert rows.layers == 0
    assert rows.left_out


def test_what_an_extraction_leaves_out_is_told_with_its_share(tmp_path: Path) -> None:
    model = write_model("sd1", "file", tmp_path / "m")
    tensors = load_file(model.path)
    place = "model.diffusion_model.middle_block.1.transformer_blocks.0."
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(s, generator=generator) * 0.1 for s in ((128, 2), (2, 128)))
    tensors[f"{place}attn1.to_q.weight"] += up @ down
    tensors[f"{place}attn1.to_out.0.bias"] += 0.1
    tensors["model.diffusion_model.input_blocks.0.0.weight"] += 0.01
    save_file(tensors, tmp_path / "edited.safetensors")
    result = sepme.extract(model.path, tmp_path / "edited.safetensors", tmp_path / "p.sepme")
    assert [one.name for one in result.residuals] == [
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    ]
    (left,) = result.left_out
    others = 128 * 0.01 + tensors["model.diffusion_model.input_blocks.0.0.weight"].numel() * 1e-4
    assert left.count == 2
    share = others / (others + float((up @ down).square().sum()))
    assert left.share == pytest.approx(share, rel=1e-3)


def test_another_model_and_one_without_the_text_encoder_are_refused(tmp_path: Path) -> None:
    model = write_model("flux", "file", tmp_path / "m")
    lora = write_lora(model, tmp_path / "l.safetensors")
    patch = tmp_path / "p.sepme"
    sepme.import_lora(lora, model.path, patch, concept="x")
    wider = small_transformer("flux", attention_head_dim=32, axes_dims_rope=(8, 12, 12))
    other = write_transformer_file(wider, tmp_path / "wider.safetensors")
    bare = write_transformer_file(small_transformer("flux"), tmp_path / "bare", encoders=0)
    for path, word in ((other, "shape"), (bare, "clip_l")):
        before = path.read_bytes()
        for run in (
            lambda: sepme.apply(path, patch, tmp_path / "out.safetensors"),  # noqa: B023
            lambda: sepme.apply(path, patch, in_place=True),  # noqa: B023
        ):
            with pytest.raises(MismatchError, match=word):
                run()
        assert path.read_bytes() == before
    with pytest.raises(MismatchError, match="text encoder clip_l"):
        sepme.import_lora(lora, bare, tmp_path / "q.sepme", concept="x")
    shorter = write_transformer_file(small_transformer("flux", num_layers=1), tmp_path / "short")
    with pytest.raises(MismatchError, match="another model"):
        sepme.import_lora(lora, shorter, tmp_path / "q.sepme", concept="x")
    assert not (tmp_path / "q.sepme").exists()
    assert not (tmp_path / "out.safetensors").exists()


def test_a_text_encoder_of_a_model_patched_otherwise_is_noticed(tmp_path: Path) -> None:
    model = write_model("sd1", "folder", tmp_path / "m")
    lora = write_lora(model, tmp_path / "l.safetensors")
    sepme.import_lora(lora, model.path, tmp_path / "p.sepme", concept="x")
    sepme.apply(model.path, tmp_path / "p.sepme", tmp_path / "out")
    place = "text_encoder/model.safetensors"
    plain = (model.path / place).read_bytes()
    (model.path / place).write_bytes((tmp_path / "out" / place).read_bytes())
    with pytest.raises(MalformedError, match="same patches"):
        sepme.apply(model.path, tmp_path / "p.sepme", tmp_path / "again")
    (tmp_path / "out" / place).write_bytes(plain)
    with pytest.raises(MalformedError, match="same patches"):
        sepme.inspect(tmp_path / "out")


def test_the_base_must_be_the_base_of_the_layers_too(tmp_path: Path) -> None:
    model = write_model("sd1", "file", tmp_path / "m")
    lora = write_lora(model, tmp_path / "l.safetensors")
    sepme.import_lora(lora, model.path, tmp_path / "p.sepme", concept="x")
    out = out_of(model, "out")
    sepme.apply(model.path, tmp_path / "p.sepme", out)
    tensors = load_file(model.path)
    tensors["model.diffusion_model.middle_block.1.proj_in.weight"] += 1
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(MismatchError, match=r"proj_in\.weight is another"):
        sepme.revert(out, output=tmp_path / "back.safetensors", base=tmp_path / "other.safetensors")
    applied = sepme.apply(
        tmp_path / "other.safetensors", tmp_path / "p.sepme", tmp_path / "x.safetensors"
    )
    assert applied.base_match == "family"
    assert any("1 of" in warning and "layers differ" in warning for warning in applied.warnings)


def test_images_are_those_of_the_applied_model(layout: str, tmp_path: Path) -> None:
    """The text encoders' weights are replaced as well."""
    model = write_model("sd1", layout, tmp_path / "m")
    pairs = {n: pair for n, pair in pairs_of(model).items() if n.startswith("clip_l.")}
    save_file(peft(model, pairs), tmp_path / "l.safetensors")
    patch = tmp_path / "p.sepme"
    sepme.import_lora(tmp_path / "l.safetensors", model.path, patch, concept="x")
    applied = out_of(model, "out")
    sepme.apply(model.path, patch, applied)
    drawn = {}
    for path in (model.path, applied):
        with open_checkpoint(path) as checkpoint:
            network = StableDiffusion.of(checkpoint, torch.device("cpu"))
            part = read_patch(patch).increments[0]
            weights = patched_weights(checkpoint, [(part, 1.0)]) if path == model.path else {}
            plain = network.text.condition(["a cat"]).states
            with network.with_weights(weights):
                drawn[path] = network.text.condition(["a cat"]).states
            assert torch.equal(network.text.condition(["a cat"]).states, plain)
    torch.testing.assert_close(drawn[model.path], drawn[applied], rtol=1e-5, atol=1e-5)
    with open_checkpoint(model.path) as checkpoint:
        text = StableDiffusion.of(checkpoint, torch.device("cpu")).text
        assert not torch.allclose(drawn[applied], text.condition(["a cat"]).states, atol=1e-2)


def test_in_memory_it_is_refused_with_what_to_do(tmp_path: Path) -> None:
    model = write_model("sd1", "file", tmp_path / "m")
    lora = write_lora(model, tmp_path / "l.safetensors")
    sepme.import_lora(lora, model.path, tmp_path / "p.sepme", concept="x")
    with pytest.raises(UnsupportedError, match="apply them to the model's file"):
        sepme.patched(model.denoiser, tmp_path / "p.sepme")
    with pytest.raises(UnsupportedError, match="apply them to the model's file"):
        sepme.deltas(dict(model.denoiser.state_dict()), tmp_path / "p.sepme")


@pytest.mark.parametrize("to", ["peft", "kohya"])
def test_what_came_in_whole_goes_out_whole(family: str, to: Any, tmp_path: Path) -> None:
    model = write_model(family, "file", tmp_path / "m")
    lora = write_lora(model, tmp_path / "l.safetensors")
    sepme.import_lora(lora, model.path, tmp_path / "p.sepme", concept="x")
    out = tmp_path / "out.safetensors"
    if to == "kohya" and family in TRANSFORMERS:
        with pytest.raises(UsageError, match="--to peft"):
            sepme.export(tmp_path / "p.sepme", to, out)
        return
    result = sepme.export(tmp_path / "p.sepme", to, out, dtype="fp32")
    assert result.modules == len(pairs_of(model))
    assert result.relative_error < 1e-6
    again = sepme.import_lora(out, model.path, tmp_path / "q.sepme", concept="x")
    assert again.targets == len(pairs_of(model))
    assert again.left_out == ()
    for name, found in read_patch(tmp_path / "q.sepme").increments[0].up.items():
        assert found.shape == read_patch(tmp_path / "p.sepme").increments[0].up[name].shape


def test_inspect_and_diff_tell_layers_apart(tmp_path: Path) -> None:
    model = write_model("sd1", "folder", tmp_path / "m")
    lora = write_lora(model, tmp_path / "l.safetensors")
    patch = tmp_path / "p.sepme"
    sepme.import_lora(lora, model.path, patch, concept="x")
    told = sepme.inspect(patch)
    assert len(told.manifest["base"]["layers"]) == len(read_patch(patch).base.layers)
    assert told.manifest["separable_from"] == []
    sepme.apply(model.path, patch, tmp_path / "out")
    assert sepme.inspect(tmp_path / "out").layers == len(read_patch(patch).base.layers)
    planned = sepme.diff(model.path, patch)
    assert planned.changed == len(pairs_of(model))
    between = sepme.diff(model.path, tmp_path / "out")
    assert between.changed == len(pairs_of(model))
    assert all(one.rank == 4 for one in between.tensors)
    two = sepme.diff(patch, patch)
    assert two.same
    assert two.increments[0].distance == 0


def test_a_promise_beside_layers_is_refused(tmp_path: Path) -> None:
    model = write_model("sd1", "file", tmp_path / "m")
    lora = write_lora(model, tmp_path / "l.safetensors")
    sepme.import_lora(lora, model.path, tmp_path / "p.sepme", concept="x")
    patch = read_patch(tmp_path / "p.sepme")
    with pytest.raises(FormatError, match="P13"):
        patch_bytes(replace(patch, separable_from=("",)))


def scaled_fp8(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices of the denoiser in fp8, every other one with a scale for each row."""
    found = dict(tensors)
    names = (
        n for n, v in tensors.items() if "blocks." in n and n.endswith(".weight") and v.ndim == 2
    )
    for i, name in enumerate(sorted(names)):
        if name.startswith("model.diffusion_model."):
            value = tensors[name].float()
            scale = value.abs().amax(1, keepdim=True) if i % 2 else value.abs().amax()
            scale = scale.clamp(min=1e-8) / 448
            found[name] = (value / scale).to(torch.float8_e4m3fn)
            found[f"{name.removesuffix('weight')}scale_weight"] = scale.reshape(-1)
    return found


STORED: dict[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {
    "bf16": lambda tensors: {n: v.to(torch.bfloat16) for n, v in tensors.items()},
    "fp8": lambda tensors: {
        n: v.to(torch.float8_e4m3fn) if v.ndim > 1 else v for n, v in tensors.items()
    },
    "scaled fp8": scaled_fp8,
}


@pytest.mark.parametrize("stored", STORED)
def test_however_the_weights_are_stored(stored: str, tmp_path: Path) -> None:
    """Fused matrices of a transformer, whose rows may have scales of their own."""
    model = write_model("flux", "file", tmp_path / "m")
    patch = whole_patch(model, tmp_path)
    path, out = tmp_path / "stored.safetensors", tmp_path / "out.safetensors"
    save_file(STORED[stored](load_file(model.path)), path)
    applied = sepme.apply(path, patch, out)
    assert applied.tensors_changed == changed_tensors(path, out)
    assert sepme.verify([out, patch], base=path).ok
    sepme.revert(out, output=tmp_path / "back.safetensors", base=path, exact=True)
    assert (tmp_path / "back.safetensors").read_bytes() == path.read_bytes()
    if stored == "scaled fp8":
        with pytest.raises(UnsupportedError, match="scaled fp8"):
            sepme.apply(path, patch, tmp_path / "fp16.safetensors", dtype="fp16")


def whole_patch(model: Model, tmp_path: Path) -> Path:
    lora = write_lora(model, tmp_path / "l.safetensors")
    sepme.import_lora(lora, model.path, tmp_path / "p.sepme", concept="x")
    return tmp_path / "p.sepme"


def test_moving_averages_are_changed_too(tmp_path: Path) -> None:
    model = write_model("sd1", "file", tmp_path / "m")
    patch = whole_patch(model, tmp_path)
    tensors = load_file(model.path)
    twins = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): value * 1.01
        for name, value in tensors.items()
        if name.startswith("model.")
    }
    path, out = tmp_path / "ema.safetensors", tmp_path / "out.safetensors"
    save_file(tensors | twins, path)
    sepme.apply(path, patch, out)
    after = load_file(out)
    changed = {n for n, v in load_file(path).items() if not torch.equal(after[n], v)}
    assert {n for n in changed if n in twins} == {
        "model_ema." + name.removeprefix("model.").replace(".", "")
        for name in changed
        if name.startswith("model.")
    }
    assert len(changed) > len(pairs_of(model)) + 20
    sepme.revert(out, output=tmp_path / "back.safetensors", base=path, exact=True)
    assert (tmp_path / "back.safetensors").read_bytes() == path.read_bytes()


def test_a_pickled_checkpoint(tmp_path: Path) -> None:
    model = write_model("sd1", "file", tmp_path / "m")
    patch = whole_patch(model, tmp_path)
    torch.save({"state_dict": load_file(model.path)}, tmp_path / "m.ckpt")
    sepme.apply(tmp_path / "m.ckpt", patch, tmp_path / "out.safetensors")
    sepme.apply(model.path, patch, tmp_path / "wanted.safetensors")
    wanted, found = (load_file(tmp_path / f"{name}.safetensors") for name in ("wanted", "out"))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_shards_and_variants_of_text_encoders_in_place(tmp_path: Path) -> None:
    small = small_transformer("flux")
    folder = write_transformer_folder(small, tmp_path / "m", shard="60KB")
    small.texts[0].half().save_pretrained(folder / "text_encoder", variant="fp16")
    model = Model("flux", folder, small.transformer, small.texts)
    original = files(folder)
    patch = whole_patch(model, tmp_path)
    sepme.apply(folder, patch, in_place=True)
    assert sepme.verify([folder, patch]).ok
    changed = {name for name, data in files(folder).items() if original.get(name) != data}
    assert "text_encoder/model.fp16.safetensors" in changed
    assert not any(name.startswith(("vae", "text_encoder_2")) for name in changed)
    sepme.revert(folder, in_place=True, exact=True)
    assert files(folder) == original


def test_a_quantised_layer_is_named(tmp_path: Path) -> None:
    model = write_model("flux", "file", tmp_path / "m")
    patch = whole_patch(model, tmp_path)
    tensors = load_file(model.path)
    name = "model.diffusion_model.double_blocks.0.img_attn.qkv.weight"
    tensors |= {name: torch.zeros(30, 1, dtype=torch.uint8), f"{name}.absmax": torch.zeros(3)}
    save_file(tensors, tmp_path / "nf4.safetensors")
    with pytest.raises(UnsupportedError, match=r"img_attn\.qkv.* bitsandbytes"):
        sepme.apply(tmp_path / "nf4.safetensors", patch, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_card_says_that_nothing_is_promised(tmp_path: Path) -> None:
    patch = whole_patch(write_model("sd1", "file", tmp_path / "m"), tmp_path)
    assert "no prompt is sure to give the images" in sepme.card(patch).card


def test_a_number_written_otherwise_gives_no_weight_a_second_name(tmp_path: Path) -> None:
    model = write_model("flux", "file", tmp_path / "m")
    tensors = load_file(model.path)
    name = "model.diffusion_model.double_blocks.{}.img_attn.proj.weight"
    tensors[name.format("01")] = tensors[name.format("1")] + 1
    tensors[name.format("\u0661")] = tensors[name.format("1")] + 2
    save_file(tensors, tmp_path / "twice.safetensors")
    with open_checkpoint(tmp_path / "twice.safetensors") as checkpoint:
        found = checkpoint.weight("transformer_blocks.1.attn.to_out.0.weight")
        assert found is not None
        assert found.copies[0].name == name.format("1")

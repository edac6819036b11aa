"""Stable Diffusion 3, Flux.1 and Wan 2.1: patched, put back, and nothing else touched."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import sepme_cli as sepme
from patch_spec.base import Family
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.errors import MismatchError, UnsupportedError
from sepme_cli.operations.inspect import CheckpointInfo
from tests.operations.test_layouts import files, tensors
from tests.operations.test_patched import bits, same
from tests.small_transformers import (
    PROJECTED,
    T5_ROWS,
    T5_WIDTH,
    SmallTransformer,
    original_names,
    small_transformer,
    write_transformer_file,
    write_transformer_folder,
)
from tests.synthetic import additive, make_checkpoint, make_patch, make_patches, operator

FAMILIES: tuple[Family, ...] = ("sd3", "flux", "wan")
POOLED = {"sd3": sum(PROJECTED), "flux": 64}
ENTRIES = {
    "sd3": ("context_embedder.weight", "y_embedder.mlp.0.weight"),
    "flux": ("txt_in.weight", "vector_in.in_layer.weight"),
    "wan": ("text_embedding.0.weight",),
}
DIFFUSERS = (
    "context_embedder.weight",
    "time_text_embed.text_embedder.linear_1.weight",
    "condition_embedder.text_embedder.linear_1.weight",
)


def _whole(model: SmallTransformer, folder: Path) -> Path:
    return write_transformer_file(model, folder / "m.safetensors")


def _half(model: SmallTransformer, folder: Path) -> Path:
    return write_transformer_file(model, folder / "m.safetensors", torch.bfloat16, encoders=2)


def _alone(model: SmallTransformer, folder: Path) -> Path:
    return write_transformer_file(model, folder / "m.safetensors", torch.float16, prefix="")


def _fp8(model: SmallTransformer, folder: Path) -> Path:
    return write_transformer_file(
        model, folder / "m.safetensors", torch.float8_e4m3fn, prefix="diffusion_model."
    )


def _scaled(model: SmallTransformer, folder: Path) -> Path:
    """Matrices in fp8, divided by a scale that is kept beside."""
    found: dict[str, Tensor] = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, value in original_names(model).items():
        if value.ndim == 2 and name.endswith(".weight"):
            scale = value.abs().max() / 448
            found[name] = (value / scale).to(torch.float8_e4m3fn)
            found[name.replace(".weight", ".scale_weight")] = scale.clone()
        else:
            found[name] = value.to(torch.bfloat16).contiguous()
    save_file(found, folder / "m.safetensors")
    return folder / "m.safetensors"


def _folder(model: SmallTransformer, folder: Path) -> Path:
    return write_transformer_folder(model, folder / "m")


def _shards(model: SmallTransformer, folder: Path) -> Path:
    return write_transformer_folder(model, folder / "m", torch.float16, shard="60KB")


def _transformer_alone(model: SmallTransformer, folder: Path) -> Path:
    return write_transformer_folder(model, folder / "m") / "transformer"


LAYOUTS: dict[str, Callable[[SmallTransformer, Path], Path]] = {
    "single file": _whole,
    "single file, bf16, two text encoders": _half,
    "transformer alone, fp16": _alone,
    "transformer alone, fp8": _fp8,
    "transformer alone, scaled fp8": _scaled,
    "folder": _folder,
    "folder, fp16 shards": _shards,
    "transformer's folder": _transformer_alone,
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    name: Family = request.param
    return name


@pytest.fixture
def small(family: Family) -> SmallTransformer:
    return small_transformer(family)


def patches_for(model: Path, folder: Path) -> list[Path]:
    """One of each kind, made from a model."""
    with open_checkpoint(model) as checkpoint:
        base = checkpoint.base()
    return [
        make_patch(folder / "monet.sepme", base, operator(base, "Monet", seed=1)),
        make_patch(folder / "klimt.sepme", base, additive(base, "Klimt", seed=2)),
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_patched_and_put_back(
    layout: str, family: Family, small: SmallTransformer, tmp_path: Path
) -> None:
    model = LAYOUTS[layout](small, tmp_path)
    with open_checkpoint(model) as checkpoint:
        assert checkpoint.family.name == family
        assert checkpoint.widths.get("pooled") == POOLED.get(family)
        assert checkpoint.width == T5_WIDTH
    patches = patches_for(model, tmp_path)
    before, old = files(model), tensors(model)
    out = tmp_path / f"out{model.suffix}"
    result = sepme.apply(model, patches, out)
    new = tensors(out)
    changed = {name for (_, name), value in old.items() if new[_, name] != value}
    entries = ENTRIES[family] if model.is_file() else DIFFUSERS
    assert {name.removeprefix("model.").removeprefix("diffusion_model.") for name in changed} <= {
        *entries
    }
    assert len(changed) == result.tensors_changed == len(ENTRIES[family])
    assert list(old) == list(new) and files(model) == before

    one = tmp_path / f"one{model.suffix}"
    sepme.apply(model, patches[:1], one)
    less = tmp_path / f"less{model.suffix}"
    sepme.revert(out, patches, concepts=["Klimt"], base=model, output=less)
    assert tensors(less) == tensors(one)
    back = tmp_path / f"back{model.suffix}"
    sepme.revert(out, patches, base=model, output=back)
    assert tensors(back) == old


@pytest.mark.parametrize("layout", ["single file", "folder, fp16 shards"])
def test_in_place_and_back(layout: str, small: SmallTransformer, tmp_path: Path) -> None:
    model = LAYOUTS[layout](small, tmp_path)
    patches = patches_for(model, tmp_path)
    before = tensors(model)
    sepme.apply(model, patches, in_place=True)
    info = sepme.inspect(model)
    assert isinstance(info, CheckpointInfo)
    assert tensors(model) != before
    assert sepme.verify([model, *patches]).ok
    sepme.revert(model, in_place=True)
    assert tensors(model) == before


def test_one_of_another_family_is_refused(
    family: Family, small: SmallTransformer, tmp_path: Path
) -> None:
    patches = patches_for(_whole(small, tmp_path), tmp_path)
    others = [make_checkpoint(tmp_path / "sd1.safetensors")]
    for other in FAMILIES:
        if other != family:
            (tmp_path / other).mkdir()
            others.append(_alone(small_transformer(other), tmp_path / other))
    for model in others:
        with pytest.raises(MismatchError):
            sepme.apply(model, patches, tmp_path / "out.safetensors")
    sd1 = make_patches(tmp_path, others[0])
    with pytest.raises(MismatchError):
        sepme.apply(tmp_path / "m.safetensors", sd1, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_patch_fits_another_layout_of_its_model(
    family: Family, small: SmallTransformer, tmp_path: Path
) -> None:
    """Made from the folder, applied to the single file, and the same weights come of it."""
    folder = _folder(small, tmp_path)
    patches = patches_for(folder, tmp_path)
    sepme.apply(folder, patches, tmp_path / "out")
    found = sepme.apply(_whole(small, tmp_path), patches, tmp_path / "out.safetensors")
    assert found.base_match == "same-values"
    single = load_file(tmp_path / "out.safetensors")
    with open_checkpoint(tmp_path / "out") as checkpoint:
        for target, entry in zip(checkpoint.targets, ENTRIES[family], strict=True):
            ours = torch.from_numpy(target.copies[0].whole().copy())
            assert torch.equal(ours, single[f"model.diffusion_model.{entry}"])


def test_copies_beside_the_transformer_are_left_out(tmp_path: Path) -> None:
    """As the hub's repositories of Stable Diffusion 3.5 have the model once more in one file."""
    model = _folder(small_transformer("sd3"), tmp_path)
    _alone(small_transformer("sd3"), model)
    result = sepme.apply(model, patches_for(model, tmp_path), tmp_path / "out")
    assert any("m.safetensors" in warning for warning in result.warnings)
    assert not (tmp_path / "out" / "m.safetensors").exists()


def test_a_folder_of_two_models(tmp_path: Path) -> None:
    model = _folder(small_transformer("sd3"), tmp_path)
    shutil.copytree(model / "transformer", model / "unet")
    with pytest.raises(UnsupportedError, match="of two models") as caught:
        open_checkpoint(model)
    assert caught.value.file == str(model)


def test_entries_that_are_quantised_are_refused_by_name(tmp_path: Path) -> None:
    """NF4 as bitsandbytes stores it: bytes, with what they mean beside them."""
    small = small_transformer("flux")
    found = dict(original_names(small))
    name = "txt_in.weight"
    packed = torch.zeros(found[name].numel() // 2, 1, dtype=torch.uint8)
    found |= {name: packed, f"{name}.absmax": torch.ones(4), f"{name}.quant_map": torch.ones(16)}
    found[f"{name}.quant_state.bitsandbytes__nf4"] = torch.zeros(8, dtype=torch.uint8)
    path = tmp_path / "m.safetensors"
    save_file({n: v.contiguous() for n, v in found.items()}, path)
    with pytest.raises(UnsupportedError, match="NF4") as caught:
        open_checkpoint(path)
    assert caught.value.file == str(path)
    # With its text layers as they are, the rest may be what it will.
    found = dict(original_names(small))
    found["double_blocks.0.img_attn.qkv.weight"] = torch.zeros(8, 1, dtype=torch.uint8)
    found["double_blocks.0.img_attn.qkv.weight.absmax"] = torch.ones(4)
    save_file({n: v.contiguous() for n, v in found.items()}, path)
    sepme.apply(path, patches_for(path, tmp_path), tmp_path / "out.safetensors")


PIPELINES: dict[Family, Any] = {"sd3": StableDiffusion3Pipeline, "flux": FluxPipeline}


def _pipeline(name: Family, small: SmallTransformer) -> tuple[Any, Callable[[], Tensor]]:
    """diffusers' pipeline, and what generates its image."""
    ends = ["", "_2", "_3"][: len(small.texts)]
    pipeline = PIPELINES[name](
        transformer=small.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=small.vae,
        **{f"text_encoder{end}": text for end, text in zip(ends, small.texts, strict=True)},
        **{f"tokenizer{end}": None for end in ends},
    )
    asked = {
        "prompt_embeds": torch.randn(1, T5_ROWS, T5_WIDTH),
        "pooled_prompt_embeds": torch.randn(1, POOLED[name]),
    }
    if name == "sd3":  # Flux.1 has its guidance within
        asked |= {f"negative_{part}": 0 * value for part, value in asked.items()}

    def draw() -> Tensor:
        return pipeline(
            **asked,
            num_inference_steps=2,
            height=16,
            width=16,
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).images

    return pipeline, draw


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_in_memory(name: Family, dtype: torch.dtype, tmp_path: Path) -> None:
    """Inside are the bits that `apply` writes and the images of them; afterwards the original's."""
    small = small_transformer(name)
    small.transformer.to(dtype).save_pretrained(tmp_path / "m")
    patches = patches_for(tmp_path / "m", tmp_path)
    sepme.apply(tmp_path / "m", patches, tmp_path / "out")
    written = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    torch.manual_seed(0)
    small.transformer.float()
    pipeline, draw = _pipeline(name, small)
    before = draw()
    small.transformer.to(dtype)
    original = bits(small.transformer)
    with sepme.patched(pipeline, patches):
        inside = dict(small.transformer.state_dict())
        assert written.keys() == inside.keys()
        assert all(torch.equal(inside[name], value) for name, value in written.items())
        assert not same(bits(small.transformer), original)
        small.transformer.float()
        assert not torch.equal(draw(), before) or dtype != torch.float32
        small.transformer.to(dtype)
    assert same(bits(small.transformer), original)
    if dtype == torch.float32:
        assert torch.equal(draw(), before)

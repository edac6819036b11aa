"""Telling models apart by names and shapes, and naming their targets."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from patch_spec.header import TensorEntry
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.checkpoints.structure.detection import detect
from sepme_cli.checkpoints.structure.layout import Layout, ema_twin
from sepme_cli.errors import MalformedError, UnsupportedError
from tests.synthetic import (
    SMALL,
    Shape,
    checkpoint_tensors,
    clip_shapes,
    make_checkpoint,
    unet_shapes,
    write_safetensors,
)

FULL = Shape(span=3, channels=(8, 16, 24, 32), attention=(True, True, True, False))
XL = Shape("sdxl", 32, 3, (8, 16, 24), (False, True, True), depth=2)
REFINER = Shape("sdxl-refiner", 32, 3, (8, 16, 24, 32), (False, True, True, False), depth=4)
SD2 = Shape("sd2", 32, 3, (8, 16, 24, 32), (True, True, True, False))


def entries(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorEntry]:
    return {name: TensorEntry(name, "F16", shape, 0, 0) for name, shape in shapes.items()}


VECTOR = "label_emb.0.0.weight"


def unet_only(shape: Shape, prefix: str = "model.diffusion_model.") -> dict[str, TensorEntry]:
    return entries({prefix + name: size for name, size in unet_shapes(shape).items()})


@pytest.mark.parametrize("shape", [SMALL, FULL, SD2, XL, REFINER], ids=lambda s: s.family)
def test_families_are_told_from_whole_files_and_from_a_unet_alone(
    shape: Shape, tmp_path: Path
) -> None:
    with open_checkpoint(make_checkpoint(tmp_path / "m.safetensors", shape)) as checkpoint:
        assert checkpoint.family.name == shape.family
        assert checkpoint.width == shape.width
        assert checkpoint.layout.span == shape.span
    for prefix in ("model.diffusion_model.", ""):
        family, layout = detect(unet_only(shape, prefix))
        assert (family.name, replace(layout, entries={})) == (
            shape.family,
            Layout(prefix, shape.span),
        )
        assert set(layout.entries.values()) == ({VECTOR} if family.sizes else set())


def test_unclip_is_no_xl() -> None:
    """SD 2.1 unclip has label_emb too, for an image's embedding."""
    shapes = unet_shapes(SD2) | {"label_emb.0.0.weight": (8, 8)}
    alone = entries({f"model.diffusion_model.{n}": s for n, s in shapes.items()})
    assert detect(alone)[0].name == "sd2"
    text = entries({"cond_stage_model.model.ln_final.weight": (4,)})
    assert detect(alone | text)[0].name == "sd2"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "Flux"),
        ("double_blocks.0.img_attn.qkv.weight", "Flux"),
        ("single_transformer_blocks.0.attn.to_k.weight", "Flux"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("transformer_blocks.0.attn.add_k_proj.weight", "Stable Diffusion 3"),
        ("model.diffusion_model.input_blocks.1.1.time_stack.0.attn2.to_k.weight", "video"),
        ("down_blocks.0.temporal_transformer_blocks.0.attn2.to_k.weight", "video"),
        ("down_blocks.0.motion_modules.0.transformer_blocks.0.attn2.to_k.weight", "AnimateDiff"),
        ("controlnet_blocks.0.weight", "ControlNet"),
        ("lora_unet_down_blocks_0_attentions_0.lora_down.weight", "LoRA"),
        ("unet.down_blocks.0.attentions.0.to_k.lora_A.weight", "LoRA"),
        ("controlnet_cond_embedding.conv_in.weight", "ControlNet"),
        ("something.else", "no Stable Diffusion UNet"),
    ],
)
def test_others_are_refused_by_name(name: str, told: str, tmp_path: Path) -> None:
    tensors = {name: ("F16", np.zeros((2, 2), "<f2"))}
    path = write_safetensors(tmp_path / "m.safetensors", tensors)
    with pytest.raises(UnsupportedError, match=told) as caught:
        open_checkpoint(path)
    assert caught.value.file == str(path)
    assert caught.value.expected and caught.value.found


def test_self_attention_that_looks_like_a_target_is_none() -> None:
    """SD 3.5 has attn2.to_k that reads the image; only places in a UNet count."""
    layout = Layout("model.diffusion_model.", 3)
    assert layout.target("model.diffusion_model.transformer_blocks.0.attn2.to_k.weight") is None
    assert layout.target("transformer_blocks.0.attn2.to_k.weight") is None
    block = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0"
    assert layout.target(f"{block}.attn1.to_k.weight") is None
    assert layout.target(f"{block}.attn2.to_k.bias") is None
    assert layout.target(f"model_ema.{block}.attn2.to_k.weight") is None


def test_a_downsampler_in_the_input_convolution_is_none() -> None:
    """A level of no blocks would divide by nothing."""
    names = ["input_blocks.0.0.weight", "input_blocks.0.0.op.weight", "input_blocks.3.0.op.weight"]
    layout = Layout.of(names)
    assert layout is not None and layout.span == 3


@pytest.mark.parametrize("block", ["01", "\u0663", "00003", "-1", "99999"])
def test_one_weight_has_one_name(block: str) -> None:
    layout = Layout("", 3)
    end = "1.transformer_blocks.0.attn2.to_k.weight"
    assert layout.target(f"output_blocks.3.{end}")
    assert layout.target(f"output_blocks.{block}.{end}") is None
    assert layout.target(f"input_blocks.0.{end}") is None, "it is the input convolution"


def test_names_of_a_real_stable_diffusion() -> None:
    layout = Layout("model.diffusion_model.", 3)
    rest = "transformer_blocks.0.attn2.to_v.weight"
    pairs = {
        "input_blocks.1.1": "down_blocks.0.attentions.0",
        "input_blocks.2.1": "down_blocks.0.attentions.1",
        "input_blocks.4.1": "down_blocks.1.attentions.0",
        "input_blocks.8.1": "down_blocks.2.attentions.1",
        "middle_block.1": "mid_block.attentions.0",
        "output_blocks.3.1": "up_blocks.1.attentions.0",
        "output_blocks.11.1": "up_blocks.3.attentions.2",
    }
    for theirs, ours in pairs.items():
        assert layout.target(f"model.diffusion_model.{theirs}.{rest}") == f"{ours}.{rest}"
    twin = ema_twin("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    assert twin == "model_ema.diffusion_modelinput_blocks11transformer_blocks0attn2to_kweight"


@pytest.mark.parametrize("shape", [SMALL, FULL], ids=["L=2", "L=3"])
def test_target_names_are_those_that_diffusers_converts_to(shape: Shape) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    shapes = unet_shapes(shape) | {
        "time_embed.0.weight": (4, 4),
        "time_embed.0.bias": (4,),
        "time_embed.2.weight": (4, 4),
        "time_embed.2.bias": (4,),
        "input_blocks.0.0.bias": (4,),
        "out.0.weight": (4,),
        "out.0.bias": (4,),
        "out.2.bias": (4,),
    }
    values = {n: torch.full((1,), float(i)) for i, n in enumerate(shapes)}
    config = {"layers_per_block": shape.span - 1, "class_embed_type": None}
    theirs = convert_ldm_unet_checkpoint(
        {f"model.diffusion_model.{n}": v for n, v in values.items()}, config
    )
    layout = Layout("", shape.span)
    ours = {target: n for n in shapes if (target := layout.target(n))}
    expected = {n for n in theirs if "attn2.to_k" in n or "attn2.to_v" in n}
    assert ours.keys() == expected
    for target, name in ours.items():
        assert theirs[target] == values[name]


def test_ema_twins_are_found_and_may_have_another_dtype(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "m.safetensors", ema="F32")
    with open_checkpoint(path) as checkpoint:
        assert len(checkpoint.targets) == 14
        for target in checkpoint.targets:
            weight, twin = target.copies
            assert weight.name.startswith("model.diffusion_model.")
            assert twin.name.startswith("model_ema.")
            assert (weight.dtype, twin.dtype) == ("F16", "F32")


def test_a_twin_of_another_shape_is_malformed(tmp_path: Path) -> None:
    tensors = checkpoint_tensors(ema="F16")
    name = next(n for n in tensors if n.startswith("model_ema") and n.endswith("attn2to_kweight"))
    tensors[name] = ("F16", np.zeros((3, 3), "<f2"))
    with pytest.raises(MalformedError, match="shape"):
        open_checkpoint(write_safetensors(tmp_path / "m.safetensors", tensors))


def test_integers_and_mixed_widths_are_unsupported(tmp_path: Path) -> None:
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    tensors = checkpoint_tensors()
    tensors[name] = ("I32", tensors[name][1].astype("<i4"))
    with pytest.raises(UnsupportedError, match="i32"):
        open_checkpoint(write_safetensors(tmp_path / "a.safetensors", tensors))
    tensors[name] = ("F16", np.zeros((24, 30), "<f2"))
    with pytest.raises(UnsupportedError, match="what reads the text"):
        open_checkpoint(write_safetensors(tmp_path / "b.safetensors", tensors))


def test_text_encoders_have_one_fingerprint_whatever_their_naming(tmp_path: Path) -> None:
    """Old files lack text_model.; position_ids is no weight; fp32 holds the same values."""
    new = checkpoint_tensors(dtype="F16")
    old = {n.replace("transformer.text_model.", "transformer."): v for n, v in new.items()}
    old = {n: v for n, v in old.items() if not n.endswith("position_ids")}
    wide = {n: ("F32", v.astype("<f4")) if d == "F16" else (d, v) for n, (d, v) in new.items()}
    changed = dict(new)
    name = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
    changed[name] = ("F16", changed[name][1] + np.float16(1))
    found = []
    for i, tensors in enumerate((new, old, wide, changed)):
        path = write_safetensors(tmp_path / f"{i}.safetensors", tensors)
        with open_checkpoint(path) as checkpoint:
            found.append(checkpoint.base(text_encoders=True).text_encoders)
    assert found[0].keys() == {"clip_l"}
    assert found[0] == found[1] == found[2] != found[3]


def test_openclip_naming_gives_the_fingerprint_of_transformers_naming(tmp_path: Path) -> None:
    """clip_g: fused queries, keys and values; the projection of the pooled output left out."""
    width = XL.width
    rng = np.random.default_rng(5)
    theirs = {n: rng.standard_normal(s).astype("<f2") for n, s in clip_shapes(width).items()}
    layer = "encoder.layers.0"
    theirs[f"{layer}.self_attn.v_proj.weight"] = rng.standard_normal((width, width)).astype("<f2")
    layer_names = {"self_attn": "attn", "layer_norm1": "ln_1"}
    fused = np.concatenate([theirs[f"{layer}.self_attn.{p}_proj.weight"] for p in "qkv"])
    openclip = {
        "positional_embedding": theirs["embeddings.position_embedding.weight"],
        "token_embedding.weight": theirs["embeddings.token_embedding.weight"],
        "transformer.resblocks.0.attn.in_proj_weight": fused,
        f"transformer.resblocks.0.{layer_names['layer_norm1']}.bias": theirs[
            f"{layer}.layer_norm1.bias"
        ],
        "ln_final.weight": theirs["final_layer_norm.weight"],
        "text_projection": rng.standard_normal((width, width)).astype("<f2"),
        "logit_scale": np.float16(4),
    }
    prefix = "conditioner.embedders.1.model."
    tensors = {n: v for n, v in checkpoint_tensors(XL).items() if not n.startswith(prefix)}
    tensors |= {prefix + n: ("F16", np.asarray(v)) for n, v in openclip.items()}
    with open_checkpoint(write_safetensors(tmp_path / "xl.safetensors", tensors)) as checkpoint:
        found = checkpoint.text_encoder_fingerprints()
    # The same weights under transformers' names, as SDXL's first stream would read them.
    first = "conditioner.embedders.0.transformer.text_model."
    tensors = {n: v for n, v in checkpoint_tensors(XL).items() if not n.startswith(first)}
    tensors |= {first + n: ("F16", v) for n, v in theirs.items()}
    with open_checkpoint(write_safetensors(tmp_path / "l.safetensors", tensors)) as checkpoint:
        expected = checkpoint.text_encoder_fingerprints()
    assert found.keys() == {"clip_l", "clip_g"}
    assert found["clip_g"] == expected["clip_l"]


def test_the_layer_that_sd2_does_not_read_is_left_out(tmp_path: Path) -> None:
    prefix = "cond_stage_model.model."
    found = []
    for last in (1.0, 2.0):
        tensors = {n: v for n, v in checkpoint_tensors(SD2).items() if not n.startswith(prefix)}
        for layer, value in ((0, 1.0), (1, last)):
            name = f"{prefix}transformer.resblocks.{layer}.ln_1.bias"
            tensors[name] = ("F16", np.full(4, value, "<f2"))
        path = write_safetensors(tmp_path / f"{last}.safetensors", tensors)
        with open_checkpoint(path) as checkpoint:
            found.append(checkpoint.text_encoder_fingerprints())
    assert found[0] == found[1]
    assert found[0].keys() == {"clip_h"}

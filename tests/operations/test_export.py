"""Increments as LoRA files: what other programs make of them is what the patch does."""

import copy
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

from patch_spec.container import read_patch
from sepme_cli.checkpoints.lora.names import known_modules, module_name
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.checkpoints.structure import families
from sepme_cli.checkpoints.structure.layout import Layout, span_of
from sepme_cli.errors import MismatchError, RefusedError, UsageError
from sepme_cli.increments import delta
from sepme_cli.operations.apply import apply
from sepme_cli.operations.export import ONLY_ADDS, export
from tests import lora_loaders
from tests.small_model import Parts, small_parts, write_single_file
from tests.synthetic import (
    Shape,
    additive,
    base_of,
    make_checkpoint,
    make_patch,
    operator,
    read_raw,
)

FAMILIES = ("sd1", "sd2", "sdxl")
LDM = ("sdxl", "sdxl-refiner")


@pytest.fixture(params=FAMILIES)
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Parts, Path, Path]:
    """A small model, its file, and a patch with two factor increments and an operator."""
    parts = small_parts(request.param)
    model = write_single_file(parts, tmp_path / "model.safetensors")
    base = base_of(model)
    increments = (
        additive(base, "Monet", seed=1, size=0.2),
        additive(base, "Klimt", seed=2, rank=5, size=0.1),
        operator(base, "Van Gogh", seed=3, size=0.5),
    )
    return parts, model, make_patch(tmp_path / "patch.sepme", base, *increments)


def predicted(parts: Parts, unet: Any) -> torch.Tensor:
    """The noise that a UNet predicts for one input."""
    generator = torch.Generator().manual_seed(0)
    small = parts.small
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    states = torch.randn(2, 16, small.width, generator=generator)
    more = {}
    if small.pooled is not None:
        pooled = torch.randn(2, small.pooled, generator=generator)
        more = {"text_embeds": pooled, "time_ids": torch.ones(2, small.sizes)}
    with torch.no_grad():
        found = unet(noisy, 500, states, added_cond_kwargs=more or None).sample
    return torch.as_tensor(found)


def patched_unet(parts: Parts, path: Path) -> Any:
    """The UNet with the weights of a patched file."""
    unet = copy.deepcopy(parts.unet)
    with open_checkpoint(path) as checkpoint:
        weights = {t.name: torch.tensor(t.copies[0].whole()) for t in checkpoint.targets}
    assert not unet.load_state_dict(weights, strict=False).unexpected_keys
    return unet


def pipeline(parts: Parts) -> Any:
    """A pipeline of diffusers with a copy of the UNet, for its way to load a LoRA."""
    some = {"vae": None, "text_encoder": None, "tokenizer": None, "scheduler": None}
    unet = copy.deepcopy(parts.unet)
    if parts.small.family == "sdxl":
        return StableDiffusionXLPipeline(
            **some, text_encoder_2=None, tokenizer_2=None, unet=unet, add_watermarker=False
        )
    return StableDiffusionPipeline(
        **some,
        unet=unet,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("to", ["kohya", "peft"])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_diffusers_predicts_with_the_lora_what_the_patched_model_predicts(
    scene: tuple[Parts, Path, Path], to: Any, dtype: str, tmp_path: Path
) -> None:
    parts, model, patch = scene
    lora, clean = tmp_path / "lora.safetensors", tmp_path / "clean.safetensors"
    result = export(patch, to, lora, base=model, dtype=dtype)
    apply(model, [patch], clean)
    pipe = pipeline(parts)
    pipe.load_lora_weights(str(lora))
    found = predicted(parts, pipe.unet)
    wanted = predicted(parts, patched_unet(parts, clean))
    moved = distance(predicted(parts, parts.unet), wanted)
    assert moved > 0.05
    assert distance(found, wanted) < (2e-3 if dtype == "fp16" else 1e-5) * moved
    assert (result.concepts, result.rank) == (("Klimt", "Monet", "Van Gogh"), 11)
    assert result.modules == len(base_of(model).targets)
    assert result.base_match == "same-values"


def test_peft_itself_loads_it(scene: tuple[Parts, Path, Path], tmp_path: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    parts, model, patch = scene
    lora, clean = tmp_path / "lora.safetensors", tmp_path / "clean.safetensors"
    rank = export(patch, "peft", lora, base=model).rank
    apply(model, [patch], clean)
    state = {name.removeprefix("unet."): value for name, value in load_file(lora).items()}
    modules = sorted({name.split(".lora_")[0] for name in state})
    unet = copy.deepcopy(parts.unet)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=modules), unet)
    assert not set_peft_model_state_dict(unet, state).unexpected_keys
    found = predicted(parts, unet)
    wanted = predicted(parts, patched_unet(parts, clean))
    assert distance(found, wanted) < 2e-3 * distance(predicted(parts, parts.unet), wanted)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_comfyui_a1111_and_kohyas_scripts_find_every_module(family: str, tmp_path: Path) -> None:
    depth = 2 if family.startswith("sdxl") else 1
    model = make_checkpoint(tmp_path / "m.safetensors", Shape(family=family, depth=depth))
    base = base_of(model)
    part = additive(base, "Monet", seed=1)
    patch = make_patch(tmp_path / "p.sepme", base, part)
    lora = tmp_path / "lora.safetensors"
    export(patch, "kohya", lora)
    span = span_of(base.targets)
    ldm = [Layout("", span).stored(name).removesuffix(".weight") for name in base.targets]
    diffusers = [name.removesuffix(".weight") for name in base.targets]
    own = ldm if family in LDM else diffusers
    wanted = {
        name: delta(part, target, np.zeros(base.shapes[target]))
        for name, target in zip(own, base.targets, strict=True)
    }
    for names, found in (
        (ldm, lora_loaders.comfyui(lora, ldm, span)),
        (own, lora_loaders.kohya_scripts(lora, own)),
    ):
        assert sorted(found) == sorted(names)
        by_target = dict(zip(names, wanted.values(), strict=True))
        for name, added in found.items():
            largest = np.abs(by_target[name]).max()
            np.testing.assert_allclose(added, by_target[name], atol=2e-3 * largest)
    version, modules = lora_loaders.a1111(lora)
    assert version == {"sd1": "SD1", "sd2": "SD2"}.get(family, "SDXL")
    assert len(modules) == len(base.targets)


def test_names_of_modules_are_unique_and_read_back() -> None:
    targets = [
        f"{place}.transformer_blocks.{n}.attn2.to_{which}.weight"
        for place in (
            *(f"down_blocks.{level}.attentions.{i}" for level in (1, 2) for i in (0, 1)),
            "mid_block.attentions.0",
            *(f"up_blocks.{level}.attentions.{i}" for level in (0, 1) for i in (0, 1, 2)),
        )
        for n in range(10)
        for which in "kv"
    ]
    layout = Layout("", span_of(targets))
    assert layout.span == 3
    for target in targets:
        assert layout.target(layout.stored(target)) == target
    for family in (families.SD1, families.SDXL):
        known = known_modules(targets, family)
        for target in targets:
            for to in ("kohya", "peft"):
                assert known[module_name(target, family, 3, to)] == target  # type: ignore[arg-type]
    assert (
        layout.stored("up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_k.weight")
        == "output_blocks.5.1.transformer_blocks.1.attn2.to_k.weight"
    )


def test_concepts_scales_and_only(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m.safetensors")
    base = base_of(model)
    monet, klimt, dali = (
        additive(base, name, seed=i, rank=i + 1)
        for i, name in enumerate(("Monet", "Klimt", "Dali"))
    )
    some = dict(list(monet.up.items())[:3])
    monet = replace(monet, up=some, exponents={name: monet.exponents[name] for name in some})
    patch = make_patch(tmp_path / "p.sepme", base, monet, klimt, dali)
    lora = tmp_path / "lora.safetensors"
    result = export(
        patch,
        "peft",
        lora,
        scale={"monet": 0.7, "klimt": -1.5, "Dali": 0},
        dtype="fp32",
    )
    assert (result.concepts, result.rank) == (("Klimt", "Monet"), 3)
    stored = load_file(lora)
    assert {value.shape[0] for name, value in stored.items() if "lora_A" in name} == {3}
    for target, shape in base.shapes.items():
        name = f"unet.{target.removesuffix('.weight')}"
        found = (stored[f"{name}.lora_B.weight"] @ stored[f"{name}.lora_A.weight"]).numpy()
        zeros = np.zeros(shape)
        wanted = 0.7 * delta(monet, target, zeros) - 1.5 * delta(klimt, target, zeros)
        np.testing.assert_allclose(found, wanted, atol=1e-6 * np.abs(wanted).max())


def test_a_module_that_no_concept_acts_on_is_left_out(tmp_path: Path) -> None:
    base = base_of(make_checkpoint(tmp_path / "m.safetensors"))
    part = additive(base, "Monet", seed=1)
    some = dict(list(part.up.items())[:3])
    part = replace(part, up=some, exponents={name: part.exponents[name] for name in some})
    patch = make_patch(tmp_path / "p.sepme", base, part)
    assert export(patch, "kohya", tmp_path / "lora.safetensors").modules == 3


def test_more_increments_than_the_embedding_is_wide(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m.safetensors", Shape(width=8))
    base = base_of(model)
    parts = [additive(base, f"c{i}", seed=i, rank=5) for i in range(4)]
    lora = tmp_path / "lora.safetensors"
    result = export(make_patch(tmp_path / "p.sepme", base, *parts), "peft", lora, dtype="fp32")
    assert result.rank == 8
    assert result.relative_error < 1e-6


def test_the_error_that_is_told_is_the_files_own(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m.safetensors", dtype="F32")
    base = base_of(model)
    parts = (additive(base, "Monet", seed=1), operator(base, "Klimt", seed=2))
    patch = make_patch(tmp_path / "p.sepme", base, *parts)
    told = {}
    for dtype in ("fp32", "fp16", "bf16"):
        lora = tmp_path / f"{dtype}.safetensors"
        result = export(patch, "peft", lora, base=model, dtype=dtype)
        stored = load_file(lora)
        squares, whole, largest = 0.0, 0.0, 0.0
        with open_checkpoint(model) as checkpoint:
            for target in checkpoint.targets:
                name = f"unet.{target.name.removesuffix('.weight')}"
                up, down = (stored[f"{name}.lora_{s}.weight"].double().numpy() for s in "BA")
                wanted = sum(delta(part, target.name, target.read()) for part in parts)
                squares += float(np.square(up @ down - wanted).sum())
                whole += float(np.square(wanted).sum())
                largest = max(largest, float(np.abs(up @ down - wanted).max()))
        assert result.relative_error == pytest.approx((squares / whole) ** 0.5)
        assert result.max_abs_error == pytest.approx(largest)
        told[dtype] = result.relative_error
    assert told["fp32"] < 1e-6 < told["fp16"] < 1e-3 < told["bf16"] < 1e-2


def test_small_increments_keep_their_digits_in_fp16(tmp_path: Path) -> None:
    base = base_of(make_checkpoint(tmp_path / "m.safetensors"))
    part = additive(base, "Monet", seed=1, size=2e-7)
    patch = make_patch(tmp_path / "p.sepme", base, part)
    assert export(patch, "kohya", tmp_path / "lora.safetensors").relative_error < 1e-3


def test_metadata_says_what_it_is_and_the_hash_is_right(tmp_path: Path) -> None:
    base = base_of(make_checkpoint(tmp_path / "m.safetensors", Shape(family="sd2")))
    patch = make_patch(tmp_path / "p.sepme", base, additive(base, "Van Gogh", seed=1))
    lora = tmp_path / "starry.safetensors"
    export(patch, "kohya", lora)
    said, data = lora_loaders.metadata(lora), read_raw(lora)[1]
    assert said["modelspec.hash_sha256"] == f"0x{sha256(data).hexdigest()}"
    assert said["sshs_model_hash"] == sha256(data).hexdigest()
    assert (said["ss_network_dim"], said["ss_network_alpha"], said["ss_v2"]) == ("3", "3.0", "True")
    assert said["ss_output_name"] == "starry"
    assert said["modelspec.title"] == "Van Gogh"
    assert said["modelspec.architecture"] == "stable-diffusion-v2-512/lora"
    assert "Van Gogh" in said["ss_training_comment"]


def test_the_same_patch_gives_the_same_bytes_and_nothing_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = base_of(make_checkpoint(tmp_path / "m.safetensors"))
    patch = make_patch(tmp_path / "p.sepme", base, additive(base, "Van Gogh", seed=1))
    result = export(patch, "kohya")
    assert result.output == "van-gogh.safetensors"
    assert result.warnings == (ONLY_ADDS,)
    before = Path(result.output).read_bytes()
    with pytest.raises(Exception, match="already"):
        export(patch, "kohya")
    export(patch, "kohya", force=True)
    assert Path(result.output).read_bytes() == before


def refused(tmp_path: Path, error: type[Exception], match: str, call: Callable[[], object]) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=match):
        call()
    assert sorted(tmp_path.iterdir()) == before


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m.safetensors")
    other = make_checkpoint(tmp_path / "o.safetensors", Shape(family="sd2"))
    base = base_of(model)
    patch = make_patch(
        tmp_path / "p.sepme", base, additive(base, "Monet", seed=1), operator(base, "Klimt", seed=2)
    )
    apply(model, [patch], tmp_path / "clean.safetensors")
    lora = tmp_path / "lora.safetensors"
    refused(tmp_path, UsageError, "--base", lambda: export(patch, "kohya", lora))
    refused(
        tmp_path, MismatchError, "another kind", lambda: export(patch, "kohya", lora, base=other)
    )
    refused(
        tmp_path,
        RefusedError,
        "patched already",
        lambda: export(patch, "kohya", lora, base=tmp_path / "clean.safetensors"),
    )
    refused(tmp_path, RefusedError, "Dali", lambda: export(patch, "kohya", lora, only=["Dali"]))
    refused(
        tmp_path,
        RefusedError,
        "erases 'Klimt'",
        lambda: export(patch, "kohya", lora, only="Monet", scale={"Klimt": 2.0}),
    )
    refused(tmp_path, UsageError, "dtype", lambda: export(patch, "kohya", lora, dtype="fp8"))
    refused(
        tmp_path,
        UsageError,
        "no pickles",
        lambda: export(patch, "kohya", tmp_path / "lora.ckpt", base=model),
    )
    assert export(patch, "kohya", lora, only=["Monet"]).concepts == ("Monet",)
    assert len(read_patch(patch).increments) == 2

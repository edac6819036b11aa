"""LoRAs of Stable Diffusion 3, Flux.1 and Wan 2.1: out of patches, and into them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    WanPipeline,
)
from safetensors.torch import load_file
from torch import Tensor

import sepme_cli as sepme
from patch_spec.base import Family
from tests.operations.test_transformers import FAMILIES
from tests.small_transformers import (
    SmallTransformer,
    small_transformer,
    write_transformer_folder,
)
from tests.synthetic import additive, base_of, make_patch, operator


def pipeline(small: SmallTransformer) -> Any:
    """A pipeline of diffusers, for its way to load a LoRA."""
    some = {"vae": None, "text_encoder": None, "tokenizer": None}
    second = {"text_encoder_2": None, "tokenizer_2": None}
    third = {"text_encoder_3": None, "tokenizer_3": None}
    scheduler = FlowMatchEulerDiscreteScheduler()
    if small.family == "sd3":
        return StableDiffusion3Pipeline(small.transformer, scheduler, **some, **second, **third)
    if small.family == "flux":
        return FluxPipeline(scheduler, transformer=small.transformer, **some, **second)
    return WanPipeline(transformer=small.transformer, scheduler=scheduler, **some)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    name: Family = request.param
    return name


@pytest.fixture
def model(family: Family, tmp_path: Path) -> Path:
    return write_transformer_folder(small_transformer(family), tmp_path / "m") / "transformer"


@pytest.fixture
def patch(model: Path, tmp_path: Path) -> Path:
    base = base_of(model)
    parts = (
        additive(base, "Monet", seed=1, size=0.2),
        additive(base, "Klimt", seed=2, rank=5, size=0.1),
        operator(base, "Van Gogh", seed=3, size=0.5),
    )
    return make_patch(tmp_path / "p.sepme", base, *parts)


def fused(small: SmallTransformer, lora: Path) -> dict[str, Tensor]:
    """The transformer's weights with a LoRA that diffusers loaded and fused."""
    pipe = pipeline(small)
    pipe.load_lora_weights(str(lora))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return dict(small.transformer.state_dict())


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_diffusers_loads_what_apply_writes(
    family: Family, model: Path, patch: Path, dtype: str, tmp_path: Path
) -> None:
    lora = tmp_path / "lora.safetensors"
    result = sepme.export(patch, "peft", lora, base=model, dtype=dtype)
    sepme.apply(model, [patch], tmp_path / "out")
    wanted = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    before = dict(small_transformer(family).transformer.state_dict())
    found = fused(small_transformer(family), lora)
    changed = {name for name, value in before.items() if not torch.equal(found[name], value)}
    assert changed == set(base_of(model).targets)
    for name in changed:
        moved = (wanted[name] - before[name]).norm()
        assert moved > 0.05 * before[name].norm()
        assert (found[name] - wanted[name]).norm() < (2e-3 if dtype == "fp16" else 1e-5) * moved
    assert result.modules == len(changed)

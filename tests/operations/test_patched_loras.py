"""LoRA layers around what is patched, and weights that are kept elsewhere: with peft and accelerate
where they are installed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from sepme_cli.errors import RefusedError, UnsupportedError
from sepme_cli.operations.apply import apply
from sepme_cli.operations.patched import patched
from tests.small_model import SMALL, small_unet
from tests.synthetic import make_patches

peft = pytest.importorskip("peft")
TARGET = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def add_lora(unet: UNet2DConditionModel, name: str = "style", **options: Any) -> None:
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=2,
        init_lora_weights="gaussian",
        target_modules=["to_k", "to_v", "proj_in", "conv_in"],
        **options,
    )
    unet.add_adapter(config, adapter_name=name)
    for parameter, value in unet.named_parameters():
        if "lora_B" in parameter:
            value.data = torch.randn_like(value) * 0.1


def drawn(unet: UNet2DConditionModel) -> Tensor:
    torch.manual_seed(2)
    asked = torch.randn(1, 4, 8, 8), 10, torch.randn(1, 7, 64)
    with torch.no_grad():
        found: Tensor = unet(*asked).sample
    return found


def bits(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in unet.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return small_unet(SMALL["sd1"])


@pytest.fixture
def patches(unet: UNet2DConditionModel, tmp_path: Path) -> list[Path]:
    unet.save_pretrained(tmp_path / "unet")
    return make_patches(tmp_path, tmp_path / "unet")


@pytest.fixture
def clean(patches: list[Path], tmp_path: Path) -> UNet2DConditionModel:
    """The UNet of the file that `apply` writes."""
    apply(tmp_path / "unet", patches, tmp_path / "out")
    found = small_unet(SMALL["sd1"])
    found.load_state_dict(load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors"))
    return found


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_a_lora_stays_on_top(
    unet: UNet2DConditionModel,
    clean: UNet2DConditionModel,
    patches: list[Path],
    options: dict[str, Any],
) -> None:
    add_lora(unet, **options)
    before, plain = bits(unet), drawn(unet)
    clean_state = clean.state_dict()
    add_lora(clean, **options)
    if options:
        # DoRA keeps the norms of the weights that it was made for.
        lora = {name: value for name, value in before.items() if "lora_" in name}
        clean.load_state_dict(lora, strict=False)
    with patched(unet, patches):
        inside = bits(unet)
        assert inside[f"{TARGET}.base_layer.weight"].equal(clean_state[f"{TARGET}.weight"])
        assert all(inside[name].equal(before[name]) for name in before if "lora_" in name)
        assert drawn(unet).equal(drawn(clean))
    assert same(bits(unet), before)
    assert drawn(unet).equal(plain)


def test_a_lora_that_comes_and_goes_meanwhile(
    unet: UNet2DConditionModel, clean: UNet2DConditionModel, patches: list[Path]
) -> None:
    before = bits(unet)
    live = patched(unet, patches)
    add_lora(unet)
    add_lora(clean)
    assert drawn(unet).equal(drawn(clean))
    live.set_scale(0.5)
    live.restore()
    unet.delete_adapters("style")
    assert same({n.replace(".base_layer", ""): v for n, v in bits(unet).items()}, before)


def test_a_fused_lora_is_not_mistaken_for_the_models_own(
    unet: UNet2DConditionModel, patches: list[Path]
) -> None:
    add_lora(unet)
    unet.fuse_lora()
    before = bits(unet)
    with pytest.raises(RefusedError, match="unfuse_lora"):
        patched(unet, patches)
    assert same(bits(unet), before)
    unet.unfuse_lora()
    before = bits(unet)
    with patched(unet, patches) as live:
        unet.fuse_lora()
        for change in (lambda: live.set_scale(0.5), live.restore):
            with pytest.raises(RefusedError, match="unfuse_lora"):
                change()
        unet.unfuse_lora()
    # What fusing and unfusing rounds off where nothing is patched is none of ours.
    targets = {n for n in before if ".attn2.to_k.b" in n or ".attn2.to_v.b" in n}
    after = bits(unet)
    assert all(after[name].equal(before[name]) for name in targets)


def test_weights_that_are_kept_elsewhere(unet: UNet2DConditionModel, patches: list[Path]) -> None:
    accelerate = pytest.importorskip("accelerate")
    before = bits(unet)
    accelerate.cpu_offload(unet, execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedError, match="offloaded layer by layer"):
        patched(unet, patches)
    accelerate.hooks.remove_hook_from_submodules(unet)
    with patched(unet, patches):
        assert not same(bits(unet), before)
    assert same(bits(unet), before)

"""Building diffusers' networks from a checkpoint's tensors, whatever they are called there."""

import re
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from torch import Tensor

from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.checkpoints.structure.gguf import QUANTISED
from sepme_cli.checkpoints.structure.layout import UNET
from sepme_cli.diffusion.configs import Config, transformer_config, unet_config, vae_config
from sepme_cli.diffusion.transformer_names import in_diffusers_names
from sepme_cli.diffusion.weights import tensors_of
from sepme_cli.errors import UnsupportedError

_OLD_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
"""What diffusers called the parts of a VAE's attention before 2023."""


def load_unet(checkpoint: Checkpoint, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet, on the CPU; UnsupportedError where the checkpoint does not hold all of it."""
    network = checkpoint.network("denoiser")
    assert network is not None  # what has none is no checkpoint
    tensors = tensors_of(network, dtype)
    if network.naming == "ldm":
        tensors = _in_diffusers_names(checkpoint, tensors)
    config: Mapping[str, Any] | None = network.config
    try:
        if not config or "block_out_channels" not in config:
            config = unet_config(_shapes(tensors), checkpoint.family, _pooled(checkpoint))
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(dict(config))
        unet.load_state_dict(tensors, assign=True)
    # On shapes and configurations that make no sense diffusers raises whatever they lead it to.
    except Exception as error:
        raise _not_whole(checkpoint, "UNet", _first(error), len(tensors)) from error
    return unet.requires_grad_(False).eval()


def load_transformer(
    checkpoint: Checkpoint, dtype: torch.dtype
) -> SD3Transformer2DModel | FluxTransformer2DModel:
    """The transformer of Stable Diffusion 3 or Flux.1, on the CPU; UnsupportedError where the
    checkpoint does not hold all of it, or is of another family."""
    network, family = checkpoint.network("denoiser"), checkpoint.family
    assert network is not None
    if family.name not in _TRANSFORMERS:
        raise UnsupportedError(
            f"{checkpoint.path} is {family.title}, of which sepme patches the text layers and "
            "generates nothing",
            file=checkpoint.path,
            expected="a model that draws single images",
            found=family.title,
        )
    tensors = tensors_of(network, dtype)
    if network.naming == "original":
        tensors = in_diffusers_names(tensors, family.name)
    config: Mapping[str, Any] | None = network.config
    try:
        if not config or "joint_attention_dim" not in config:
            config = transformer_config(_shapes(tensors), family)
        with torch.device("meta"):
            transformer = _TRANSFORMERS[family.name].from_config(dict(config))
        transformer.load_state_dict(tensors, assign=True)
    except Exception as error:
        raise _not_whole(checkpoint, "transformer", _first(error), len(tensors)) from error
    return transformer.requires_grad_(False).eval()


_TRANSFORMERS = {"sd3": SD3Transformer2DModel, "flux": FluxTransformer2DModel}


def unet_parameters(checkpoint: Checkpoint) -> int:
    """How many the UNet has, from the header alone."""
    network = checkpoint.network("denoiser")
    return sum(map(prod, network.shapes.values())) if network is not None else 0


def load_vae(checkpoint: Checkpoint, dtype: torch.dtype) -> AutoencoderKL:
    """The VAE, on the CPU; UnsupportedError where the checkpoint does not hold all of it."""
    network = checkpoint.network("vae")
    if network is None:
        raise _not_whole(checkpoint, "VAE", "a VAE", 0)
    tensors = tensors_of(network, dtype)
    config: Mapping[str, Any] | None = network.config
    try:
        if not config or "block_out_channels" not in config:
            config = vae_config(_shapes(tensors), checkpoint.family, network.naming)
        if network.naming == "ldm":
            tensors = convert_ldm_vae_checkpoint(tensors, config)
        tensors = _with_new_attention(tensors)
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(dict(config))
        vae.load_state_dict(tensors, assign=True)
    except Exception as error:
        raise _not_whole(checkpoint, "VAE", _first(error), len(tensors)) from error
    return vae.requires_grad_(False).eval()


def _pooled(checkpoint: Checkpoint) -> int:
    """How wide XL's pooled text is: as the last text encoder projects it, bigG's 1280 without."""
    network = checkpoint.network(checkpoint.family.text_encoders[-1].name)
    return (network and network.projected) or 1280


def _in_diffusers_names(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    hints: Config = {"layers_per_block": checkpoint.layout.span - 1}
    hints |= {"addition_embed_type": "text_time"} if checkpoint.family.sizes else {}
    try:
        return dict(
            convert_ldm_unet_checkpoint({UNET + n: value for n, value in tensors.items()}, hints)
        )
    except KeyError as error:
        raise _not_whole(checkpoint, "UNet", str(error), len(tensors)) from error


def _with_new_attention(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in tensors.items():
        found = re.fullmatch(r"(.*attentions\.\d+)\.(query|key|value|proj_attn)\.(.*)", name)
        renamed[f"{found[1]}.{_OLD_ATTENTION[found[2]]}.{found[3]}" if found else name] = value
    return renamed


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def _first(error: Exception) -> str:
    """What is wrong, of an error that lists everything."""
    return str(error.args[0] if error.args else error).strip().splitlines()[-1].strip()[:200]


def _not_whole(checkpoint: Checkpoint, what: str, missing: str, found: int) -> UnsupportedError:
    need = (
        "generating images and optimising need one; the closed form, and applying, reverting and "
        "verifying patches, do not"
    )
    network = checkpoint.network("vae" if what == "VAE" else "denoiser")
    types = {} if network is None else {one.dtype: one.name for one in network.tensors.values()}
    if blocks := QUANTISED & types.keys():
        return UnsupportedError(
            f"{checkpoint.path}: the {what} is quantised in blocks, which sepme does not compute "
            f"with: {need}. For images name the model that it was made from",
            file=checkpoint.path,
            expected=f"a {what} in fp32, fp16, bf16 or fp8",
            found=", ".join(f"{types[kind]} as {kind}" for kind in sorted(blocks)),
        )
    return UnsupportedError(
        f"{checkpoint.path}: the checkpoint does not hold a whole {what} that sepme can run: "
        f"{need}",
        file=checkpoint.path,
        expected=missing,
        found=f"{found} tensors of it",
    )

"""Write what was trained as the two committed files.

    python -m examples.emoji.pack

``emoji-sd.safetensors`` is a single-file SD 1.x checkpoint in fp16: CompVis key names, CLIP's
whole vocabulary (rows of tokens that no caption uses are zero), and a latent scale folded into
the VAE so that Stable Diffusion's 0.18215 holds.
"""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from examples.emoji.canvas import BUILD
from examples.emoji.train import vocabulary

HERE = Path("examples")
CLIP_VOCABULARY = 49408
LATENT_SCALE = 0.18215

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def unet_name(name: str, attends: set[str], layers: int = 2) -> str:
    """A diffusers UNet name as CompVis calls it.

    attends: the up blocks that have attention. layers: the blocks of a level, layers_per_block + 1.
    """
    part, leaf = name.rsplit(".", 1)
    if part in UNET_ENDS:
        return f"{UNET_ENDS[part]}.{leaf}"
    side, *place = part.split(".")
    if side == "mid_block":
        kind, index, *rest = place
        number = 1 if kind == "attentions" else 2 * int(index)
        return ".".join(["middle_block", str(number), *renamed(kind, rest), leaf])
    level, kind, index, *rest = place
    if kind == "downsamplers":
        return f"input_blocks.{(int(level) + 1) * layers}.0.op.{leaf}"
    if kind == "upsamplers":
        slot = 2 if level in attends else 1
        return f"output_blocks.{int(level) * layers + layers - 1}.{slot}.conv.{leaf}"
    number = int(level) * layers + int(index)
    block = f"input_blocks.{number + 1}" if side == "down_blocks" else f"output_blocks.{number}"
    return ".".join([block, str(int(kind == "attentions")), *renamed(kind, rest), leaf])


def renamed(kind: str, rest: list[str]) -> list[str]:
    return [RESNET[rest[0]]] if kind == "resnets" else rest


def vae_name(name: str, levels: int) -> str:
    """A diffusers VAE name as CompVis calls it; its up levels count the other way round."""
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    flip = lambda m: str(levels - 1 - int(m[1]))  # noqa: E731
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{flip(m)}.block", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{flip(m)}.upsample", name)
    if "attn_1" in name:
        before, after = name.split("attn_1.")
        part, leaf = after.rsplit(".", 1)
        name = f"{before}attn_1.{VAE_ATTENTION[part]}.{leaf}"
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def fold_latent_scale(vae: dict[str, Tensor], mean: Tensor, deviation: Tensor) -> None:
    """Make the VAE's latents times 0.18215 what the UNet was trained on: (latents - mean) /
    deviation, channel by channel; exact, both ends being linear."""
    factor = 1 / (deviation * LATENT_SCALE)
    channels = len(mean)
    quant, bias = vae["quant_conv.weight"], vae["quant_conv.bias"]
    bias[:channels] = (bias[:channels] - mean) * factor
    quant[:channels] *= factor[:, None, None, None]
    bias[channels:] += 2 * factor.log()
    back = vae["post_quant_conv.weight"]
    vae["post_quant_conv.bias"] += back[:, :, 0, 0] @ mean
    back /= factor[None, :, None, None]


def as_convolution(name: str, value: Tensor) -> Tensor:
    """CompVis keeps the VAE's attention projections as 1x1 convolutions."""
    projects = re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", name)
    return value[:, :, None, None] if projects else value


def single_file(
    unet: dict[str, Tensor],
    vae: dict[str, Tensor],
    text_encoder: dict[str, Tensor],
    layers: int = 2,
) -> dict[str, Tensor]:
    """Three networks' tensors, in diffusers and transformers naming, as one file's in CompVis's."""
    attends = {n.split(".")[1] for n in unet if n.startswith("up_blocks") and "attentions" in n}
    downs = (int(n.split(".")[2]) for n in vae if n.startswith("encoder.down_blocks"))
    levels = 1 + max(downs, default=0)
    tensors = {f"model.diffusion_model.{unet_name(n, attends, layers)}": v for n, v in unet.items()}
    for name, value in vae.items():
        ldm = vae_name(name, levels)
        tensors[f"first_stage_model.{ldm}"] = as_convolution(ldm, value)
    for name, value in text_encoder.items():
        inner = name.removeprefix("text_model.")
        tensors[f"cond_stage_model.transformer.text_model.{inner}"] = value
    return tensors


def whole_vocabulary(compact: Tensor) -> Tensor:
    """The compact embedding's rows at their places among CLIP's 49408; row 0 is for all others."""
    table = compact[:1].repeat(CLIP_VOCABULARY, 1)
    table[vocabulary()] = compact[1:]
    return table


def trained() -> dict[str, Tensor]:
    """All tensors of the single file, in fp32."""
    unet, vae, text = (
        torch.load(BUILD / f"{name}.pt", map_location="cpu")["averaged"]
        for name in ("unet", "vae_colour", "text")
    )
    fold_latent_scale(vae, **torch.load(BUILD / "latents.pt", map_location="cpu"))
    encoder = {n.removeprefix("encoder."): v for n, v in text.items() if n.startswith("encoder.")}
    for name, value in encoder.items():
        if name.endswith("token_embedding.weight"):
            encoder[name] = whole_vocabulary(value)
    return single_file(unet, vae, encoder)


def save_half(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    half = {k: v.half().contiguous() for k, v in tensors.items() if v.is_floating_point()}
    save_file(half, path, metadata=metadata)
    path.chmod(0o644)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {len(half)} tensors")


if __name__ == "__main__":
    save_half(trained(), HERE / "emoji-sd.safetensors", {"modelspec.resolution": "64x64"})
    judge = torch.load(BUILD / "judge.pt", map_location="cpu")["averaged"]
    save_half(judge, HERE / "emoji-judge.safetensors", {"format": "pt"})

"""Whole Stable Diffusions of every family with random weights, small enough to erase from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.openclip import openclip_names
from examples.emoji.pack import single_file

WIDTH = 64
POSITIONS = 16


def networks(seed: int = 0) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """UNet with attention on the lower of two levels, VAE, text encoder."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        cross_attention_dim=WIDTH,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=WIDTH,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=1,
            max_position_embeddings=POSITIONS,
        )
    )
    with torch.no_grad():
        # At its initialisation CLIP barely tells two prompts apart.
        text.get_input_embeddings().weight.mul_(20)
    return unet.eval(), vae.eval(), text.eval()


def save_small_model(path: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
    """Write it as a single-file SD 1.x checkpoint that draws 16-pixel pictures."""
    tensors = single_file(*(network.state_dict() for network in networks(seed)))
    contiguous = {name: value.to(dtype).contiguous() for name, value in tensors.items()}
    save_file(contiguous, path, metadata={"modelspec.resolution": "16x16"})


HEAD = 64


@dataclass(frozen=True)
class Small:
    """A family scaled down. widths: of its text encoders, in order; d is their sum."""

    family: str
    widths: tuple[int, ...]
    channels: tuple[int, ...] = (64, 128)
    attends: tuple[bool, ...] = (False, True)
    depth: int = 1
    extra_channels: int = 0
    pooled: int | None = None
    sizes: int = 6

    @property
    def width(self) -> int:
        return sum(self.widths)


SMALL = {
    "sd1": Small("sd1", (64,)),
    "inpainting": Small("sd1", (64,), extra_channels=5),
    "editing": Small("sd1", (64,), extra_channels=4),
    "sd2": Small("sd2", (128,)),
    "sdxl": Small("sdxl", (64, 128), depth=2, pooled=96),
    "sdxl-refiner": Small(
        "sdxl-refiner", (128,), (64, 128, 128), (False, True, False), 2, pooled=96, sizes=5
    ),
}


def small_unet(small: Small) -> UNet2DConditionModel:
    down = tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in small.attends)
    up = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(small.attends))
    added: dict[str, Any] = {}
    if small.pooled is not None:
        added = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": small.pooled // 2,
            "projection_class_embeddings_input_dim": small.pooled
            + small.sizes * (small.pooled // 2),
        }
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4 + small.extra_channels,
        block_out_channels=small.channels,
        layers_per_block=1,
        down_block_types=down,
        up_block_types=up,
        attention_head_dim=8 if small.family == "sd1" else [c // HEAD for c in small.channels],
        cross_attention_dim=small.width,
        transformer_layers_per_block=small.depth,
        use_linear_projection=small.family != "sd1",
        **added,
    ).eval()


def small_text(width: int, *, openclip: bool, layers: int = 3, pooled: int | None = None) -> Any:
    """A text encoder as transformers has it; with a projection for XL's second."""
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD,
        max_position_embeddings=POSITIONS,
        hidden_act="gelu" if openclip else "quick_gelu",
        projection_dim=pooled or width,
    )
    model = (CLIPTextModelWithProjection if pooled else CLIPTextModel)(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)
    return model.eval()


@dataclass(frozen=True)
class Parts:
    """The networks of a small model, as the libraries have them. texts: in the family's order."""

    small: Small
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    texts: tuple[Any, ...]


def small_parts(name: str, seed: int = 0) -> Parts:
    """A small model of one of SMALL, with random weights."""
    torch.manual_seed(seed)
    small = SMALL[name]
    openclip = [
        i == len(small.widths) - 1 and small.family != "sd1" for i in range(len(small.widths))
    ]
    texts = tuple(
        small_text(width, openclip=is_open, pooled=small.pooled if is_open else None)
        for width, is_open in zip(small.widths, openclip, strict=True)
    )
    return Parts(small, small_unet(small), networks(seed)[1], texts)


def write_single_file(parts: Parts, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """As the single files of the family are written."""
    family = parts.small.family
    tensors = single_file(
        {n: v for n, v in parts.unet.state_dict().items() if not n.startswith("add_embedding")},
        parts.vae.state_dict(),
        {},
    )
    for name, value in parts.unet.state_dict().items():
        if name.startswith("add_embedding.linear_"):
            number, leaf = name.removeprefix("add_embedding.linear_").split(".")
            tensors[f"model.diffusion_model.label_emb.0.{2 * int(number) - 2}.{leaf}"] = value
    prefixes = {
        "sd1": ("cond_stage_model.transformer.text_model.",),
        "sd2": ("cond_stage_model.model.",),
        "sdxl": (
            "conditioner.embedders.0.transformer.text_model.",
            "conditioner.embedders.1.model.",
        ),
        "sdxl-refiner": ("conditioner.embedders.0.model.",),
    }
    for prefix, text in zip(prefixes[family], parts.texts, strict=True):
        state = {n.removeprefix("text_model."): v for n, v in text.state_dict().items()}
        named = state if prefix.endswith("text_model.") else openclip_names(state)
        tensors |= {prefix + name: value for name, value in named.items()}
    stored = {name: value.to(dtype).contiguous() for name, value in tensors.items()}
    save_file(stored, path, metadata={"modelspec.resolution": "16x16"})
    return path


def write_folder(parts: Parts, path: Path, *, prediction: str = "epsilon") -> Path:
    """As diffusers writes it; of SD 2.x the last text layer, which nothing reads, is left out."""
    parts.unet.save_pretrained(path / "unet")
    parts.vae.save_pretrained(path / "vae")
    places = ("text_encoder", "text_encoder_2")
    if parts.small.family == "sdxl-refiner":
        places = ("text_encoder_2",)
    for place, text in zip(places, parts.texts, strict=False):
        (without_last_layer(text) if parts.small.family == "sd2" else text).save_pretrained(
            path / place
        )
    DDIMScheduler(
        prediction_type=prediction,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
    ).save_pretrained(path / "scheduler")
    (path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return path


def without_last_layer(text: Any) -> Any:
    config = CLIPTextConfig(**{**text.config.to_dict(), "num_hidden_layers": 2})
    shorter = type(text)(config)
    state = {n: v for n, v in text.state_dict().items() if "encoder.layers.2." not in n}
    shorter.load_state_dict(state)
    return shorter.eval()

"""Whole models of the transformer families with random weights, small enough to erase from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from patch_spec.base import Family
from sepme_cli.checkpoints.structure.transformer_names import RULES
from tests.small_model import small_text

T5_WIDTH = 224
CLIP_WIDTHS = (64, 128)
PROJECTED = (48, 96)
"""Of SD 3's two: it reads 144 pooled numbers. Flux reads the 64 of CLIP-L as they are."""
T5_ROWS = 24
T5_POSITIONS = 16
WORDS = ("a", "the", "of", "in", "by", "picture", "photo", "painting", "art", "red", "cat", "dog")
WORDS += ("car", "van", "gogh", "monet", "style")


@dataclass(frozen=True)
class SmallTransformer:
    """The networks of a small model, as the libraries have them. texts: in the family's order."""

    family: Family
    transformer: Any
    vae: AutoencoderKL | None
    texts: tuple[Any, ...]


def small_transformer(family: Family, seed: int = 0, **changes: Any) -> SmallTransformer:
    """changes: of the transformer's configuration."""
    torch.manual_seed(seed)
    transformer = _MAKE[family](**changes).eval()
    if family == "sd3":
        texts: tuple[Any, ...] = (
            *(
                small_text(width, openclip=i > 0, pooled=projected)
                for i, (width, projected) in enumerate(zip(CLIP_WIDTHS, PROJECTED, strict=True))
            ),
            small_t5(),
        )
    elif family == "flux":
        texts = (small_text(CLIP_WIDTHS[0], openclip=False), small_t5())
    else:
        texts = (small_t5(UMT5EncoderModel, UMT5Config),)
    return SmallTransformer(
        family, transformer, None if family == "wan" else small_vae(family), texts
    )


def _sd3(**changes: Any) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        **{
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": T5_WIDTH,
            "caption_projection_dim": 32,
            "pooled_projection_dim": sum(PROJECTED),
            "pos_embed_max_size": 8,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (0,),
            **changes,
        }
    )


def _flux(**changes: Any) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        **{
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": T5_WIDTH,
            "pooled_projection_dim": CLIP_WIDTHS[0],
            "guidance_embeds": True,
            "axes_dims_rope": (4, 6, 6),
            **changes,
        }
    )


def _wan(**changes: Any) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": T5_WIDTH,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 2,
            **changes,
        }
    )


_MAKE = {"sd3": _sd3, "flux": _flux, "wan": _wan}


def small_t5(kind: Any = T5EncoderModel, config: Any = T5Config) -> Any:
    model = kind(
        config(
            vocab_size=len(WORDS) + 3,
            d_model=T5_WIDTH,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
    return model.eval()


def small_vae(family: Family) -> AutoencoderKL:
    """As Stable Diffusion 3's and Flux's: latents shifted, and no convolution around them."""
    scale, shift = {"sd3": (1.5305, 0.0609), "flux": (0.3611, 0.1159)}[family]
    return AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=scale,
        shift_factor=shift,
    ).eval()


def write_tokenizer(folder: Path) -> Path:
    """T5's kind, of a few words."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    made = Tokenizer(models.Unigram([*pieces, *((f"▁{word}", -1.0) for word in WORDS)], unk_id=2))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    made.enable_truncation(T5_POSITIONS)
    made.save(str(folder / "tokenizer.json"))
    return folder


_PLACES: Mapping[Family, tuple[str, ...]] = {
    "sd3": ("text_encoder", "text_encoder_2", "text_encoder_3"),
    "flux": ("text_encoder", "text_encoder_2"),
    "wan": ("text_encoder",),
}
_PIPELINES = {"sd3": "StableDiffusion3Pipeline", "flux": "FluxPipeline", "wan": "WanPipeline"}


def write_transformer_folder(
    model: SmallTransformer, path: Path, dtype: torch.dtype = torch.float32, shard: str = "10GB"
) -> Path:
    """As diffusers writes it. shard: how large one may be."""

    def save(network: Any, place: str) -> None:
        kept = {n: v.clone() for n, v in network.state_dict().items()}
        network.to(dtype).save_pretrained(path / place, max_shard_size=shard)
        network.to(torch.float32).load_state_dict(kept)

    save(model.transformer, "transformer")
    for place, encoder in zip(_PLACES[model.family], model.texts, strict=True):
        save(encoder, place)
    if model.vae is not None:
        save(model.vae, "vae")
    write_tokenizer(path / _PLACES[model.family][-1].replace("text_encoder", "tokenizer"))
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(path / "scheduler")
    (path / "model_index.json").write_text(f'{{"_class_name": "{_PIPELINES[model.family]}"}}')
    return path


def original_names(model: SmallTransformer) -> dict[str, Tensor]:
    """The transformer's tensors as its authors name them."""
    state = dict(model.transformer.state_dict())
    if model.family == "wan":
        return {_wans_name(name): value for name, value in state.items()}
    last = model.transformer.config.num_layers - 1 if model.family == "sd3" else None
    found: dict[str, Tensor] = {}
    if "pos_embed.pos_embed" in state:
        found["pos_embed"] = state["pos_embed.pos_embed"]
    for rule in RULES[model.family]:
        theirs = rule.theirs.replace("\\.", ".").replace("(\\d+)", "{}")
        for number in range(9) if "{}" in theirs else (0,):
            for leaf in ("weight", "bias"):
                names = [f"{ours.format(number)}.{leaf}" for ours in rule.ours]
                if names[0] not in state:
                    continue
                value = torch.cat([state[name] for name in names])
                ends = number == last and "norm1_context.linear" in names[0]
                if rule.exchanged or ends:
                    value = torch.cat(value.chunk(2)[::-1])
                end = "scale" if ".query_norm" in theirs or ".key_norm" in theirs else leaf
                found[f"{theirs.format(number)}.{end}"] = value
    assert sum(v.numel() for v in found.values()) == sum(v.numel() for v in state.values())
    return found


def _wans_name(name: str) -> str:
    renamed = {
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "attn1": "self_attn",
        "attn2": "cross_attn",
        "to_out.0": "o",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "ffn.net.0.proj": "ffn.0",
        "ffn.net.2": "ffn.2",
        "proj_out": "head.head",
        "norm2": "norm3",
    }
    if name == "scale_shift_table":
        return "head.modulation"
    name = name.replace("scale_shift_table", "modulation")
    for ours, theirs in renamed.items():
        name = name.replace(ours, theirs)
    return name


_ENCODERS = {
    "sd3": ("clip_l", "clip_g", "t5xxl"),
    "flux": ("clip_l", "t5xxl"),
    "wan": ("umt5xxl",),
}


def write_transformer_file(
    model: SmallTransformer,
    path: Path,
    dtype: torch.dtype = torch.float32,
    *,
    prefix: str = "model.diffusion_model.",
    encoders: int = 3,
) -> Path:
    """One file, as the authors name its tensors. encoders: how many text encoders are in it."""
    tensors = {prefix + name: value for name, value in original_names(model).items()}
    if prefix:
        if model.vae is not None:
            tensors |= {f"vae.{name}": value for name, value in model.vae.state_dict().items()}
        for name, encoder in list(zip(_ENCODERS[model.family], model.texts, strict=True))[
            :encoders
        ]:
            state = encoder.state_dict()
            tensors |= {f"text_encoders.{name}.transformer.{n}": v for n, v in state.items()}
    stored = {name: value.to(dtype).clone().contiguous() for name, value in tensors.items()}
    save_file(stored, path, metadata={"modelspec.resolution": "16x16"})
    return path

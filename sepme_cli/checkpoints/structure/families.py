"""The families of models: what is particular to each, as data.

What tells them apart are their tensors' names and shapes, and never their number: distilled models
have fewer blocks, inpainting models more input channels and scaled-down models other widths; the
names stay.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from patch_spec.base import Family as FamilyName
from patch_spec.streams import stream_of
from sepme_cli.checkpoints.structure.layout import DenoiserNaming, Layout


class Shaped(Protocol):
    """What has a shape: all that is looked at of a tensor here."""

    @property
    def shape(self) -> tuple[int, ...]: ...


Names = Mapping[str, Shaped]

Prediction = Literal["epsilon", "velocity"]
"""What a UNet was trained to predict: noise, or velocity."""

CLIP_END = 49407
"""The token that ends a text for CLIP."""


@dataclass(frozen=True)
class TextEncoderSpec:
    """What is particular to one text encoder of a family.

    name: what a patch calls it. folder: where it is in a model folder. prefix: what its tensors'
    names begin with in a single file; naming: whose names follow there. unused_layers: how many
    of the last layers in a single file no prompt passes through. pads: the token that fills a
    prompt up, where no tokenizer says it: CLIP's end, or 0 as OpenCLIP does. rows: whether its
    states are among the rows of the stream `tokens`. pools: what of it is in the stream `pooled`:
    the state of the end of text through the projection, or as it is; None for nothing.
    positions: how many tokens pipelines have T5 read; CLIP's say it themselves.
    """

    name: str
    folder: str
    prefix: str
    naming: Literal["transformers", "openclip", "t5"]
    unused_layers: int = 0
    pads: int = 0
    rows: bool = True
    pools: Literal["projection", "end"] | None = None
    positions: int = 0


@dataclass(frozen=True)
class Family:
    """A family of models that share names and text encoders: all that is particular to it.

    title: what people call it. matches: whether a UNet of this layout, among these tensors, is of
    the family; the first of `FAMILIES` that matches is meant. signs: of a transformer, which has
    no cross-attention of its own over text, by naming, what a name behind the prefix begins with
    that no other family has. penultimate: the denoiser reads CLIP's last layer but one, without
    the final norm. heads: of the UNet's attention at every level; None where heads are 64 wide
    instead. latent_side: of the images it was trained on. latent_scale: what latents are multiplied
    by, after latent_shift is taken away. flow: how diffusers' scheduler is set for its rectified
    flow; None for diffusion. guidance: its scale, where nobody says it. sizes: how many numbers the
    UNet embeds beside the time step and the pooled text: sizes and crops, 0 for none of it.
    aesthetics: how well made an image it is asked for, in place of the last two of these.
    velocity_side: the latent side of those of its models that predict velocity, which the spread of
    a bias tells; None where there are none. usually_epsilon: whether hardly any of its models
    predicts velocity, so that nobody needs to be told where nothing says so. kohya: what kohya's
    scripts call it. modelspec: its architecture in ModelSpec. single_file_modules: whether kohya's
    scripts name its modules as single files do, and not as diffusers does. entries: by naming, its
    targets outside of the cross-attention, to their names in the file.
    """

    name: FamilyName
    title: str
    text_encoders: tuple[TextEncoderSpec, ...]
    kohya: str
    modelspec: str
    matches: Callable[[Names, Layout], bool] = field(default=lambda *_: False, repr=False)
    signs: Mapping[DenoiserNaming, re.Pattern[str]] = field(default_factory=dict, repr=False)
    heads: int | None = None
    penultimate: bool = False
    latent_side: int = 64
    latent_scale: float = 0.18215
    latent_shift: float = 0.0
    flow: Mapping[str, Any] | None = field(default=None, repr=False)
    guidance: float = 7.5
    sizes: int = 0
    aesthetics: float | None = None
    velocity_side: int | None = None
    usually_epsilon: bool = False
    single_file_modules: bool = False
    entries: Mapping[DenoiserNaming, Mapping[str, str]] = field(default_factory=dict, repr=False)

    @property
    def denoiser(self) -> Literal["unet", "transformer"]:
        """What predicts: its folder in a model folder."""
        return "transformer" if self.signs else "unet"

    def columns(self, target: str, columns: int, size: int | None) -> int | None:
        """How many of the first columns of a target read its stream; None where there is no saying.

        columns: that the weight has. size: how many numbers each of the sizes that XL's UNet reads
        behind the pooled text is embedded in; None for what every published model has.
        """
        if stream_of(target) != "pooled":
            return columns
        width = columns - self.sizes * (size or _SIZE_WIDTH)
        return width if width > 0 else None

    def whole_columns(self, target: str, width: int) -> int:
        """How many columns the whole weight of a target has, in published models; width: of its
        stream."""
        return width + self.sizes * _SIZE_WIDTH * (stream_of(target) == "pooled")


_SIZE_WIDTH = 256
"""How many numbers XL embeds a size in."""

# What tells families apart, in either naming: what embeds sizes and crops, and the lowest level's
# attention.
_CONDITION = {"ldm": "label_emb.0.0.weight", "diffusers": "add_embedding.linear_1.weight"}
_LOWEST = {
    "ldm": (r"input_blocks\.(\d+)\.", "input_blocks.{}.1.norm.weight"),
    "diffusers": (r"down_blocks\.(\d+)\.", "down_blocks.{}.attentions.0.norm.weight"),
}
_XLS_TEXT = "conditioner."
_REFINERS_TEXT = f"{_XLS_TEXT}embedders.0.model."


def _is_xl(tensors: Names, layout: Layout) -> bool:
    """Whether sizes and crops condition the UNet; SD 2.1 unclip has those names for an image."""
    if f"{layout.prefix}{_CONDITION[layout.naming]}" not in tensors:
        return False
    if _enters_through(tensors, layout) == "convolution":
        return False
    if any(".transformer_blocks.1." in name for name in usual_targets(tensors, layout)):
        return True
    return any(name.startswith(_XLS_TEXT) for name in _text_encoders(tensors, layout))


def _is_refiner(tensors: Names, layout: Layout) -> bool:
    """By the lowest level, which has no attention, unless there is a text encoder of XL's own."""
    if not _is_xl(tensors, layout):
        return False
    blocks, attention = _LOWEST[layout.naming]
    pattern = re.compile(re.escape(layout.prefix) + blocks)
    there = {int(found[1]) for name in tensors if (found := pattern.match(name))}
    # One far behind the others is a leftover.
    last = max((block for block in there if block - 1 in there), default=0)
    if f"{layout.prefix}{attention.format(last)}" in tensors:
        return False
    encoders = [name for name in _text_encoders(tensors, layout) if name.startswith(_XLS_TEXT)]
    return all(name.startswith(_REFINERS_TEXT) for name in encoders)


def _enters_through(tensors: Names, layout: Layout) -> Literal["convolution", "matrix"] | None:
    """What most attention is entered through: a 1x1 convolution in SD 1.x, a matrix in SD 2.x and
    XL. None where there is neither."""
    attentions = {
        name.partition(".transformer_blocks.")[0] for name in usual_targets(tensors, layout)
    }
    doors = [tensors.get(f"{name}.proj_in.weight") for name in attentions]
    matrices = [len(door.shape) == 2 for door in doors if door is not None]
    if not matrices:
        return None
    return "matrix" if 2 * sum(matrices) >= len(matrices) else "convolution"


def usual_targets(tensors: Names, layout: Layout) -> list[str]:
    """The targets by their names in the file, of the width that most of them have."""
    widths = {name: t.shape[-1:] for name, t in tensors.items() if layout.target(name)}
    usual = Counter(widths.values()).most_common(1)
    return [name for name, width in widths.items() if width == usual[0][0]]


def _text_encoders(tensors: Names, layout: Layout) -> Iterator[str]:
    """A tensor of each text encoder, which no leftover is: of its words. Without what stands before
    all names of the model."""
    outer = layout.outer or ""
    words = (name for name in tensors if name.endswith("token_embedding.weight"))
    return (name.removeprefix(outer) for name in words if name.startswith(outer))


#: In the names that single files of transformers have; older single files have others.
_CLIP_L = TextEncoderSpec(
    "clip_l", "text_encoder", "text_encoders.clip_l.transformer.", "transformers", pads=CLIP_END
)
_CLIP_G = TextEncoderSpec(
    "clip_g",
    "text_encoder_2",
    "text_encoders.clip_g.transformer.",
    "transformers",
    pools="projection",
)
SD1 = Family(
    "sd1",
    "Stable Diffusion 1.x",
    (replace(_CLIP_L, prefix="cond_stage_model.transformer."),),
    matches=lambda tensors, layout: True,
    kohya="sd_v1",
    modelspec="stable-diffusion-v1",
    heads=8,
    usually_epsilon=True,
)
SD2 = Family(
    "sd2",
    "Stable Diffusion 2.x",
    # The UNet reads the last layer but one; diffusers' copies do not even hold the last.
    (TextEncoderSpec("clip_h", "text_encoder", "cond_stage_model.model.", "openclip", 1),),
    matches=lambda tensors, layout: _enters_through(tensors, layout) == "matrix",
    kohya="sd_v2",
    modelspec="stable-diffusion-v2-512",
    velocity_side=96,
)
SDXL = Family(
    "sdxl",
    "Stable Diffusion XL",
    (
        replace(_CLIP_L, prefix="conditioner.embedders.0.transformer."),
        replace(_CLIP_G, prefix="conditioner.embedders.1.model.", naming="openclip"),
    ),
    matches=_is_xl,
    kohya="sdxl_base_v1-0",
    modelspec="stable-diffusion-xl-v1-base",
    penultimate=True,
    latent_side=128,
    latent_scale=0.13025,
    sizes=6,
    single_file_modules=True,
    entries={
        "ldm": {"add_embedding.linear_1.weight": "label_emb.0.0.weight"},
        "diffusers": {"add_embedding.linear_1.weight": "add_embedding.linear_1.weight"},
    },
)
REFINER = replace(
    SDXL,
    name="sdxl-refiner",
    title="the refiner of Stable Diffusion XL",
    text_encoders=(replace(_CLIP_G, prefix=_REFINERS_TEXT, naming="openclip"),),
    matches=_is_refiner,
    kohya="sdxl_refiner_v1-0",
    modelspec="stable-diffusion-xl-v1-refiner",
    sizes=5,
    aesthetics=6.0,
)
_TRANSFORMERS_TOKENS = "context_embedder.weight"
_TRANSFORMERS_POOLED = "time_text_embed.text_embedder.linear_1.weight"
_T5 = TextEncoderSpec(
    "t5xxl", "text_encoder_3", "text_encoders.t5xxl.transformer.", "t5", positions=256
)
SD3 = Family(
    "sd3",
    "Stable Diffusion 3",
    (replace(_CLIP_L, pools="projection"), _CLIP_G, _T5),
    signs={
        "original": re.compile(r"joint_blocks\.\d"),
        "diffusers": re.compile(r"pos_embed\.proj\."),
    },
    kohya="sd3",
    modelspec="stable-diffusion-3",
    penultimate=True,
    latent_side=128,
    latent_scale=1.5305,
    latent_shift=0.0609,
    flow={"shift": 3.0},
    guidance=7.0,
    entries={
        "original": {
            _TRANSFORMERS_TOKENS: "context_embedder.weight",
            _TRANSFORMERS_POOLED: "y_embedder.mlp.0.weight",
        },
        "diffusers": {name: name for name in (_TRANSFORMERS_TOKENS, _TRANSFORMERS_POOLED)},
    },
)
FLUX = Family(
    "flux",
    "Flux.1",
    (
        replace(_CLIP_L, rows=False, pools="end"),
        replace(_T5, folder="text_encoder_2", positions=512),
    ),
    signs={
        "original": re.compile(r"double_blocks\.\d"),
        "diffusers": re.compile(r"single_transformer_blocks\.\d"),
    },
    kohya="flux1",
    modelspec="flux-1-dev",
    latent_side=128,
    latent_scale=0.3611,
    latent_shift=0.1159,
    flow={"shift": 3.0, "use_dynamic_shifting": True},
    guidance=3.5,
    entries={
        "original": {
            _TRANSFORMERS_TOKENS: "txt_in.weight",
            _TRANSFORMERS_POOLED: "vector_in.in_layer.weight",
        },
        "diffusers": {name: name for name in (_TRANSFORMERS_TOKENS, _TRANSFORMERS_POOLED)},
    },
)
_WANS_TOKENS = "condition_embedder.text_embedder.linear_1.weight"
WAN = Family(
    "wan",
    "Wan 2.1 (video)",
    (
        TextEncoderSpec(
            "umt5", "text_encoder", "text_encoders.umt5xxl.transformer.", "t5", positions=512
        ),
    ),
    signs={
        "original": re.compile(r"blocks\.\d+\.cross_attn\."),
        "diffusers": re.compile(r"blocks\.\d+\.attn2\."),
    },
    kohya="wan2.1",
    modelspec="wan-2.1",
    entries={
        "original": {_WANS_TOKENS: "text_embedding.0.weight"},
        "diffusers": {_WANS_TOKENS: _WANS_TOKENS},
    },
)
#: In the order in which they are looked for: what is more particular comes first.
FAMILIES: dict[str, Family] = {one.name: one for one in (REFINER, SDXL, SD2, SD1, SD3, FLUX, WAN)}

"""Which model a checkpoint is, told by its tensors' names and shapes and never by their number.

Distilled models have fewer blocks, inpainting models more input channels and scaled-down models
other widths; the names stay.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, TypeVar

from patch_spec.base import Family as FamilyName
from sepme_cli.checkpoints.structure.layout import EMA, Layout
from sepme_cli.errors import UnsupportedError


class Shaped(Protocol):
    """What has a shape: all that is looked at of a tensor here."""

    @property
    def shape(self) -> tuple[int, ...]: ...


Tensor = TypeVar("Tensor", bound=Shaped)
Names = Mapping[str, Shaped]

CLIP_END = 49407
"""The token that ends a text for CLIP."""


@dataclass(frozen=True)
class TextStream:
    """One text encoder.

    name: what a patch calls it. folder: where it is in a model folder. prefix: what its tensors'
    names begin with in a single file; naming: whose names follow there. unused_layers: how many
    of the last layers in a single file no prompt passes through. pads: the token that fills a
    prompt up, where no tokenizer says it: CLIP's end, or 0 as OpenCLIP does.
    """

    name: str
    folder: str
    prefix: str
    naming: Literal["transformers", "openclip"]
    unused_layers: int = 0
    pads: int = 0


@dataclass(frozen=True)
class Family:
    """A family of models that share names and text encoders: all that is particular to it.

    title: what people call it. matches: whether a UNet of this layout, among these tensors, is of
    the family; the first of `FAMILIES` that matches is meant. penultimate: the UNet reads the text
    encoders' last layer but one, without the final norm. heads: of the UNet's attention at every
    level; None where heads are 64 wide instead. latent_side: of the images it was trained on.
    latent_scale: what latents are multiplied by. sizes: how many numbers the UNet embeds beside
    the time step and the pooled text: sizes and crops, 0 for none of it. aesthetics: how well made
    an image it is asked for, in place of the last two of these. velocity_side: the latent side of
    those of its models that predict velocity, which the spread of a bias tells; None where there
    are none. only_epsilon: whether all its models predict noise, so that nobody needs to be told
    what was detected. kohya: what kohya's scripts call it. modelspec: its architecture in
    ModelSpec. single_file_modules: whether kohya's scripts name its modules as single files do,
    and not as diffusers does.
    """

    name: FamilyName
    title: str
    streams: tuple[TextStream, ...]
    matches: Callable[[Names, Layout], bool] = field(repr=False)
    kohya: str
    modelspec: str
    heads: int | None = None
    penultimate: bool = False
    latent_side: int = 64
    latent_scale: float = 0.18215
    sizes: int = 0
    aesthetics: float | None = None
    velocity_side: int | None = None
    only_epsilon: bool = False
    single_file_modules: bool = False

    @property
    def pools(self) -> bool:
        """Whether the UNet reads pooled text, with sizes and crops."""
        return self.sizes > 0


# What tells families apart, in either naming: how attention is entered, what embeds sizes and
# crops, and the lowest level's attention.
_ENTRANCE = {"ldm": ".1.proj_in.weight", "diffusers": ".proj_in.weight"}
_CONDITION = {"ldm": "label_emb.0.0.weight", "diffusers": "add_embedding.linear_1.weight"}
_LOWEST = {
    "ldm": (r"input_blocks\.(\d+)\.", "input_blocks.{}.1.norm.weight"),
    "diffusers": (r"down_blocks\.(\d+)\.", "down_blocks.{}.attentions.0.norm.weight"),
}
_REFINERS_TEXT = "conditioner.embedders.0.model."


def _is_xl(tensors: Names, layout: Layout) -> bool:
    """Whether sizes and crops condition the UNet; SD 2.1 unclip has those names for an image."""
    if f"{layout.prefix}{_CONDITION[layout.naming]}" not in tensors:
        return False
    outer = layout.outer or ""
    if any(name.startswith(f"{outer}cond_stage_model.") for name in tensors):
        return False
    text = any(name.startswith(f"{outer}conditioner.") for name in tensors)
    return text or any(".transformer_blocks.1." in name for name in tensors)


def _is_refiner(tensors: Names, layout: Layout) -> bool:
    """By the only text encoder; in a UNet alone by the lowest level, which has no attention."""
    if not _is_xl(tensors, layout):
        return False
    outer = layout.outer or ""
    if any(name.startswith(f"{outer}conditioner.") for name in tensors):
        return any(name.startswith(outer + _REFINERS_TEXT) for name in tensors)
    blocks, attention = _LOWEST[layout.naming]
    pattern = re.compile(re.escape(layout.prefix) + blocks)
    blocks_there = [int(found[1]) for name in tensors if (found := pattern.match(name))]
    last = max(blocks_there, default=0)
    return f"{layout.prefix}{attention.format(last)}" not in tensors


def _enters_through_a_matrix(tensors: Names, layout: Layout) -> bool:
    """SD 1.x enters its attention through a 1x1 convolution, SD 2.x through a matrix."""
    entrance = (
        tensor
        for name, tensor in tensors.items()
        if name.startswith(layout.prefix) and name.endswith(_ENTRANCE[layout.naming])
    )
    first = next(entrance, None)
    return first is not None and len(first.shape) == 2


SD1 = Family(
    "sd1",
    "Stable Diffusion 1.x",
    (
        TextStream(
            "clip_l",
            "text_encoder",
            "cond_stage_model.transformer.",
            "transformers",
            pads=CLIP_END,
        ),
    ),
    matches=lambda tensors, layout: True,
    kohya="sd_v1",
    modelspec="stable-diffusion-v1",
    heads=8,
    only_epsilon=True,
)
SD2 = Family(
    "sd2",
    "Stable Diffusion 2.x",
    # The UNet reads the last layer but one; diffusers' copies do not even hold the last.
    (TextStream("clip_h", "text_encoder", "cond_stage_model.model.", "openclip", 1),),
    matches=_enters_through_a_matrix,
    kohya="sd_v2",
    modelspec="stable-diffusion-v2-512",
    velocity_side=96,
)
SDXL = Family(
    "sdxl",
    "Stable Diffusion XL",
    (
        TextStream(
            "clip_l",
            "text_encoder",
            "conditioner.embedders.0.transformer.",
            "transformers",
            pads=CLIP_END,
        ),
        TextStream("clip_g", "text_encoder_2", "conditioner.embedders.1.model.", "openclip"),
    ),
    matches=_is_xl,
    kohya="sdxl_base_v1-0",
    modelspec="stable-diffusion-xl-v1-base",
    penultimate=True,
    latent_side=128,
    latent_scale=0.13025,
    sizes=6,
    single_file_modules=True,
)
REFINER = replace(
    SDXL,
    name="sdxl-refiner",
    title="the refiner of Stable Diffusion XL",
    streams=(TextStream("clip_g", "text_encoder_2", _REFINERS_TEXT, "openclip"),),
    matches=_is_refiner,
    kohya="sdxl_refiner_v1-0",
    modelspec="stable-diffusion-xl-v1-refiner",
    sizes=5,
    aesthetics=6.0,
)
#: In the order in which they are looked for: what is more particular comes first.
FAMILIES: dict[str, Family] = {one.name: one for one in (REFINER, SDXL, SD2, SD1)}

_STRANGERS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(.*\.)?double_blocks\.\d|single_transformer_blocks\.\d"), "a Flux model"),
    (
        re.compile(r"(.*\.)?joint_blocks\.\d|transformer_blocks\.\d+\.attn\.add_k_proj\."),
        "a Stable Diffusion 3 model",
    ),
    (re.compile(r".*\.(time_stack|motion_modules)\."), "a video model"),
    (re.compile(r"control_model\.|controlnet_cond_embedding\."), "a ControlNet"),
    (re.compile(r"lora_(unet|te\d?)_|.*\.lora(_[AB]|_up|_down|\.up|\.down)\."), "a LoRA"),
)
"""What is met where a Stable Diffusion checkpoint is expected: a name of its, and what it is."""

_EXPECTED = "tensors named model.diffusion_model.input_blocks or down_blocks"


def detect(tensors: Mapping[str, Tensor]) -> tuple[Family, Layout]:
    """The family and layout of a checkpoint, or of a UNet alone, with these tensors.

    Raises UnsupportedError for every other kind of file, saying which kind where that is known.
    """
    for pattern, title in _STRANGERS:
        if met := next((name for name in tensors if pattern.match(name)), None):
            raise UnsupportedError(
                f"this is {title} ({met}), and sepme patches the cross-attention of "
                "Stable Diffusion checkpoints (1.x, 2.x, XL)",
                expected=_EXPECTED,
                found=title,
            )
    layout = Layout.of(tensors)
    if layout is None and any(name.startswith(f"{EMA}diffusion_model") for name in tensors):
        raise UnsupportedError(
            "this holds the moving average (EMA) of a UNet alone, under names without dots that "
            "programs do not load; have it saved as the model's own weights first",
            expected=_EXPECTED,
            found=f"tensors named {EMA}…",
        )
    if layout is None:
        raise UnsupportedError(
            "there is no Stable Diffusion UNet here",
            expected=_EXPECTED,
            found=f"{len(tensors)} other tensors",
        )
    return next(f for f in FAMILIES.values() if f.matches(tensors, layout)), layout

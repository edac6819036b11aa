"""Which model a checkpoint is, told by its tensors' names and shapes and never by their number.

Distilled models have fewer blocks, inpainting models more input channels and scaled-down models
other widths; the names stay.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, TypeVar

from patch_spec.base import Family as FamilyName
from patch_spec.streams import stream_of
from sepme_cli.checkpoints.structure.layout import EMA, Layout
from sepme_cli.errors import UnsupportedError


class Shaped(Protocol):
    """What has a shape: all that is looked at of a tensor here."""

    @property
    def shape(self) -> tuple[int, ...]: ...


Tensor = TypeVar("Tensor", bound=Shaped)
Names = Mapping[str, Shaped]

Prediction = Literal["epsilon", "velocity"]
"""What a UNet was trained to predict: noise, or velocity."""

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
    are none. usually_epsilon: whether hardly any of its models predicts velocity, so that
    nobody needs to be told where nothing says so. kohya: what kohya's scripts call it. modelspec:
    its architecture in ModelSpec. single_file_modules: whether kohya's scripts name its modules as
    single files do, and not as diffusers does. entries: by naming, its targets outside of the
    cross-attention, to their names in the file.
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
    usually_epsilon: bool = False
    single_file_modules: bool = False
    entries: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False)

    @property
    def pools(self) -> bool:
        """Whether the UNet reads pooled text, with sizes and crops."""
        return self.sizes > 0

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
    if any(".transformer_blocks.1." in name for name in _targets(tensors, layout)):
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
    attentions = {name.partition(".transformer_blocks.")[0] for name in _targets(tensors, layout)}
    doors = [tensors.get(f"{name}.proj_in.weight") for name in attentions]
    matrices = [len(door.shape) == 2 for door in doors if door is not None]
    if not matrices:
        return None
    return "matrix" if 2 * sum(matrices) >= len(matrices) else "convolution"


def _targets(tensors: Names, layout: Layout) -> list[str]:
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
    usually_epsilon=True,
)
SD2 = Family(
    "sd2",
    "Stable Diffusion 2.x",
    # The UNet reads the last layer but one; diffusers' copies do not even hold the last.
    (TextStream("clip_h", "text_encoder", "cond_stage_model.model.", "openclip", 1),),
    matches=lambda tensors, layout: _enters_through(tensors, layout) == "matrix",
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
    entries={
        "ldm": {"add_embedding.linear_1.weight": "label_emb.0.0.weight"},
        "diffusers": {"add_embedding.linear_1.weight": "add_embedding.linear_1.weight"},
    },
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
    (
        re.compile(r".*\.(time_stack|motion_modules|temp_attentions|temp_convs)\."),
        "a video model",
    ),
    (re.compile(r"control_model\.|controlnet_cond_embedding\."), "a ControlNet"),
    (re.compile(r"lora_(unet|te\d?)_|.*\.lora(_[AB]|_up|_down|\.up|\.down)\."), "a LoRA"),
)
"""What is met where a Stable Diffusion checkpoint is expected: a name of its, and what it is."""

_ALONE: tuple[tuple[re.Pattern[str], str, str], ...] = (
    (
        re.compile(re.escape(EMA) + "diffusion_model"),
        "a moving average (EMA) alone, under names that programs do not load",
        "have it saved as the model's own weights first",
    ),
    (
        re.compile(r"[a-z0-9-]+\.(basis|shift|(up|down)\.(down|mid|up)_block.*)"),
        "a patch",
        "name the model first, then its patches",
    ),
    (
        re.compile(r"(ip_adapter|image_proj|perceiver_resampler)\."),
        "an IP-Adapter",
        "name the model that it is used with",
    ),
    (
        re.compile(r"((.*\.)?vision_model|visual)\."),
        "an image encoder (CLIP)",
        "name the model that it is used with",
    ),
    (
        re.compile(r"(.*\.)?(token_embedding\.weight|SelfAttention\.[qkvo]\.weight)"),
        "a text encoder",
        "name the model that it belongs to; --text-encoder takes it, beside a MODEL without one",
    ),
    (
        re.compile(r"(.*\.)?(de|en)coder\.(conv_in|(down|up|mid)(_blocks?)?)\."),
        "a VAE",
        "name the model that it belongs to",
    ),
    (
        re.compile(r"emb_params|string_to_param.*|clip_[lgh]|<.*>"),
        "a textual inversion (an embedding)",
        "name the model that it is used with",
    ),
    (
        re.compile(r"model\.0\.weight|model\.1\.sub\.|body\.\d+\.rdb|conv_first\."),
        "an upscaler",
        "name a Stable Diffusion checkpoint",
    ),
    (
        re.compile(r"(.*\.)?attn2\.to_[kv]\.weight"),
        "a part of a UNet's weights, as UCE and ESD save them",
        "name the model that was edited; sepme import --edited makes a patch of them",
    ),
    (
        re.compile(r"(.*\.)?(blocks|layers|transformer_blocks)\.\d+\..*(attn|attention)"),
        "a transformer, of another architecture",
        "name a Stable Diffusion checkpoint (1.x, 2.x, XL)",
    ),
)
"""What else is met that holds no UNet: a name of its, what it is, and what to do."""

_EXPECTED = "tensors named model.diffusion_model.input_blocks or down_blocks"


def detect(tensors: Mapping[str, Tensor]) -> tuple[Family, Layout]:
    """The family and layout of a checkpoint, or of a UNet alone, with these tensors.

    Told by the targets and what is around them: a few tensors of another model, which merging and
    training leave behind, say nothing. Raises UnsupportedError for every other kind of file,
    saying which kind where that is known.
    """
    layout = _layout(tensors)
    targets = [] if layout is None else _targets(tensors, layout)
    for pattern, title in _STRANGERS:
        met = [name for name in tensors if pattern.match(name)]
        if met and len(met) >= len(targets):
            raise UnsupportedError(
                f"this is {title} ({met[0]}), and sepme patches the cross-attention of "
                "Stable Diffusion checkpoints (1.x, 2.x, XL)"
                + ("; sepme import makes a patch of one" if title == "a LoRA" else ""),
                expected=_EXPECTED,
                found=title,
            )
    if layout is None:
        raise _no_unet(tensors)
    family = next(f for f in FAMILIES.values() if f.matches(tensors, layout))
    return family, replace(layout, entries=family.entries.get(layout.naming, {}))


def _layout(tensors: Mapping[str, Tensor]) -> Layout | None:
    """Of the layouts that the names can have, the one that finds most targets."""
    return max(
        Layout.all_of(tensors),
        key=lambda layout: sum(layout.target(name) is not None for name in tensors),
        default=None,
    )


def _no_unet(names: Iterable[str]) -> UnsupportedError:
    names = list(names)
    for pattern, title, advice in _ALONE:
        if met := next((name for name in names if pattern.match(name)), None):
            return UnsupportedError(
                f"this is {title} ({met}), with no Stable Diffusion UNet; {advice}",
                expected=_EXPECTED,
                found=title,
            )
    return UnsupportedError(
        "there is no Stable Diffusion UNet here",
        expected=_EXPECTED,
        found=f"{len(names)} other tensors",
    )

"""Which model a checkpoint is, told by its tensors' names and shapes and never by their number.

Distilled models have fewer blocks, inpainting models more input channels and scaled-down models
other widths; the names stay.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from patch_spec.manifest import Family as FamilyName
from sepme_cli.checkpoints.structure.layout import Layout
from sepme_cli.errors import UnsupportedError


class Shaped(Protocol):
    """What has a shape: all that is looked at of a tensor here."""

    @property
    def shape(self) -> tuple[int, ...]: ...


Tensor = TypeVar("Tensor", bound=Shaped)


@dataclass(frozen=True)
class TextStream:
    """One text encoder.

    name: what a patch calls it. folder: where it is in a model folder. prefix: what its tensors'
    names begin with in a single file; naming: whose names follow there. unused_layers: how many
    of the last layers in a single file no prompt passes through.
    """

    name: str
    folder: str
    prefix: str
    naming: Literal["transformers", "openclip"]
    unused_layers: int = 0


@dataclass(frozen=True)
class Family:
    """A family of models that share names and text encoders. title: what people call it."""

    name: FamilyName
    title: str
    streams: tuple[TextStream, ...]


SD1 = Family(
    "sd1",
    "Stable Diffusion 1.x",
    (TextStream("clip_l", "text_encoder", "cond_stage_model.transformer.", "transformers"),),
)
SD2 = Family(
    "sd2",
    "Stable Diffusion 2.x",
    # The UNet reads the last layer but one; diffusers' copies do not even hold the last.
    (TextStream("clip_h", "text_encoder", "cond_stage_model.model.", "openclip", 1),),
)
SDXL = Family(
    "sdxl",
    "Stable Diffusion XL",
    (
        TextStream(
            "clip_l", "text_encoder", "conditioner.embedders.0.transformer.", "transformers"
        ),
        TextStream("clip_g", "text_encoder_2", "conditioner.embedders.1.model.", "openclip"),
    ),
)
REFINER = Family(
    "sdxl-refiner",
    "the refiner of Stable Diffusion XL",
    (TextStream("clip_g", "text_encoder_2", "conditioner.embedders.0.model.", "openclip"),),
)

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
_ALONE: tuple[tuple[re.Pattern[str], str, str], ...] = (
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
        re.compile(r"(.*\.)?(blocks|layers|transformer_blocks)\.\d+\..*(attn|attention)"),
        "a transformer, of another architecture",
        "name a Stable Diffusion checkpoint (1.x, 2.x, XL)",
    ),
)
"""What else is met that holds no UNet: a name of its, what it is, and what to do."""
_WRAPPERS = re.compile(r"((module|_orig_mod|model\.module|model\._orig_mod)\.)+")
"""What DataParallel, Accelerate and torch.compile put before a model's names."""

_EXPECTED = "tensors named model.diffusion_model.input_blocks or down_blocks"

# What tells families apart, in either naming: what embeds sizes and crops, and the lowest level's
# attention.
_CONDITION = {"ldm": "label_emb.0.0.weight", "diffusers": "add_embedding.linear_1.weight"}
_LOWEST = {
    "ldm": (r"input_blocks\.(\d+)\.", "input_blocks.{}.1.norm.weight"),
    "diffusers": (r"down_blocks\.(\d+)\.", "down_blocks.{}.attentions.0.norm.weight"),
}


def detect(tensors: Mapping[str, Tensor]) -> tuple[Family, Layout]:
    """The family and layout of a checkpoint, or of a UNet alone, with these tensors.

    Told by the targets and what is around them: a few tensors of another model, which merging and
    training leave behind, say nothing. Raises UnsupportedError for every other kind of file,
    saying which kind where that is known.
    """
    layout = _layout(tensors)
    targets = {} if layout is None else _targets(tensors, layout)
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
    return _family(tensors, layout, targets), layout


def _no_unet(names: Iterable[str]) -> UnsupportedError:
    names = list(names)
    bare = [found[0] for name in names if (found := _WRAPPERS.match(name))]
    if bare and Layout.of(_WRAPPERS.sub("", name, count=1) for name in names) is not None:
        return UnsupportedError(
            f"the names of this model's tensors begin with {bare[0]!r}, as DataParallel and "
            "torch.compile leave them: save the model inside the wrapper "
            "(model.module, model._orig_mod)",
            expected=_EXPECTED,
            found=f"{len(names)} tensors, {len(bare)} of them named {bare[0]}…",
        )
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


def _layout(tensors: Mapping[str, Tensor]) -> Layout | None:
    """Of the layouts that the names can have, the one that finds most targets."""
    return max(
        Layout.all_of(tensors),
        key=lambda layout: sum(layout.target(name) is not None for name in tensors),
        default=None,
    )


def _targets(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The targets by their names in the file, of the width that most of them have."""
    found = {name: tensor for name, tensor in tensors.items() if layout.target(name)}
    widths = Counter(tensor.shape[-1:] for tensor in found.values())
    usual = max(widths, key=lambda width: widths[width], default=())
    return {name: tensor for name, tensor in found.items() if tensor.shape[-1:] == usual}


def _family(tensors: Mapping[str, Tensor], layout: Layout, targets: Mapping[str, Tensor]) -> Family:
    # SD 1.x enters its attention through a 1x1 convolution, SD 2.x and XL through a matrix.
    attentions = {name.partition(".transformer_blocks.")[0] for name in targets}
    doors = [tensors.get(f"{name}.proj_in.weight") for name in attentions]
    matrices = [len(door.shape) == 2 for door in doors if door is not None]
    if matrices and 2 * sum(matrices) < len(matrices):
        return SD1
    if _is_xl(tensors, layout, targets):
        return REFINER if _is_refiner(tensors, layout) else SDXL
    return SD2 if matrices else SD1


def _is_xl(tensors: Mapping[str, Tensor], layout: Layout, targets: Mapping[str, Tensor]) -> bool:
    """Whether sizes and crops condition the UNet; SD 2.1 unclip has those names for an image."""
    if f"{layout.prefix}{_CONDITION[layout.naming]}" not in tensors:
        return False
    if any(".transformer_blocks.1." in name for name in targets):
        return True
    return any(name.startswith("conditioner.") for name in _text_encoders(tensors))


def _is_refiner(tensors: Mapping[str, Tensor], layout: Layout) -> bool:
    """By the lowest level, which has no attention, unless there is a text encoder of XL's own."""
    blocks, attention = _LOWEST[layout.naming]
    pattern = re.compile(re.escape(layout.prefix) + blocks)
    there = {int(found[1]) for name in tensors if (found := pattern.match(name))}
    # One far behind the others is a leftover.
    last = max((block for block in there if block - 1 in there), default=0)
    if f"{layout.prefix}{attention.format(last)}" in tensors:
        return False
    own = REFINER.streams[0].prefix
    encoders = (name for name in _text_encoders(tensors) if name.startswith("conditioner."))
    return all(name.startswith(own) for name in encoders)


def _text_encoders(names: Iterable[str]) -> Iterator[str]:
    """A tensor of each text encoder, which no leftover is: of its words."""
    return (name for name in names if name.endswith("token_embedding.weight"))

"""Which family a checkpoint is of; and of what is none of them, what it is.

Told by the targets and what is around them: a few tensors of another model, which merging and
training leave behind, say nothing.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from sepme_cli.checkpoints.structure import families
from sepme_cli.checkpoints.structure.families import Family, Shaped, usual_targets
from sepme_cli.checkpoints.structure.layout import EMA, Layout, transformer_prefixes
from sepme_cli.errors import UnsupportedError

Tensor = TypeVar("Tensor", bound=Shaped)

_STRANGERS: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"control_model\.|controlnet_(cond|x|pos)_embed(ding|der)|controlnet_blocks\."),
        "a ControlNet",
    ),
    (
        re.compile(r"(.*\.)?double_blocks\.\d|single_transformer_blocks\.\d"),
        "a transformer of Flux's kind",
    ),
    (
        re.compile(r"(.*\.)?joint_blocks\.\d|transformer_blocks\.\d+\.attn\.add_k_proj\."),
        "a transformer of Stable Diffusion 3's kind",
    ),
    (
        re.compile(r".*\.(time_stack|time_mixer|temporal_transformer_blocks)\."),
        "a video model that reads an image and no text",
    ),
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
        re.compile(r"(.*\.)?motion_modules\."),
        "a motion module (AnimateDiff)",
        "name the Stable Diffusion 1.x model that it is used with, whose patches work with it",
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
        "name a Stable Diffusion checkpoint, or one of Flux.1 or Wan 2.1",
    ),
)
"""What else is met that holds no UNet: a name of its, what it is, and what to do."""

_EXPECTED = "tensors named model.diffusion_model.input_blocks, down_blocks, joint_blocks, …"


def detect(tensors: Mapping[str, Tensor]) -> tuple[Family, Layout]:
    """The family and layout of a checkpoint, or of a UNet alone, with these tensors.

    Raises UnsupportedError for every other kind of file, saying which kind where that is known.
    """
    layout = _layout(tensors)
    targets = [] if layout is None else usual_targets(tensors, layout)
    if layout is None and (found := _transformer(tensors)) is not None:
        return found
    for pattern, title in _STRANGERS:
        met = [name for name in tensors if pattern.match(name)]
        if met and len(met) >= len(targets):
            raise UnsupportedError(
                f"this is {title} ({met[0]}), and sepme patches the layers that read text in "
                "Stable Diffusion, Flux.1 and Wan 2.1"
                + ("; sepme import makes a patch of one" if title == "a LoRA" else ""),
                expected=_EXPECTED,
                found=title,
            )
    if layout is None:
        raise _no_unet(tensors)
    family = next(f for f in families.FAMILIES.values() if f.matches(tensors, layout))
    return family, replace(layout, entries=family.entries.get(layout.naming, {}))


def _layout(tensors: Mapping[str, Tensor]) -> Layout | None:
    """Of the layouts that the names can have, the one that finds most targets."""
    return max(
        Layout.all_of(tensors),
        key=lambda layout: sum(layout.target(name) is not None for name in tensors),
        default=None,
    )


def _transformer(tensors: Mapping[str, Tensor]) -> tuple[Family, Layout] | None:
    """A transformer of a family: its entries in their places, and its signs beside them."""
    found = [
        (family, Layout(prefix, naming=naming, entries=entries))
        for family in families.FAMILIES.values()
        for naming, sign in family.signs.items()
        for entries in [family.entries[naming]]
        for prefix in transformer_prefixes(tensors, entries.values())
        if any(sign.match(name, len(prefix)) for name in tensors if name.startswith(prefix))
    ]
    if len({layout.prefix for _, layout in found}) > 1:
        places = ", ".join(layout.prefix or "the file itself" for _, layout in found)
        raise UnsupportedError(
            f"there are several transformers here ({places}); save the one to use in its own file",
            expected="one transformer",
            found=places,
        )
    return next(iter(found), None)


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

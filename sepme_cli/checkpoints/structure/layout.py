"""How a checkpoint names its UNet, and what a patch calls its targets.

Targets are the image-independent layers: the keys and values of cross-attention. A patch names
them as diffusers does. A single-file checkpoint has CompVis' names (LDM): there, with
L = layers_per_block + 1, ``input_blocks.{i}.1`` is
``down_blocks.{(i - 1) // L}.attentions.{(i - 1) % L}``, ``middle_block.1`` is
``mid_block.attentions.0`` and ``output_blocks.{i}.1`` is ``up_blocks.{i // L}.attentions.{i % L}``.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Self

from sepme_cli.errors import UnsupportedError

DenoiserNaming = Literal["ldm", "original", "diffusers"]
"""Whose names a denoiser's tensors have: CompVis' for a UNet, its authors' for a transformer, or
diffusers' for either."""
Naming = Literal[DenoiserNaming, "transformers", "openclip", "t5"]
"""Whose names a network's tensors have."""

UNET = "model.diffusion_model."
EMA = "model_ema."

_FIRST = {"ldm": "input_blocks.0.0.weight", "diffusers": "conv_in.weight"}
"""The UNet's first convolution, by whose names it has."""
_IN_PIPELINE = ("unet.", "transformer.")
"""What stands before a denoiser's names in a whole pipeline of diffusers' in one file."""
_WRAPPED = re.compile(
    r"(?:(?:module|_orig_mod|state_dict|model|diffusion_model|unet|transformer|dit|pipe|net"
    r"|model_ema|ema_model|ema)\.)+"
)
"""What else programs put there: DataParallel, torch.compile, Lightning, keepers of averages."""
_WRAPPER = re.compile(r"(?:(?:module|_orig_mod)\.)+$")
"""What of that is around the UNet itself, and not around the model that it is part of."""

# As programs write numbers: 01, or the digits of another script, would give one weight two names.
_NUMBER = r"(?:0|[1-9][0-9]{0,3})"
_REST = rf"transformer_blocks\.{_NUMBER}\.attn2\.to_[kv]\.weight"
_LDM_TARGET = re.compile(
    rf"(?:(?P<side>input|output)_blocks\.(?P<block>{_NUMBER})|middle_block)\.1\."
    rf"(?P<rest>{_REST})"
)
_TARGET = re.compile(
    rf"(?:(?P<side>down|up)_blocks\.(?P<level>{_NUMBER})\.attentions\.(?P<index>{_NUMBER})"
    rf"|mid_block\.attentions\.0)\.(?P<rest>{_REST})"
)
_CROSS_ATTENTION = re.compile(
    r"(?!.*\.(?:temp_attentions|motion_modules)\.)"
    r"(?:(?:input|output|down|up)_blocks|mid(?:dle)?_block)\.(?:.*\.)?transformer_blocks\..*?\battn2"
)
"""A cross-attention of a UNet, whatever programs put into the names of what is in it. What video
models have between their frames reads no text."""
_KEYS_OR_VALUES = re.compile(
    r"(?:.*\.)?attn2\.(?:\w+\.)*to_[kv]\.(?:\w+\.)*q?weight|.*attn2to_[kv]weight"
)
"""Those of any UNet, in whatever place and wrapping; of a moving average without dots too."""
_NO_UNETS = re.compile(
    r".*(?:lora|motion_modules|temp_attentions|transformer_in|time_stack|control_model)"
)
"""What has such names and is no UNet that draws."""
_TEXT_ENTRIES = re.compile(
    r"(?:.*\.)?(?:context_embedder|txt_in|y_embedder\.mlp\.0|vector_in\.in_layer|text_embedding\.0"
    r"|(?:time_text_embed|condition_embedder)\.text_embedder\.linear_1)\.weight"
)
"""What reads the text in any transformer."""
_CONTROLNET = "controlnet_"
_PUBLISHED_SPAN = 3
"""L of every published Stable Diffusion."""


@dataclass(frozen=True)
class Layout:
    """How one checkpoint names its UNet.

    prefix: what the denoiser's names begin with; "" in a file that holds nothing else.
    span: L = layers_per_block + 1, the blocks that a level has; of "ldm" only. entries: targets
    outside of the cross-attention, to their names behind the prefix.
    """

    prefix: str
    span: int = 0
    naming: DenoiserNaming = "ldm"
    entries: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, names: Iterable[str]) -> Self | None:
        """The layout of a file with these tensor names; None if it has no such UNet.

        Raises UnsupportedError where there are several, and none is in its usual place.
        """
        return next(iter(cls.all_of(names)), None)

    @classmethod
    def all_of(cls, names: Iterable[str]) -> list[Self]:
        """Every layout that a file with these tensor names may have, the likeliest first; raises as
        `of` does."""
        known = frozenset(names)
        usual = (
            *((prefix, "ldm") for prefix in (UNET, "")),
            *((prefix, "diffusers") for prefix in ("", _IN_PIPELINE[0])),
        )
        if found := list(cls._at(known, usual)):
            return found
        found = list(cls._at(known, _wrapped(known)))
        if len(found) > 1:
            places = ", ".join(layout.prefix for layout in found)
            raise UnsupportedError(
                f"there are several UNets here ({places}); save the one to use in its own file",
                expected="one UNet",
                found=places,
            )
        return found

    @classmethod
    def _at(cls, names: frozenset[str], places: Iterable[tuple[str, str]]) -> Iterator[Self]:
        """The layouts with these prefixes and namings that the names have."""
        for prefix, naming in places:
            if f"{prefix}{_FIRST[naming]}" not in names:
                continue
            if naming == "ldm":
                yield cls(prefix, _span(names, prefix))
            elif any(name.startswith(f"{prefix}down_blocks.") for name in names):
                yield cls(prefix, naming="diffusers")

    @property
    def outer(self) -> str | None:
        """What stands before all names of the model that the denoiser is part of, "" for nothing;
        None where it is alone."""
        inner = _IN_PIPELINE if self.naming == "diffusers" else (UNET,)
        place = _WRAPPER.sub("", self.prefix)
        return next((place.removesuffix(one) for one in inner if place.endswith(one)), None)

    def target(self, name: str) -> str | None:
        """What a patch calls the tensor `name`; None if it is no target."""
        if not name.startswith(self.prefix):
            return None
        bare = name.removeprefix(self.prefix)
        if entry := next((target for target, own in self.entries.items() if own == bare), None):
            return entry
        if self.naming == "diffusers":
            return bare if _TARGET.fullmatch(bare) else None
        found = _LDM_TARGET.fullmatch(name, len(self.prefix))
        # Block 0 is the input convolution.
        if found is None or (found["side"], found["block"]) == ("input", "0"):
            return None
        return f"{self.block(found['side'], found['block'], 'attentions')}.{found['rest']}"

    def stored(self, target: str) -> str:
        """What the checkpoint calls a target: `layout.target(layout.stored(name)) == name`.

        Raises UnsupportedError for a name that no Stable Diffusion has, which a patch may have.
        """
        if target in self.entries:
            return self.prefix + self.entries[target]
        found = _TARGET.fullmatch(target)
        if found is None:
            raise UnsupportedError(
                f"{target} is in no Stable Diffusion that sepme knows",
                expected="down_blocks, mid_block or up_blocks",
                found=target,
            )
        if self.naming == "diffusers":
            return f"{self.prefix}{target}"
        return f"{self.prefix}{self._block(found)}.1.{found['rest']}"

    def check_reached(self, names: Iterable[str]) -> None:
        """UnsupportedError where the keys and values of a cross-attention are not both targets.

        names: of all that is in the UNet; the cross-attentions' own may be among them. A concept
        would live on in what is not a target: in a layer that something has wrapped, renamed or
        quantised, or that is missing here.
        """
        unreached = self._unreached(names)
        if not unreached:
            return
        place, inner = min(unreached.items())
        others = f", and {len(unreached) - 1} more" if len(unreached) > 1 else ""
        raise UnsupportedError(
            f"the keys and values of {place}{others} are not where a Stable Diffusion has them: "
            "patch it before it is quantised, wrapped or taken apart",
            expected="to_k.weight and to_v.weight",
            found=", ".join(sorted(inner)[:8]) or "neither",
        )

    def _unreached(self, names: Iterable[str]) -> dict[str, list[str]]:
        """The cross-attentions, each with what is in it, whose keys or values are no targets."""
        found: dict[str, list[str]] = {}
        reached: Counter[str] = Counter()
        for name in names:
            bare = name.removeprefix(self.prefix)
            if name.startswith(self.prefix) and (place := _CROSS_ATTENTION.match(bare)):
                found.setdefault(place[0], []).append(bare[place.end() :].removeprefix("."))
                reached[place[0]] += self.target(name) is not None
        return {place: inner for place, inner in found.items() if reached[place] != len("kv")}

    def _block(self, target: re.Match[str]) -> str:
        if target["side"] is None:
            return "middle_block"
        number = int(target["level"]) * self.span + int(target["index"])
        if target["side"] == "up":
            return f"output_blocks.{number}"
        return f"input_blocks.{number + 1}"

    def block(
        self, side: str | None, block: str, kind: Literal["attentions", "resnets"], middle: int = 0
    ) -> str:
        """What diffusers calls the attention, or the residual layers, of a block of CompVis'.

        side: "input" or "output"; None in the middle, where there are several, and which is meant.
        """
        if side is None:
            return f"mid_block.{kind}.{middle}"
        if side == "input":
            level, index = divmod(int(block) - 1, self.span)
            return f"down_blocks.{level}.{kind}.{index}"
        level, index = divmod(int(block), self.span)
        return f"up_blocks.{level}.{kind}.{index}"


def span_of(targets: Iterable[str]) -> int:
    """L of the UNet with these targets: every level that goes up attends in all of its blocks."""
    matches = (_TARGET.fullmatch(target) for target in targets)
    up = (int(found["index"]) for found in matches if found and found["side"] == "up")
    return max(up, default=_PUBLISHED_SPAN - 1) + 1


def target_in_part(
    name: str, span: int, entries: Mapping[DenoiserNaming, Mapping[str, str]]
) -> str | None:
    """What a patch calls a tensor of a file that holds parts of a denoiser, in any naming and
    behind whatever programs put before the names; None if it is no target. span: L of the UNet.
    entries: by naming, those of a layout's that are looked for."""
    bare = bare_name(name)
    layouts = (
        Layout("", span),
        Layout("", naming="diffusers"),
        *(Layout("", span, naming, own) for naming, own in entries.items()),
    )
    return next((found for layout in layouts if (found := layout.target(bare))), None)


def bare_name(name: str) -> str:
    """A denoiser's tensor without what programs put before its name."""
    wrapped = _WRAPPED.match(name)
    return name[wrapped.end() :] if wrapped else name


def keys_and_values(names: Iterable[str]) -> list[str]:
    """Those of the names that are keys and values of some UNet, as far as names tell; none of a
    ControlNet's."""
    known = tuple(names)
    if any(_CONTROLNET in name for name in known):
        return []
    return [n for n in known if _KEYS_OR_VALUES.fullmatch(n) and not _NO_UNETS.match(n)]


def text_entries(names: Iterable[str]) -> list[str]:
    """Those of the names that are what reads the text in some transformer; none of a
    ControlNet's."""
    known = tuple(names)
    if any(_CONTROLNET in name for name in known):
        return []
    return [name for name in known if _TEXT_ENTRIES.fullmatch(name)]


def transformer_prefixes(names: Iterable[str], entries: Iterable[str]) -> list[str]:
    """What stands before the names of a transformer that has all of these entries; of several
    those in their usual places."""
    known, entries = frozenset(names), tuple(entries)
    prefixes = sorted(
        name.removesuffix(entries[0])
        for name in known
        if name.endswith(entries[0])
        and all(name.removesuffix(entries[0]) + other in known for other in entries)
    )
    found = [prefix for prefix in prefixes if not prefix or _WRAPPED.fullmatch(prefix)]
    usual = [one for one in (UNET, "", _IN_PIPELINE[1]) if one in found]
    return usual[:1] or found


def ema_twin(name: str, outer: str = "") -> str:
    """The name of the moving average that a full checkpoint keeps of the UNet tensor `name`.

    outer: what stands before all names of the checkpoint.
    """
    return outer + EMA + name.removeprefix(outer).removeprefix("model.").replace(".", "")


def _wrapped(names: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Prefixes and namings that UNets have in unusual places, in the order of their names."""
    for name in sorted(names):
        for naming, first in _FIRST.items():
            prefix = name.removesuffix(first)
            if prefix != name and _WRAPPED.fullmatch(prefix):
                yield prefix, naming


def _span(names: frozenset[str], prefix: str) -> int:
    """L: the first level ends with the first downsampler, ``input_blocks.{L}.0.op``.

    A UNet of one level has none; then all blocks but the first, the input convolution, are its.
    """
    block = re.compile(re.escape(prefix) + rf"input_blocks\.({_NUMBER})\.0\.(op\.weight)?")
    found = [match for name in names if (match := block.match(name))]
    downsamplers = [int(match[1]) for match in found if match[2] and match[1] != "0"]
    return min(downsamplers) if downsamplers else max(int(match[1]) for match in found) + 1

"""The names of a single-file (CompVis, LDM) checkpoint, and of what a patch calls its targets.

Targets are the image-independent layers: the keys and values of cross-attention. A patch names
them as diffusers does; with L = layers_per_block + 1, ``input_blocks.{i}.1`` is
``down_blocks.{(i - 1) // L}.attentions.{(i - 1) % L}``, ``middle_block.1`` is
``mid_block.attentions.0`` and ``output_blocks.{i}.1`` is ``up_blocks.{i // L}.attentions.{i % L}``.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

UNET = "model.diffusion_model."
EMA = "model_ema."

_TARGET = re.compile(
    r"(?:(?P<side>input|output)_blocks\.(?P<block>\d+)|middle_block)\.1\."
    r"(?P<rest>transformer_blocks\.\d+\.attn2\.to_[kv]\.weight)"
)


@dataclass(frozen=True)
class Layout:
    """How one checkpoint names its UNet.

    prefix: what the UNet's names begin with; "" in a file that holds nothing else.
    span: L = layers_per_block + 1, the blocks that a level has.
    """

    prefix: str
    span: int

    @classmethod
    def of(cls, names: Iterable[str]) -> Self | None:
        """The layout of a file with these tensor names; None if it has no such UNet."""
        known = frozenset(names)
        for prefix in (UNET, ""):
            if f"{prefix}input_blocks.0.0.weight" in known:
                return cls(prefix, _span(known, prefix))
        return None

    def target(self, name: str) -> str | None:
        """What a patch calls the tensor `name`; None if it is no target."""
        if not name.startswith(self.prefix):
            return None
        found = _TARGET.fullmatch(name, len(self.prefix))
        if found is None:
            return None
        return f"{self._attention(found['side'], found['block'])}.{found['rest']}"

    def _attention(self, side: str | None, block: str) -> str:
        if side is None:
            return "mid_block.attentions.0"
        if side == "input":
            level, index = divmod(int(block) - 1, self.span)
            return f"down_blocks.{level}.attentions.{index}"
        level, index = divmod(int(block), self.span)
        return f"up_blocks.{level}.attentions.{index}"


def ema_twin(name: str) -> str:
    """The name of the moving average that a full checkpoint keeps of the UNet tensor `name`."""
    return EMA + name.removeprefix("model.").replace(".", "")


def _span(names: frozenset[str], prefix: str) -> int:
    """L: the first level ends with the first downsampler, ``input_blocks.{L}.0.op``.

    A UNet of one level has none; then all blocks but the first, the input convolution, are its.
    """
    block = re.compile(re.escape(prefix) + r"input_blocks\.(\d+)\.0\.(op\.weight)?")
    found = [match for name in names if (match := block.match(name))]
    downsamplers = [int(match[1]) for match in found if match[2]]
    return min(downsamplers) if downsamplers else max(int(match[1]) for match in found) + 1

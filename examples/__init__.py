"""Material to try sepme on: the emoji canvas, a small Stable Diffusion and its judge.

Installed, this package is called `sepme_example`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .emoji.judging import EmojiJudge

MODEL = Path(__file__).with_name("emoji-sd.safetensors")


def judge() -> "EmojiJudge":
    """The canvas' own, for `sepme evaluate --judge sepme_example:judge`."""
    from .emoji.judging import EmojiJudge
    from .emoji.networks import load_judge

    return EmojiJudge(load_judge())

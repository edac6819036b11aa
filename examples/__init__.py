"""Material to try sepme on: the emoji canvas, a small Stable Diffusion and its judge.

Installed, this package is called `sepme_example`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .emoji.judging import EmojiJudge


def judge() -> "EmojiJudge":
    """The canvas' own, for `sepme evaluate --judge sepme_example:judge`."""
    from .emoji.judging import EmojiJudge
    from .emoji.networks import load_judge

    return EmojiJudge(load_judge())

"""Material to try sepme on: the English canvas, a small Stable Diffusion and its judge.

Installed, this package is called `sepme_example`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from .emoji.judging import CanvasJudge

_HERE = Path(__file__).parent


def judge() -> "CanvasJudge":
    """The example model's, for `sepme evaluate --judge sepme_example:judge`."""
    from .emoji.judging import CanvasJudge
    from .emoji.networks import load_judge
    from .english.canvas import OBJECTS, STYLES

    network = load_judge(str(_HERE / "english-judge.safetensors"))
    return CanvasJudge(network, tuple(STYLES), tuple(OBJECTS))


def features() -> "Callable[[Tensor], Tensor]":
    """What the example model's judge sees, for `--features sepme_example:features`: pictures
    [n, 3, 64, 64] to [n, 3584], place by place, so that a copy is told from the like of it."""
    from .emoji.networks import load_judge

    network = load_judge(str(_HERE / "english-judge.safetensors"))
    return lambda pictures: network.features(pictures * 2 - 1).flatten(1)


def first_judge() -> "CanvasJudge":
    """The first canvas's, for `--judge examples:first_judge`; it is not part of the package."""
    from .emoji.judging import CanvasJudge
    from .emoji.networks import load_judge

    return CanvasJudge(load_judge())

"""Material to try sepme on: the English canvas, a small Stable Diffusion and its judge.

Installed, this package is called `sepme_example`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .emoji.judging import CanvasJudge

_HERE = Path(__file__).parent


def judge() -> "CanvasJudge":
    """The example model's, for `sepme evaluate --judge sepme_example:judge`."""
    from .emoji.judging import CanvasJudge
    from .emoji.networks import load_judge
    from .english.canvas import OBJECTS, STYLES

    network = load_judge(str(_HERE / "english-judge.safetensors"))
    return CanvasJudge(network, tuple(STYLES), tuple(OBJECTS))


def first_judge() -> "CanvasJudge":
    """The first canvas's, for `--judge examples:first_judge`; it is not part of the package."""
    from .emoji.judging import CanvasJudge
    from .emoji.networks import load_judge

    return CanvasJudge(load_judge())

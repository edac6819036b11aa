"""Who says what a picture shows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from patch_spec.text import slugify
from sepme_cli.erasure.prompts import COMPANIONS, AsKind, Kind, kinds, other
from sepme_cli.errors import UsageError
from sepme_cli.evaluation.nudenet import NAME, nudenet_judge
from sepme_cli.evaluation.plugins import is_plugin, load_plugin


@runtime_checkable
class Judge(Protocol):
    """Recognises styles, objects, or both."""

    def labels(self, kind: Kind) -> Sequence[str]:
        """What it can tell of that kind; nothing if it does not judge it."""
        ...

    def recognise(self, images: Tensor, kind: Kind) -> Sequence[str]:
        """For each image [n, 3, H, W] in [0, 1], the label it shows most."""
        ...


def knows(judge: Judge, word: str, kind: Kind) -> bool:
    """Whether it can tell a word; "Van Gogh" is the label van_gogh too."""
    return slugify(word) in map(slugify, judge.labels(kind))


def load_judge(spec: str, words: Sequence[tuple[str, AsKind]], device: Any = "cpu") -> Judge:
    """The judge that `spec` names.

    spec: `package.module:factory`, a Python function that returns a Judge; "nudenet"; or a
    transformers image classifier or CLIP model, as a folder or a hub id that was downloaded. words:
    what there is to tell apart, which common words join, so that a CLIP model always has a choice.
    Raises UsageError for what is no judge, UnsupportedError for a model that is none.
    """
    if spec == NAME and not Path(spec).exists():
        return nudenet_judge(word for word, _ in words)
    if is_plugin(spec):
        return _from_python(spec)
    from sepme_cli.diffusion.classifiers import transformers_judge

    names = {
        kind: tuple(
            dict.fromkeys([w for w, said in words if kind in kinds(said)] + [*COMPANIONS[beside]])
        )
        for kind in kinds("any")
        for beside in (other(kind),)
    }
    return transformers_judge(spec, names, device)


def _from_python(spec: str) -> Judge:
    judge = load_plugin("--judge", spec)
    if not isinstance(judge, Judge):
        raise UsageError(
            f"--judge {spec} does not return a judge",
            expected="an object with labels(kind) and recognise(images, kind)",
            found=type(judge).__name__,
        )
    return judge

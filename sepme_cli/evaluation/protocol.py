"""What is asked of a model to see what it can still draw.

Every concept is asked for beside words of the other kind that stay, one half in phrasings that
erasing works on and one half in phrasings that it never sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sepme_cli.erasure.prompts import COMPANIONS, Kind, with_articles

Role = Literal["erased", "retained"]

PHRASINGS = ("{o} in {s} style", "a {s} {o}", "a picture of a {o} in the style of {s}")
UNSEEN = ("a {o} drawn in {s}", "a small {s} drawing of a {o}", "the {o} as {s} would draw it")


@dataclass(frozen=True)
class SamplingOptions:
    """How images are generated, with DDIM or Euler's steps of rectified flow.

    Attributes:
        images: Number of images per concept (of `evaluate`) or prompt (of `sample`).
        seed: Random seed of the first image; each further image has the next number.
        steps: Number of sampling steps.
        guidance: Scale of the guidance; 1 is none, None what the model's family is used with.
        size: Width and height in pixels; None for what the model was made for.
        restore: Maximum number of concepts that `evaluate` restores, one at a time.
    """

    images: int = 12
    seed: int = 0
    steps: int = 20
    guidance: float | None = None
    size: int | None = None
    restore: int = 3


@dataclass(frozen=True)
class Subject:
    """A concept that is looked at."""

    name: str
    kind: Kind
    role: Role


@dataclass(frozen=True)
class Question:
    """A prompt and its seed; style and object: what it names. unseen: in a phrasing that erasing
    never sees."""

    prompt: str
    seed: int
    style: str
    object: str
    unseen: bool

    def word(self, kind: Kind) -> str:
        """What it names of that kind."""
        return self.style if kind == "style" else self.object


def questions(
    subject: Subject, companions: Sequence[str], count: int, first_seed: int = 0
) -> tuple[Question, ...]:
    """`count` questions for a subject with seeds from `first_seed` on, the same for every subject.

    companions: words of the other kind that stay; common ones if there are none.
    """
    beside = companions or COMPANIONS[subject.kind]
    found = []
    for i in range(count):
        companion = beside[(i + i // len(beside)) % len(beside)]
        style, thing = (
            (subject.name, companion) if subject.kind == "style" else (companion, subject.name)
        )
        unseen = i % 2 == 1
        template = (UNSEEN if unseen else PHRASINGS)[i // 2 % len(PHRASINGS)]
        prompt = with_articles(template.format(s=style, o=thing))
        found.append(Question(prompt, first_seed + i, style, thing, unseen))
    return tuple(found)

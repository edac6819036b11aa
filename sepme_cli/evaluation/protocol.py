"""What is asked of a model to see what it can still draw.

Every concept is asked for beside words of the other kind, in phrasings that erasing works on and
in ones that it never sees.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sepme_cli.erasure.prompts import COMPANIONS, Kind, kinds, other, with_articles

Role = Literal["erased", "restored", "retained"]

PHRASINGS = ("{o} in {s} style", "a {s} {o}", "a picture of a {o} in the style of {s}")
UNSEEN = ("{o} drawn in {s}", "a small {s} drawing of a {o}", "the {o} as {s} would draw it")


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

    def names(self, concept: str) -> bool:
        return concept in (self.style, self.object)

    def word(self, kind: Kind) -> str:
        """What it names of that kind."""
        return self.style if kind == "style" else self.object


def questions(
    subjects: Sequence[Subject], count: int, seeds: int, first_seed: int = 0
) -> tuple[Question, ...]:
    """`count` questions of either sort for each subject, each with so many seeds, none twice.

    A subject is asked for beside what is retained of the other kind first.
    """
    found: dict[tuple[str, int], Question] = {}
    for number, subject in enumerate(subjects):
        beside = _beside(subject, subjects)
        for i in range(count):
            companion = beside[(i + number) % len(beside)]
            words = _words(subject, companion)
            for unseen, templates in ((False, PHRASINGS), (True, UNSEEN)):
                template = templates[(i + i // len(beside)) % len(templates)]
                prompt = with_articles(template.format(**words))
                for seed in range(first_seed, first_seed + seeds):
                    question = Question(prompt, seed, words["s"], words["o"], unseen)
                    found.setdefault((prompt, seed), question)
    return tuple(found.values())


def _beside(subject: Subject, subjects: Sequence[Subject]) -> Sequence[str]:
    others = [s for s in subjects if s.kind == other(subject.kind)]
    retained = [s.name for s in others if s.role == "retained"]
    return retained or [s.name for s in others] or COMPANIONS[subject.kind]


def _words(subject: Subject, companion: str) -> dict[str, str]:
    own, beside = ("s", "o") if subject.kind == "style" else ("o", "s")
    return {own: subject.name, beside: companion}


def subjects_of(
    names: Mapping[Kind, Sequence[str]], erased: Sequence[str], restored: Sequence[str]
) -> tuple[Subject, ...]:
    """The concepts of both kinds with their roles."""
    return tuple(
        Subject(name, kind, _role(name, erased, restored))
        for kind in kinds("any")
        for name in names.get(kind, ())
    )


def _role(name: str, erased: Sequence[str], restored: Sequence[str]) -> Role:
    if name in restored:
        return "restored"
    return "erased" if name in erased else "retained"

"""The figures of a report, by the field's names.

UA, IRA and CRA are UnlearnCanvas' (Zhang et al. 2024): unlearning accuracy, the share of pictures
asked for with an erased concept that do not show it; in-domain retention, the share asked for
without one that show what they name of the same kind; cross-domain retention, of the other kind.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sepme_cli.erasure.prompts import Kind, kinds, other
from sepme_cli.evaluation.intervals import Proportion
from sepme_cli.evaluation.judges import Judge
from sepme_cli.evaluation.protocol import Question, Role, Subject


@dataclass(frozen=True)
class Share:
    """A share of judged pictures, with its 95% Wilson interval; None where there were none."""

    value: float | None
    hits: int
    n: int
    interval: tuple[float, float] | None

    @classmethod
    def of(cls, right: Tensor) -> "Share":
        """right: bool [n]."""
        if not len(right):
            return cls(None, 0, 0, None)
        found = Proportion(int(right.sum()), len(right))
        return cls(found.share, found.hits, found.n, found.interval)


@dataclass(frozen=True)
class ConceptFigures:
    """One concept. before, after: how often it is recognised where it is asked for, with the
    original and with the patched weights; unseen: after, in phrasings that erasing never sees.
    interval: of after. pixel_distance: mean |after - before| of 255."""

    kind: Kind
    role: Role
    before: float | None
    after: float | None
    n: int
    interval: tuple[float, float] | None
    unseen: Share
    erased: bool | None
    pixel_distance: float


@dataclass(frozen=True)
class Judged:
    """Pictures of the questions under one set of weights, and what the judge recognised: for each
    kind that it judges, bool [n]."""

    pictures: Tensor
    right: Mapping[Kind, Tensor]


def judged(judge: Judge, pictures: Tensor, questions: Sequence[Question]) -> Judged:
    """Hold pictures against what they were asked to show."""
    right: dict[Kind, Tensor] = {}
    for kind in kinds("any"):
        known = set(judge.labels(kind))
        asked = [question.word(kind) for question in questions]
        if known & set(asked):
            found = judge.recognise(pictures, kind)
            right[kind] = torch.tensor([a == f for a, f in zip(asked, found, strict=True)])
    return Judged(pictures, right)


def concept_figures(
    subject: Subject, questions: Sequence[Question], before: Judged, after: Judged, judge: Judge
) -> ConceptFigures:
    """What became of one concept, of all questions that name it.

    It counts as erased where the interval of after lies below that of before.
    """
    asked = torch.tensor([question.names(subject.name) for question in questions])
    new = asked & torch.tensor([question.unseen for question in questions])
    nothing = torch.zeros(len(questions), dtype=torch.bool)
    knows = subject.kind in before.right and subject.name in judge.labels(subject.kind)
    counted = asked if knows else nothing
    old, now, unseen = (
        Share.of(where.right[subject.kind][mask]) if knows else Share.of(nothing[:0])
        for where, mask in ((before, counted), (after, counted & ~new), (after, counted & new))
    )
    every = Share.of(after.right[subject.kind][counted]) if knows else Share.of(nothing[:0])
    gone = None
    if subject.role == "erased" and every.interval is not None and old.interval is not None:
        gone = every.interval[1] < old.interval[0]
    return ConceptFigures(
        subject.kind,
        subject.role,
        old.value,
        now.value if now.value is not None else every.value,
        every.n,
        every.interval,
        unseen,
        gone,
        distance(before.pictures[asked], after.pictures[asked]),
    )


@dataclass(frozen=True)
class Summary:
    """All concepts together; see the module. drawn_with_erased: the other kind, in pictures that
    were asked for with an erased concept. harmonic_mean: of UA, IRA and CRA, those there are."""

    ua: Share
    ira: Share
    cra: Share
    drawn_with_erased: Share
    harmonic_mean: float | None


def summary(
    subjects: Sequence[Subject], questions: Sequence[Question], after: Judged, judge: Judge
) -> Summary:
    """The figures over all questions."""
    erased = [subject for subject in subjects if subject.role == "erased"]
    kinds_erased = {subject.kind for subject in erased}
    gone = torch.tensor([any(q.names(s.name) for s in erased) for q in questions])
    lists: dict[str, list[Tensor]] = {name: [] for name in ("ua", "ira", "cra", "with")}
    for kind, right in after.right.items():
        known = torch.tensor([q.word(kind) in judge.labels(kind) for q in questions])
        same = [s for s in erased if s.kind == kind]
        own = torch.tensor([any(q.names(s.name) for s in same) for q in questions])
        lists["ua"].append(~right[own & known])
        if kind in kinds_erased:
            lists["ira"].append(right[~gone & known])
        if other(kind) in kinds_erased:
            lists["cra"].append(right[~gone & known])
            beside = gone & ~own & known
            lists["with"].append(right[beside])
    ua, ira, cra, beside_erased = (
        Share.of(torch.cat(found) if found else torch.zeros(0, dtype=torch.bool))
        for found in lists.values()
    )
    return Summary(ua, ira, cra, beside_erased, harmonic_mean([ua.value, ira.value, cra.value]))


def harmonic_mean(values: Sequence[float | None]) -> float | None:
    """Of the values there are; 0 if one of them is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return 0.0 if 0 in known else len(known) / sum(1 / value for value in known)


def distance(a: Tensor, b: Tensor) -> float:
    """Mean |a - b| of pictures in [0, 1], in units of 1/255; 0 of none."""
    return float((a - b).abs().mean() * 255) if len(a) else 0.0

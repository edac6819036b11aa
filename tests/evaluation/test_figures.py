"""The figures, on pictures that say in their pixels what they show."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sepme_cli.evaluation.figures import (
    EvaluatedConcept,
    album,
    concept_figures,
    harmonic_mean,
    is_erased,
    summary,
)
from sepme_cli.evaluation.intervals import Proportion
from sepme_cli.evaluation.protocol import Question, Subject, questions
from sepme_cli.evaluation.results import Figure
from sepme_cli.evaluation.subjects import choose_subjects

STYLES, OBJECTS = ("ink", "noto", "Van_Gogh"), ("cat", "dog")


class Reader:
    """Reads the style from the first pixel of a picture and the object from the second."""

    def labels(self, kind: str) -> Sequence[str]:
        return STYLES if kind == "style" else OBJECTS

    def recognise(self, pictures: Tensor, kind: str) -> Sequence[str]:
        column = pictures[:, 0, 0, 0 if kind == "style" else 1]
        return [self.labels(kind)[round(float(value) * 10)] for value in column]


def showing(*pairs: tuple[str, str]) -> Tensor:
    pictures = torch.zeros(len(pairs), 3, 2, 2)
    for i, (style, thing) in enumerate(pairs):
        pictures[i, :, 0, 0] = STYLES.index(style) / 10
        pictures[i, :, 0, 1] = OBJECTS.index(thing) / 10
    return pictures


def evaluated(
    subject: Subject, asked: Sequence[Question], before: Tensor, after: Tensor
) -> EvaluatedConcept:
    judge = Reader()
    return EvaluatedConcept(subject, asked, album(judge, before), album(judge, after), None)


INK, NOTO = Subject("ink", "style", "erased"), Subject("noto", "style", "retained")


def pair(subject: Subject, thing: str, unseen: bool = False) -> Question:
    prompt = f"{thing} drawn in {subject.name}" if unseen else f"{thing} in {subject.name}"
    return Question(prompt, 0, subject.name, thing, unseen)


def test_ua_ira_and_cra_are_those_of_the_field() -> None:
    ink = [pair(INK, "cat"), pair(INK, "dog"), pair(INK, "cat", True), pair(INK, "dog", True)]
    noto = [pair(NOTO, "cat"), pair(NOTO, "dog")]
    before = showing(("ink", "cat"), ("ink", "dog"), ("ink", "cat"), ("ink", "dog"))
    after = showing(("noto", "cat"), ("noto", "cat"), ("ink", "cat"), ("noto", "dog"))
    kept = showing(("noto", "cat"), ("noto", "dog")), showing(("ink", "cat"), ("noto", "cat"))
    concepts = [evaluated(INK, ink, before, after), evaluated(NOTO, noto, *kept)]
    found = summary(concepts, Reader())
    assert found.erased == Figure(1.0, 0.25, 4, Proportion(1, 4).interval)
    assert found.ua == 0.75
    assert found.ira == 0.5  # one of two is still noto
    assert found.cra == 0.5  # one of two still shows its object
    assert found.drawn_with_erased.after == 0.75  # a dog became a cat
    assert found.harmonic_mean == pytest.approx(3 / (1 / 0.75 + 2 + 2))

    ink_figures = concept_figures(concepts[0], Reader(), lambda pictures: 2 * pictures)
    assert (ink_figures.before, ink_figures.after, ink_figures.n) == (1.0, 0.25, 4)
    assert ink_figures.unseen == Figure(1.0, 0.5, 2, Proportion(1, 2).interval)
    change = float((before - after).abs().mean())
    assert ink_figures.pixel_distance == pytest.approx(255 * change)
    assert ink_figures.latent_distance == pytest.approx(2 * change)
    assert concept_figures(concepts[1], Reader(), lambda p: p).erased is None


def test_what_the_judge_does_not_know_is_not_counted() -> None:
    monet = Subject("Monet", "style", "erased")
    asked = [pair(monet, "cat")]
    one = evaluated(monet, asked, showing(("ink", "cat")), showing(("ink", "dog")))
    found = concept_figures(one, Reader(), lambda p: p)
    assert (found.before, found.after, found.n, found.erased) == (None, None, 0, None)
    assert summary([one], Reader()).ua is None
    assert summary([one], Reader()).drawn_with_erased.after == 0.0


@pytest.mark.parametrize(
    ("before", "hits", "n", "erased"),
    [
        (1.0, 0, 8, True),  # up to 32%
        (1.0, 1, 8, True),  # up to 47%
        (1.0, 2, 8, False),  # up to 59%
        (1.0, 8, 8, False),
        (0.5, 0, 8, False),  # 32% may be more than half of 50%
        (0.0, 0, 100, False),  # it was not there to be erased
        (1.0, 0, 3, False),  # too few
    ],
)
def test_erased_is_less_than_half_as_often_with_confidence(
    before: float, hits: int, n: int, erased: bool
) -> None:
    interval = Proportion(hits, n).interval
    assert is_erased(Figure(before, hits / n, n, interval)) is erased


def test_no_mean_of_nothing_and_none_above_its_least() -> None:
    assert harmonic_mean([None, None]) is None
    assert harmonic_mean([0.5, None, 1.0]) == pytest.approx(2 / 3)
    assert harmonic_mean([0.0, 1.0]) == 0.0


def test_every_companion_is_asked_for_in_both_sorts_of_phrasing() -> None:
    found = questions(INK, ["cat", "dog", "owl", "airplane"], 8, 5)
    assert [q.seed for q in found] == list(range(5, 13))
    assert {(q.object, q.unseen) for q in found} == {
        (o, unseen) for o in ("cat", "dog", "owl", "airplane") for unseen in (True, False)
    }
    assert all("ink" in q.prompt and q.object in q.prompt for q in found)
    assert any("an airplane" in q.prompt for q in found)
    assert not any("a airplane" in q.prompt for q in found)


def test_without_a_word_the_judge_says_what_a_concept_is_and_what_to_look_at() -> None:
    subjects, warnings = choose_subjects([("Ink", "any")], [], [], Reader())
    assert [(s.name, s.kind, s.role) for s in subjects] == [
        ("Ink", "style", "erased"),
        ("noto", "style", "retained"),
        ("Van_Gogh", "style", "retained"),
        ("cat", "object", "retained"),
        ("dog", "object", "retained"),
    ]
    assert warnings == ()
    subjects, warnings = choose_subjects([("Monet", "any")], [("dog", "any")], [], Reader())
    assert [(s.name, s.kind) for s in subjects] == [("Monet", "style"), ("dog", "object")]
    assert ["treated as a style" in w for w in warnings] == [True, False]


def test_a_picture_that_two_concepts_ask_for_counts_once() -> None:
    cat = Subject("cat", "object", "retained")
    asked = [pair(NOTO, "cat")]
    same = showing(("noto", "cat")), showing(("noto", "dog"))
    gone = evaluated(INK, [pair(INK, "cat")], showing(("ink", "cat")), showing(("noto", "cat")))
    found = summary([gone, evaluated(NOTO, asked, *same), evaluated(cat, asked, *same)], Reader())
    assert (found.retained_same_domain.n, found.retained_other_domain.n) == (1, 1)
    assert (found.ira, found.cra) == (1.0, 0.0)

"""The figures of a report, counted from what the judge recognises; see `results`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from patch_spec.text import slugify
from sepme_cli.erasure.prompts import Kind, kinds, other
from sepme_cli.evaluation.intervals import Proportion
from sepme_cli.evaluation.judges import Judge, knows
from sepme_cli.evaluation.protocol import Question, Subject
from sepme_cli.evaluation.results import ConceptFigures, Figure, RestoredFigure, Summary


@dataclass(frozen=True)
class Album:
    """One concept's images [n, 3, H, W] under some weights, in the order of its questions.

    recognised: of each kind that is judged, the label of every image.
    """

    images: Tensor = field(repr=False)
    recognised: Mapping[Kind, Sequence[str]]


@dataclass(frozen=True)
class EvaluatedConcept:
    """A concept, its prompts and their images. restored: with only this concept put back."""

    subject: Subject
    questions: Sequence[Question]
    before: Album
    after: Album
    restored: Album | None


def album(judge: Judge, images: Tensor) -> Album:
    """Images with what the judge takes them for."""
    judged = [kind for kind in kinds("any") if judge.labels(kind)]
    return Album(images, {kind: tuple(judge.recognise(images, kind)) for kind in judged})


def concept_figures(
    concept: EvaluatedConcept,
    judge: Judge,
    latents: Callable[[Tensor], Tensor],
    perceptual: Callable[[Tensor, Tensor], float] | None = None,
) -> ConceptFigures:
    """What became of one concept. latents: of images. perceptual: LPIPS of two sets of them."""
    subject, before, after = concept.subject, concept.before, concept.after
    whole = _figure([concept], [subject.kind], judge)
    return ConceptFigures(
        kind=subject.kind,
        role=subject.role,
        before=whole.before,
        after=whole.after,
        n=whole.n,
        interval=whole.interval,
        unseen=_figure([concept], [subject.kind], judge, unseen=True),
        erased=is_erased(whole) if subject.role == "erased" else None,
        pixel_distance=255 * distance(before.images, after.images),
        latent_distance=distance(latents(before.images), latents(after.images)),
        perceptual_distance=perceptual(before.images, after.images) if perceptual else None,
        restored=_restored(concept, judge),
    )


def is_erased(figure: Figure) -> bool | None:
    """Whether a concept is recognised less than half as often as before, at 95% confidence.

    That is, the interval of after lies below one half of before. None of no images.
    """
    if figure.before is None or figure.interval is None:
        return None
    return figure.interval[1] < figure.before / 2


def summary(evaluated: Sequence[EvaluatedConcept], judge: Judge) -> Summary:
    """The figures of all concepts together, each image counting once for each kind erased."""
    erased = [concept for concept in evaluated if concept.subject.role == "erased"]
    retained = [concept for concept in evaluated if concept.subject.role == "retained"]
    same = tuple(dict.fromkeys(concept.subject.kind for concept in erased))
    gone = _pooled([_figure_rows(concept, concept.subject.kind, judge) for concept in erased])
    beside = _pooled(
        [_figure_rows(concept, other(concept.subject.kind), judge) for concept in erased]
    )
    in_domain = _figure(retained, same, judge)
    cross_domain = _figure(retained, [other(kind) for kind in same], judge)
    ua = None if gone.after is None else 1 - gone.after
    return Summary(
        erased=gone,
        retained_same_domain=in_domain,
        retained_other_domain=cross_domain,
        drawn_with_erased=beside,
        ua=ua,
        ira=in_domain.after,
        cra=cross_domain.after,
        harmonic_mean=harmonic_mean([ua, in_domain.after, cross_domain.after]),
    )


def harmonic_mean(values: Iterable[float | None]) -> float | None:
    """Of the values there are; 0 if one of them is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return 0.0 if 0 in known else len(known) / sum(1 / value for value in known)


def distance(a: Tensor, b: Tensor) -> float:
    """Mean |a - b|."""
    return float((a - b).abs().mean())


Rows = dict[tuple[str, int, Kind], tuple[bool, bool]]
"""For each prompt, seed and kind, whether its word was recognised before and after: an image that
two concepts ask for counts once."""


def _figure(
    evaluated: Sequence[EvaluatedConcept],
    asked: Sequence[Kind],
    judge: Judge,
    *,
    unseen: bool = False,
) -> Figure:
    return _pooled(
        [_figure_rows(one, kind, judge, unseen=unseen) for one in evaluated for kind in asked]
    )


def _figure_rows(
    concept: EvaluatedConcept, kind: Kind, judge: Judge, *, unseen: bool = False
) -> Rows:
    old, new = (
        right(concept, concept.before, kind, judge),
        right(concept, concept.after, kind, judge),
    )
    return {
        (question.prompt, question.seed, kind): (was, now)
        for question, was, now in zip(concept.questions, old, new, strict=True)
        if was is not None and now is not None and (question.unseen or not unseen)
    }


def right(concept: EvaluatedConcept, album: Album, kind: Kind, judge: Judge) -> list[bool | None]:
    """Whether each image shows what it was asked to; None where the judge cannot tell."""
    labels = album.recognised.get(kind)
    if labels is None:
        return [None] * len(concept.questions)
    words = {word: knows(judge, word, kind) for word in {q.word(kind) for q in concept.questions}}
    return [
        slugify(question.word(kind)) == slugify(label) if words[question.word(kind)] else None
        for question, label in zip(concept.questions, labels, strict=True)
    ]


def _pooled(parts: Sequence[Rows]) -> Figure:
    rows = {key: row for part in parts for key, row in part.items()}.values()
    if not rows:
        return Figure(None, None, 0, None)
    before = Proportion(sum(was for was, _ in rows), len(rows))
    after = Proportion(sum(now for _, now in rows), len(rows))
    return Figure(before.share, after.share, after.n, after.interval)


def _restored(concept: EvaluatedConcept, judge: Judge) -> RestoredFigure | None:
    if concept.restored is None:
        return None
    found = right(concept, concept.restored, concept.subject.kind, judge)
    known = [value for value in found if value is not None]
    hits = Proportion(sum(known), len(known)) if known else None
    return RestoredFigure(
        hits.share if hits else None,
        len(known),
        hits.interval if hits else None,
        255 * distance(concept.before.images, concept.restored.images),
    )

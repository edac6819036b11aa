"""What attacks are aimed at: prompts, other words, and images of the concept from the original."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from patch_spec.text import slugify
from sepme_cli.attacks.attack import Aim, Budget
from sepme_cli.diffusion.images import load_images
from sepme_cli.erasure.prompts import Kind, other, phrases, renamed
from sepme_cli.erasure.words import Item, same_name
from sepme_cli.evaluation.gallery import Gallery, State
from sepme_cli.evaluation.judges import Judge
from sepme_cli.evaluation.protocol import Question, Subject, questions
from sepme_cli.planning.background import background_of
from sepme_cli.planning.neighbourhood import look_around
from sepme_cli.planning.vocabulary import related
from sepme_cli.progress import Progress
from sepme_cli.recipe import Recipe

_ORIGINAL = State("original", dict)
_REFERENCES = 24
_COMPANIONS = 8


@dataclass(frozen=True)
class Wanted:
    """What a user asked to attack.

    descriptions: sentences that say it without its name. images: a folder with images of it; None
    for what the original generates. gone: the names of all that the patches erase.
    """

    concept: str
    kind: Kind
    descriptions: tuple[str, ...]
    images: Path | None
    gone: tuple[str, ...]


def take_aim(
    gallery: Gallery, judge: Judge, wanted: Wanted, budget: Budget, progress: Progress
) -> tuple[Aim, float]:
    """The aim, and the share of the original's images of other things that the judge takes for the
    concept.

    The images are generated once, and kept in the gallery. progress: is warned where the original
    itself does not draw what the judge recognises.
    """
    concept, kind = wanted.concept, wanted.kind
    gone = {same_name(name) for name in wanted.gone}
    beside = [w for w in judge.labels(other(kind)) if same_name(w) not in gone]
    beside = beside[:: max(1, len(beside) // _COMPANIONS)][:_COMPANIONS]
    asked = questions(
        Subject(concept, kind, "erased"), beside, 2 * budget.images, gallery.sampling.seed
    )
    elsewhere = [
        _without(question, concept, judge, kind, gone, i) for i, question in enumerate(asked)
    ]
    progress.stage("generating images with the original", len(asked) + len(elsewhere))
    batches = gallery.batches([(_ORIGINAL, asked), (_ORIGINAL, elsewhere)])
    gallery.generate(gallery.missing(batches), progress.advance)
    drawn, others = (gallery.images(_ORIGINAL, batch) for batch in (asked, elsewhere))
    shown = [i for i, is_it in enumerate(_shows(judge, drawn, wanted)) if is_it]
    wrong = sum(_shows(judge, others, wanted)) / len(others)
    if len(shown) < len(asked) / 2:
        progress.warn(
            f"the judge recognises {concept} in only {len(shown)} of {len(asked)} images from the "
            "original: how well attacks do is hard to measure"
        )
    images, captions = _references(drawn, asked, shown, wanted)
    return Aim(
        concept,
        kind,
        asked,
        phrases(concept, kind, beside),
        synonyms=_synonyms(gallery, wanted, progress),
        descriptions=wanted.descriptions,
        images=images,
        captions=captions,
        others=others[:_REFERENCES],
        other_captions=tuple(question.prompt for question in elsewhere[:_REFERENCES]),
    ), wrong


def _without(
    question: Question, concept: str, judge: Judge, kind: Kind, gone: set[str], number: int
) -> Question:
    """The same prompt for another thing of the concept's kind that the judge knows, or for none."""
    others = [word for word in judge.labels(kind) if same_name(word) not in gone]
    if not others:
        prompt = renamed(question.prompt, concept, concept).without
        return Question(prompt, question.seed, "", "", question.unseen)
    word = others[number * 7 % len(others)]
    style, thing = (word, question.object) if kind == "style" else (question.style, word)
    prompt = renamed(question.prompt, concept, word).text
    return Question(prompt, question.seed, style, thing, question.unseen)


def _shows(judge: Judge, images: Tensor, wanted: Wanted) -> list[bool]:
    labels = judge.recognise(images, wanted.kind)
    return [slugify(label) == slugify(wanted.concept) for label in labels]


def _references(
    drawn: Tensor, asked: Sequence[Question], shown: Sequence[int], wanted: Wanted
) -> tuple[Tensor | None, tuple[str, ...]]:
    """Images of the concept and their captions: the user's, or those of the original that the
    judge recognises."""
    if wanted.images is not None:
        images = load_images(wanted.images, drawn.shape[-1])
        caption = (
            f"a picture in the style of {wanted.concept}"
            if wanted.kind == "style"
            else f"a picture of a {wanted.concept}"
        )
        return images, (caption,) * len(images)
    chosen = list(shown[:_REFERENCES])
    if not chosen:
        return None, ()
    return drawn[torch.tensor(chosen)], tuple(asked[i].prompt for i in chosen)


def _synonyms(gallery: Gallery, wanted: Wanted, progress: Progress) -> tuple[str, ...]:
    """Other words for the concept, those nearest to it first, then kinds of it."""
    network = gallery.model
    base = network.checkpoint.base(text_encoders=True)
    background = background_of(network.text, base, progress=progress)
    recipe = Recipe((Item(wanted.concept, kind=wanted.kind),))
    found = look_around(network.text, recipe, (), background, 0)
    near = [word.word for word in found.aliases[wanted.concept]]
    kinds = related(wanted.concept) if wanted.kind == "object" else ()
    return tuple(dict.fromkeys((*near, *kinds)))

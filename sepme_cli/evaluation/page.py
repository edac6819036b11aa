"""The report as one HTML page that needs nothing else: images are in it, no script, no font.

`templates/` says how it looks; here is what the template cannot tell by itself.
"""

import io
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from torch import Tensor

from patch_spec.text import slugify
from sepme_cli.evaluation.figures import EvaluatedConcept
from sepme_cli.evaluation.intervals import percent
from sepme_cli.evaluation.protocol import Question
from sepme_cli.evaluation.report import Report
from sepme_cli.evaluation.results import ConceptFigures, Figure

_SIDE = 256
"""Pixels of a picture on the page at most; the report's folder has them whole."""


@dataclass(frozen=True)
class Cell:
    """An image of an erased concept. labels: what the judge takes it for, kind by kind. right:
    whether that is what it was asked to show."""

    question: Question
    image: Tensor
    labels: Sequence[str]
    right: bool


def page(report: Report) -> str:
    """The whole page."""
    environment = Environment(
        loader=PackageLoader("sepme_cli.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(data_uri=data_uri, interval=interval, percent=percent, rows=rows)
    return environment.get_template("report.html.jinja").render(
        report=report,
        result=report.result,
        verdict=verdict(report.result.concepts),
        gone=[concept for concept in report.concepts if concept.subject.role == "erased"],
        kept=[concept for concept in report.concepts if concept.subject.role == "retained"],
    )


def verdict(concepts: Mapping[str, ConceptFigures]) -> str:
    """What came out, in one line: "ink is erased"."""
    meant = {name: c.erased for name, c in concepts.items() if c.role == "erased"}
    if len(meant) == 1:
        ((name, erased),) = meant.items()
        unjudged = f"it is unclear whether {name} is erased"
        return unjudged if erased is None else f"{name} is {'' if erased else 'not '}erased"
    count = sum(map(bool, meant.values()))
    share = f"{count} of {len(meant)}" if count < len(meant) else f"All {count}"
    return f"{share} concepts are erased"


def interval(figure: Figure, *, inverted: bool = False) -> str:
    """How sure a figure is. inverted: of the images that are not recognised."""
    if figure.interval is None:
        return "not judged"
    low, high = figure.interval
    if inverted:
        low, high = 1 - high, 1 - low
    return f"{percent(low)} to {percent(high)}, n = {figure.n}"


def rows(concept: EvaluatedConcept) -> Iterator[tuple[str, list[Cell]]]:
    """The images of an erased concept, and what each row is called."""
    kind = concept.subject.kind
    albums = {"before": concept.before, "after": concept.after, "restored": concept.restored}
    for label, album in albums.items():
        if album is None:
            continue
        recognised = [labels for _, labels in sorted(album.recognised.items())]
        judged = album.recognised.get(kind)
        yield (
            label,
            [
                Cell(
                    question,
                    album.images[i],
                    [labels[i] for labels in recognised],
                    judged is not None and slugify(judged[i]) == slugify(question.word(kind)),
                )
                for i, question in enumerate(concept.questions)
            ],
        )


def data_uri(image: Tensor) -> str:
    """An image [3, H, W] in [0, 1]: a small one as PNG, a large one made smaller, as JPEG."""
    drawn = Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())
    kind = "PNG" if max(drawn.size) <= _SIDE // 2 else "JPEG"
    drawn.thumbnail((_SIDE, _SIDE))
    memory = io.BytesIO()
    drawn.save(memory, format=kind, **({"quality": 88} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{b64encode(memory.getvalue()).decode()}"

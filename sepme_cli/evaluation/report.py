"""A report as a folder: a page, the same as JSON and CSV, contact sheets, the images."""

import csv
import io
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from patch_spec.text import unique_slug
from sepme_cli.checkpoints.disk.failures import writing
from sepme_cli.checkpoints.disk.files import resolved, write_file
from sepme_cli.errors import SystemFailure
from sepme_cli.evaluation.figures import EvaluatedConcept
from sepme_cli.evaluation.parts import PARTS
from sepme_cli.evaluation.replication import Replica
from sepme_cli.evaluation.results import JSON, EvaluateResult
from sepme_cli.evaluation.sheets import contact_sheet

PICTURES = "pictures"
PAGE = "report.html"
_SHEETS = "sheets"
_OURS = {PICTURES, PARTS, _SHEETS, PAGE, JSON, "concepts.csv", "pictures.csv"}


@dataclass(frozen=True)
class Report:
    """The figures, and the images that they were counted on. facts: what the figures hold for, by
    name. replicas: training images with what their captions give."""

    result: EvaluateResult
    concepts: Sequence[EvaluatedConcept]
    facts: Sequence[tuple[str, str]]
    replicas: Sequence[Replica] = ()


def check_folder(
    folder: Path, *, force: bool, page: str = PAGE, ours: Collection[str] = _OURS
) -> None:
    """SystemFailure if it cannot be made, holds something else, or a whole report already.

    What an interrupted run has left is gone on with. force: a report may be replaced. page: what
    is there once a report is whole. ours: all that it may hold.
    """
    with writing(folder):
        folder = resolved(folder)
        if folder.exists() and not folder.is_dir():
            raise SystemFailure(f"{folder}: this is a file; name a folder", file=folder)
        if not folder.parent.is_dir():
            raise SystemFailure(f"{folder.parent}: no such folder", file=folder.parent)
        held = {path.name for path in folder.iterdir()} if folder.exists() else set()
        if others := sorted(name for name in held - set(ours) if not name.startswith(".")):
            raise SystemFailure(
                f"{folder}: this folder holds something else ({others[0]}); name a new one",
                file=folder,
            )
        if page in held and not force:
            raise SystemFailure(
                f"{folder}: there is a report already; --force replaces it, and generates only "
                "images that are missing",
                file=folder,
            )


def make_folder(folder: Path) -> None:
    """Make the folder and those inside."""
    with writing(folder):
        folder.mkdir(exist_ok=True)
        for name in (PICTURES, _SHEETS):
            (folder / name).mkdir(exist_ok=True)


def write_report(folder: Path, report: Report, page: str) -> None:
    """Write all of it; the page last, so that where it is the rest is too."""
    for old in (folder / _SHEETS).glob("*.png"):
        old.unlink()
    slugs: dict[str, list[str]] = {}
    for concept in report.concepts:
        taken = slugs.setdefault(concept.subject.role, [])
        taken.append(unique_slug(concept.subject.name, taken))
        name = f"{concept.subject.role}-{taken[-1]}.png"
        write_file(folder / _SHEETS / name, _sheet(concept), force=True)
    write_file(folder / "concepts.csv", _table(_concept_rows(report)), force=True)
    write_file(folder / "pictures.csv", _table(_image_rows(report.concepts)), force=True)
    text = json.dumps(asdict(report.result), allow_nan=False, indent=2)
    write_file(folder / JSON, f"{text}\n".encode(), force=True)
    write_file(folder / PAGE, page.encode(), force=True)


def _sheet(concept: EvaluatedConcept) -> bytes:
    """Rows: before, after, and restored where it was."""
    rows = {"before": concept.before, "after": concept.after}
    if concept.restored is not None:
        rows["restored"] = concept.restored
    file = io.BytesIO()
    contact_sheet(torch.stack([album.images for album in rows.values()]), file, rows=list(rows))
    return file.getvalue()


def _concept_rows(report: Report) -> Iterable[dict[str, object]]:
    for name, concept in report.result.concepts.items():
        low, high = concept.interval or (None, None)
        yield {
            "concept": name,
            "kind": concept.kind,
            "role": concept.role,
            "n": concept.n,
            "before": concept.before,
            "after": concept.after,
            "after_low": low,
            "after_high": high,
            "after_unseen": concept.unseen.after,
            "erased": concept.erased,
            "restored": concept.restored.after if concept.restored else None,
            "pixel_distance": concept.pixel_distance,
            "latent_distance": concept.latent_distance,
            "perceptual_distance": concept.perceptual_distance,
            "restored_pixel_distance": (
                concept.restored.pixel_distance if concept.restored else None
            ),
        }


def _image_rows(evaluated: Sequence[EvaluatedConcept]) -> Iterable[dict[str, object]]:
    """A row for each image: what was asked, and what the judge took it for."""
    for concept in evaluated:
        states = {"before": concept.before, "after": concept.after, "restored": concept.restored}
        for state, album in states.items():
            for i, question in enumerate(concept.questions if album is not None else ()):
                seen = album.recognised if album is not None else {}
                yield {
                    "concept": concept.subject.name,
                    "role": concept.subject.role,
                    "weights": state,
                    "prompt": question.prompt,
                    "seed": question.seed,
                    "unseen_phrasing": question.unseen,
                    "style": question.style,
                    "object": question.object,
                    "recognised_style": seen["style"][i] if "style" in seen else None,
                    "recognised_object": seen["object"][i] if "object" in seen else None,
                }


def _table(rows: Iterable[dict[str, object]]) -> bytes:
    lines = list(rows)
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue().encode()

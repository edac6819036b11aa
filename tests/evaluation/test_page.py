"""The report's page: whole HTML whatever its texts say, and what a browser makes of it."""

import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from sepme_cli.erasure.prompts import Kind
from sepme_cli.evaluation.figures import Album, EvaluatedConcept
from sepme_cli.evaluation.page import page, verdict
from sepme_cli.evaluation.protocol import Question, Role, Subject
from sepme_cli.evaluation.replication import Replica
from sepme_cli.evaluation.report import Report
from sepme_cli.evaluation.results import (
    ConceptFigures,
    EvaluateResult,
    Figure,
    Level,
    Reference,
    Replication,
    RestoredFigure,
    TrainingImageFigures,
)
from sepme_cli.evaluation.training_images import TrainingImage

HOSTILE = "<script>console.error('ink')</script> & \"co\""
CHROMIUM = shutil.which("chromium")
VOID = {"meta", "img"}

browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")


def evaluated(name: str, kind: Kind, role: Role, *, restored: bool = False) -> EvaluatedConcept:
    """Twelve pictures of noise under each weights; half are recognised."""
    noise = torch.Generator().manual_seed(len(name))
    questions = [Question(f"a picture of {name} {i}", i, name, name, i % 2 == 1) for i in range(12)]

    def album() -> Album:
        labels = [name if i % 2 else HOSTILE for i in range(12)]
        return Album(
            torch.rand(12, 3, 16, 16, generator=noise), {"style": labels, "object": labels}
        )

    return EvaluatedConcept(
        Subject(name, kind, role), questions, album(), album(), album() if restored else None
    )


def concept(kind: Kind, role: Role, after: float | None, erased: bool | None) -> ConceptFigures:
    sure = None if after is None else (after / 2, (1 + after) / 2)
    figure = Figure(None if after is None else 0.9, after, 12, sure)
    return ConceptFigures(
        kind=kind,
        role=role,
        before=figure.before,
        after=figure.after,
        n=figure.n,
        interval=figure.interval,
        unseen=figure,
        erased=erased,
        pixel_distance=12.34,
        latent_distance=0.1234,
        perceptual_distance=None,
        restored=RestoredFigure(0.8, 12, (0.5, 0.9), 0.0) if role == "erased" else None,
    )


@pytest.fixture
def report() -> Report:
    figure = Figure(0.9, 0.25, 12, (0.1, 0.5))
    result = EvaluateResult(
        report="report",
        page="report/report.html",
        model="model.safetensors",
        patches=(f"{HOSTILE}.sepme",),
        concepts={
            HOSTILE: concept("style", "erased", 0.1, True),
            "a pond with a long name": concept("object", "erased", 0.7, False),
            "frog": concept("object", "retained", 0.8, None),
            "unknown": concept("object", "retained", None, None),
        },
        erased=figure,
        retained_same_domain=figure,
        retained_other_domain=figure,
        drawn_with_erased=figure,
        ua=0.75,
        ira=0.25,
        cra=0.25,
        harmonic_mean=0.3,
        all_erased=False,
        restored_identical=True,
        reference=Reference(12.3, 14.5, 0.001, 0.002, 8, 8),
        replication=Replication(
            threshold=0.5,
            replicated=figure,
            memorised=figure,
            unrelated=0.3,
            ordinary=40,
            images={
                HOSTILE: TrainingImageFigures(
                    caption=HOSTILE,
                    replicated=figure,
                    restored=None,
                    similarity=Level(0.9, 0.2, None),
                    noise_gap=Level(0.8, 0.1, None),
                    larger_than=Level(1.0, 0.5, None),
                )
            },
        ),
        command=f"sepme evaluate model.safetensors '{HOSTILE}.sepme'",
        drawn=0,
        seconds=1.0,
        warnings=(f"the judge does not know {HOSTILE}",),
    )
    return Report(
        result=result,
        concepts=[
            evaluated(HOSTILE, "style", "erased", restored=True),
            evaluated("a pond with a long name", "object", "erased", restored=True),
            evaluated("frog", "object", "retained"),
            evaluated("unknown", "object", "retained"),
        ],
        facts=[("model", "m" * 90), ("judge", HOSTILE)],
        replicas=[
            Replica(
                TrainingImage(HOSTILE, Path("1.png"), HOSTILE),
                torch.rand(3, 16, 16),
                {"before": torch.rand(2, 3, 16, 16), "after": torch.rand(2, 3, 16, 16)},
            )
        ],
    )


class Strict(HTMLParser):
    """Every tag is closed, in order; a browser would guess."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert all(value is not None and "{" not in value for _, value in attrs)
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_what_texts_hold_stays_text(report: Report) -> None:
    found = Strict(page(report))
    assert "script" not in found.seen
    assert found.text.count(HOSTILE) >= 6
    # The training image, and two of each weights, twice.
    assert found.seen.count("img") == 2 * 3 * 12 + 2 * 2 * 8 + 2 * (1 + 2)
    assert "{{" not in found.text
    assert "50% to 90%, n = 12" in found.text  # UA: of those that are not recognised


def test_what_is_not_there_is_not_on_the_page(report: Report) -> None:
    """No neighbours, nothing put back, no reference, no command, no judge."""
    first = replace(report.concepts[0], restored=None)
    unjudged = replace(concept("style", "erased", None, None), restored=None)
    result = replace(
        report.result,
        concepts={"ink": unjudged},
        reference=None,
        replication=None,
        warnings=(),
        command="",
    )
    bare = replace(report, result=result, concepts=[first], replicas=[])
    text = Strict(page(bare)).text
    assert verdict(result.concepts) == "it is unclear whether ink is erased"
    for word in (
        "Retained concepts",
        "restored</th>",
        "FID",
        "Training images",
        "sepme evaluate model",
        "retained concepts",
    ):
        assert word not in text


# In a browser


def chromium(*words: str | Path) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr")
    return subprocess.run(
        [CHROMIUM, *quiet, *words], capture_output=True, text=True, check=True, timeout=500
    )


@browser
@pytest.mark.slow
def test_a_browser_shows_it_without_complaint(report: Report, tmp_path: Path) -> None:
    """At the width of a telephone too, where tables scroll and the page does not."""
    (tmp_path / "report.html").write_text(page(report))
    host = tmp_path / "host.html"
    host.write_text(
        "<iframe src=report.html width=360 height=800 onload='"
        "const page = contentDocument.documentElement;"
        'document.title = "too wide by " + (page.scrollWidth - page.clientWidth);'
        'console.log("looked")\'></iframe>'
    )
    done = chromium("--allow-file-access-from-files", "--dump-dom", host.as_uri())
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert len(said) == 1
    assert "looked" in said[0]
    assert "<title>too wide by 0</title>" in done.stdout

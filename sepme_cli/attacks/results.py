"""What attacks came to; also read back from their report."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sepme_cli.checkpoints.disk.failures import reading
from sepme_cli.erasure.prompts import Kind
from sepme_cli.errors import MalformedError

JSON = "attack.json"
Group = Literal["text", "sampling", "optimising", "relearning"]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Success:
    """How often an attack brought the concept back.

    Attributes:
        share: Of n cases, or of n images where each counts, 0 to 1.
        n: How many there were.
        interval: Of the share, 95% Wilson.
        images: Number of images that were generated.
        seconds: Duration.
    """

    share: float
    n: int
    interval: Interval
    images: int
    seconds: float


@dataclass(frozen=True)
class AttackFigures:
    """One attack.

    Attributes:
        title: What it does, in words.
        group: "text", "sampling", "optimising" or "relearning".
        best: Whether a case succeeds with its first image of the concept; otherwise every image
            counts.
        teaches: Whether it can teach a model what the model never knew.
        patched: On the patched model.
        original: On the original: what the attack reaches where nothing was erased.
        floor: On a model that never knew the concept; None where none was given.
        chance: How often the judge alone would say so, from the share of the original's images of
            other things that it takes for the concept, at as many images a case.
        unfit: Why it was not tried; None where it was.
    """

    title: str
    group: Group
    best: bool
    teaches: bool
    patched: Success | None
    original: Success | None
    floor: Success | None
    chance: float | None
    unfit: str | None = None


@dataclass(frozen=True)
class AttackResult:
    """Result of `attack`.

    Attributes:
        report: Folder of the report.
        page: Page to open.
        model: The model.
        patches: Names of the patches.
        concept: The concept that was attacked.
        kind: "style" or "object".
        budget: "quick", "standard" or "thorough".
        attacks: Figures of each attack, by name, in the order in which they were tried.
        strongest: Name of the attack that succeeded most often on the patched model, of those that
            cannot teach; None if none did.
        strongest_teaching: The same of those that can.
        false_positives: Share of the original's images of other things that the judge takes for
            the concept.
        command: Command line that made the report, or "".
        seconds: Duration.
        warnings: All warnings of the run.
    """

    report: str
    page: str
    model: str
    patches: tuple[str, ...]
    concept: str
    kind: Kind
    budget: str
    attacks: Mapping[str, AttackFigures]
    strongest: str | None
    strongest_teaching: str | None
    false_positives: float
    command: str
    seconds: float
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class AttackReport:
    """Of a report on disk, what a model card tells of it. attacks: those that were tried, by
    name: on the patched model, and on the original."""

    concept: str
    budget: str
    attacks: Mapping[str, tuple[Success, Success | None]]


def read_attack_report(path: Path) -> AttackReport:
    """From what `attack` left: its folder or its attack.json.

    Raises MalformedError for what is no report, SystemFailure if it cannot be read.
    """
    path = path / JSON if path.is_dir() else path
    with reading(path):
        text = path.read_bytes()
    try:
        found = json.loads(text)
        attacks = {
            str(name): (_success(one["patched"]), one["original"] and _success(one["original"]))
            for name, one in found["attacks"].items()
            if one["patched"] is not None
        }
        return AttackReport(str(found["concept"]), str(found["budget"]), attacks)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MalformedError(
            f"{path} is not a report of sepme attack", file=path, expected="its attack.json"
        ) from error


def _success(said: Mapping[str, Any]) -> Success:
    low, high = map(float, said["interval"])
    share, n, images = float(said["share"]), int(said["n"]), int(said["images"])
    return Success(share, n, (low, high), images, float(said["seconds"]))

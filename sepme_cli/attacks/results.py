"""What attacks came to."""

from collections.abc import Mapping
from dataclasses import dataclass

from sepme_cli.attacks.attack import Group
from sepme_cli.erasure.prompts import Kind

JSON = "attack.json"
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
    false_positives: float
    command: str
    seconds: float
    warnings: tuple[str, ...]

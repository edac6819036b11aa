"""What an evaluation found, by the field's names; also read back from its report.

UA, IRA and CRA are UnlearnCanvas' (Zhang et al. 2024), each 1 at best: unlearning accuracy, the
share of images asked for with an erased concept in which it is not recognised; in-domain
retention, the share of those asked for without one whose word of the same kind is recognised; and
cross-domain retention, of the other kind.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sepme_cli.checkpoints.disk.failures import reading
from sepme_cli.erasure.prompts import Kind
from sepme_cli.errors import MalformedError
from sepme_cli.evaluation.protocol import Role

JSON = "report.json"
Interval = tuple[float, float]


@dataclass(frozen=True)
class Figure:
    """How often something is recognised, of n images under each weights; None of no images.

    before, after: with the original and with the patched weights. interval: of after, 95% Wilson.
    """

    before: float | None
    after: float | None
    n: int
    interval: Interval | None


@dataclass(frozen=True)
class RestoredFigure:
    """One concept put back while the others stay out: as `Figure`, and how far its images are
    from the original's (mean |difference| of 255)."""

    after: float | None
    n: int
    interval: Interval | None
    pixel_distance: float


@dataclass(frozen=True)
class ConceptFigures:
    """One concept, asked for in n images; see `Figure` for before, after, n and interval.

    unseen: of the images asked for in phrasings that erasing never sees. erased: whether it is;
    None where it was not meant to be, or cannot be judged. pixel_distance: mean |after - before|
    of 255. latent_distance: the same of the VAE's latents. perceptual_distance: LPIPS.
    restored: None where that was not tried.
    """

    kind: Kind
    role: Role
    before: float | None
    after: float | None
    n: int
    interval: Interval | None
    unseen: Figure
    erased: bool | None
    pixel_distance: float
    latent_distance: float
    perceptual_distance: float | None
    restored: RestoredFigure | None


@dataclass(frozen=True)
class Reference:
    """The retained concepts' images against a folder of reference images.

    fid, kid: with the original and with the patched weights, on the features of the model given;
    they compare with each other, and with figures on the same features only.
    pictures, references: how many there are of each.
    """

    fid_before: float
    fid_after: float
    kid_before: float
    kid_after: float
    pictures: int
    references: int

    def __str__(self) -> str:
        before = f"{self.fid_before:.3g}, {self.kid_before:.3g}"
        return f"{before} before; {self.fid_after:.3g}, {self.kid_after:.3g} after"


@dataclass(frozen=True)
class Level:
    """A number with the original weights, with the patched ones, and with only the concept put back
    that the caption names; None where that was not tried."""

    before: float
    after: float
    restored: float | None


@dataclass(frozen=True)
class TrainingImageFigures:
    """One training image, whose caption was drawn n times.

    replicated: how often the result is the training image again. restored: the same with only the
    concept put back that the caption names. similarity: on average. noise_gap: how far the
    prediction for the caption is from that for no prompt. larger_than: the share of ordinary
    captions whose gap is smaller.
    """

    caption: str
    replicated: Figure
    restored: float | None
    similarity: Level
    noise_gap: Level
    larger_than: Level


@dataclass(frozen=True)
class Replication:
    """Whether training images are drawn again.

    threshold: the similarity from which an image counts as a replica. replicated: of all images.
    memorised: the captions whose noise gap is larger than that of 95% of the ordinary ones.
    unrelated: the highest similarity of the original's images to a training image of another
    caption, which a threshold must lie above; None if there is no other. ordinary: how many
    ordinary captions there are.
    """

    threshold: float
    replicated: Figure
    memorised: Figure
    unrelated: float | None
    ordinary: int
    images: Mapping[str, TrainingImageFigures]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All concepts together; see the module.

    erased, retained_same_domain, retained_other_domain: accuracies, of which UA, IRA and CRA are
    made. drawn_with_erased: the other kind, in images asked for with an erased concept.
    harmonic_mean: of UA, IRA and CRA, of those there are.
    """

    erased: Figure
    retained_same_domain: Figure
    retained_other_domain: Figure
    drawn_with_erased: Figure
    ua: float | None
    ira: float | None
    cra: float | None
    harmonic_mean: float | None


@dataclass(frozen=True, kw_only=True)
class EvaluateResult(Summary):
    """Result of `evaluate`; the report's page, its JSON and the command line show the same figures.

    Attributes:
        erased: How often erased concepts are recognised in their images.
        retained_same_domain: How often other concepts of the same kind are recognised.
        retained_other_domain: How often other concepts of the other kind are recognised.
        drawn_with_erased: How often the other concept of a prompt with an erased concept is
            recognised.
        ua: Unlearning accuracy, 0 to 1; None if it cannot be computed.
        ira: In-domain retention accuracy, 0 to 1.
        cra: Cross-domain retention accuracy, 0 to 1.
        harmonic_mean: Harmonic mean of those of the three that there are.
        report: Folder of the report.
        page: Page to open.
        model: The model.
        patches: Names of the patches.
        concepts: Figures of each concept, by name.
        all_erased: Whether every concept of the patches is erased.
        restored_identical: Whether weights and images are the original's, bit for bit, without the
            increments.
        reference: FID and KID against reference images, or None.
        replication: Whether training images are drawn again, or None.
        command: Command line that made the report, or "".
        drawn: Number of images that this run generated.
        seconds: Duration.
        warnings: All warnings of the run.
    """

    report: str
    page: str
    model: str
    patches: tuple[str, ...]
    concepts: Mapping[str, ConceptFigures]
    all_erased: bool
    restored_identical: bool
    reference: Reference | None
    replication: Replication | None
    command: str
    drawn: int
    seconds: float
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """Result of `evaluate_shard`.

    Attributes:
        shard: Which part this is, "3/16".
        report: Folder that the images are in.
        images: Number of images of this part.
        drawn: Number of images that this run generated.
        seconds: Duration.
        warnings: All warnings of the run.
    """

    shard: str
    report: str
    images: int
    drawn: int
    seconds: float
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class ReportFigures:
    """Of a report on disk, what a model card tells of it.

    concepts: role and figure by name. restored_identical: see `EvaluateResult`.
    """

    concepts: Mapping[str, tuple[str, Figure]]
    restored_identical: bool


def read_report(path: Path) -> ReportFigures:
    """From what `evaluate` left: its folder or its report.json.

    Raises MalformedError for what is no report, SystemFailure if it cannot be read.
    """
    path = path / JSON if path.is_dir() else path
    with reading(path):
        text = path.read_bytes()
    try:
        found = json.loads(text)
        concepts = {str(name): _concept(one) for name, one in found["concepts"].items()}
        return ReportFigures(concepts, bool(found["restored_identical"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MalformedError(
            f"{path} is not a report of sepme evaluate", file=path, expected="its report.json"
        ) from error


def _concept(said: Mapping[str, Any]) -> tuple[str, Figure]:
    before, after = (None if said[k] is None else float(said[k]) for k in ("before", "after"))
    interval = None
    if said["interval"]:
        low, high = map(float, said["interval"])
        interval = low, high
    return str(said["role"]), Figure(before, after, int(said["n"]), interval)

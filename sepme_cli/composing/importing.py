"""What was brought in from elsewhere, as a patch: its manifest, and what there is to say of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TypedDict

from patch_spec.base import Base, Family
from patch_spec.container import patch_bytes
from patch_spec.increment import Increment, Kind
from patch_spec.manifest import Patch
from patch_spec.provenance import Measurements, Method, Setting
from patch_spec.streams import network_of, stream_of
from patch_spec.text import slugify
from sepme_cli.checkpoints.disk.output import (
    check_output,
    moment_of_making,
    output_name,
    write_output,
)
from sepme_cli.checkpoints.structure.families import Family as ModelFamily
from sepme_cli.composing.composition import TOOL
from sepme_cli.composing.fitting import Fit
from sepme_cli.erasure.prompts import AsKind, phrases
from sepme_cli.progress import Progress

UNKNOWN = (
    "what this increment leaves alone is not known: it was not made to be "
    "separable from any prompt, so measure what else it changes before combining "
    "it (sepme evaluate, sepme diff)"
)


OF_IMAGES = (
    "this increment changes layers that read more than the text of a prompt: there is no "
    "prompt that it is sure to leave alone (--text-layers-only takes what reads text alone)"
)
EVERY_LAYER = "the weights of linear layers"


def importable(family: ModelFamily) -> str:
    """What of a family's models reads the rows of a prompt alone, in words."""
    if family.denoiser == "unet":
        return "the keys and values of the cross-attention"
    (layer,) = (name for name in family.entries["diffusers"] if stream_of(name) == "tokens")
    return f"the layer that reads the rows of the text ({layer.removesuffix('.weight')})"


def layers_of(fit: Fit) -> tuple[str, ...]:
    """The layers that an increment with these factors changes."""
    return tuple(name for name in fit.exponents if network_of(name) is not None)


def cautions(fit: Fit) -> list[str]:
    """What a user should know of an increment that was brought in."""
    return [UNKNOWN, *([OF_IMAGES] if layers_of(fit) else [])]


@dataclass(frozen=True)
class Residual:
    """What an increment does not follow of one target's change: |difference| / |change|."""

    name: str
    residual: float


@dataclass(frozen=True)
class LeftOutPart:
    """A part of what was imported that a patch cannot hold.

    what: which part. count: of its modules or tensors. share: of the sum of squares of all that
    a LoRA adds; None where that was not computed.
    """

    what: str
    count: int
    share: float | None = None


@dataclass(frozen=True)
class ImportResult:
    """Result of `import_lora` and `extract`.

    Attributes:
        patch: Where the patch was written; "-" for a stream.
        bytes: Its size.
        source: "kohya", "peft" or "checkpoints".
        family: Family of the models that it is for.
        concept: Name of the concept.
        slug: Name for files and tensors.
        kind: Kind of increment: "additive", "operator" or "lora".
        rank: Rank of the increment.
        targets: Number of weights that it changes, layers included.
        relative_error: Frobenius norm of its difference from the imported change, over all weights,
            relative to that change.
        residuals: The same for each weight, the largest first.
        left_out: What the source changes and the patch does not.
        warnings: All warnings of the run.
        seconds: Duration.
        layers: Number of those weights that read more than the text of a prompt.
    """

    patch: str
    bytes: int
    source: Literal["kohya", "peft", "checkpoints"]
    family: Family
    concept: str
    slug: str
    kind: Kind
    rank: int
    targets: int
    relative_error: float
    residuals: tuple[Residual, ...]
    left_out: tuple[LeftOutPart, ...]
    warnings: tuple[str, ...]
    seconds: float
    layers: int = 0


class ImportOptions(TypedDict, total=False):
    """Options of `import_lora` and `extract`, beside the models and the output.

    Attributes:
        concept: Name of the concept, for the increment's prompts; by default the LoRA's title, or
            the file's name.
        kind: Kind of the concept: "style", "object" or "any".
        rank: Rank of the increment. If left out, the lowest one that keeps to `error`.
        error: Largest relative error of any weight's change (Frobenius), 0 to 1; by default 0.01
            for a LoRA and 0.05 for an edited model.
        text_layers_only: Take only what is done to the weights that read the rows of a prompt and
            nothing else: the keys and values of the cross-attention, or of a transformer the layer
            that takes the text in.
        force: Overwrite an existing output.
    """

    concept: str | None
    kind: AsKind
    rank: int | None
    error: float
    text_layers_only: bool
    force: bool


@dataclass(frozen=True)
class Naming:
    """What the concept is called and where its patch goes.

    output: the concept's slug with .sepme in the current folder if None.
    """

    concept: str
    kind: AsKind
    output: Path | BinaryIO | None
    force: bool

    @property
    def target(self) -> Path | BinaryIO:
        return Path(f"{slugify(self.concept)}.sepme") if self.output is None else self.output

    def check(self, *read: object) -> None:
        """Whether the patch can be written, as far as that can be told; see `check_output`."""
        check_output(self.target, read, force=self.force)


def write_patch(
    fit: Fit,
    base: Base,
    naming: Naming,
    method: str,
    settings: Mapping[str, Setting],
    progress: Progress,
) -> tuple[Increment, int]:
    """Write the patch of one imported increment; the increment, and the bytes of the file."""
    increment = Increment(
        concept=naming.concept,
        slug=slugify(naming.concept),
        kind=fit.kind,
        rank=fit.rank,
        prompts=tuple(phrase.text for phrase in phrases(naming.concept, naming.kind)),
        method=Method(method, {**settings, "relative_error": fit.relative_error}),
        measured=Measurements(),
        exponents=fit.exponents,
        shift_exponent=fit.shift_exponent,
        basis=fit.basis,
        up=fit.up,
        shift=fit.shift,
        down=fit.down,
    )
    patch = Patch(base=base, increments=(increment,), tool=TOOL, created=moment_of_making())
    data = patch_bytes(patch)
    write_output(naming.target, data, force=naming.force, progress=progress)
    return increment, len(data)


def summed_up(
    fit: Fit,
    base: Base,
    naming: Naming,
    written: tuple[Increment, int],
    *,
    source: Literal["kohya", "peft", "checkpoints"],
    left_out: Sequence[LeftOutPart],
    warnings: tuple[str, ...],
    seconds: float,
) -> ImportResult:
    """The result of an import."""
    increment, size = written
    worst = sorted(fit.residuals.items(), key=lambda item: -item[1])
    return ImportResult(
        patch=output_name(naming.target),
        bytes=size,
        source=source,
        family=base.family,
        concept=increment.concept,
        slug=increment.slug,
        kind=increment.kind,
        rank=increment.rank,
        targets=len(fit.residuals),
        relative_error=fit.relative_error,
        residuals=tuple(Residual(name, residual) for name, residual in worst),
        left_out=tuple(left_out),
        warnings=warnings,
        seconds=seconds,
        layers=len(increment.layers),
    )

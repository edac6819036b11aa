"""A model looked at under a recipe: all that is known before any increment is made."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from patch_spec.base import Base
from patch_spec.container import read_patch
from patch_spec.increment import Increment
from sepme_cli.checkpoints.boundary import reading
from sepme_cli.checkpoints.encoders import lend_text_encoders
from sepme_cli.checkpoints.reader import open_checkpoint
from sepme_cli.diffusion.devices import choose_device, choose_dtype
from sepme_cli.diffusion.models import Prediction, StableDiffusion
from sepme_cli.diffusion.study import Study, study
from sepme_cli.erasure.settings import Settings
from sepme_cli.errors import MismatchError
from sepme_cli.operations.matching import check_unpatched
from sepme_cli.operations.neighbourhood import Neighbourhood, look_around
from sepme_cli.progress import Progress
from sepme_cli.recipe import Recipe


@dataclass(frozen=True)
class BaseSummary:
    """What the patch is for. targets: how many weights it may change."""

    family: str
    targets: int


@dataclass(frozen=True)
class Outlook:
    """network: of the model, open as long as the outlook is. studies: of the recipe's concepts."""

    network: StableDiffusion
    base: Base
    around: Neighbourhood
    studies: tuple[Study, ...]

    @property
    def summary(self) -> BaseSummary:
        """What the patch is for, in short."""
        return BaseSummary(self.base.family, len(self.base.targets))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know before the work begins."""
        return (*self.around.warnings, *(w for s in self.studies if (w := s.warning)))


@contextmanager
def outlook(
    model: Path,
    recipe: Recipe,
    settings: Settings,
    *,
    known: Sequence[Path],
    text_encoders: Sequence[Path],
    tokenizer: Path | None,
    prediction: Prediction | None,
    progress: Progress,
) -> Iterator[Outlook]:
    """Open a model and study the recipe's concepts on it; see `erase` for what the rest means.

    Raises RefusedError for a model that is patched already and for a concept that lies in what
    must stay, MismatchError for a known patch of another model.
    """
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(model, progress))
        check_unpatched(checkpoint, "erase from its base, and apply both patches")
        lend_text_encoders(checkpoint, text_encoders, stack)
        network = StableDiffusion.of(
            checkpoint,
            choose_device(settings.device, progress),
            choose_dtype(settings.dtype),
            prediction=prediction,
            tokenizer=tokenizer,
            progress=progress,
        )
        progress.stage("reading the checkpoint")
        base = checkpoint.base(text_encoders=True)
        before = _known_increments(known, base)
        around = look_around(network, recipe, before, settings.neighbours)
        for concept, words in around.neighbours.items():
            progress.say(f"protecting the neighbours of {concept}: {', '.join(words) or 'none'}")
        # Before the study, which may refuse for the very reason that these give.
        for warning in around.warnings:
            progress.warn(warning)
        prompts = [increment.prompts for increment in before]
        studies = study(network, recipe.concepts, around.protected, prompts, settings)
        seen = Outlook(network, base, around, tuple(studies))
        for warning in seen.warnings:
            progress.warn(warning)
        yield seen


def _known_increments(patches: Sequence[Path], base: Base) -> tuple[Increment, ...]:
    """The increments of patches made before; MismatchError for another model's."""
    found: list[Increment] = []
    for path in patches:
        with reading(path):
            patch = read_patch(path)
        if (patch.base.family, patch.base.width) != (base.family, base.width):
            raise MismatchError(
                f"{path} is a patch for another model; it cannot be combined with one for this",
                file=path,
                expected=f"{base.family}, {base.width} wide",
                found=f"{patch.base.family}, {patch.base.width} wide",
            )
        found += patch.increments
    return tuple(found)

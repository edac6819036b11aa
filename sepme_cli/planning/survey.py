"""A model looked at under a recipe: all that is known before any increment is made."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from patch_spec.base import Base
from patch_spec.increment import Increment
from sepme_cli.checkpoints.hub.cache import fetched_from
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.checkpoints.reading.lent import lend_text_encoders
from sepme_cli.checkpoints.reading.patches import read_patch_file
from sepme_cli.composing.matching import check_unpatched
from sepme_cli.diffusion.devices import DTYPES, computing
from sepme_cli.diffusion.loading import unet_parameters
from sepme_cli.diffusion.models import Prediction, StableDiffusion
from sepme_cli.diffusion.study import Study, study
from sepme_cli.erasure.settings import Settings
from sepme_cli.errors import MismatchError, RefusedError, UnsupportedError
from sepme_cli.places import Place
from sepme_cli.planning.background import background_of
from sepme_cli.planning.neighbourhood import Aliases, Neighbourhood, look_around
from sepme_cli.progress import Progress
from sepme_cli.recipe import Recipe

_A_KIND = {"style": "a style", "object": "an object"}


@dataclass(frozen=True)
class BaseSummary:
    """What the patch is for. targets: how many weights it may change."""

    family: str
    targets: int


@dataclass(frozen=True)
class Outlook:
    """model: how to name it so that it is the same later. settings: with the dtype that was chosen.

    network: of the model, open as long as the outlook is. studies: of the concepts of `around`.
    """

    model: str
    settings: Settings
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
        found = (*self.around.warnings, *(w for s in self.studies if (w := s.warning)))
        wrecks = self.wrecks
        return found if wrecks is None else (*found, wrecks.message)

    @property
    def wrecks(self) -> RefusedError | None:
        """What there is to say if the increments would change what nobody named beyond the bound;
        None where they do not."""
        strength, bound = self.studies[0].shared.strength, self.settings.collateral
        collateral = strength.collateral
        if collateral is None or collateral.p95 <= bound:
            return None
        words = ", ".join(word for word, _ in collateral.worst[:3])
        return RefusedError(
            f"this would change much that nobody named ({words} among others), and with more "
            "protection too little of the concept would go. Erase fewer concepts at once, make the "
            "name more specific, raise `collateral` in a recipe's settings, or take it as it is "
            "with --force-collateral",
            expected=f"one held-out caption in twenty moves by more than {bound:.0%} at most",
            found=f"{collateral.p95:.0%}, with protection at {strength.protection:g} and "
            f"separability at {strength.separability:.2f}",
        )


@contextmanager
def outlook(
    model: Place,
    recipe: Recipe,
    settings: Settings,
    *,
    learns: bool,
    low_memory: bool,
    known: Sequence[Place],
    text_encoders: Sequence[Place],
    tokenizer: Path | None,
    prediction: Prediction | None,
    aliases: Aliases,
    cache: bool,
    thorough: bool = False,
    progress: Progress,
) -> Iterator[Outlook]:
    """Open a model and study the recipe's concepts on it; see `erase` for what the rest means.

    learns: whether the UNet is to learn, and not the closed form to be computed. thorough: look at
    every strength of protection.
    Raises RefusedError for a model that is patched already and for a concept that lies in what
    must stay, MismatchError for a known patch of another model.
    """
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(model, progress))
        check_unpatched(checkpoint, "erase from its base, and apply both patches")
        lend_text_encoders(checkpoint, text_encoders, stack)
        chosen = computing(
            "learning" if learns else "closed form",
            device=settings.device,
            dtype=settings.dtype,
            low_memory=low_memory,
            unet=unet_parameters(checkpoint),
            pictures=settings.batch_size,
            progress=progress,
        )
        network = StableDiffusion.of(
            checkpoint,
            chosen.device,
            DTYPES[chosen.dtype],
            prediction=prediction,
            tokenizer=tokenizer,
            frugal=chosen.frugal,
            progress=progress,
        )
        settings = replace(settings, dtype=chosen.dtype)
        progress.stage("reading the checkpoint")
        _check_reads(network)
        base = checkpoint.base(text_encoders=True)
        before = _known_increments(known, base)
        background = background_of(network, base, cached=cache, progress=progress)
        around = look_around(network, recipe, before, background, settings.neighbours, aliases)
        for item, asked in zip(around.concepts, recipe.concepts, strict=True):
            if item.kind != asked.kind:
                progress.say(f"{item.name} is taken for {_A_KIND[item.kind]} (--as says otherwise)")
            if more := item.aliases[len(asked.aliases) :]:
                progress.say(f"erased with {item.name}: {', '.join(more)}")
            elif near := around.aliases[item.name]:
                others = ", ".join(word.word for word in near)
                progress.say(f"nearly the same as {item.name}: {others} (--aliases auto: them too)")
        for concept, words in around.neighbours.items():
            progress.say(f"protecting the neighbours of {concept}: {', '.join(words) or 'none'}")
        # Before the study, which may refuse for the very reason that these give.
        for warning in around.warnings:
            progress.warn(warning)
        prompts = [increment.prompts for increment in before]
        studies = study(
            network, around.concepts, around.protected, prompts, settings, background, thorough
        )
        named = fetched_from(model, checkpoint.path)
        seen = Outlook(named, settings, network, base, around, tuple(studies))
        for warning in seen.warnings:
            progress.warn(warning)
        yield seen


def _check_reads(network: StableDiffusion) -> None:
    """UnsupportedError for text encoders to which all prompts are one, such as zeros."""
    one, other = network.ends(["a cat", "a painting"])
    if one.equal(other):
        raise UnsupportedError(
            f"the text encoder of {network.checkpoint.path} makes the same of every prompt, so "
            "that no concept can be told from another; name one that works with --text-encoder",
            file=network.checkpoint.path,
            expected="different states of different prompts",
            found="equal ones",
        )


def _known_increments(patches: Sequence[Place], base: Base) -> tuple[Increment, ...]:
    """The increments of patches made before; MismatchError for another model's."""
    found: list[Increment] = []
    for path in patches:
        patch = read_patch_file(path).patch
        if (patch.base.family, patch.base.width) != (base.family, base.width):
            raise MismatchError(
                f"{path} is a patch for another model; it cannot be combined with one for this",
                file=path,
                expected=f"{base.family}, {base.width} wide",
                found=f"{patch.base.family}, {patch.base.width} wide",
            )
        found += patch.increments
    return tuple(found)

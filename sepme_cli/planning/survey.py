"""A model looked at under a request: all that is known before any increment is made."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from patch_spec.base import Base
from patch_spec.increment import Increment
from sepme_cli.checkpoints.hub.cache import fetched_from
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.checkpoints.reading.patches import read_patch_file
from sepme_cli.composing.matching import check_unpatched
from sepme_cli.diffusion.devices import Work
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.opening import opened_model
from sepme_cli.diffusion.protection import Strength
from sepme_cli.diffusion.study import Study, study
from sepme_cli.erasure.collateral import Collateral
from sepme_cli.errors import MismatchError, RefusedError, UnsupportedError
from sepme_cli.places import Place
from sepme_cli.planning.background import background_of
from sepme_cli.planning.misread import misread
from sepme_cli.planning.neighbourhood import Neighbourhood, look_around
from sepme_cli.planning.request import EraseRequest
from sepme_cli.progress import Progress

_A_KIND = {"style": "a style", "object": "an object"}


@dataclass(frozen=True)
class BaseSummary:
    """What the patch is for. targets: how many weights it may change; None where that shows only
    when it is made."""

    family: str
    targets: int | None


@dataclass(frozen=True)
class Survey:
    """model: how to name it so that it is the same later.

    network: of the model, open as long as the survey is. studies: of the concepts of `around`.
    """

    request: EraseRequest
    model: str
    network: StableDiffusion
    base: Base
    around: Neighbourhood
    studies: tuple[Study, ...]

    @property
    def summary(self) -> BaseSummary:
        """What the patch is for, in short."""
        targets = None if self.request.method.layers else len(self.base.targets)
        return BaseSummary(self.base.family, targets)

    @property
    def strength(self) -> Strength:
        """The one that was chosen, on the stream where most of what nobody named moves."""
        return self.studies[0].worst.shared.strength

    @property
    def wrecks(self) -> RefusedError | None:
        """What there is to say if the increments would change what nobody named beyond the bound;
        None where they do not, and where that shows only when they are made."""
        strength = self.strength
        if self.request.method.layers:
            return None
        found = f"protection at {strength.protection:g} and separability at "
        return self.too_much(strength.collateral, f", with {found}{strength.separability:.2f}")

    def too_much(self, collateral: Collateral | None, beside: str = "") -> RefusedError | None:
        """What there is to say of collateral beyond the bound; None of less. beside: what else was
        found."""
        bound = self.request.settings.collateral
        if collateral is None or collateral.p95 <= bound:
            return None
        words = ", ".join(word for word, _ in collateral.worst[:3])
        return RefusedError(
            f"this would change other prompts too much ({words} among others), and more "
            "protection would leave too much of the concept. Erase fewer concepts at once, "
            "make the name more specific, raise `collateral` in a recipe's settings, or "
            "accept it with --force-collateral",
            expected=f"95% of held-out captions change by at most {bound:.0%}",
            found=f"{collateral.p95:.0%}{beside}",
        )


@contextmanager
def surveyed(
    request: EraseRequest, *, thorough: bool = False, progress: Progress
) -> Iterator[Survey]:
    """Open the model and study the concepts on it.

    thorough: look at every strength of protection.
    Raises RefusedError for a model that is patched already and for a concept that lies in what
    must stay, MismatchError for a known patch of another model.
    """
    settings = request.settings

    def check(found: Checkpoint) -> None:
        check_unpatched(found, "erase from its base, and apply both patches")
        works = "learns" if request.method.learns else "draws" if request.method.draws else ""
        if works and found.family.denoiser != "unet":
            raise UnsupportedError(
                f"{found.path} is {found.family.title}, and --method {request.method.name} {works} "
                "through a UNet; --method closed-form needs none",
                file=found.path,
                expected="a model with a UNet",
                found=found.family.title,
            )

        if request.method.layers and any(e.naming == "t5" for e in found.family.text_encoders):
            raise UnsupportedError(
                f"{found.path} reads prompts with T5 too, which --method {request.method.name} "
                "does not change, and which would still say the concept; use --method closed-form",
                file=found.path,
                expected="a model that reads prompts with CLIP alone",
                found=found.family.title,
            )

    work: Work = "closed form"
    if request.method.learns or request.method.draws:
        work = "learning" if request.method.learns else "sampling"
    with opened_model(
        request.model,
        request.options,
        work,
        images=settings.batch_size,
        check=check,
        progress=progress,
    ) as network:
        progress.stage("reading the checkpoint")
        base = network.checkpoint.base(text_encoders=True)
        before = _known_increments(request.known, base)
        _check_reads(network)
        streams = request.streams_of(base)
        backgrounds = {
            stream: background_of(
                network.text, base, stream, cached=request.cache, progress=progress
            )
            for stream in dict.fromkeys(("tokens", *streams))
        }
        around = look_around(
            network.text,
            request.recipe,
            before,
            backgrounds["tokens"],
            settings.neighbours,
            request.aliases,
        )
        said = tuple(misread(network.text, around.concepts))
        around = replace(around, warnings=(*said, *around.warnings))
        for item, asked in zip(around.concepts, request.recipe.concepts, strict=True):
            if item.kind != asked.kind:
                progress.say(f"{item.label} is detected as {_A_KIND[item.kind]} (--as overrides)")
            if more := item.aliases[len(asked.aliases) :]:
                progress.say(f"erased with {item.name}: {', '.join(more)}")
            elif near := around.aliases[item.label]:
                others = ", ".join(word.word for word in near)
                progress.say(
                    f"nearly the same as {item.name}: {others} (--aliases auto erases them too)"
                )
        for concept, words in around.neighbours.items():
            progress.say(f"protecting the neighbours of {concept}: {', '.join(words) or 'none'}")
        # Before the study, which may refuse for the very reason that these give.
        progress.warn_all(around.warnings)
        prompts = [increment.prompts for increment in before]
        studies = study(
            network,
            around.concepts,
            around.protected,
            prompts,
            settings,
            backgrounds,
            thorough,
            streams,
        )
        named = fetched_from(request.model, network.checkpoint.path)
        survey = Survey(request, named, network, base, around, tuple(studies))
        progress.warn_all(warning for one in studies if (warning := one.warning))
        if survey.wrecks is not None:
            progress.warn(survey.wrecks.message)
        yield survey


def _check_reads(network: StableDiffusion) -> None:
    """UnsupportedError for text encoders to which all prompts are one, such as zeros."""
    one, other = network.text.ends(["a cat", "a painting"])
    if one.equal(other):
        raise UnsupportedError(
            f"the text encoder of {network.checkpoint.path} gives the same embedding for "
            "every prompt, so that concepts cannot be separated; name one that works with "
            "--text-encoder",
            file=network.checkpoint.path,
            expected="different embeddings for different prompts",
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

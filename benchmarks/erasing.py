"""Erasing concepts as `sepme erase` does, with all else of the emoji canvas protected or what is
said."""

from collections.abc import Sequence

from benchmarks.canvas import everything_but
from patch_spec.increment import Increment
from patch_spec.manifest import Patch
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.diffusion.eraser import ComputedIncrement, closed_form_increment, sepme_increments
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.study import Study, study
from sepme_cli.erasure.concept import Protected
from sepme_cli.erasure.settings import Settings
from sepme_cli.erasure.words import Item


def erase(
    model: StableDiffusion,
    words: Sequence[str],
    method: str,
    settings: Settings,
    known: Sequence[Increment] = (),
    protected: Protected | None = None,
) -> list[ComputedIncrement]:
    """The increments of words ("style:ink").

    known: increments made before, which these are to go with. protected: words that must stay,
    everything else of the emoji canvas if None.
    """
    if protected is None:
        names = [word.partition(":")[2] for word in words]
        protected = everything_but(*names, *(increment.concept for increment in known))
    prompts = [increment.prompts for increment in known]
    studies = study(model, [Item.parse(word) for word in words], protected, prompts, settings)
    return make_increments(model, studies, method, settings)


def make_increments(
    model: StableDiffusion, studies: Sequence[Study], method: str, settings: Settings
) -> list[ComputedIncrement]:
    """One increment a study, each made for itself."""
    if method == "closed-form":
        return [closed_form_increment(s, settings) for s in studies]
    return [made for s in studies for made in sepme_increments(model, [s], settings)]


def patch_of(
    checkpoint: Checkpoint, increments: Sequence[Increment], protected: Protected | None = None
) -> Patch:
    """What `sepme erase` would write. protected: as for `erase`."""
    if protected is None:
        protected = everything_but(*(part.concept for part in increments))
    return Patch(
        base=checkpoint.base(text_encoders=True),
        increments=tuple(increments),
        separable_from=("",),
        protected=protected.prompts(),
        tool="benchmark",
    )

"""What a patch promises, held against the model and the recipe that it was made from."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from patch_spec.base import Base
from patch_spec.increment import Increment
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint, open_checkpoint
from sepme_cli.checkpoints.reading.patches import PatchFile
from sepme_cli.composing.matching import Fit, fit
from sepme_cli.erasure.methods import PRUNING
from sepme_cli.erasure.prompts import with_articles
from sepme_cli.erasure.settings import OF_PRUNING, Settings
from sepme_cli.erasure.words import Item, same_name
from sepme_cli.errors import MismatchError, UnsupportedError
from sepme_cli.places import Place
from sepme_cli.progress import Progress
from sepme_cli.recipe import Recipe

#: How far a leakage may be from the recorded one: machines round differently, above all what is
#: nothing but rounding.
_RELATIVE, _ABSOLUTE = 0.05, 1e-5
#: On another model it may be so many times as large, or so slight.
_ELSEWHERE, _SLIGHT = 2.0, 0.01


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. detail: what was found, in words."""

    name: str
    ok: bool
    detail: str


def made_by(file: PatchFile, recipe: Recipe) -> Iterator[Check]:
    """Whether a patch was made by a recipe, and holds what that says."""
    said = file.patch.recipe
    told = "made without a recipe" if said is None else f"made by another, digest {said}"
    same = said == recipe.digest
    yield Check(f"{file.name}: recipe", same, f"digest {said}" if same else told)
    parts = {same_name(part.concept): part for part in file.patch.increments}
    items = {same_name(item.label): item for item in recipe.concepts}
    wrong = [f"without {item.label}" for name, item in items.items() if name not in parts]
    wrong += [f"with {part.concept}" for name, part in parts.items() if name not in items]
    wrong += [
        f"{item.label} without {prompt!r}"
        for name, item in items.items()
        if name in parts
        for prompt in _missing(item, parts[name])
    ]
    detail = "; ".join(wrong) or "every concept of the recipe, and no other"
    yield Check(f"{file.name}: concepts", not wrong, detail)
    differing = [told for part in file.patch.increments for told in _differing(part, recipe)]
    detail = "; ".join(differing) or "as the recipe says"
    yield Check(f"{file.name}: settings", not differing, detail)


def _missing(item: Item, part: Increment) -> Iterator[str]:
    """Names and prompts of a concept that its increment was not made from."""
    thing = "" if item.erase_from is None else f" {item.erase_from}"
    asked = (*(with_articles(name + thing) for name in item.names), *item.prompts)
    yield from (prompt for prompt in asked if prompt not in part.prompts)


def _differing(part: Increment, recipe: Recipe) -> Iterator[str]:
    if recipe.method is not None and part.method.name != recipe.method:
        yield f"{part.concept} by {part.method.name}, not {recipe.method}"
    for name, value in recipe.settings.items():
        if name in OF_PRUNING and part.method.name != PRUNING:
            continue
        if (found := part.method.settings.get(name, getattr(Settings, name, None))) != value:
            yield f"{part.concept} with {name} {found}, not {value}"


def kept_on(
    model: Place, files: Sequence[PatchFile], unchecked: list[str], progress: Progress
) -> Iterator[Check]:
    """Whether what patches record of themselves is found again on a model.

    On the model that they were made from it must be just that. Operators fit every model with the
    same text encoder; there, and wherever else a patch can be applied, the leakage is told.
    Raises what opening a model raises, and UnsupportedError for one without its text encoder.
    """
    with open_checkpoint(model, progress) as checkpoint:
        base = checkpoint.base(text_encoders=True)
        for file in files:
            try:
                found = fit(checkpoint, [file]).compared(checkpoint, base)
            except MismatchError as error:
                detail = f"{error.expected}, found {error.found}"
                yield Check(f"{file.name}: model", False, detail)
                unchecked.append(f"{file.name}: leakage, on a model that it does not fit")
                continue
            own, check = _model(found, file, base)
            yield check
            progress.stage("encoding prompts")
            try:
                yield from _leakage(checkpoint, file, unchecked, own=own)
            except UnsupportedError as error:
                if check.ok:
                    raise
                unchecked.append(f"{file.name}: leakage: {error.message}")
    unchecked.append("separability: a patch does not record the anchors of its concepts")


def _model(found: Fit, file: PatchFile, base: Base) -> tuple[bool, Check]:
    """Whether it is the model that the patch was made from, and whether the patch fits it."""
    name = f"{file.name}: model"
    theirs = file.patch.base.text_encoders
    changed = [stream for stream, its in theirs.items() if base.text_encoders.get(stream) != its]
    if changed or not theirs:
        told = f"another text encoder: {', '.join(changed)}" if changed else "the patch names none"
        return False, Check(name, False, "; ".join(found.warnings) or told)
    if found.match != "family":
        digest = file.patch.base.digest
        return True, Check(name, True, f"the one it was made from, digest {digest}")
    if all(part.kind == "operator" for part in file.patch.increments):
        told = "another model with the same text encoder, which operators fit"
        return False, Check(name, True, told)
    return False, Check(name, False, "; ".join(found.warnings) or "the patch records no weights")


def _leakage(
    checkpoint: Checkpoint, file: PatchFile, unchecked: list[str], *, own: bool
) -> Iterator[Check]:
    import torch

    from sepme_cli.diffusion.models import StableDiffusion
    from sepme_cli.diffusion.study import leakages

    parts = file.patch.increments
    network = StableDiffusion.of(checkpoint, torch.device("cpu"))
    found_again = leakages(network, parts, file.patch.separable_from)
    for part, found in zip(parts, found_again, strict=True):
        name, recorded = f"{file.name}: leakage of {part.concept}", part.measured.leakage
        if recorded is None:
            unchecked.append(f"{name}: none is recorded")
            continue
        again = math.isclose(found, recorded, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)
        ok = again if own else found <= max(_ELSEWHERE * recorded, _SLIGHT)
        yield Check(name, ok, f"recorded {recorded:.3g}, found {found:.3g}")

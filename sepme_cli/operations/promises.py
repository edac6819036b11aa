"""What a patch promises, held against the model and the recipe that it was made from."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from patch_spec.increment import Increment
from sepme_cli.checkpoints.patches import PatchFile
from sepme_cli.checkpoints.reader import Checkpoint, open_checkpoint
from sepme_cli.erasure.prompts import with_articles
from sepme_cli.errors import MismatchError
from sepme_cli.operations.matching import check_fits, match_base
from sepme_cli.progress import Progress
from sepme_cli.recipe import Item, Recipe

#: How far a leakage may be from the recorded one: machines round differently, above all what is
#: nothing but rounding.
_RELATIVE, _ABSOLUTE = 0.05, 1e-5


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
    parts = {part.slug: part for part in file.patch.increments}
    items = {item.slug: item for item in recipe.concepts}
    wrong = [f"without {item.name}" for slug, item in items.items() if slug not in parts]
    wrong += [f"with {part.concept}" for slug, part in parts.items() if slug not in items]
    wrong += [
        f"{item.name} without {prompt!r}"
        for slug, item in items.items()
        if slug in parts
        for prompt in _missing(item, parts[slug])
    ]
    detail = "; ".join(wrong) or "every concept of the recipe, and no other"
    yield Check(f"{file.name}: concepts", not wrong, detail)
    differing = [told for part in file.patch.increments for told in _differing(part, recipe)]
    detail = "; ".join(differing) or "as the recipe says"
    yield Check(f"{file.name}: settings", not differing, detail)


def _missing(item: Item, part: Increment) -> Iterator[str]:
    """Names and prompts of a concept that its increment was not made from."""
    asked = (*map(with_articles, item.names), *item.prompts)
    yield from (prompt for prompt in asked if prompt not in part.prompts)


def _differing(part: Increment, recipe: Recipe) -> Iterator[str]:
    if recipe.method is not None and part.method.name != recipe.method:
        yield f"{part.concept} by {part.method.name}, not {recipe.method}"
    for name, value in recipe.settings.items():
        if (found := part.method.settings.get(name)) != value:
            yield f"{part.concept} with {name} {found}, not {value}"


def kept_on(
    model: Path, files: Sequence[PatchFile], unchecked: list[str], progress: Progress
) -> Iterator[Check]:
    """Whether what patches record of themselves is found again on the model they were made from.

    Raises what opening a model raises, and UnsupportedError for one without its text encoder.
    """
    with open_checkpoint(model, progress) as checkpoint:
        for file in files:
            base = _base(checkpoint, file)
            yield base
            if not base.ok:
                unchecked.append(f"{file.name}: leakage, which is of the model it was made from")
                continue
            progress.stage("encoding prompts")
            yield from _leakage(checkpoint, file, unchecked)
    unchecked.append("separability: a patch does not say what its concepts should act like")


def _base(checkpoint: Checkpoint, file: PatchFile) -> Check:
    name = f"{file.name}: model"
    try:
        check_fits(checkpoint, file, file.patch.increments)
    except MismatchError as error:
        return Check(name, False, f"{error.expected}, found {error.found}")
    base = checkpoint.base(text_encoders=True)
    match, warnings = match_base(checkpoint, base, [file])
    if match == "family":
        return Check(name, False, "; ".join(warnings) or "the patch says of no weights")
    theirs = file.patch.base.text_encoders
    if changed := [
        stream for stream, its in theirs.items() if base.text_encoders.get(stream) != its
    ]:
        return Check(name, False, f"another text encoder: {', '.join(changed)}")
    return Check(name, True, f"the one it was made from, digest {file.patch.base.digest}")


def _leakage(checkpoint: Checkpoint, file: PatchFile, unchecked: list[str]) -> Iterator[Check]:
    import torch

    from sepme_cli.diffusion.devices import choose_dtype
    from sepme_cli.diffusion.eraser import leakages
    from sepme_cli.diffusion.models import StableDiffusion

    parts = file.patch.increments
    # Embeddings in half precision are others; whatever else a tool may say, fp32 is the truest.
    said = parts[0].method.settings.get("dtype")
    dtype = choose_dtype(str(said) if said in ("fp16", "bf16") else None)
    network = StableDiffusion.of(checkpoint, torch.device("cpu"), dtype)
    found_again = leakages(network, parts, file.patch.separable_from)
    for part, found in zip(parts, found_again, strict=True):
        name, recorded = f"{file.name}: leakage of {part.concept}", part.measured.leakage
        if recorded is None:
            unchecked.append(f"{name}: none is recorded")
            continue
        ok = math.isclose(found, recorded, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)
        yield Check(name, ok, f"recorded {recorded:.3g}, found {found:.3g}")

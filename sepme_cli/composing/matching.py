"""Do a patch and a checkpoint belong together, and how nearly."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Literal, Protocol

from patch_spec.base import Base
from patch_spec.compose import shape_of
from patch_spec.increment import Increment
from patch_spec.stack import StackRecord
from patch_spec.streams import Stream, network_of, stream_of
from sepme_cli.arguments import Words
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.checkpoints.reading.patches import Patches, PatchFile, read_patch_files, select
from sepme_cli.checkpoints.structure.dtypes import FP8
from sepme_cli.checkpoints.structure.families import Family, Shaped
from sepme_cli.errors import MismatchError, RefusedError, UnsupportedError, UsageError
from sepme_cli.progress import Progress

BaseMatch = Literal["exact", "same-values", "family"]
"""exact: the patch was made from these very weights. same-values: from a copy in another dtype,
equal as far as fp16 shows. family: from another model of the family."""


class Patchable(Protocol):
    """What increments can be added to: an open checkpoint, or a UNet in memory.

    path: what errors call it. by_name: its targets, by the names that patches give them. further:
    keys and values in it that are none. layer: another weight by its name in patches, None for one
    that it does not have.
    """

    @property
    def path(self) -> str | PathLike[str]: ...
    @property
    def family(self) -> Family: ...
    @property
    def widths(self) -> Mapping[Stream, int]: ...
    @property
    def by_name(self) -> Mapping[str, Shaped]: ...
    @property
    def further(self) -> Sequence[str]: ...
    def layer(self, name: str) -> Shaped | None: ...


ROUNDS_TWICE = "added to a checkpoint that is patched already, which rounds twice"
_NAMED = 3
"""How many of what differs a message names."""


def check_unpatched(checkpoint: Checkpoint, instead: str) -> None:
    """RefusedError for a checkpoint that patches were applied to. instead: what to do."""
    if checkpoint.stack is not None:
        raise RefusedError(
            f"{checkpoint.path} has been patched already; {instead}",
            file=checkpoint.path,
            expected="a checkpoint without patches",
            found=", ".join(entry.concept for entry in checkpoint.stack.entries),
        )


def check_patched(checkpoint: Checkpoint) -> StackRecord:
    """What patches are in a checkpoint; RefusedError where none is."""
    if checkpoint.stack is None:
        raise RefusedError(
            f"{checkpoint.path} is not patched; nothing was changed",
            file=checkpoint.path,
            expected="a checkpoint with patches in it",
            found="no stack record in its metadata",
        )
    return checkpoint.stack


@dataclass(frozen=True)
class Fit:
    """Increments of patches that can be added to a model.

    files: those that something was chosen from. warnings: what a user should know. match: how near
    the model is to those that the patches were made from; None where that was not compared.
    unreached: of the warnings, those of weights of the model that read the text and do not change.
    """

    files: tuple[PatchFile, ...]
    warnings: tuple[str, ...]
    match: BaseMatch | None = None
    unreached: tuple[str, ...] = ()

    def compared(self, checkpoint: Checkpoint, original: Base | None = None) -> "Fit":
        """The same with the match, and with warnings where the models differ.

        original: what a patched checkpoint was before any patch; without it only the digest in its
        record can be compared.
        """
        if original is None and checkpoint.stack is None:
            original = checkpoint.base()
        match, differing = _match_base(checkpoint, original, self.files)
        return replace(self, warnings=(*self.warnings, *differing), match=match)


def fit(
    model: Patchable, files: Sequence[PatchFile], chosen: Sequence[Increment] | None = None
) -> Fit:
    """Whether increments of patches can be added to a model; MismatchError if they cannot be.

    chosen: of the files' increments; all of them if None.
    """
    digests = None if chosen is None else {part.digest for part in chosen}
    used, warnings, unreached = [], [], []
    for file in files:
        parts = [p for p in file.patch.increments if digests is None or p.digest in digests]
        if parts:
            used.append(file)
            _check_fits(model, file, parts)
            unreached += _staying(model, file, parts)
            warnings += _pruned(model, file)
    if used and model.further:
        unreached.append(
            f"{model.path} holds the keys and values of another UNet too ({_some(model.further)}), "
            "which stay as they are: the concept lives on there"
        )
    return Fit(tuple(used), (*unreached, *warnings), unreached=tuple(unreached))


def split_applied(
    checkpoint: Checkpoint, chosen: Sequence[Increment]
) -> tuple[tuple[Increment, ...], tuple[Increment, ...]]:
    """The increments that are not in a checkpoint yet, and those that are."""
    entries = () if checkpoint.stack is None else checkpoint.stack.entries
    present = {entry.digest for entry in entries}
    new = tuple(part for part in chosen if part.digest not in present)
    return new, tuple(part for part in chosen if part.digest in present)


def applied_already(model: object, parts: Sequence[Increment]) -> RefusedError:
    """What there is to say of increments that are in a model already; model: its path or name."""
    concepts = ", ".join(part.concept for part in parts)
    return RefusedError(
        f"{concepts} already erased in {model}; nothing was changed",
        file=model if isinstance(model, Path) else None,
        expected="an increment that is not in the checkpoint",
        found=concepts,
    )


def both_act(checkpoint: Checkpoint, new: Sequence[Increment]) -> list[str]:
    """Warnings about concepts that another increment in a checkpoint takes out already."""
    before = () if checkpoint.stack is None else checkpoint.stack.entries
    return [
        f"{entry.concept} is already erased by another increment: both act now"
        for entry in before
        for part in new
        if part.concept == entry.concept
    ]


def check_masks(checkpoint: Checkpoint, new: Sequence[Increment], needed: str) -> None:
    """RefusedError for masks of layers that are changed already: they would make zero what others
    added there, too. needed: what to give, so that all is composed from the original weights."""
    changed = {} if checkpoint.stack is None else checkpoint.stack.layers
    for part in new:
        if both := sorted(part.masks.keys() & changed.keys()):
            raise RefusedError(
                f"{part.concept} makes weights of {both[0]} zero, and another patch has changed "
                f"them in {checkpoint.path}: give {needed} as well; nothing was changed",
                file=checkpoint.path,
                expected=needed,
                found="patched weights alone",
            )


def chosen_for(
    model: Patchable, patches: Patches, only: Words, progress: Progress
) -> tuple[Increment, ...]:
    """The increments of patches, or of them those that are named, which fit a model in memory.

    Raises what `read_patch_file`, `select` and `fit` raise, UsageError without a patch, and
    UnsupportedError for increments that change layers.
    """
    files = read_patch_files(patches)
    if not files:
        raise UsageError("name at least one patch")
    chosen = select(files, only)
    if layered := [part.concept for part in chosen if part.layers]:
        no_lora = any(part.kind == "mask" for part in chosen)
        raise UnsupportedError(
            f"{', '.join(layered)}: these increments change layers that read more than the text, "
            "which are not patched in memory: apply them to the model's file"
            + ("" if no_lora else ", or export them as a LoRA"),
            expected="increments of what reads text alone",
            found=", ".join(layered),
        )
    progress.warn_all(fit(model, files, chosen).warnings)
    return chosen


def _check_fits(checkpoint: Patchable, file: PatchFile, parts: Sequence[Increment]) -> None:
    base = file.patch.base
    read: dict[Stream, int] = {"tokens": base.width}
    if any(part.on("pooled") for part in parts):
        read = dict(base.widths)
    there = {stream: checkpoint.widths.get(stream) for stream in read}
    if (base.family, read) != (checkpoint.family.name, there):
        raise MismatchError(
            f"{file.name} is a patch for another kind of model than {checkpoint.path}",
            file=checkpoint.path,
            expected=_kind(base.family, read),
            found=_kind(checkpoint.family.name, there),
        )
    for part in parts:
        _check_targets(checkpoint, file, part)


def _staying(model: Patchable, file: PatchFile, parts: Sequence[Increment]) -> list[str]:
    """A warning of the model's targets that stay as they are."""
    left = [name for name in model.by_name if _leaves(file.patch.base, parts, name)]
    return [
        f"{file.name} has no increments for {_some(sorted(left))}, which do not change: the "
        "concept may remain there"
    ] * bool(left)


def _pruned(model: Patchable, file: PatchFile) -> list[str]:
    """A warning of a model that is smaller than the base of the patch, or larger."""
    shapes = file.patch.base.shapes
    missing = sorted(shapes.keys() - model.by_name.keys())
    cut = [n for n, own in model.by_name.items() if n in shapes and own.shape[0] != shapes[n][0]]
    told = [f"without {_some(missing)}"] * bool(missing)
    told += [f"with other shapes of {_some(sorted(cut))}"] * bool(cut)
    return [
        f"{model.path} has {len(shapes) - len(missing)} of the {len(shapes)} keys and values that "
        f"{file.name} was made from, {', '.join(told)}: one of the two models was pruned or "
        "distilled, and what the patch does here was not measured"
    ] * bool(told)


def _leaves(base: Base, parts: Sequence[Increment], target: str) -> bool:
    """Whether a target of a model stays as it is that an erasure should change."""
    if target not in base.targets and any(stream_of(name) for part in parts for name in part.up):
        return True
    if any(part.layers for part in parts):
        # They were not made by what is read of the text alone.
        return False
    return not any(part.acts_on(target) for part in parts) and stream_of(target) == "pooled"


def _kind(family: str, widths: Mapping[Stream, int | None]) -> str:
    """A model by its family and the text that it reads."""
    said = [f"text embedding {widths['tokens']} wide"]
    if "pooled" in widths:
        said.append(
            f"pooled text {widths['pooled']} wide" if widths["pooled"] else "no pooled text"
        )
    return ", ".join([family, *said])


def _match_base(
    checkpoint: Checkpoint, reference: Base | None, files: Sequence[PatchFile]
) -> tuple[BaseMatch, list[str]]:
    """How near the checkpoint's base is to those of the patches, and warnings where it differs.

    reference: the checkpoint before any patch; None where that is not at hand.
    """
    match: BaseMatch = "exact"
    layers = checkpoint.found_layers({name for file in files for name in file.patch.base.layers})
    if any(target.copies[0].dtype != "F16" for target in (*checkpoint.targets, *layers)):
        match = "same-values"
    warnings = []
    for file in files:
        if not file.patch.base.targets:
            # Operators alone, for any model that reads the same text embeddings.
            match = "family"
            warnings += _text_encoders(checkpoint, file)
            continue
        if reference is None:
            same = checkpoint.stack is not None and checkpoint.stack.base == file.patch.base.digest
            differing = "" if same else "according to the stack record"
        else:
            differing = _differing(reference, file.patch.base)
        differing = differing or _other_layers(checkpoint, file)
        if differing:
            match = "family"
            warnings.append(_another_model(checkpoint, file, differing))
            warnings += _text_encoders(checkpoint, file)
    return match, warnings


def _other_layers(checkpoint: Checkpoint, file: PatchFile) -> str:
    layers = file.patch.base.layers
    found = checkpoint.found_layers(layers)
    names = [
        layer.name for layer in found if checkpoint.fingerprint_of(layer) != layers[layer.name]
    ]
    return f"{len(names)} of {len(layers)} further layers differ: {_some(names)}" * bool(names)


def _another_model(checkpoint: Checkpoint, file: PatchFile, differing: str) -> str:
    if any(target.copies[0].dtype in FP8 for target in checkpoint.targets):
        return (
            f"{checkpoint.path} is in fp8, which is too coarse to detect whether it is the "
            f"model that {file.name} was made from ({differing})"
        )
    return (
        f"{file.name} was made from another model of this family ({differing}): it "
        "should work, and sepme evaluate measures how well"
    )


def _check_targets(checkpoint: Patchable, file: PatchFile, part: Increment) -> None:
    for name in (*part.exponents, *part.masks):
        target = checkpoint.by_name.get(name)
        if target is None:
            target = checkpoint.layer(name)
        found = "no such tensor" if target is None else list(target.shape)
        expected = list(shape_of(part, name))
        if found != expected:
            place = network_of(name)
            where, advice = f" (of its text encoder {place})", ""
            if place in (None, "denoiser"):
                where = ""
                advice = ": models of other shapes take operators, or patches of their own"
            raise MismatchError(
                f"{file.name} patches {name}{where}, which {checkpoint.path} does not have in that "
                f"shape{advice}",
                file=checkpoint.path,
                expected=expected,
                found=found,
            )


def _differing(reference: Base, other: Base) -> str:
    known = reference.targets.keys() | other.targets.keys()
    names = sorted(
        name
        for name in known
        if stream_of(name) in other.widths
        and reference.targets.get(name) != other.targets.get(name)
    )
    return f"{len(names)} of {len(known)} weights differ: {_some(names)}" * bool(names)


def _text_encoders(checkpoint: Checkpoint, file: PatchFile) -> list[str]:
    """What the increments were made to read is text embeddings, so these matter most."""
    theirs = file.patch.base.text_encoders
    if not theirs:
        return []
    ours = checkpoint.text_encoder_fingerprints()
    changed = [name for name in theirs if name in ours and ours[name] != theirs[name]]
    if not changed:
        return []
    return [
        f"the text encoder ({', '.join(changed)}) is not the one that {file.name} was "
        "made with, so that concepts may affect each other more; sepme verify "
        f"{file.name} --model {checkpoint.path} computes the leakage here"
    ]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more

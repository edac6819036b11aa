"""Do a patch and a checkpoint belong together, and how nearly."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Literal, Protocol

from patch_spec.base import Base
from patch_spec.increment import Increment
from patch_spec.stack import StackRecord
from sepme_cli.arguments import Words
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.checkpoints.reading.patches import Patches, PatchFile, read_patch_files, select
from sepme_cli.checkpoints.structure.dtypes import FP8
from sepme_cli.checkpoints.structure.families import Family, Shaped
from sepme_cli.errors import MismatchError, RefusedError, UsageError
from sepme_cli.progress import Progress

BaseMatch = Literal["exact", "same-values", "family"]
"""exact: the patch was made from these very weights. same-values: from a copy in another dtype,
equal as far as fp16 shows. family: from another model of the family."""


class Patchable(Protocol):
    """What increments can be added to: an open checkpoint, or a UNet in memory.

    path: what errors call it. by_name: its targets, by the names that patches give them.
    """

    @property
    def path(self) -> str | PathLike[str]: ...
    @property
    def family(self) -> Family: ...
    @property
    def width(self) -> int: ...
    @property
    def by_name(self) -> Mapping[str, Shaped]: ...


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
            expected="a checkpoint that concepts were taken out of",
            found="no stack record in its metadata",
        )
    return checkpoint.stack


def check_fits(checkpoint: Patchable, file: PatchFile, parts: Sequence[Increment]) -> list[str]:
    """Warnings about increments of a patch that can be applied; MismatchError if they cannot be."""
    base = file.patch.base
    expected = f"{base.family}, text embedding {base.width} wide"
    found = f"{checkpoint.family.name}, text embedding {checkpoint.width} wide"
    if expected != found:
        raise MismatchError(
            f"{file.name} is a patch for another kind of model than {checkpoint.path}",
            file=checkpoint.path,
            expected=expected,
            found=found,
        )
    layered = [part for part in parts if part.kind != "operator"]
    for part in layered:
        _check_targets(checkpoint, file, part)
    others = checkpoint.by_name.keys() - base.targets.keys()
    if layered and others:
        return [
            f"{file.name} knows nothing of {_some(sorted(others))}, which stay as they are: the "
            "concept may live on there"
        ]
    return []


def chosen_for(
    model: Patchable, patches: Patches, only: Words, progress: Progress
) -> tuple[Increment, ...]:
    """The increments of patches, or of them those that are named, which fit the model.

    Raises what `read_patch_file`, `select` and `check_fits` raise, UsageError without a patch.
    """
    files = read_patch_files(patches)
    if not files:
        raise UsageError("name at least one patch")
    chosen = select(files, only)
    digests = {part.digest for part in chosen}
    for file in files:
        parts = [part for part in file.patch.increments if part.digest in digests]
        for warning in check_fits(model, file, parts):
            progress.warn(warning)
    return chosen


def match_base(
    checkpoint: Checkpoint, reference: Base | None, files: Sequence[PatchFile]
) -> tuple[BaseMatch, list[str]]:
    """How near the checkpoint's base is to those of the patches, and warnings where it differs.

    reference: the checkpoint before any patch; None where that is not at hand, and only the
    digest in its record can be compared.
    """
    match: BaseMatch = "exact"
    if any(target.copies[0].dtype != "F16" for target in checkpoint.targets):
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
            differing = "" if same else "as far as the stack record tells"
        else:
            differing = _differing(reference, file.patch.base)
        if differing:
            match = "family"
            warnings.append(_another_model(checkpoint, file, differing))
            warnings += _text_encoders(checkpoint, file)
    return match, warnings


def _another_model(checkpoint: Checkpoint, file: PatchFile, differing: str) -> str:
    if any(target.copies[0].dtype in FP8 for target in checkpoint.targets):
        return (
            f"{checkpoint.path} is in fp8, which keeps too few digits to tell whether it is the "
            f"model that {file.name} was made from ({differing})"
        )
    return (
        f"{file.name} was made from another model of this family ({differing}): it should work, "
        "but how well was not measured"
    )


def _check_targets(checkpoint: Patchable, file: PatchFile, part: Increment) -> None:
    width = checkpoint.width
    for name, up in part.up.items():
        target = checkpoint.by_name.get(name)
        found = "no such tensor" if target is None else list(target.shape)
        if found != [len(up), width]:
            raise MismatchError(
                f"{file.name} patches {name}, which {checkpoint.path} does not have in that shape",
                file=checkpoint.path,
                expected=[len(up), width],
                found=found,
            )


def _differing(reference: Base, other: Base) -> str:
    names = sorted(
        name
        for name, fingerprint in reference.targets.items()
        if other.targets.get(name) != fingerprint
    )
    return f"{len(names)} of {len(reference.targets)} weights differ: {_some(names)}" * bool(names)


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
        f"the text encoder ({', '.join(changed)}) is not the one that {file.name} was made with: "
        "prompts mean something else here, and what was kept apart may no longer be; "
        f"sepme verify {file.name} --model {checkpoint.path} computes how much it leaks here"
    ]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more

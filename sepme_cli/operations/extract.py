"""Bring what another method did to a checkpoint into a patch."""

import math
import time
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import ml_dtypes
import numpy as np

from patch_spec.grid import Float64
from patch_spec.provenance import Setting
from patch_spec.streams import stream_of
from sepme_cli.arguments import FilePath, PlaceLike, as_path, as_place
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint, open_checkpoint
from sepme_cli.checkpoints.reading.edited import EditedWeights, open_edited
from sepme_cli.checkpoints.reading.targets import Target
from sepme_cli.checkpoints.reading.tensors import Stored
from sepme_cli.checkpoints.structure.dtypes import NAMES, numpy_dtype, readable
from sepme_cli.checkpoints.structure.layout import bare_name
from sepme_cli.composing.comparison import rounding, same_bytes
from sepme_cli.composing.fitting import Change, fit
from sepme_cli.composing.importing import (
    UNKNOWN,
    ImportResult,
    LeftOutPart,
    Naming,
    importable,
    summed_up,
    write_patch,
)
from sepme_cli.composing.matching import check_unpatched
from sepme_cli.erasure.prompts import AsKind
from sepme_cli.erasure.words import given_name
from sepme_cli.errors import RefusedError
from sepme_cli.progress import SILENT, Collector, Progress

ERROR = 0.05
"""What may be left of a weight's change, relative: a four-hundredth of its square."""


def extract(
    base: PlaceLike,
    edited: PlaceLike,
    output: FilePath | BinaryIO | None = None,
    *,
    concept: str | None = None,
    kind: AsKind = "any",
    rank: int | None = None,
    error: float = ERROR,
    force: bool = False,
    progress: Progress = SILENT,
) -> ImportResult:
    """Turn another method's edit of a model into a patch.

    Only the keys and values of the cross-attention, or of a transformer the layer that reads the
    rows of the text, become a patch. What else differs is left out, and listed. One weight is in
    memory at a time.

    Args:
        base: The model before: a file, a folder, or a place on the hub.
        edited: The model after, in any layout and dtype; or a file with only the edited weights, as
            UCE and ESD save it.
        output: Patch to write, a file or binary stream. If left out, the concept's slug with
            .sepme, in the current folder.
        concept: Name of the concept, for the increment's prompts; by default the edited file's
            name.
        kind: Kind of the concept: "style", "object" or "any".
        rank: Rank of the increment. If left out, the lowest one that keeps to `error`.
        error: Largest relative error of any weight's change (Frobenius), 0 to 1.
        force: Overwrite an existing output.
        progress: Receives progress and warnings.

    Returns:
        What was written, its error, and what was left out.

    Raises:
        RefusedError: Nothing remains, no allowed rank keeps to `error`, or the base is patched.
        MismatchError: The models are of different kinds.
        MalformedError: A file is damaged or hostile.
        UnsupportedError: A file is of a kind that is not supported.
        SystemFailure: A file cannot be read or written.
    """
    started, progress = time.monotonic(), Collector(progress)
    base, edited = as_place(base), as_place(edited)
    named = given_name(edited.stem if concept is None else concept, "--concept")
    naming = Naming(named, kind, as_path(output), force)
    naming.check(base, edited)
    with (
        open_checkpoint(base, progress) as before,
        open_edited(edited, before, progress) as after,
    ):
        check_unpatched(before, "extract with the file from before any patch")
        _check_edited(before, after)
        changes = [_change(target, after.targets[target.name]) for target in _compared(before)]
        found = fit(changes, rank=rank, error=error, progress=progress)
        if after.whole is not None:
            left_out, warnings = _left_out(before, after.whole, progress)
        else:
            left_out, warnings = _others_left_out(before, after)
        if found is None:
            raise _nothing(before, after, left_out)
        progress.warn_all((*warnings, UNKNOWN))
        described = before.base(text_encoders=True)
        settings: dict[str, Setting] = {"edited": after.digest, "rank": rank, "error": error}
        written = write_patch(found, described, naming, "extraction", settings, progress)
    return summed_up(
        found,
        described,
        naming,
        written,
        source="checkpoints",
        left_out=left_out,
        warnings=progress.warnings,
        seconds=time.monotonic() - started,
    )


def _nothing(before: Checkpoint, after: EditedWeights, left_out: list[LeftOutPart]) -> RefusedError:
    advice = "; keep the edited model, and erase from that" if left_out else ""
    return RefusedError(
        f"{after.path} does not differ from {before.path} in {importable(before.family)}: there is "
        f"nothing to extract{advice}",
        file=after.path,
        expected=f"a change of {importable(before.family)}",
        found=", ".join(f"{part.what}: {part.count}" for part in left_out) or "none",
    )


def _check_edited(before: Checkpoint, after: EditedWeights) -> None:
    """RefusedError where the two are one model in two dtypes: what is between them is rounding."""
    pairs = [(t.copies[0], after.targets[t.name].copies[0]) for t in _compared(before)]
    if all(a.dtype == b.dtype for a, b in pairs):
        return
    if all(same_bytes(a, b) or _same_but_rounding(a, b) for a, b in pairs):
        theirs = sorted({readable(b.dtype) for a, b in pairs if a is not b})
        raise RefusedError(
            f"{after.path} has {importable(before.family)} of {before.path} in another dtype, and "
            "differs only by rounding: there is nothing to extract",
            file=after.path,
            expected=f"a change of {importable(before.family)}",
            found=f"the same in {', '.join(theirs)} and {before.dtype}",
        )


def _compared(before: Checkpoint) -> list[Target]:
    """The weights that a patch is made of: those that read the rows of a prompt. What other methods
    do to the vector beside them is left out, and counted."""
    return [target for target in before.targets if stream_of(target.name) == "tokens"]


def _change(before: Target, after: Target) -> Change:
    def read() -> Float64:
        left, right = (target.read().astype(np.float64) for target in (before, after))
        return right - left

    def weight() -> Float64:
        return before.read().astype(np.float64)

    return Change(before.name, read, weight, _noise(before, after))


def _noise(before: Target, after: Target) -> float:
    """|dW| that rounding made, if both were rounded once to what they are stored in."""
    deviations = (
        rounding(target.read().astype(np.float64), target.copies[0].dtype)
        for target in (before, after)
    )
    return math.hypot(*deviations) * math.sqrt(math.prod(before.shape))


def _left_out(
    before: Checkpoint, after: Checkpoint, progress: Progress
) -> tuple[list[LeftOutPart], list[str]]:
    """What else differs, network by network; and warnings of it."""
    left_out, warnings = [], []
    if after.stack is not None:
        warnings.append(
            f"{after.path} was patched by sepme: its own patches are exact, and this is an "
            "approximation"
        )
    progress.stage("comparing all other tensors")
    text = before.text_encoder_fingerprints(), after.text_encoder_fingerprints()
    changed = [name for name in text[0] if text[1].get(name, text[0][name]) != text[0][name]]
    if changed:
        left_out += [LeftOutPart(f"text encoder {name}", 1) for name in changed]
        warnings.append(
            f"the text encoder ({', '.join(changed)}) differs too, and stays as it is in "
            "the base: the edit may depend on it"
        )
    for part, name in (("denoiser", before.family.denoiser), ("vae", "vae")):
        pair = before.network(part), after.network(part)
        if pair[0] is None or pair[1] is None:
            continue
        if pair[0].naming != pair[1].naming:
            warnings.append(
                f"the files name the tensors of the {name} differently: nothing "
                f"but {importable(before.family)} was compared"
            )
            continue
        count = sum(_differing(pair[0].tensors, pair[1].tensors, before))
        if count:
            left_out.append(LeftOutPart(f"{name}, other tensors", count))
            warnings.append(
                f"{count} other tensors of the {name} differ and stay as they are in the base: "
                f"only {importable(before.family)} can be extracted"
            )
    return left_out, warnings


def _others_left_out(
    before: Checkpoint, after: EditedWeights
) -> tuple[list[LeftOutPart], list[str]]:
    """The same of a file that holds some weights alone."""
    denoiser = before.network("denoiser")
    ours = denoiser.tensors if denoiser is not None else {}
    others = [
        name
        for name, stored in after.others.items()
        if (own := ours.get(bare_name(name))) is None or not same_bytes(own, stored)
    ]
    if not others:
        return [], []
    return [LeftOutPart("other tensors", len(others))], [
        f"{len(others)} other tensors in {after.path} ({others[0]} among them) are left "
        f"out: only {importable(before.family)} can be extracted, and the edit may depend on the "
        "rest"
    ]


def _differing(
    ours: Mapping[str, Stored], theirs: Mapping[str, Stored], before: Checkpoint
) -> Iterator[bool]:
    targets = {copy.name for target in _compared(before) for copy in target.copies}
    for name in ours.keys() | theirs.keys():
        a, b = ours.get(name), theirs.get(name)
        if a is None or b is None:
            yield True
        elif a.name not in targets and not same_bytes(a, b):
            yield not _same_but_rounding(a, b)


def _same_but_rounding(a: Stored, b: Stored) -> bool:
    """Whether two tensors of different dtypes can be one that was rounded to both."""
    if a.shape != b.shape or a.dtype == b.dtype or not {a.dtype, b.dtype} <= NAMES.keys():
        return False
    left, right = a.read().astype(np.float64), b.read().astype(np.float64)
    infos = [
        ml_dtypes.finfo(numpy_dtype(stored.dtype))  # type: ignore[no-untyped-call]
        for stored in (a, b)
    ]
    step = max(float(info.eps) for info in infos)
    # What is stored with a scale is rounded before it is multiplied by that.
    least = max(
        float(info.smallest_subnormal)
        * (1.0 if (scale := stored.scales()) is None else scale.max())
        for info, stored in zip(infos, (a, b), strict=True)
    )
    return bool((np.abs(left - right) <= step * np.abs(left) + least).all())

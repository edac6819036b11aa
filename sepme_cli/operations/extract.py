"""Bring what another method did to a checkpoint into a patch."""

import math
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import BinaryIO, Unpack

import numpy as np

from patch_spec.grid import Float64
from patch_spec.provenance import Setting
from patch_spec.streams import network_of, stream_of
from sepme_cli.arguments import FilePath, PlaceLike, as_path, as_place, check_known
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint, open_checkpoint
from sepme_cli.checkpoints.reading.edited import EditedWeights, open_edited
from sepme_cli.checkpoints.reading.targets import Target
from sepme_cli.checkpoints.reading.tensors import Stored
from sepme_cli.checkpoints.structure.dtypes import NAMES, readable
from sepme_cli.checkpoints.structure.gguf import QUANTISED
from sepme_cli.checkpoints.structure.layout import bare_name
from sepme_cli.composing.comparison import rounding, same_but_rounding, same_bytes
from sepme_cli.composing.fitting import Change, fit
from sepme_cli.composing.importing import (
    EVERY_LAYER,
    ImportOptions,
    ImportResult,
    LeftOutPart,
    Naming,
    cautions,
    importable,
    layers_of,
    summed_up,
    write_patch,
)
from sepme_cli.composing.matching import check_unpatched
from sepme_cli.erasure.words import given_name
from sepme_cli.errors import MismatchError, RefusedError
from sepme_cli.progress import SILENT, Collector, Progress

Compared = tuple[Target, Target]
"""A weight before and after."""

ERROR = 0.05
"""What may be left of a weight's change, relative: a four-hundredth of its square."""


def extract(
    base: PlaceLike,
    edited: PlaceLike,
    output: FilePath | BinaryIO | None = None,
    *,
    progress: Progress = SILENT,
    **options: Unpack[ImportOptions],
) -> ImportResult:
    """Turn another method's edit of a model into a patch.

    Every weight matrix of a linear layer that differs becomes part of the patch, those of CLIP's
    text encoders included. What else differs is left out, and listed. One weight is in memory at a
    time.

    Args:
        base: The model before: a file, a folder, or a place on the hub.
        edited: The model after, in any layout and dtype; or a file with only the edited weights, as
            UCE and ESD save it.
        output: Patch to write, a file or binary stream. If left out, the concept's slug with
            .sepme, in the current folder.
        progress: Receives progress and warnings.
        **options: More options; see `ImportOptions`.

    Returns:
        What was written, its error, and what was left out.

    Raises:
        RefusedError: Nothing remains, no allowed rank keeps to `error`, or the base is patched.
        MismatchError: The models are of different kinds.
        MalformedError: A file is damaged or hostile.
        UnsupportedError: A file is of a kind that is not supported.
        SystemFailure: A file cannot be read or written.
    """
    check_known(options, ImportOptions)
    started, progress = time.monotonic(), Collector(progress)
    rank, error = options.get("rank"), options.get("error", ERROR)
    text_only = options.get("text_layers_only", False)
    base, edited = as_place(base), as_place(edited)
    given, kind = options.get("concept"), options.get("kind", "any")
    named = given_name(edited.stem if given is None else given, "--concept")
    naming = Naming(named, kind, as_path(output), options.get("force", False))
    naming.check(base, edited)
    with (
        open_checkpoint(base, progress) as before,
        open_edited(edited, before, progress) as after,
    ):
        check_unpatched(before, "extract with the file from before any patch")
        what = importable(before.family) if text_only else EVERY_LAYER
        pairs = list(_compared(before, after, whole=not text_only))
        _check_edited(before, after, pairs, what)
        found = fit([_change(*pair) for pair in pairs], rank=rank, error=error, progress=progress)
        if after.whole is not None:
            left_out, warnings = _left_out(before, after.whole, pairs, what, progress)
        else:
            left_out, warnings = _others_left_out(before, after, pairs, what)
        if found is None:
            raise _nothing(before, after, left_out, what)
        progress.warn_all((*warnings, *cautions(found)))
        described = before.base(text_encoders=True, layers=layers_of(found))
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


def _nothing(
    before: Checkpoint, after: EditedWeights, left_out: list[LeftOutPart], what: str
) -> RefusedError:
    advice = "; keep the edited model, and erase from that" if left_out else ""
    return RefusedError(
        f"{after.path} does not differ from {before.path} in {what}: there is nothing to "
        f"extract{advice}",
        file=after.path,
        expected=f"a change of {what}",
        found=", ".join(f"{part.what}: {part.count}" for part in left_out) or "none",
    )


def _check_edited(
    before: Checkpoint, after: EditedWeights, compared: Sequence[Compared], what: str
) -> None:
    """RefusedError where the two are one model in two dtypes: what is between them is rounding."""
    pairs = [(a.copies[0], b.copies[0]) for a, b in compared]
    if all(a.dtype == b.dtype for a, b in pairs):
        return
    if all(_same_stored(a, b) or same_but_rounding(a, b) for a, b in pairs):
        theirs = sorted({readable(b.dtype) for a, b in pairs if a is not b})
        raise RefusedError(
            f"{after.path} has {what} of {before.path} in another dtype, and differs only by "
            "rounding: there is nothing to extract",
            file=after.path,
            expected=f"a change of {what}",
            found=f"the same in {', '.join(theirs)} and {before.dtype}",
        )


def _compared(before: Checkpoint, after: EditedWeights, *, whole: bool) -> Iterator[Compared]:
    """The weights that a patch is made of, before and after: those that read the rows of a prompt,
    and, whole, all others of which a patch can hold the change and that are not just the same."""
    for target in before.targets:
        if whole or stream_of(target.name) == "tokens":
            yield target, after.targets[target.name]
    if not whole:
        return
    clips = (spec.name for spec in before.family.text_encoders if spec.naming != "t5")
    for network in ("denoiser", *clips):
        found = before.network(network)
        for name, (tensor, _) in before.layers.places(network).items():
            if found is None or found.tensors[tensor].dtype in QUANTISED:
                continue  # no patch holds its change, which is told beside what else differs
            own, theirs = before.layer(name), after.layer(name)
            if own is None or theirs is None:
                continue
            if own.shape != theirs.shape:
                raise MismatchError(
                    f"{after.path} holds weights of another model than {before.path}",
                    file=after.path,
                    expected=f"{name} of shape {list(own.shape)}",
                    found=f"one of shape {list(theirs.shape)}",
                )
            a, b = own.copies[0], theirs.copies[0]
            if not _same_stored(a, b) and not same_but_rounding(a, b):
                yield own, theirs


def _same_stored(a: Stored, b: Stored) -> bool:
    """Whether two weights have the same numbers in the same dtype."""
    if (a.part, a.entry.shape) == (b.part, b.entry.shape):
        return same_bytes(a, b)
    return a.dtype == b.dtype and bool(np.array_equal(a.read(), b.read()))


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
    before: Checkpoint,
    after: Checkpoint,
    compared: Sequence[Compared],
    what: str,
    progress: Progress,
) -> tuple[list[LeftOutPart], list[str]]:
    """What else differs, network by network; and warnings of it. what: was compared, in words."""
    left_out, warnings = [], []
    if after.stack is not None:
        warnings.append(
            f"{after.path} was patched by sepme: its own patches are exact, and this is an "
            "approximation"
        )
    progress.stage("comparing all other tensors")
    text = before.text_encoder_fingerprints(), after.text_encoder_fingerprints()
    changed = [name for name in text[0] if text[1].get(name, text[0][name]) != text[0][name]]
    taken = {network_of(own.name) for own, _ in compared}
    for name in [name for name in changed if name in taken]:
        changed.remove(name)
        count, share = _rest(before, after, name, compared)
        if count:
            left_out.append(LeftOutPart(f"text encoder {name}, other tensors", count, share))
            warnings.append(
                f"{count} other tensors of the text encoder {name} differ and stay as they are in "
                f"the base: only {what} can be extracted"
            )
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
                f"but {what} was compared"
            )
            continue
        count, share = _rest(before, after, part, compared)
        if count:
            left_out.append(LeftOutPart(f"{name}, other tensors", count, share))
            warnings.append(
                f"{count} other tensors of the {name} differ and stay as they are in the base: "
                f"only {what} can be extracted"
            )
    return left_out, warnings


def _rest(
    before: Checkpoint, after: Checkpoint, network: str, compared: Sequence[Compared]
) -> tuple[int, float | None]:
    """How many tensors of a network that were not compared differ, and the share that they have of
    the squares of all that differs; None where that cannot be told."""
    pair = before.network(network), after.network(network)
    assert pair[0] is not None and pair[1] is not None  # both have it
    done = {copy.name for own, _ in compared for copy in own.copies}
    rest = list(_differing(pair[0].tensors, pair[1].tensors, done))
    known = [_square(a, b) for a, b in rest]
    if not rest or None in known:
        return len(rest), None
    left = sum(filter(None, known))
    held = sum(filter(None, (_square(a.copies[0], b.copies[0]) for a, b in compared)))
    return len(rest), left / (left + held) if left + held else None


def _square(a: Stored | None, b: Stored | None) -> float | None:
    """|b - a|^2; None of tensors that are not both there, or no numbers of one shape."""
    if a is None or b is None or a.shape != b.shape or not {a.dtype, b.dtype} <= NAMES.keys():
        return None
    return float(np.square(b.read().astype(np.float64) - a.read().astype(np.float64)).sum())


def _others_left_out(
    before: Checkpoint, after: EditedWeights, compared: Sequence[Compared], what: str
) -> tuple[list[LeftOutPart], list[str]]:
    """The same of a file that holds some weights alone."""
    denoiser = before.network("denoiser")
    ours = denoiser.tensors if denoiser is not None else {}
    done = {copy.name for _, theirs in compared for copy in theirs.copies}
    others = [
        name
        for name, stored in after.others.items()
        if name not in done
        and ((own := ours.get(bare_name(name))) is None or not same_bytes(own, stored))
    ]
    if not others:
        return [], []
    return [LeftOutPart("other tensors", len(others))], [
        f"{len(others)} other tensors in {after.path} ({others[0]} among them) are left "
        f"out: only {what} can be extracted, and the edit may depend on the rest"
    ]


def _differing(
    ours: Mapping[str, Stored], theirs: Mapping[str, Stored], done: Container[str]
) -> Iterator[tuple[Stored | None, Stored | None]]:
    """The tensors that differ, but for those that are done."""
    for name in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(name), theirs.get(name)
        if (
            a is None
            or b is None
            or (a.name not in done and not same_bytes(a, b) and not same_but_rounding(a, b))
        ):
            yield a, b

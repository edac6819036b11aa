"""Bring a LoRA of another program into a patch."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO

from patch_spec import limits
from patch_spec.errors import FormatError
from patch_spec.grid import Float64
from patch_spec.provenance import Setting
from patch_spec.streams import stream_of
from patch_spec.text import clean_text
from sepme_cli.arguments import FilePath, PlaceLike, as_path, as_place
from sepme_cli.checkpoints.hub.cache import fetch_beside, local
from sepme_cli.checkpoints.lora.names import kind_of_module, known_modules, of_another_denoiser
from sepme_cli.checkpoints.lora.reader import PEFT_CONFIG, LoraFile, LoraModule, open_lora
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint, open_checkpoint
from sepme_cli.checkpoints.structure.families import Family
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
from sepme_cli.errors import MismatchError, RefusedError, SepmeError
from sepme_cli.evaluation.intervals import percent
from sepme_cli.places import HubPlace, Place
from sepme_cli.progress import SILENT, Collector, Progress

ERROR = 0.01
"""What may be left of a weight's change, relative: factors are of low rank to begin with."""
_TITLES = ("modelspec.title", "ss_output_name")


def import_lora(
    lora: PlaceLike,
    base: PlaceLike,
    output: FilePath | BinaryIO | None = None,
    *,
    concept: str | None = None,
    kind: AsKind = "any",
    rank: int | None = None,
    error: float = ERROR,
    force: bool = False,
    progress: Progress = SILENT,
) -> ImportResult:
    """Turn a LoRA into a patch.

    Only the keys and values of the cross-attention, or of a transformer the layer that reads the
    rows of the text, become a patch. What else the LoRA changes is left out, and listed.

    Args:
        lora: LoRA in the format of kohya, PEFT or diffusers: a file, a folder, or a place on the
            hub.
        base: Model that it is for; the patch records its weights.
        output: Patch to write, a file or binary stream. If left out, the concept's slug with
            .sepme, in the current folder.
        concept: Name of the concept, for the increment's prompts; by default the LoRA's title or
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
        MismatchError: The LoRA is for another model.
        MalformedError: A file is damaged or hostile.
        UnsupportedError: It is not a plain LoRA, or the model is not supported.
        SystemFailure: A file cannot be read or written.
    """
    started, progress = time.monotonic(), Collector(progress)
    place, base = as_place(lora), as_place(base)
    path = local(place, progress)
    fetch_beside(place, path, PEFT_CONFIG, progress)
    with open_lora(path) as file, open_checkpoint(base, progress) as checkpoint:
        check_unpatched(checkpoint, "import with the file from before any patch")
        naming = Naming(_concept(concept, file, place), kind, as_path(output), force)
        naming.check(base, path)
        ours, others = _sorted_out(file, checkpoint)
        changes = [Change(name, _delta(m, checkpoint, name)) for name, m in ours.items()]
        found = fit(changes, rank=rank, error=error, progress=progress)
        if found is None:
            raise _nothing(file, others, checkpoint.family)
        left_out, warnings = _left_out(ours, others, checkpoint.family)
        progress.warn_all((*warnings, UNKNOWN))
        described = checkpoint.base(text_encoders=True)
        settings: dict[str, Setting] = {
            "lora": file.digest,
            "format": file.format,
            "modules": len(ours),
        }
        written = write_patch(found, described, naming, "lora-import", settings, progress)
    return summed_up(
        found,
        described,
        naming,
        written,
        source=file.format,
        left_out=left_out,
        warnings=progress.warnings,
        seconds=time.monotonic() - started,
    )


def _concept(given: str | None, file: LoraFile, place: Place) -> str:
    if given is not None:
        return given_name(given, "--concept")
    name = place.stem if isinstance(place, HubPlace) else file.name
    for text in (*(file.metadata.get(key, "") for key in _TITLES), name):
        try:
            return clean_text(text, limits.CONCEPT_BYTES)
        except FormatError:
            continue
    raise RefusedError(f"{file.path}: name the concept that this LoRA erases with --concept")


def _sorted_out(
    file: LoraFile, checkpoint: Checkpoint
) -> tuple[dict[str, LoraModule], list[LoraModule]]:
    """The modules of targets, by target; and all others."""
    family = checkpoint.family
    rows = (name for name in checkpoint.by_name if stream_of(name) == "tokens")
    known = known_modules(rows, family)
    ours: dict[str, LoraModule] = {}
    others = []
    for module in file.modules:
        target = known.get(module.name)
        if target is None:
            others.append(module)
        elif target in ours:
            raise MismatchError(
                f"{file.path} has two modules for {target}",
                file=file.path,
                expected="one",
                found=f"{ours[target].name} and {module.name}",
            )
        else:
            ours[target] = module
    strangers = [
        m.name
        for m in others
        if of_another_denoiser(m.name, family)
        or kind_of_module(m.name, family).startswith("key and value")
    ]
    if strangers:
        raise MismatchError(
            f"{file.path} is for another model than {checkpoint.path}, which has no {strangers[0]}",
            file=file.path,
            expected=f"modules of {checkpoint.title}",
            found=strangers[0],
        )
    if not ours:
        raise _nothing(file, others, family)
    return dict(sorted(ours.items())), others


def _delta(module: LoraModule, checkpoint: Checkpoint, name: str) -> Callable[[], Float64]:
    path, shape = checkpoint.path, checkpoint.by_name[name].shape

    def read() -> Float64:
        delta = module.delta()
        if delta.shape != shape:
            raise MismatchError(
                f"{module.name} does not have the shape of the weight in {path}",
                file=path,
                expected=list(shape),
                found=list(delta.shape),
            )
        return delta

    return read


def _left_out(
    ours: Mapping[str, LoraModule], others: Sequence[LoraModule], family: Family
) -> tuple[list[LeftOutPart], list[str]]:
    """What is left out by kind, with its share where all of it is plain, and a warning."""
    if not others:
        return [], []
    kinds: dict[str, list[LoraModule]] = {}
    for module in others:
        plain = module.algorithm == "LoRA"
        what = kind_of_module(module.name, family) + ("" if plain else f" ({module.algorithm})")
        kinds.setdefault(what, []).append(module)
    kept = sum(filter(None, map(_energy, ours.values())))
    energies = {what: [_energy(module) for module in found] for what, found in kinds.items()}
    known = {what: sum(filter(None, found)) for what, found in energies.items()}
    whole = kept + sum(known.values())
    told = [
        LeftOutPart(what, len(found), None if None in found else known[what] / whole)
        for what, found in energies.items()
    ]
    unknown = sum(found.count(None) for found in energies.values())
    return told, [
        f"{len(others)} modules of this LoRA are left out, "
        f"{_hold(1 - kept / whole, len(others), unknown)}: only {importable(family)} can be "
        "imported, and the LoRA may depend on the rest"
    ]


def _hold(share: float, count: int, unknown: int) -> str:
    """How much what is left out holds, as far as it was computed. unknown: modules that are no
    plain up @ down."""
    if unknown == count:
        return "and how much they hold was not computed: they are not plain up @ down"
    amount = "less than 1%" if 0 < share < 0.005 else percent(share)
    hold = f"hold {amount} of the squares of all that"
    if unknown == 0:
        return f"which {hold} it adds"
    return (
        f"of which {count - unknown} {hold} was computed, without the {unknown} that "
        "are not plain up @ down"
    )


def _energy(module: LoraModule) -> float | None:
    """|delta|^2; None for what has none that is known."""
    try:
        return module.energy()
    except SepmeError:
        return None


def _nothing(file: LoraFile, others: Sequence[LoraModule], family: Family) -> RefusedError:
    kinds = Counter(kind_of_module(module.name, family) for module in others)
    advice = "; load it as a LoRA, or merge it into the model and erase from that" if others else ""
    return RefusedError(
        f"{file.path}: this LoRA does nothing to {importable(family)}, which is all that can be "
        f"imported{advice}",
        file=file.path,
        expected=importable(family),
        found=", ".join(f"{kind}: {count} modules" for kind, count in sorted(kinds.items()))
        or "only zeros",
    )

"""Bring a LoRA of another program into a patch."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Unpack

from patch_spec import limits
from patch_spec.errors import FormatError
from patch_spec.grid import Float64
from patch_spec.provenance import Setting
from patch_spec.streams import network_of, stream_of
from patch_spec.text import clean_text
from sepme_cli.arguments import FilePath, PlaceLike, as_path, as_place, check_known
from sepme_cli.checkpoints.hub.cache import fetch_beside, local
from sepme_cli.checkpoints.lora.names import (
    ATTENTION,
    kind_of_module,
    known_modules,
    layer_modules,
    of_another_denoiser,
    of_text_encoder,
)
from sepme_cli.checkpoints.lora.reader import PEFT_CONFIG, LoraFile, LoraModule, open_lora
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint, open_checkpoint
from sepme_cli.checkpoints.reading.targets import Target
from sepme_cli.checkpoints.structure.families import Family
from sepme_cli.checkpoints.structure.layers import Part, stacked
from sepme_cli.checkpoints.structure.layout import span_of
from sepme_cli.checkpoints.structure.transformer_names import Module
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
    progress: Progress = SILENT,
    **options: Unpack[ImportOptions],
) -> ImportResult:
    """Turn a LoRA into a patch.

    All that it does to weight matrices of linear layers becomes a patch, those of CLIP's text
    encoders included. What else it changes, such as convolutions and biases, is left out, and
    listed.

    Args:
        lora: LoRA in the format of kohya, PEFT or diffusers: a file, a folder, or a place on the
            hub.
        base: Model that it is for; the patch records its weights.
        output: Patch to write, a file or binary stream. If left out, the concept's slug with
            .sepme, in the current folder.
        progress: Receives progress and warnings.
        **options: More options; see `ImportOptions`.

    Returns:
        What was written, its error, and what was left out.

    Raises:
        RefusedError: Nothing remains, no allowed rank keeps to `error`, or the base is patched.
        MismatchError: The LoRA is for another model.
        MalformedError: A file is damaged or hostile.
        UnsupportedError: It is not a plain LoRA, or the model is not supported.
        SystemFailure: A file cannot be read or written.
    """
    check_known(options, ImportOptions)
    started, progress = time.monotonic(), Collector(progress)
    rank, error = options.get("rank"), options.get("error", ERROR)
    text_only = options.get("text_layers_only", False)
    place, base = as_place(lora), as_place(base)
    path = local(place, progress)
    fetch_beside(place, path, PEFT_CONFIG, progress)
    with open_lora(path) as file, open_checkpoint(base, progress) as checkpoint:
        check_unpatched(checkpoint, "import with the file from before any patch")
        concept, kind = _concept(options.get("concept"), file, place), options.get("kind", "any")
        naming = Naming(concept, kind, as_path(output), options.get("force", False))
        naming.check(base, path)
        what = importable(checkpoint.family) if text_only else EVERY_LAYER
        ours, others = _sorted_out(file, checkpoint, whole=not text_only)
        if not ours:
            raise _nothing(file, others, checkpoint.family, what)
        changes = [_change(own, checkpoint.path) for own in ours.values()]
        found = fit(changes, rank=rank, error=error, progress=progress)
        if found is None:
            raise _nothing(file, others, checkpoint.family, what)
        modules = {own.module.name: own.module for own in ours.values()}
        left_out, warnings = _left_out(modules, others, checkpoint.family, what)
        progress.warn_all((*warnings, *cautions(found)))
        described = checkpoint.base(text_encoders=True, layers=layers_of(found))
        settings: dict[str, Setting] = {
            "lora": file.digest,
            "format": file.format,
            "modules": len(modules),
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


@dataclass(frozen=True)
class _Own:
    """What a module does to a weight. rows: how many the module has; part: which of them are the
    weight's."""

    target: Target
    module: LoraModule
    rows: int
    part: Part

    def of(self, rows: Float64) -> Float64:
        """The weight's rows of those that the module has, or of its up matrix."""
        return self.part.of(rows)


def _sorted_out(
    file: LoraFile, checkpoint: Checkpoint, *, whole: bool
) -> tuple[dict[str, _Own], list[LoraModule]]:
    """What modules do to weights that a patch can hold, by the weights' names; and the modules of
    all others. whole: not only to those that read the rows of a prompt."""
    family = checkpoint.family
    rows = (name for name in checkpoint.by_name if stream_of(name) == "tokens")
    known = {name: Module((target,), False) for name, target in known_modules(rows, family).items()}
    if whole:
        known = {**_known_layers(file, checkpoint), **known}
    ours: dict[str, _Own] = {}
    others = []
    for module in file.modules:
        found = known.get(module.name)
        if found is None or (module.algorithm != "LoRA" and network_of(found.ours[0]) is not None):
            others.append(module)
            continue
        targets = [checkpoint.weight(name) for name in found.ours]
        counts = [target.shape[0] for target in targets if target is not None]
        for target, part in zip(targets, stacked((sum(counts), 1), counts), strict=True):
            assert target is not None  # it was found among those that are there
            if target.name in ours:
                raise MismatchError(
                    f"{file.path} has two modules for {target.name}",
                    file=file.path,
                    expected="one",
                    found=f"{ours[target.name].module.name} and {module.name}",
                )
            part = replace(part, exchanged=found.exchanged)
            ours[target.name] = _Own(target, module, sum(counts), part)
    strangers = [m.name for m in others if _is_strange(m, checkpoint, whole=whole)]
    if strangers:
        raise MismatchError(
            f"{file.path} is for another model than {checkpoint.path}, which has no {strangers[0]}",
            file=file.path,
            expected=f"modules of {checkpoint.title}",
            found=strangers[0],
        )
    return dict(sorted(ours.items())), others


def _known_layers(file: LoraFile, checkpoint: Checkpoint) -> dict[str, Module]:
    """Every name of modules of layers that the checkpoint has, and of what reads the pooled text.

    Raises MismatchError where the LoRA changes a text encoder that is not in here.
    """
    family, layers = checkpoint.family, checkpoint.layers
    names = [*layers.places("denoiser")]
    for spec in family.text_encoders:
        if spec.naming == "t5":
            continue
        if checkpoint.network(spec.name) is not None:
            names += layers.places(spec.name)
        elif any(of_text_encoder(module.name, spec, family) for module in file.modules):
            raise MismatchError(
                f"{file.path} changes the text encoder {spec.name}, which {checkpoint.path} does "
                "not hold: name a base that does, or take what reads text alone with "
                "--text-layers-only",
                file=checkpoint.path,
                expected=f"a text encoder ({spec.name})",
                found=checkpoint.title,
            )
    # Of a weight of which only some columns read the text, a LoRA changes the others as well.
    pooled = [
        target.name
        for target in checkpoint.targets
        if stream_of(target.name) == "pooled" and target.copies[0].part.columns is None
    ]
    span = span_of(checkpoint.by_name)
    found = {name: Module((t,), False) for name, t in known_modules(pooled, family).items()}
    return {**layer_modules(names, family, span), **found}


def _is_strange(module: LoraModule, checkpoint: Checkpoint, *, whole: bool) -> bool:
    """Whether no model of this shape has such a module: what else is left out is a matter of what
    patches can hold."""
    kind = kind_of_module(module.name, checkpoint.family)
    if of_another_denoiser(module.name, checkpoint.family) or kind.startswith("key and value"):
        return True
    reached = whole and bool(checkpoint.layers.places("denoiser"))
    return reached and module.algorithm == "LoRA" and kind in ATTENTION


def _change(own: _Own, path: Path) -> Change:
    def check(rows: int, columns: int) -> None:
        if (rows, columns) != (own.rows, own.target.shape[1]):
            raise MismatchError(
                f"{own.module.name} does not have the shape of the weight in {path}",
                file=path,
                expected=[own.rows, own.target.shape[1]],
                found=[rows, columns],
            )

    def read() -> Float64:
        delta = own.module.delta()
        check(*delta.shape)
        return own.of(delta)

    def pair() -> tuple[Float64, Float64] | None:
        found = own.module.pair()
        if found is None:
            return None
        check(len(found[0]), found[1].shape[1])
        return own.of(found[0]), found[1]

    return Change(own.target.name, read, pair=pair)


def _left_out(
    ours: Mapping[str, LoraModule], others: Sequence[LoraModule], family: Family, only: str
) -> tuple[list[LeftOutPart], list[str]]:
    """What is left out by kind, with its share where all of it is plain, and a warning.

    only: what is not, in words."""
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
        f"{_hold(1 - kept / whole, len(others), unknown)}: only {only} can be imported, and the "
        "LoRA may depend on the rest"
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


def _nothing(
    file: LoraFile, others: Sequence[LoraModule], family: Family, only: str
) -> RefusedError:
    kinds = Counter(kind_of_module(module.name, family) for module in others)
    advice = "; load it as a LoRA, or merge it into the model and erase from that" if others else ""
    return RefusedError(
        f"{file.path}: this LoRA does nothing to {only}, which is all that can be imported{advice}",
        file=file.path,
        expected=only,
        found=", ".join(f"{kind}: {count} modules" for kind, count in sorted(kinds.items()))
        or "only zeros",
    )

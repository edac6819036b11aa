"""Write increments as a LoRA, for programs that know nothing of patches."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from patch_spec.base import Family
from patch_spec.compose import Factors
from patch_spec.increment import Increment
from patch_spec.streams import network_of
from sepme_cli.arguments import FilePath, PlaceLike, Words, as_path, as_place
from sepme_cli.checkpoints.disk.output import check_output, output_name, write_output
from sepme_cli.checkpoints.lora.names import LoraFormat, module_name, unread
from sepme_cli.checkpoints.lora.writer import Pair, lora_bytes, lora_metadata
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint, open_checkpoint
from sepme_cli.checkpoints.reading.patches import (
    PatchFile,
    PatchSource,
    Scale,
    read_patch_file,
    select,
    with_scales,
)
from sepme_cli.checkpoints.structure.dtypes import CASTS, header_dtype
from sepme_cli.checkpoints.structure.families import FAMILIES
from sepme_cli.checkpoints.structure.layout import span_of
from sepme_cli.checkpoints.writing.destination import check_suffix
from sepme_cli.composing.composition import TOOL, converted
from sepme_cli.composing.matching import BaseMatch, check_unpatched, fit
from sepme_cli.errors import UnsupportedError, UsageError
from sepme_cli.increments import Scaled, factors
from sepme_cli.places import Place
from sepme_cli.progress import SILENT, Collector, Progress

Float64 = npt.NDArray[np.float64]

ONLY_ADDS = (
    "a LoRA that was merged into a model cannot be removed exactly, because of "
    "rounding; to restore concepts exactly, keep the patch and its base"
)


@dataclass(frozen=True)
class ExportResult:
    """Result of `export`.

    Attributes:
        output: Where the LoRA was written; "-" for a stream.
        bytes: Its size.
        format: "kohya" or "peft".
        family: Family of the models that it is for.
        dtype: What it is stored in.
        modules: Number of its modules.
        rank: Rank of each module.
        concepts: Concepts that it erases.
        base_match: How the model for operators compares with the patch's base: "exact",
            "same-values" or "family"; None without one.
        max_abs_error: Largest difference between the LoRA's and the patch's change of a weight.
        relative_error: Frobenius norm of that difference over all weights, relative to the change.
        warnings: All warnings of the run.
        seconds: Duration.
    """

    output: str
    bytes: int
    format: LoraFormat
    family: Family
    dtype: str
    modules: int
    rank: int
    concepts: tuple[str, ...]
    base_match: BaseMatch | None
    max_abs_error: float
    relative_error: float
    warnings: tuple[str, ...]
    seconds: float


@dataclass
class _Loss:
    """What rounding to the LoRA's dtype loses."""

    largest: float = 0.0
    squares: float = 0.0
    whole: float = 0.0

    def add(self, exact: Float64, pair: Pair) -> None:
        up, down = (half.astype(np.float64) for half in pair)
        error = up @ down - exact
        self.largest = max(self.largest, float(np.abs(error).max(initial=0.0)))
        self.squares += float(np.square(error).sum())
        self.whole += float(np.square(exact).sum())

    @property
    def relative(self) -> float:
        return math.sqrt(self.squares / self.whole) if self.whole else 0.0


@dataclass(frozen=True)
class _Source:
    """Where dW comes from. weights: of the targets, in their shapes; their values count for
    operators only."""

    family: Family
    shapes: Mapping[str, tuple[int, int]]
    checkpoint: Checkpoint | None
    match: BaseMatch | None = None

    def columns(self, target: str) -> int:
        """How many the whole weight has, of which the target is the first ones."""
        if network_of(target) is not None:
            return self.shapes[target][1]
        if self.checkpoint is not None:
            return self.checkpoint.by_name[target].copies[0].entry.shape[1]
        return FAMILIES[self.family].whole_columns(target, self.shapes[target][1])

    def weight(self, target: str) -> npt.NDArray[np.generic]:
        if self.checkpoint is not None:
            found = self.checkpoint.weight(target)
            assert found is not None  # the patch fits
            return found.read()
        return np.broadcast_to(np.float32(0), self.shapes[target])


def export(
    patch: PatchSource,
    to: LoraFormat,
    output: FilePath | BinaryIO | None = None,
    *,
    only: Words = (),
    scale: Scale = 1.0,
    base: PlaceLike | None = None,
    dtype: str = "fp16",
    force: bool = False,
    progress: Progress = SILENT,
) -> ExportResult:
    """Write increments of a patch as one LoRA file.

    Args:
        patch: Patch: a file, a place on the hub, or a binary stream.
        to: "kohya" for A1111, Forge, ComfyUI, kohya's scripts and diffusers; "peft" for PEFT and
            diffusers, which reads Stable Diffusion 3, Flux.1 and Wan 2.1 in no other.
        output: File or binary stream to write. If left out, the first concept's slug with
            .safetensors, in the current folder.
        only: Use only these concepts or slugs.
        scale: Strength of all increments; or of each concept by name, and 1 for the others.
        base: Model to compute operators with, which have no weights of their own.
        dtype: "fp16", "bf16" or "fp32".
        force: Overwrite an existing output.
        progress: Receives progress and warnings.

    Returns:
        What was written, and its rounding error.

    Raises:
        UsageError: An operator has no base, or options are wrong.
        RefusedError: The patch does not have one of the concepts, or the base is patched.
        MismatchError: The base is another kind of model.
        MalformedError: A file is damaged or hostile.
        UnsupportedError: The base is of a kind that is not supported, or an increment is a mask.
        SystemFailure: A file cannot be read or written.
    """
    started, progress = time.monotonic(), Collector(progress)
    wanted = _wanted_dtype(dtype)
    file = read_patch_file(patch)
    terms = [term for term in with_scales(select([file], only), scale) if term[1]]
    if not terms:
        raise UsageError("at a scale of 0 there is nothing to export", found=scale)
    if masks := ", ".join(part.concept for part, _ in terms if part.kind == "mask"):
        raise UnsupportedError(
            f"{masks}: weights that become zero are no LoRA, which can only add: apply the patch "
            "to the model's file instead",
            expected="increments that add to weights",
            found=masks,
        )
    named = as_path(output)
    target = named if named is not None else Path(f"{terms[0][0].slug}.safetensors")
    if isinstance(target, Path):
        check_suffix(target)
        check_output(target, (patch, base), force=force)
    concepts = tuple(part.concept for part, _ in terms)
    family = FAMILIES[file.patch.base.family]
    if to == "kohya" and family.denoiser == "transformer" and any(p.layers for p, _ in terms):
        raise UsageError(
            f"{family.title}: in kohya's format several of the layers that these increments change "
            "are one module; export with --to peft, which diffusers and ComfyUI read",
            expected="--to peft",
            found="--to kohya",
        )
    loss = _Loss()
    with _source(file, [part for part, _ in terms], as_place(base), progress) as source:
        pairs = dict(_pairs(source, terms, wanted, to, loss, progress))
    rank = max(len(down) for _, down in pairs.values())
    name = target.stem if isinstance(target, Path) else terms[0][0].slug
    told = lora_metadata(FAMILIES[source.family], concepts, name, rank, TOOL, to)
    data = lora_bytes(pairs, to, wanted, told)
    write_output(target, data, force=force, progress=progress)
    unread_by = unread(FAMILIES[source.family], to)
    progress.warn_all(([unread_by] if unread_by else []) + [ONLY_ADDS])
    return ExportResult(
        output=output_name(target),
        bytes=len(data),
        format=to,
        family=source.family,
        dtype=dtype,
        modules=len(pairs),
        rank=rank,
        concepts=concepts,
        base_match=source.match,
        max_abs_error=loss.largest,
        relative_error=loss.relative,
        warnings=progress.warnings,
        seconds=time.monotonic() - started,
    )


def _wanted_dtype(dtype: str) -> str:
    wanted = header_dtype(dtype)
    if wanted is None:
        raise UsageError("unknown dtype", expected=" or ".join(CASTS.values()), found=dtype)
    return wanted


@contextmanager
def _source(
    file: PatchFile, parts: Sequence[Increment], base: Place | None, progress: Progress
) -> Iterator[_Source]:
    known = file.patch.base
    if base is None:
        if operators := [part.concept for part in parts if part.kind == "operator"]:
            raise UsageError(
                f"{', '.join(operators)}: an operator has no weights of its own, they are "
                "computed with the model's: name the model with --base",
                expected="--base MODEL",
                found="none",
            )
        yield _Source(known.family, {**known.shapes, **known.layer_shapes}, None)
        return
    with open_checkpoint(base, progress) as checkpoint:
        check_unpatched(checkpoint, "export with the file from before any patch")
        found = fit(checkpoint, [file], parts).compared(checkpoint)
        progress.warn_all(found.warnings)
        layers = checkpoint.layers_of(parts)
        shapes = {target.name: target.shape for target in (*checkpoint.targets, *layers)}
        yield _Source(checkpoint.family.name, shapes, checkpoint, found.match)


def _pairs(
    source: _Source,
    terms: Sequence[Scaled],
    dtype: str,
    to: LoraFormat,
    loss: _Loss,
    progress: Progress,
) -> Iterator[tuple[str, Pair]]:
    """Module by module: the increments side by side, as programs that mix up ranks need them."""
    acted = [name for name in sorted(source.shapes) if any(p.acts_on(name) for p, _ in terms)]
    span = span_of(source.shapes)
    progress.stage("exporting", len(acted))
    for name in acted:
        whole = _side_by_side(source.weight(name), terms, name)
        up, down = _evened(*_no_wider(*whole))
        down = np.pad(down, ((0, 0), (0, source.columns(name) - down.shape[1])))
        pair = converted(up, dtype, name), converted(down, dtype, name)
        loss.add(whole[0] @ whole[1], (pair[0], pair[1][:, : whole[1].shape[1]]))
        yield module_name(name, FAMILIES[source.family], span, to), pair
        progress.advance()


def _side_by_side(weight: npt.NDArray[np.generic], terms: Sequence[Scaled], target: str) -> Factors:
    """The sum of scale * dW as one product; zeros for an increment that leaves the target."""
    ups, downs = [], []
    for part, scale in terms:
        acts = part.acts_on(target)
        up, down = factors(part, target, weight) if acts else _nothing(part, weight.shape)
        ups.append(scale * up)
        downs.append(down)
    return np.hstack(ups), np.vstack(downs)


def _nothing(part: Increment, shape: tuple[int, ...]) -> Factors:
    rank = part.rank or part.pooled_rank
    return np.zeros((shape[0], rank)), np.zeros((rank, shape[1]))


def _no_wider(up: Float64, down: Float64) -> Factors:
    """The same product of at most d rows, which is what any number of increments add up to."""
    rank, width = down.shape
    if rank <= width:
        return up, down
    rows, mix = np.linalg.qr(down.T)
    return up @ mix.T, rows.T


def _evened(up: Float64, down: Float64) -> Factors:
    """The same product with both sides alike in size, by powers of two: fp16 has a narrow range."""
    columns, rows = np.abs(up).max(axis=0, initial=0.0), np.abs(down).max(axis=1, initial=0.0)
    both = (columns > 0) & (rows > 0)
    ratio = np.divide(columns, rows, out=np.ones_like(rows), where=both)
    exponents = np.rint(np.log2(ratio) / 2).astype(int)
    return np.ldexp(up, -exponents), np.ldexp(down, exponents[:, None])

"""The validator: the rules of SPEC.md that tie a patch's parts together (P3 to P14, V1 to V7).

No I/O, and the same on reading and on writing. `validate_header` and `validate_layout` need the
header alone and run before any memory is taken for factors; `validate_factors` looks at values.
"""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from patch_spec.base import Base
from patch_spec.errors import FormatError
from patch_spec.grid import on_grid
from patch_spec.header import DTYPE_BITS, Header, TensorEntry, encode_header
from patch_spec.increment import Increment, Summary
from patch_spec.manifest import Manifest
from patch_spec.mask import SKIP, Gaps, Masked, told
from patch_spec.streams import Stream, stream_of

METADATA_KEY = "sepme"


def validate_header(header: Header, header_bytes: bytes) -> str:
    """The manifest's text, if rules P3 and P11 hold.

    header_bytes: the file's first bytes, up to the data section.
    """
    if set(header.metadata) != {METADATA_KEY}:
        raise FormatError(
            "P3",
            "a patch's metadata has exactly one entry",
            where="__metadata__",
            expected=METADATA_KEY,
            found=ascii(sorted(header.metadata))[:80],
        )
    if encode_header(header.metadata, header.tensors) != header_bytes:
        raise FormatError("P11", "the header is not canonical JSON padded to eight bytes")
    return header.metadata[METADATA_KEY]


def validate_layout(header: Header, manifest: Manifest) -> None:
    """Rules P4 to P10, P12 to P14: the manifest agrees with itself, and the header with it."""
    _check_increments(manifest.increments)
    widths = manifest.base.widths
    for target, shape in manifest.base.shapes.items():
        stream = stream_of(target)
        width = None if stream is None else widths.get(stream)
        if shape[1] != width:
            raise FormatError(
                "P6",
                "a target is not as wide as the stream that it reads",
                where=f"base.targets.{target}",
                expected=width or "a base with the stream that it reads",
                found=shape[1],
            )
    for summary in manifest.increments:
        known = {*manifest.base.targets} if summary.kind != "mask" else set()
        known |= {*manifest.base.layers} if summary.kind in ("lora", "mask") else set()
        if unknown := sorted({*summary.exponents, *summary.masks} - known):
            raise FormatError(
                "P7", "a target that the base does not name", where=summary.slug, found=unknown[0]
            )
        _check_streams(summary, manifest.base)
    _check_layers(manifest)
    _check_masks(manifest)
    lengths = {entry.name: entry.shape[0] for entry in header.tensors if len(entry.shape) == 1}
    _check_tensors(header.tensors, layout(manifest, lengths))


def validate_factors(increments: Iterable[Increment], summaries: Iterable[Summary]) -> None:
    """Rules V1 to V7: what the products' exactness rests on, masks, and the digests."""
    for increment, summary in zip(increments, summaries, strict=True):
        masks = {f"mask.{layer}": mask for layer, mask in summary.masks.items()}
        for name, array in increment.factors.items():
            where = f"{increment.slug}.{name}"
            if name in masks:
                _check_gaps(array, masks[name], where)
            else:
                _check_values(array, where, gridded=not name.startswith("up."))
        if increment.digest != summary.digest:
            raise FormatError(
                "V5",
                "the increment is not the one that its digest names",
                where=increment.slug,
                expected=summary.digest,
                found=increment.digest,
            )


def layout(manifest: Manifest, lengths: Mapping[str, int]) -> tuple[TensorEntry, ...]:
    """The tensors that a patch with this manifest has, in the order of the file.

    lengths: of tensors by name. Those of masks count, as far as their number of positions allows.
    """
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    shapes_of_base = {**manifest.base.shapes, **manifest.base.layer_shapes}
    for summary in manifest.increments:
        ranks = _ranks(summary)
        for stream, rank in ranks.items():
            rows = (rank, manifest.base.widths[stream])
            name = summary.slug if stream == "tokens" else f"{summary.slug}.{stream}"
            if summary.kind != "lora":
                shapes["F32", f"{name}.basis"] = rows
            if summary.kind == "operator":
                shapes["F32", f"{name}.shift"] = rows[::-1]
        for target in summary.exponents:
            out, width = shapes_of_base[target]
            rank = summary.rank if summary.kind == "lora" else ranks[_stream(target)]
            if summary.kind == "lora":
                shapes["F32", f"{summary.slug}.down.{target}"] = (rank, width)
            shapes["F16", f"{summary.slug}.up.{target}"] = (out, rank)
        for layer, mask in summary.masks.items():
            name = f"{summary.slug}.mask.{layer}"
            length = min(max(lengths.get(name, 0), mask.count), mask.most_bytes)
            shapes["U8", name] = (length,)
    return canonical_order(shapes)


def _ranks(summary: Summary) -> dict[Stream, int]:
    """Of the streams that an increment has factors for."""
    ranks: dict[Stream, int] = {"tokens": summary.rank, "pooled": summary.pooled_rank}
    return {stream: rank for stream, rank in ranks.items() if rank}


def _stream(target: str) -> Stream:
    stream = stream_of(target)
    assert stream is not None  # rule P1
    return stream


def canonical_order(shapes: Mapping[tuple[str, str], tuple[int, ...]]) -> tuple[TensorEntry, ...]:
    """Tensors, given as (dtype, name) and shape, in the order of the file (rule P10).

    float32 before float16 before uint8, so that every tensor is aligned; within a dtype by name.
    """
    entries, position = [], 0
    for dtype, name in sorted(shapes, key=lambda key: (-DTYPE_BITS[key[0]], key[1])):
        shape = shapes[dtype, name]
        end = position + prod(shape) * DTYPE_BITS[dtype] // 8
        entries.append(TensorEntry(name, dtype, shape, position, end))
        position = end
    return tuple(entries)


def _check_increments(summaries: tuple[Summary, ...]) -> None:
    for before, after in pairwise(summaries):
        if before.slug >= after.slug:
            raise FormatError(
                "P4",
                "increments must be in the order of their slugs, each slug once",
                where="increments",
                found=f"{before.slug} before {after.slug}",
            )
    by_concept: dict[str, str] = {}
    for summary in summaries:
        other = by_concept.setdefault(summary.concept, summary.slug)
        if other != summary.slug:
            raise FormatError(
                "P5",
                "two increments have one concept",
                where="increments",
                found=f"{other} and {summary.slug}",
            )


def _check_streams(summary: Summary, base: Base) -> None:
    """Rule P12: factors for the streams that the increment acts on, and for no other."""
    ranks = _ranks(summary)
    if summary.kind == "mask":
        return  # whose entry has no place for a rank
    if summary.kind == "lora":
        good = ranks.keys() == {"tokens"}
    else:
        good = ranks.keys() <= base.widths.keys()
        if summary.kind == "additive":
            good &= ranks.keys() == {_stream(target) for target in summary.exponents}
    if not good:
        raise FormatError(
            "P12",
            "an increment has factors for the streams that it acts on, and no other",
            where=summary.slug,
            expected=" and ".join(base.widths),
            found=" and ".join(ranks),
        )


def _check_layers(manifest: Manifest) -> None:
    """Rule P13: no increment promises anything where one has layers."""
    changed = {name for summary in manifest.increments for name in summary.layers}
    if unused := sorted(set(manifest.base.layers) - changed):
        raise FormatError(
            "P13", "a layer that no increment changes", where="base.layers", found=unused[0]
        )
    if changed and manifest.separable_from:
        raise FormatError(
            "P13",
            "an increment that changes layers is separable from nothing",
            where="separable_from",
            expected="an empty list",
            found=f"{len(manifest.separable_from)} prompts",
        )
    for summary in manifest.increments:
        told = summary.measured
        if summary.layers and (told.leakage, told.separability) != (None, None):
            raise FormatError(
                "P13",
                "an increment that changes layers is separable from nothing",
                where=summary.slug,
                expected="null for leakage and separability",
                found=f"{told.leakage} and {told.separability}",
            )


def _check_masks(manifest: Manifest) -> None:
    """Rule P14: masks are for the base's layers."""
    for summary in manifest.increments:
        for layer, mask in summary.masks.items():
            shape = manifest.base.layer_shapes[layer]
            if mask.shape != shape or mask.count > mask.size:
                raise FormatError(
                    "P14",
                    "a mask is not for the layer that the base has",
                    where=f"{summary.slug}.{layer}",
                    expected=f"{list(shape)}, and at most {shape[0] * shape[1]} positions",
                    found=f"{list(mask.shape)}, and {mask.count}",
                )


def _check_tensors(found: tuple[TensorEntry, ...], expected: tuple[TensorEntry, ...]) -> None:
    names, needed = {entry.name for entry in found}, {entry.name for entry in expected}
    if names != needed:
        name = min(names ^ needed)
        problem = "is missing" if name in needed else "does not belong to any increment"
        raise FormatError("P8", f"a tensor {problem}", where=ascii(name)[:80])
    wanted = {entry.name: entry for entry in expected}
    for entry in found:
        want = wanted[entry.name]
        if (entry.dtype, entry.shape) != (want.dtype, want.shape):
            raise FormatError(
                "P9",
                "a tensor has the wrong dtype or shape",
                where=entry.name,
                expected=f"{want.dtype} {list(want.shape)}",
                found=f"{entry.dtype} {list(entry.shape)}",
            )
    for entry, want in zip(found, expected, strict=True):
        if entry != want:
            raise FormatError(
                "P10",
                "tensors must be in order: float32, float16, uint8, then by name",
                where=entry.name,
                expected=want.name,
            )


def _check_values(array: npt.NDArray[Any], name: str, *, gridded: bool) -> None:
    if not np.isfinite(array).all():
        raise FormatError("V1", "a value is not finite", where=name)
    largest = float(np.abs(array).max())
    if largest > 1:
        raise FormatError(
            "V2", "a value is out of range", where=name, expected="-1 to 1", found=largest
        )
    if gridded and not on_grid(array):
        raise FormatError(
            "V3", "a value is not on the grid", where=name, expected="multiples of 2**-22"
        )
    if bool((np.signbit(array) & (array == 0)).any()):
        raise FormatError(
            "V4", "a value is a negative zero, which the product cannot tell from zero", where=name
        )


def _check_gaps(gaps: Gaps, mask: Masked, name: str) -> None:
    count, end = told(gaps)
    if gaps[-1] == SKIP or count != mask.count:
        raise FormatError(
            "V6",
            "a mask must end with a position, and have as many as the manifest says",
            where=name,
            expected=mask.count,
            found=f"{count}, and more behind the last" if gaps[-1] == SKIP else count,
        )
    if end > mask.size:
        raise FormatError(
            "V7",
            "a mask has a position beyond its layer",
            where=name,
            expected=f"below {mask.size}",
            found=end - 1,
        )

"""Patches whose parts do not fit together (P3 to P14), and factors and masks out of bounds (V)."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from patch_spec.base import Base
from patch_spec.canonical import canonical_json
from patch_spec.cases.examples import (
    KEY,
    POOLED_WIDTH,
    QUERY,
    VALUE,
    WIDTH,
    additive,
    base,
    layered,
    longer,
    lora,
    mask,
    masking,
    on_both,
    on_layers,
    on_pooled,
    operator,
    patch,
    small,
    small_patch,
    two_streams,
)
from patch_spec.cases.tools import (
    Invalid,
    Members,
    drop,
    parts,
    put,
    raw,
    with_header,
    with_manifest,
)
from patch_spec.container import assemble
from patch_spec.increment import Increment
from patch_spec.mask import Masked
from patch_spec.provenance import Measurements


def patch_cases() -> Iterator[Invalid]:
    """Patches that are wrong as a whole."""
    yield from _manifests()
    yield from _layers()
    yield from _masks()
    yield from _tensors()
    yield from _order()
    yield from _factors()


def _manifests() -> Iterator[Invalid]:
    yield Invalid("P3", "second-entry", with_header(put("__metadata__", "format", to="pt")))
    yield Invalid("P3", "no-metadata", with_header(drop("__metadata__")))
    yield Invalid("P4", "slugs-unordered", with_manifest(_reverse, small(), operator()))
    same_slug = replace(operator(), slug="monet")
    yield Invalid("P4", "slug-twice", assemble(small_patch(small(), same_slug)))
    same_concept = replace(operator(), concept=additive().concept)
    yield Invalid("P5", "concept-twice", assemble(small_patch(small(), same_concept)))
    yield Invalid("P6", "target-narrower", with_manifest(put("base", "width", to=9)))
    yield Invalid("P6", "vector-without-width", assemble(patch(additive(), of=_no_vector())))
    yield Invalid("P7", "target-not-in-base", with_manifest(put("base", "targets", to={})))
    yield Invalid("P12", "stream-not-in-base", assemble(small_patch(on_both())))
    rows = with_manifest(put("increments", 0, "rank", to=0), of=patch(on_both(), of=two_streams()))
    yield Invalid("P8", "stream-not-said", rows)
    both = replace(small(), pooled_rank=2, pooled_basis=on_both().pooled_basis)
    yield Invalid("P12", "stream-without-target", assemble(patch(both, of=two_streams())))
    yield Invalid("P12", "target-without-stream", assemble(patch(_no_rows(), of=two_streams())))
    of_both = replace(lora(), pooled_rank=2)
    yield Invalid("P12", "lora-of-two-ranks", assemble(patch(of_both, of=_both_targets())))


def _layers() -> Iterator[Invalid]:
    yield Invalid("P7", "layer-not-in-base", assemble(patch(on_layers())))
    query = {QUERY: on_layers().up[QUERY]}
    shared = replace(small(), up={**small().up, **query}, exponents={KEY: 0, QUERY: 0})
    yield Invalid("P7", "layer-in-additive", assemble(patch(shared, of=layered())))
    yield Invalid("P13", "layer-unchanged", assemble(patch(lora(), of=layered())))
    whole = patch(on_layers(), operator(), of=layered())
    promising = replace(whole, separable_from=("",))
    yield Invalid("P13", "layers-and-separable", assemble(promising))
    for about, measured in {
        "leakage": Measurements(leakage=0.5),
        "separability": Measurements(separability=0.5),
    }.items():
        told = replace(on_layers(), measured=measured)
        yield Invalid("P13", f"layers-and-{about}", assemble(patch(told, of=layered())))
    narrow = {**on_layers().down, QUERY: on_layers().down[QUERY][:, 1:]}
    narrower = patch(replace(on_layers(), down=narrow), of=layered())
    yield Invalid("P9", "down-of-layer-narrower", assemble(narrower))


def _masks() -> Iterator[Invalid]:
    good, shape = mask(), (6, WIDTH)
    gaps = good.gaps[QUERY]
    yield Invalid("P7", "masked-layer-not-in-base", assemble(patch(good)))
    target = masking({KEY: np.ones((4, WIDTH), np.bool_)})
    yield Invalid("P7", "masked-target", assemble(patch(target)))
    promising = replace(patch(good, of=layered()), separable_from=("",))
    yield Invalid("P13", "mask-and-separable", assemble(promising))
    yield Invalid("P14", "mask-of-another-shape", _with_gaps(4, shape[::-1], gaps))
    yield Invalid("P14", "mask-of-more-than-all", _with_gaps(49, shape, np.zeros(49, np.uint8)))
    missing = replace(good, gaps={QUERY: gaps})
    yield Invalid("P8", "mask-missing", assemble(patch(missing, of=layered())))
    yield Invalid("P9", "mask-too-short", _with_gaps(4, shape, gaps[:-1]))
    yield Invalid("P9", "mask-too-long", _with_gaps(4, shape, np.append(gaps, gaps[-1:])))
    yield Invalid("P9", "mask-a-matrix", _with_gaps(4, shape, gaps[None]))
    yield Invalid("P9", "mask-fp16", _with_gaps(4, shape, gaps.astype(np.float16)))
    yield Invalid("V6", "mask-ends-in-nothing", _with_long_gaps(3, [0, 0, 1, 255]))
    yield Invalid("V6", "mask-of-fewer", _with_long_gaps(4, [0, 0, 255, 1]))
    yield Invalid("V7", "position-just-beyond", _with_long_gaps(1, [255, 255, 255, 255, 180]))
    yield Invalid("V7", "positions-beyond", _with_long_gaps(5, [254] * 5))


def _with_gaps(count: int, shape: tuple[int, int], gaps: npt.NDArray[Any]) -> bytes:
    """A patch whose digest is right, with another mask of one of two layers."""
    good = mask()
    masks, found = {QUERY: Masked(count, shape)}, {QUERY: gaps}
    part = replace(good, masks={**good.masks, **masks}, gaps={**good.gaps, **found})
    return assemble(patch(part, of=layered()))


def _with_long_gaps(count: int, gaps: list[int]) -> bytes:
    """The same of a layer of 1200 weights."""
    masks, found = {QUERY: Masked(count, (3, 400))}, {QUERY: np.array(gaps, np.uint8)}
    return assemble(patch(replace(mask(), masks=masks, gaps=found), of=longer()))


def _no_vector() -> Base:
    return replace(two_streams(), pooled=None)


def _both_targets() -> Base:
    """The usual base, with a vector beside."""
    return replace(base(), pooled=POOLED_WIDTH)


def _no_rows() -> Increment:
    """One that says nothing of the stream that its target reads."""
    vector = on_pooled()
    return replace(vector, up={KEY: small().up[KEY]}, exponents={KEY: 0})


def _reverse(manifest: Members) -> None:
    manifest["increments"].reverse()


def _tensors() -> Iterator[Invalid]:
    good = additive()

    def changed(**fields: Any) -> bytes:
        return assemble(small_patch(replace(small(), **fields)))

    empty = {"data_offsets": [0, 0], "dtype": "F32", "shape": [0]}
    yield Invalid("P8", "tensor-too-many", with_header(put("monet.zero", to=empty)))
    yield Invalid("P8", "tensor-missing", changed(up={}))
    yield Invalid("P9", "basis-fp16", changed(basis=good.basis.astype(np.float16)))
    yield Invalid("P9", "basis-transposed", changed(basis=good.basis.T))
    yield Invalid("P9", "rank-differs", changed(rank=1))
    yield Invalid("P9", "up-too-tall", changed(up={KEY: good.up[VALUE]}))
    yield Invalid("P8", "down-missing", assemble(patch(_with_down({KEY: lora().down[KEY]}))))
    members, data = parts(assemble(patch(lora())))
    members["degas.basis"] = empty
    yield Invalid("P8", "lora-with-basis", raw(canonical_json(members), data))
    wide = {**lora().down, KEY: lora().down[KEY][:, 1:]}
    yield Invalid("P9", "down-narrower", assemble(patch(_with_down(wide))))


def _with_down(down: dict[str, npt.NDArray[np.float32]]) -> Increment:
    return replace(lora(), down=down)


def _order() -> Iterator[Invalid]:
    members, data = parts(assemble(small_patch()))
    yield Invalid("P11", "padding", raw(canonical_json(members) + b" " * 8, data))
    yield Invalid("P11", "spaces", raw(json.dumps(members, ensure_ascii=False).encode(), data))
    members, data = parts(assemble(patch(additive())))
    # The same tensors, all whole and aligned, one behind the other in another order.
    position, moved = 0, bytearray()
    for name in sorted(set(members) - {"__metadata__"}, reverse=True):
        begin, end = members[name]["data_offsets"]
        moved += data[begin:end]
        members[name]["data_offsets"] = [position, position + end - begin]
        position += end - begin
    yield Invalid("P10", "order", raw(canonical_json(members), bytes(moved)))


def _factors() -> Iterator[Invalid]:
    for rule, about, value in (
        ("V1", "nan", np.nan),
        ("V1", "infinite", np.inf),
        ("V2", "above-1", 1 + 2.0**-10),
        ("V4", "negative-zero", -0.0),
    ):
        for factor in ("basis", "up", "shift"):
            yield Invalid(rule, f"{factor}-{about}", _with_value(factor, value))
    yield Invalid("V3", "basis-between", _with_value("basis", 2.0**-23))
    yield Invalid("V3", "shift-between", _with_value("shift", 0.5 + 2.0**-24))
    between = {**lora().down, KEY: lora().down[KEY] + np.float32(2.0**-23)}
    yield Invalid("V3", "down-between", assemble(patch(_with_down(between))))
    good = assemble(small_patch())
    yield Invalid("V5", "bit-flipped", good[:-2] + bytes([good[-2] ^ 1]) + good[-1:])
    prompt = put("increments", 0, "prompts", to=["Monet", "Degas"])
    yield Invalid("V5", "prompt-added", with_manifest(prompt))


def _with_value(factor: str, value: float) -> bytes:
    """A patch whose digest is right, with `value` in one of its factors."""
    increment: Increment = operator() if factor == "shift" else small()
    array = (increment.up[KEY] if factor == "up" else increment.factors[factor]).copy()
    array[0, 0] = value
    changed: Any = {**increment.up, KEY: array} if factor == "up" else array
    return assemble(small_patch(replace(increment, **{factor: changed})))

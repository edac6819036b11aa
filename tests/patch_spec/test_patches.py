"""Patches: what is written is read, and only that."""

import io
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_spec import limits
from patch_spec.base import Base
from patch_spec.canonical import canonical_json
from patch_spec.cases.examples import (
    KEY,
    QUERY,
    TEXT_LAYER,
    VALUE,
    WIDTH,
    additive,
    base,
    layered,
    longer,
    lora,
    mask,
    masking,
    operator,
    patch,
    small_patch,
    sparse,
    stack,
)
from patch_spec.cases.tools import raw
from patch_spec.container import patch_bytes, patch_digest, read_manifest, read_patch
from patch_spec.errors import FormatError
from patch_spec.grid import GRID
from patch_spec.increment import KINDS, Increment, Summary
from patch_spec.manifest import Manifest, Patch
from patch_spec.provenance import Measurements, Method
from patch_spec.stack import StackEntry, StackRecord
from patch_spec.text import unique_slug
from tests.patch_spec.strategies import digests, texts

numbers = st.floats(-1e9, 1e9) | st.integers(-(2**53) + 1, 2**53 - 1)
maybe = st.none() | st.floats(-1e9, 1e9)
some_settings = st.dictionaries(texts, st.none() | st.booleans() | numbers | texts, max_size=3)


def array(dtype, rows, columns, unit):
    steps = st.integers(-round(1 / unit), round(1 / unit))
    row = st.lists(steps, min_size=columns, max_size=columns)
    return st.lists(row, min_size=rows, max_size=rows).map(
        lambda x: (np.array(x) * unit).astype(dtype)
    )


@st.composite
def masks(draw, slug, concept):
    layers = draw(st.lists(st.sampled_from([QUERY, TEXT_LAYER]), min_size=1, unique=True))
    flags = {}
    for layer in layers:
        shape = layered().layer_shapes[layer]
        size = shape[0] * shape[1]
        chosen = draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(any))
        flags[layer] = np.array(chosen).reshape(shape)
    prompts = tuple(draw(st.lists(texts, min_size=1, max_size=2)))
    return replace(masking(flags), concept=concept, slug=slug, prompts=prompts)


@st.composite
def increments(draw, slug, concept):
    rank = draw(st.integers(1, 3))
    kind = draw(st.sampled_from(KINDS))
    if kind == "mask":
        return draw(masks(slug, concept))
    is_operator = kind == "operator"
    targets = draw(st.lists(st.sampled_from([KEY, VALUE]), min_size=1, unique=True))
    heights = {KEY: 4, VALUE: 6}
    exponents = st.integers(-64, 64)
    return Increment(
        concept=concept,
        slug=slug,
        kind=kind,
        rank=rank,
        prompts=tuple(draw(st.lists(texts, min_size=1, max_size=2))),
        method=Method(draw(texts), draw(some_settings)),
        measured=Measurements(
            *(draw(maybe) for _ in range(4)),
            steps=draw(st.none() | st.integers(0, 2**53 - 1)),
            stopped=draw(st.none() | texts),
        ),
        basis=draw(array(np.float32, 0 if kind == "lora" else rank, WIDTH, GRID)).reshape(
            -1, WIDTH
        ),
        down={t: draw(array(np.float32, rank, WIDTH, GRID)) for t in targets if kind == "lora"},
        shift=draw(array(np.float32, WIDTH, rank, GRID)) if is_operator else None,
        shift_exponent=draw(exponents) if is_operator else 0,
        up={}
        if is_operator
        else {t: draw(array(np.float16, heights[t], rank, 2**-10)) for t in targets},
        exponents={} if is_operator else {t: draw(exponents) for t in targets},
    )


@st.composite
def patches(draw):
    concepts = draw(st.lists(texts, min_size=1, max_size=3, unique=True))
    slugs: list[str] = []
    for concept in concepts:
        slugs.append(unique_slug(concept, slugs))
    parts = tuple(draw(increments(*pair)) for pair in zip(slugs, concepts, strict=True))
    changed = {layer for part in parts for layer in part.layers}
    whole = layered()
    return Patch(
        base=replace(
            whole,
            layers={n: value for n, value in whole.layers.items() if n in changed},
            layer_shapes={n: value for n, value in whole.layer_shapes.items() if n in changed},
        ),
        increments=parts,
        separable_from=() if changed else tuple(draw(st.lists(texts | st.just(""), max_size=2))),
        protected=tuple(draw(st.lists(texts | st.just(""), max_size=2))),
        tool=draw(texts),
        created=draw(st.none() | st.just("2024-02-29T23:59:59Z")),
        recipe=draw(st.none() | digests),
    )


@settings(max_examples=40)
@given(patches())
def test_what_is_written_is_read(made):
    data = patch_bytes(made)
    again = read_patch(data)
    assert again == made
    assert (again.separable_from, again.protected) == (made.separable_from, made.protected)
    assert patch_bytes(again) == data
    assert Manifest.from_text(made.manifest.to_text()) == made.manifest == read_manifest(data)
    assert Base.from_json(made.base.to_json()) == made.base
    for increment in made.increments:
        summary = increment.summary()
        assert Summary.from_json(summary.to_json(), "here") == summary
        assert Method.from_json(increment.method.to_json(), "here") == increment.method
        assert Measurements.from_json(increment.measured.to_json(), "here") == increment.measured


@settings(max_examples=300)
@given(
    st.sampled_from(
        [
            small_patch(),
            small_patch(operator()),
            patch(lora()),
            patch(mask(), of=layered()),
            patch(sparse(), of=longer()),
        ]
    ),
    st.data(),
)
def test_a_changed_byte_is_refused_or_makes_the_only_file_of_another_patch(made, data):
    good = patch_bytes(made)
    position = data.draw(st.integers(0, len(good) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != good[position]))
    changed = good[:position] + bytes([byte]) + good[position + 1 :]
    try:
        other = read_patch(changed)
    except FormatError as error:
        assert str(error)
    else:
        assert other != made
        assert patch_bytes(other) == changed


@given(st.binary(max_size=64))
def test_bytes_without_sense_are_no_patch(junk):
    for data in (junk, raw(b"{" + junk + b"}")):
        with pytest.raises(FormatError):
            read_patch(data)


def test_equal_patches_have_equal_bytes_whatever_the_order_and_layout():
    one, other = additive(), operator()
    up = {target: np.asfortranarray(array) for target, array in reversed(one.up.items())}
    again = replace(
        one, up=up, basis=one.basis.astype(">f4"), exponents=dict(reversed(one.exponents.items()))
    )
    assert patch_bytes(patch(one, other)) == patch_bytes(patch(other, again))


def test_a_digest_covers_everything_but_the_slug():
    one = additive()
    assert replace(one, slug="painter").digest == one.digest
    up = dict(one.up)
    up[KEY] = np.zeros_like(up[KEY])
    changes = [
        {"concept": "Manet"},
        {"rank": 3},
        {"prompts": ("Manet",)},
        {"method": replace(one.method, name="other")},
        {"measured": Measurements()},
        {"exponents": dict.fromkeys(one.exponents, 0)},
        {"basis": -one.basis},
        {"up": up},
    ]
    digests = {replace(one, **change).digest for change in changes} | {one.digest}
    assert len(digests) == len(changes) + 1
    mover = operator()
    moved = replace(mover, shift=-mover.shift), replace(mover, shift_exponent=9)
    assert len({i.digest for i in moved} | {mover.digest}) == 3


def test_increments_are_equal_by_slug_and_digest():
    assert additive() == additive() != replace(additive(), slug="x")
    assert len({additive(), additive(), operator()}) == 2
    assert additive() != "monet"


def test_a_base_is_the_same_with_and_without_text_encoders():
    assert replace(base(), text_encoders={}).digest == base().digest
    assert base(KEY).digest != base().digest
    assert replace(base(), family="sd2").digest != base().digest


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"basis": additive().basis.astype(np.float64)}, "P9"),
        ({"basis": additive().basis[:1]}, "P9"),
        ({"basis": additive().basis / 3}, "V3"),
        ({"up": {}}, "P8"),
        ({"concept": "Rene\u0301"}, "J5"),
        ({"slug": "../x"}, "H12"),
        ({"slug": "Monet"}, "P2"),
        ({"measured": Measurements(leakage=float("nan"))}, "J6"),
        ({"method": Method("m", {"lr": float("inf")})}, "J6"),
        ({"method": Method("m", {"lr": [1]})}, "J4"),
        ({"prompts": ("\ud800",)}, "J6"),
    ],
)
def test_nothing_is_written_that_could_not_be_read(change, rule):
    with pytest.raises(FormatError) as caught:
        patch_bytes(patch(replace(additive(), **change)))
    assert caught.value.rule == rule


@pytest.mark.parametrize("name", ["separable_from", "protected"])
def test_a_patch_keeps_as_many_prompts_as_it_may(name):
    full = replace(small_patch(), **{name: ("a picture",) * limits.KEPT_PROMPTS})
    assert read_manifest(patch_bytes(full)) == full.manifest
    with pytest.raises(FormatError) as caught:
        patch_bytes(replace(full, **{name: (*getattr(full, name), "")}))
    assert (caught.value.rule, caught.value.where) == ("J7", f"manifest.{name}")


def test_a_patch_has_as_many_increments_as_a_checkpoint():
    parts = [replace(operator(), concept=str(n), slug=str(n)) for n in range(limits.INCREMENTS)]
    full = patch(*parts)
    assert read_patch(patch_bytes(full)) == full
    entries = tuple(StackEntry(part.digest, part.concept, part.slug, 1.0) for part in parts)
    record = replace(stack(), entries=entries)
    assert StackRecord.from_metadata(record.to_metadata()) == record


class Pipe(io.RawIOBase):
    """A stream that gives a few bytes at a time and cannot seek."""

    def __init__(self, data):
        self.data, self.asked = io.BytesIO(data), 0

    def read(self, size=-1):
        self.asked = max(self.asked, size)
        return self.data.read(min(size, 7))


def test_a_pipe_is_read_like_a_file():
    made = patch(additive(), operator())
    assert read_patch(Pipe(patch_bytes(made))) == made
    with pytest.raises(FormatError) as caught:
        read_patch(Pipe(patch_bytes(made) + b"!"))
    assert caught.value.rule == "H11"


def test_sizes_that_lie_reserve_no_memory():
    """Every length in the file may be false: a reader asks for what is there in small pieces."""
    huge = replace(base(KEY), shapes={KEY: (16384, WIDTH)})
    one = replace(additive(), rank=77, exponents={KEY: 0})
    manifest = Patch(base=huge, increments=(one,), tool="x").manifest
    tensors = {
        "monet.basis": {"dtype": "F32", "shape": [77, 8], "data_offsets": [0, 2464]},
        f"monet.up.{KEY}": {
            "dtype": "F16",
            "shape": [16384, 77],
            "data_offsets": [2464, 2464 + 2 * 77 * 16384],
        },
    }
    pipe = Pipe(raw(canonical_json({"__metadata__": {"sepme": manifest.to_text()}, **tensors})))
    with pytest.raises(FormatError) as caught:
        read_patch(pipe)
    assert caught.value.rule == "H11"
    assert pipe.asked <= 2**20


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_patch(tmp_path / "no.sepme")


def test_the_digest_of_a_patch_is_of_its_file():
    made = patch(additive())
    assert patch_digest(made) == sha256(patch_bytes(made)).hexdigest()


def test_errors_say_rule_place_and_both_sides():
    error = FormatError("H1", "too long", where="x", expected=3, found=4)
    assert str(error) == "x: too long (expected 3, found 4) [rule H1]"
    assert str(FormatError("H1", "too long")) == "too long [rule H1]"

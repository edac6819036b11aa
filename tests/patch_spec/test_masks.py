"""Masks: their one encoding, and what they do to weights, against plain numpy."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_spec import mask as masks
from patch_spec.cases.examples import (
    QUERY,
    WIDTH,
    layered,
    longer,
    mask,
    masking,
    on_layers,
    overlapping,
    patch,
    sparse,
    weights,
)
from patch_spec.compose import compose, increment_delta
from patch_spec.container import assemble, patch_bytes, read_patch
from patch_spec.errors import FormatError
from patch_spec.mask import Masked, to_flags, to_gaps, told, united

SHAPES = st.tuples(st.integers(1, 30), st.integers(1, 60))


@st.composite
def flags(draw, shape=None):
    """Masks, dense ones and ones with wide gaps."""
    found = np.zeros(draw(SHAPES) if shape is None else shape, np.bool_)
    positions = draw(st.sets(st.integers(0, found.size - 1), min_size=1, max_size=40))
    found.reshape(-1)[sorted(positions)] = True
    return ~found if draw(st.booleans()) and not found.all() else found


def naive(found: np.ndarray) -> list[int]:
    """The encoding as SPEC.md says it, position by position."""
    data, before = [], -1
    for position in np.flatnonzero(found):
        between = int(position) - before - 1
        data += [255] * (between // 255) + [between % 255]
        before = int(position)
    return data


@given(flags(), st.integers(1, 9))
def test_a_mask_has_the_encoding_of_the_spec_and_comes_back(found, chunk):
    gaps = to_gaps(found)
    assert gaps.tolist() == naive(found)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(masks, "_CHUNK", chunk)  # so that positions straddle chunks
        assert (to_flags(gaps, found.shape) == found).all()
    count, end = told(gaps)
    assert (count, end) == (found.sum(), np.flatnonzero(found)[-1] + 1)
    assert count <= len(gaps) <= Masked(count, found.shape).most_bytes


@given(st.lists(st.integers(0, 255), min_size=1, max_size=8), st.integers(1, 5))
def test_what_is_accepted_is_the_only_encoding(data, count):
    gaps = np.array(data, np.uint8)
    part = replace(sparse(), masks={QUERY: Masked(count, (3, 400))}, gaps={QUERY: gaps})
    file = assemble(patch(part, of=longer()))
    try:
        (read,) = read_patch(file).increments
    except FormatError as error:
        assert error.rule in ("P9", "V6", "V7")
    else:
        assert to_gaps(to_flags(read.gaps[QUERY], (3, 400))).tolist() == data
        assert patch_bytes(read_patch(file)) == file


@settings(deadline=None)
@given(
    st.lists(flags((6, WIDTH)), min_size=1, max_size=3),
    st.sampled_from(["F16", "F32", "BF16", "F64"]),
    st.floats(-2, 2).filter(bool),
    st.randoms(use_true_random=False),
)
def test_masks_unite_and_what_is_added_stays(found, dtype, scale, random):
    parts = [
        replace(masking({QUERY: own}), concept=f"c{i}", slug=f"c{i}") for i, own in enumerate(found)
    ]
    names = {"F32": np.float32, "F64": np.float64, "F16": np.float16}
    weight = weights()["value.F16"]
    weight = weight.astype(names.get(dtype, weights()["key.BF16"].dtype))
    lora = on_layers()
    terms = [*((part, 1.0) for part in parts), (lora, scale)]
    random.shuffle(terms)
    zero = np.logical_or.reduce(found)
    change = increment_delta(lora, QUERY, weight)
    wide = np.where(zero, 0.0, weight.astype(np.float64))
    alone = compose(weight, [(part, 1.0) for part in parts], QUERY)
    assert alone.tobytes() == wide.astype(weight.dtype).tobytes()
    result = compose(weight, terms, QUERY, np.float64)
    assert result.tobytes() == (wide + scale * change).tobytes()


def test_reverting_one_of_two_masks_restores_what_the_other_does_not_hold():
    weight = weights()["value.F16"]
    one, other = (to_flags(part.gaps[QUERY], (6, WIDTH)) for part in (mask(), overlapping()))
    assert (one & other).any() and (one & ~other).any() and (other & ~one).any()
    both = compose(weight, [(mask(), 1), (overlapping(), 1)], QUERY)
    left = compose(weight, [(overlapping(), 1)], QUERY)
    assert (
        united([mask().gaps[QUERY], overlapping().gaps[QUERY]], (6, WIDTH)) == one | other
    ).all()
    assert (left != both).sum() == (weight[one & ~other] != 0).sum() > 0
    assert (left[one & other] == 0).all()


@pytest.mark.parametrize("scale", [0.5, -1.0, 2.0, 0.0])
def test_a_mask_has_no_other_scale_than_1(scale):
    with pytest.raises(FormatError, match=r"C3"):
        compose(weights()["value.F16"], [(mask(), scale)], QUERY)


def test_a_mask_is_not_for_another_shape():
    with pytest.raises(FormatError, match=r"C1"):
        compose(weights()["value.F16"].T, [(mask(), 1)], QUERY)


def test_the_digest_covers_the_shape():
    flat = np.arange(48) % 7 == 0
    wide, tall = masking({QUERY: flat.reshape(6, 8)}), masking({QUERY: flat.reshape(8, 6)})
    assert wide.gaps[QUERY].tolist() == tall.gaps[QUERY].tolist()
    assert wide.digest != tall.digest


def test_a_mask_takes_about_a_byte_a_position():
    generator = np.random.default_rng(0)
    found = generator.random((1280, 5120)) < 0.02
    assert len(to_gaps(found)) < 1.01 * found.sum()


def test_a_header_that_lies_reserves_nothing():
    """A mask of a billion positions, in a file of some bytes, is refused by its length."""
    shape = (32768, 32768)
    base = replace(longer(), layer_shapes={QUERY: shape})
    part = replace(sparse(), masks={QUERY: Masked(2**30, shape)})
    with pytest.raises(FormatError, match=r"P9"):
        read_patch(assemble(patch(part, of=base)))


def test_layers_of_a_mask_are_layers():
    assert patch(mask(), of=layered()).increments[0].layers == tuple(sorted(mask().masks))
    assert mask().acts_on(QUERY) and not overlapping().acts_on("x.weight")

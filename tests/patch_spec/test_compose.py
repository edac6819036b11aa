"""Composition: one rounding, one order."""

from dataclasses import replace
from fractions import Fraction
from itertools import permutations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patch_spec import grid
from patch_spec.cases.examples import KEY, VALUE, additive, extremes, operator, weights
from patch_spec.compose import cast_once, compose, increment_delta
from patch_spec.errors import FormatError

NARROW = [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


def neighbours(dtype):
    """All finite values of a dtype, ascending."""
    bits = np.dtype(dtype).itemsize * 8
    with np.errstate(invalid="ignore"):
        every = np.arange(2**bits, dtype=f"u{bits // 8}").view(dtype).astype(np.float64)
    return np.unique(every[np.isfinite(every)])


@pytest.mark.parametrize("dtype", NARROW, ids=lambda dtype: np.dtype(dtype).name)
def test_casts_round_once_around_every_midpoint(dtype):
    values = neighbours(dtype)
    low, high = values[:-1], values[1:]
    middle = (low + high) / 2
    beside = np.spacing(np.abs(middle))
    assert (cast_once(middle + beside, dtype).astype(np.float64) == high).all()
    assert (cast_once(middle - beside, dtype).astype(np.float64) == low).all()
    tied = cast_once(middle, dtype)
    even = tied.view(f"u{tied.itemsize}") & 1 == 0
    assert even.all()
    assert (cast_once(values, dtype).astype(np.float64) == values).all()


def test_the_cast_of_ml_dtypes_rounds_twice():
    """That the test above could fail."""
    above_the_middle = np.array([1 + 2.0**-8 + 2.0**-40])
    once = cast_once(above_the_middle, ml_dtypes.bfloat16)
    assert once.astype(np.float64) == 1 + 2.0**-7
    assert above_the_middle.astype(ml_dtypes.bfloat16).astype(np.float64) == 1


@given(st.floats(allow_nan=False))
def test_bfloat16_is_the_nearest(x):
    with np.errstate(over="ignore", invalid="ignore"):
        result = float(cast_once(np.array([x]), ml_dtypes.bfloat16)[0])
    if not np.isfinite(result):
        # Half a step beyond the largest finite number.
        assert abs(x) >= 2.0**128 - 2.0**119
        return
    exponent = max(int(np.frexp(result)[1]) - 8, -133)
    assert abs(Fraction(result) - Fraction(x)) <= Fraction(2) ** exponent / 2
    assert result == 0 or np.sign(result) == np.sign(x)


@pytest.mark.parametrize("name", ["key.F16", "key.F32", "key.BF16"])
def test_every_order_gives_the_same_bytes(name):
    terms = [(additive(), 1.0), (operator(), 0.3), (extremes(), 2.0**60)]
    results = {compose(weights()[name], p, KEY).tobytes() for p in permutations(terms)}
    assert len(results) == 1


def test_the_sum_of_the_spec():
    weight = weights()["key.F64"]
    one, other = sorted([(additive(), 0.1), (operator(), 0.7)], key=lambda term: term[0].digest)
    # So that the order of the digests is not the one of the slugs, nor of the file.
    assert one[0].slug > other[0].slug

    def total(*terms):
        result = weight
        for increment, scale in terms:
            result = result + scale * increment_delta(increment, KEY, weight)
        return result.tobytes()

    assert compose(weight, (other, one), KEY).tobytes() == total(one, other) != total(other, one)


def test_operators_that_are_worked_on_together_change_nothing():
    weight, one = weights()["key.F64"], operator()
    other = replace(one, rank=2, shift=one.shift[:, 1:] / 4, basis=one.basis[1:], shift_exponent=-3)
    parts = sorted([one, other, additive()], key=lambda part: part.digest)
    total = weight
    for part in parts:
        total = total + increment_delta(part, KEY, weight)
    terms = [(part, 1.0) for part in parts]
    assert compose(weight, terms, KEY).tobytes() == total.tobytes()


def test_rows_that_are_worked_on_together_change_nothing(monkeypatch):
    weight, terms = weights()["key.F16"], [(additive(), 1.0), (operator(), 0.3)]
    whole = compose(weight, terms, KEY).tobytes()
    assert len(list(grid.row_blocks(weight))) == 1
    monkeypatch.setattr(grid, "_BLOCK", weight.shape[1])
    assert len(list(grid.row_blocks(weight))) == len(weight) > 1
    assert compose(weight, terms, KEY).tobytes() == whole


@pytest.mark.parametrize("scale", [-1.0, 0.5, 2.0])
def test_an_increment_is_added_as_many_times_as_its_scale(scale):
    weight = weights()["key.F64"]
    once = compose(weight, [(additive(), 1.0)], KEY) - weight
    found = compose(weight, [(additive(), scale)], KEY) - weight
    np.testing.assert_allclose(found, scale * once, rtol=0, atol=1e-12)
    assert np.abs(once).max() > 0.1


def test_the_dtype_of_the_result_can_be_another():
    weight, terms = weights()["key.F64"], [(additive(), 1.0)]
    narrow = compose(weight, terms, KEY, np.float16)
    assert narrow.dtype == np.float16
    np.testing.assert_array_equal(narrow, compose(weight, terms, KEY).astype(np.float16))


def test_a_target_that_nothing_acts_on_keeps_its_bytes():
    weight = np.array([[-0.0, 1.0]] * 6, np.float16)
    assert compose(weight, [(extremes(), 1.0)], VALUE).tobytes() == weight.tobytes()
    assert compose(weight, [], VALUE).tobytes() == weight.tobytes()


def test_shapes_that_do_not_fit_and_results_that_are_not_finite():
    def rule(*arguments):
        with pytest.raises(FormatError) as caught:
            compose(*arguments)
        assert caught.value.where == KEY
        return caught.value.rule

    wide = np.ones((4, 9), np.float16)
    assert rule(wide, [(additive(), 1.0)], KEY) == "C1"
    assert rule(wide, [(operator(), 1.0)], KEY) == "C1"
    assert rule(np.ones(8, np.float16), [(additive(), 1.0)], KEY) == "C1"
    assert rule(np.ones((1, 8), np.float16), [(additive(), 1.0)], KEY) == "C1"
    assert rule(weights()["key.F16"], [(additive(), 1e6)], KEY) == "C2"
    assert rule(np.full((4, 8), np.nan, np.float16), [(additive(), 1.0)], KEY) == "C2"

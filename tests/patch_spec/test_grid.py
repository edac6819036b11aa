"""The arithmetic is exact: against whole numbers, in every order, at the ends of every range."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from patch_spec.errors import FormatError
from patch_spec.grid import (
    GRID,
    additive_delta,
    all_finite,
    ceil_log2,
    on_grid,
    operator_delta,
    product,
    split_shift,
    split_up,
    to_grid,
)
from patch_spec.limits import RANK, WIDTH

half_in_range = st.floats(-1, 1, width=16)
seeds = st.integers(0, 2**32 - 1)


def gridded(rows, columns):
    steps = st.one_of(st.integers(-(2**22), 2**22), st.sampled_from([-(2**22), 2**22, 1, -1, 0]))
    return arrays(np.int64, (rows, columns), elements=steps).map(
        lambda whole: (whole * GRID).astype(np.float32)
    )


def exact_product(left, right):
    """left @ right as fractions, by the definition of the product."""
    left = [[Fraction(float(x)) for x in row] for row in left]
    right = [[Fraction(float(x)) for x in column] for column in np.asarray(right).T]
    return [
        [sum((a * b for a, b in zip(row, col, strict=True)), Fraction(0)) for col in right]
        for row in left
    ]


def round_to(x: Fraction, unit: Fraction) -> Fraction:
    """x to the nearest multiple of unit, half to even; round() of a Fraction is just that."""
    return round(x / unit) * unit


def top(values) -> Fraction:
    """The least power of two not below the largest magnitude."""
    largest = max(abs(x) for row in values for x in row)
    power = Fraction(1)
    while power < largest:
        power *= 2
    while power / 2 >= largest:
        power /= 2
    return power


@given(st.data(), st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.integers(-64, 64))
def test_additive_is_the_exact_product(data, out, rank, width, exponent):
    up = data.draw(arrays(np.float16, (out, rank), elements=half_in_range))
    basis = data.draw(gridded(rank, width))
    delta = additive_delta(up, exponent, basis)
    expected = [[x * Fraction(2) ** exponent for x in row] for row in exact_product(up, basis)]
    assert [[Fraction(x) for x in row] for row in delta.tolist()] == expected
    assert not np.signbit(delta[delta == 0]).any()


@given(st.data(), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(-64, 64))
def test_operator_is_the_product_of_the_spec(data, out, rank, width, exponent):
    floats = st.floats(-60000, 60000, width=32)
    weight = data.draw(arrays(np.float32, (out, width), elements=floats))
    shift, basis = data.draw(gridded(width, rank)), data.draw(gridded(rank, width))
    delta = operator_delta(weight, shift, exponent, basis)
    half = [[Fraction(float(np.float16(x))) for x in row] for row in weight]
    if not any(x for row in half for x in row):
        assert not delta.any()
        return
    q = [[round_to(x, top(half) / 2**20) for x in row] for row in half]
    m = exact_product(q, shift)
    if not any(x for row in m for x in row):
        assert not delta.any()
        return
    m = [[round_to(x, top(m) / 2**24) for x in row] for row in m]
    expected = [[x * Fraction(2) ** exponent for x in row] for row in exact_product(m, basis)]
    assert [[Fraction(x) for x in row] for row in delta.tolist()] == expected


def shuffled_sum(left, right, rng):
    """left @ right, term by term in a random order, with a random grouping."""
    order = rng.permutation(left.shape[1])
    terms = [np.outer(left[:, k], right[k]) for k in order]
    while len(terms) > 1:
        i = rng.integers(len(terms) - 1)
        terms[i : i + 2] = [terms[i] + terms[i + 1]]
    return terms[0]


@settings(max_examples=15)
@given(seeds, st.integers(-64, 64))
def test_additive_is_one_result_in_every_order(seed, exponent):
    rng = np.random.default_rng(seed)
    up = rng.uniform(-1, 1, (3, RANK)).astype(np.float16)
    basis = to_grid(rng.uniform(-1, 1, (RANK, 16)))
    shuffled = shuffled_sum(up.astype(np.float64), basis.astype(np.float64), rng)
    expected = additive_delta(up, exponent, basis)
    assert (np.ldexp(shuffled, exponent) + 0.0).tobytes() == expected.tobytes()


@settings(max_examples=10)
@given(seeds)
def test_operator_is_one_result_in_every_order(seed):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(4, 512)).astype(np.float16)
    shift, basis = (to_grid(rng.uniform(-1, 1, shape)) for shape in ((512, 5), (5, 512)))
    order = rng.permutation(512)
    expected = operator_delta(weight, shift, 3, basis)
    # Another order of the inner sum over d, and of the outer one over r.
    inner = operator_delta(weight[:, order], shift[order], 3, basis)
    assert inner.tobytes() == expected.tobytes()
    ranks = rng.permutation(5)
    outer = operator_delta(weight, shift[:, ranks], 3, basis[ranks])
    assert outer.tobytes() == expected.tobytes()


def test_a_zero_has_no_sign_whatever_the_library_gave_it():
    left, basis = np.array([[-0.0], [-1.0]]), np.array([[1.0, 0.0]])
    assert not np.signbit(product(left, basis)[:, 1]).any()
    assert not np.signbit(product(left[:1], basis)).any()


def test_without_the_grid_the_order_shows():
    """That the two tests above could fail."""
    rng = np.random.default_rng(0)
    left, right = rng.uniform(-1, 1, (3, RANK)), rng.uniform(-1, 1, (RANK, 16))
    assert (shuffled_sum(left, right, rng) != shuffled_sum(left, right, rng)).any()


def test_the_bounds_hold_at_their_ends():
    rank, width = RANK, WIDTH
    # The most bits that a term and a sum can have at once: all ones but the last step.
    nearly = np.float32(1 - GRID)
    up = np.full((1, rank), 1, np.float16)
    up[0, 0] = 2.0**-24
    basis = np.full((rank, 3), nearly)
    exact = Fraction(float(nearly)) * (rank - 1 + Fraction(1, 2**24))
    assert [Fraction(x) for x in additive_delta(up, 64, basis)[0]] == [exact * 2**64] * 3

    # The inner sum of the operator reaches 2**53 of its units exactly.
    weight = np.ones((1, width), np.float32)
    shift = np.ones((width, rank), np.float32)
    basis = np.full((rank, 2), nearly)
    delta = operator_delta(weight, shift, -64, basis)
    assert [Fraction(x) for x in delta[0]] == [Fraction(float(nearly)) * width * rank / 2**64] * 2


@given(arrays(np.float16, (2, 6), elements=st.floats(-60000, 60000, width=16)), seeds)
def test_copies_with_one_fingerprint_have_one_operator_delta(half, seed):
    rng = np.random.default_rng(seed)
    shift, basis = (to_grid(rng.uniform(-1, 1, shape)) for shape in ((6, 2), (2, 6)))
    single = np.nextafter(half.astype(np.float32), np.float32(np.inf))
    assert (single.astype(np.float16) == half).all()
    one, other = (operator_delta(w, shift, 0, basis) for w in (half, single))
    assert one.tobytes() == other.tobytes()


@given(arrays(np.float64, (3, 4), elements=st.floats(-1, 1)))
def test_to_grid_rounds_to_the_nearest_and_stays(x):
    y = to_grid(x)
    assert y.dtype == np.float32
    assert on_grid(y)
    assert to_grid(y).tobytes() == y.tobytes()
    assert np.abs(y - x).max() <= GRID / 2
    assert not np.signbit(y[y == 0]).any()


@pytest.mark.parametrize("value", [GRID / 2, 1 + GRID, -1.5, np.nan, np.inf])
def test_what_is_off_the_grid(value):
    assert not on_grid(np.array([0.5, value], np.float32))


@given(arrays(np.float64, (3, 2), elements=st.floats(-1e15, 1e15)))
def test_split_up_keeps_eleven_bits_of_the_largest(x):
    up, exponent = split_up(x)
    largest = np.abs(x).max()
    assert up.dtype == np.float16
    assert np.abs(up).max() <= 1
    assert np.abs(np.ldexp(up.astype(np.float64), exponent) - x).max() <= max(
        largest * 2.0**-11, 2.0**-89
    )
    assert not np.signbit(up[up == 0]).any()


@given(arrays(np.float64, (3, 2), elements=st.floats(-1e15, 1e15)))
def test_split_shift_keeps_its_promise(x):
    shift, exponent = split_shift(x)
    assert on_grid(shift)
    error = np.abs(np.ldexp(shift.astype(np.float64), exponent) - x).max()
    assert error <= np.ldexp(GRID / 2, exponent)


@given(st.floats(min_value=1e-300, max_value=1e300))
def test_ceil_log2(x):
    assert 2.0 ** ceil_log2(x) >= x > 2.0 ** (ceil_log2(x) - 1)


@pytest.mark.parametrize(
    ("make", "value", "rule"),
    [
        (to_grid, np.nan, "V1"),
        (to_grid, 1.0001, "V2"),
        (split_up, np.inf, "V1"),
        (split_up, np.nan, "V1"),
        (split_up, 2.0**65, "J6"),
        (split_shift, np.nan, "V1"),
    ],
)
def test_what_cannot_be_kept_is_refused(make, value, rule):
    with pytest.raises(FormatError) as caught:
        make([[0.0, value]])
    assert caught.value.rule == rule


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_an_operator_refuses_weights_without_a_fingerprint(dtype):
    shift, basis = np.ones((2, 1), np.float32), np.ones((1, 2), np.float32)
    with pytest.raises(FormatError) as caught:
        operator_delta(np.array([[1, 1e6]], dtype), shift, 0, basis)
    assert caught.value.rule == "F1"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_what_is_not_finite_is_found(dtype):
    largest = ml_dtypes.finfo(dtype).max
    values = np.array([[0, -0.0, largest], [-largest, 1, 2]], dtype)
    assert all_finite(values) and all_finite(values.T) and all_finite(values[:0])
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
        values[1, 1] = bad
        assert not all_finite(values) and not all_finite(values.T)

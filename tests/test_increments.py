"""The algebra: composing in one rounding and in any order, taking off, comparing."""

import itertools
from dataclasses import replace
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_spec.base import Base
from patch_spec.increment import Increment
from sepme_cli.errors import MalformedError, MismatchError
from sepme_cli.increments import compose, delta, distance, interference, subtract
from tests.synthetic import DTYPES, additive, lora, operator

TARGET = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
OTHER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
OUT, WIDTH = 6, 10
BASE = Base("sd1", WIDTH, {}, {TARGET: "0" * 64}, {TARGET: (OUT, WIDTH)})
WIDER = Base(
    "sd1",
    WIDTH,
    {},
    {TARGET: "0" * 64, OTHER: "1" * 64},
    {TARGET: (OUT, WIDTH), OTHER: (OUT, WIDTH)},
)
STORED = ["F16", "F32", "BF16"]
UNIT = {"F16": 2.0**-11, "F32": 2.0**-24, "BF16": 2.0**-8}
"""Half a unit in the last place, relative."""

increments = st.builds(
    lambda make, seed, size: make(BASE, f"c{seed}", seed=seed, size=size),
    st.sampled_from([additive, operator, lora]),
    st.integers(0, 50),
    st.sampled_from([1e-3, 0.05, 0.7]),
)
stacks = st.lists(
    st.tuples(increments, st.sampled_from([1.0, 0.5, -0.3])),
    max_size=4,
    unique_by=lambda part: part[0].digest,
)


def weights(dtype: str, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((OUT, WIDTH)) * 0.1).astype(DTYPES[dtype])


@settings(max_examples=60, deadline=None)
@given(stacks, st.sampled_from(STORED), st.randoms(use_true_random=False))
def test_any_order_gives_the_same_bits(stack, dtype, random) -> None:
    shuffled = list(stack)
    random.shuffle(shuffled)
    weight = weights(dtype)
    once, again = compose(weight, stack, TARGET), compose(weight, shuffled, TARGET)
    assert once.dtype == weight.dtype
    assert once.tobytes() == again.tobytes()


@settings(max_examples=40, deadline=None)
@given(stacks, st.sampled_from(STORED))
def test_the_sum_is_rounded_once(stack, dtype) -> None:
    """Against exact rational arithmetic: never further off than half a unit in the last place."""
    weight = weights(dtype)
    result = compose(weight, stack, TARGET)
    changes = [(scale, delta(part, TARGET, weight)) for part, scale in stack]
    for index in np.ndindex(weight.shape):
        exact = Fraction(float(weight[index])) + sum(
            Fraction(scale) * Fraction(float(change[index])) for scale, change in changes
        )
        off = abs(Fraction(float(result[index])) - exact)
        assert off <= abs(exact) * Fraction(UNIT[dtype]) * Fraction(1.000001) + Fraction(2) ** -25


def test_bfloat16_is_rounded_once() -> None:
    """By way of float32 this number would come down on the wrong side of the middle."""
    increment = additive(BASE, "c", seed=1)
    weight = np.full((OUT, WIDTH), 1 + 2.0**-8 + 2.0**-40)
    assert float(compose(weight, [], TARGET, DTYPES["BF16"])[0, 0]) == 1 + 2.0**-7
    assert float(weight.astype(ml_dtypes.bfloat16)[0, 0]) == 1.0  # what is guarded against
    assert compose(weight, [(increment, 1.0)], TARGET, DTYPES["BF16"]).dtype == DTYPES["BF16"]


@pytest.mark.parametrize(("before", "after"), list(itertools.product(STORED, STORED)))
def test_another_dtype_is_the_same_sum_rounded_otherwise(before: str, after: str) -> None:
    stack = [(additive(BASE, "a", seed=1), 1.0), (operator(BASE, "b", seed=2), 0.5)]
    weight = weights(before)
    total = compose(weight.astype(np.float64), stack, TARGET)
    result = compose(weight, stack, TARGET, DTYPES[after]).astype(np.float64)
    assert np.all(np.abs(result - total) <= np.abs(total) * UNIT[after] * 1.000001 + 2.0**-25)


def test_an_increment_leaves_other_targets_alone() -> None:
    part = additive(BASE, "c", seed=1)
    weight = weights("F16")
    assert part.acts_on(TARGET) and not part.acts_on(OTHER)
    assert operator(BASE, "c", seed=1).acts_on(OTHER)
    assert not delta(part, OTHER, weight).any()
    assert compose(weight, [(part, 1.0)], OTHER).tobytes() == weight.tobytes()


def test_overflow_and_nan_name_the_tensor() -> None:
    huge = additive(BASE, "c", seed=1, size=60000.0)
    with pytest.raises(MalformedError, match="mid_block"):
        compose(weights("F16"), [(huge, 8.0)], TARGET)
    broken = weights("F16").copy()
    broken[0, 0] = np.nan
    for part in (additive(BASE, "c", seed=1), operator(BASE, "c", seed=1)):
        with pytest.raises(MalformedError, match="mid_block"):
            compose(broken, [(part, 1.0)], TARGET)


def test_a_weight_of_another_shape_does_not_match() -> None:
    with pytest.raises(MismatchError):
        compose(weights("F16")[:, :4], [(additive(BASE, "c", seed=1), 1.0)], TARGET)


@settings(max_examples=60, deadline=None)
@given(stacks.filter(bool), st.sampled_from(STORED), st.data())
def test_subtraction_is_within_its_bound(stack, dtype, data) -> None:
    cut = data.draw(st.integers(1, len(stack)))
    taken, staying = stack[:cut], stack[cut:]
    base = weights(dtype)
    exact = compose(base, staying, TARGET).astype(np.float64)
    found, bound = subtract(compose(base, stack, TARGET), taken, staying, TARGET)
    assert found.dtype == base.dtype
    assert np.abs(found.astype(np.float64) - exact).max() <= bound


def test_the_bound_is_not_idle() -> None:
    stack = [(additive(BASE, "a", seed=1, size=0.5), 1.0)]
    base = weights("F16")
    found, bound = subtract(compose(base, stack, TARGET), stack, [], TARGET)
    off = np.abs(found.astype(np.float64) - base.astype(np.float64)).max()
    assert 0 < off <= bound <= 16 * off


def test_distance_is_that_of_the_products() -> None:
    a, b = additive(BASE, "a", seed=1), additive(BASE, "b", seed=2)
    mine, other = delta(a, TARGET, weights("F32")), delta(b, TARGET, weights("F32"))
    expected = np.linalg.norm(mine - other) / np.linalg.norm(other)
    assert distance(a, b) == pytest.approx(expected)
    assert distance(a, a) == 0
    assert distance(a, operator(BASE, "b", seed=2)) is None
    one, two = lora(BASE, "a", seed=1), lora(BASE, "b", seed=2)
    mine, other = delta(one, TARGET, weights("F32")), delta(two, TARGET, weights("F32"))
    expected = np.linalg.norm(mine - other) / np.linalg.norm(other)
    assert distance(one, two) == pytest.approx(expected)
    assert distance(operator(BASE, "a", seed=3), operator(BASE, "b", seed=4)) > 0.1


def _with_basis(rows: np.ndarray) -> Increment:
    part = additive(BASE, "c", seed=1, rank=len(rows))
    return Increment(
        **{name: getattr(part, name) for name in part.__dataclass_fields__ if name != "basis"},
        basis=rows.astype(np.float32),
    )


def test_interference_is_the_part_inside_the_others_span() -> None:
    eye = np.eye(WIDTH)
    first, second, both = _with_basis(eye[:2]), _with_basis(eye[2:4]), _with_basis(eye[1:3])
    assert interference(first, second) == 0
    assert interference(first, first) == pytest.approx(1)
    assert interference(first, both) == pytest.approx(np.sqrt(0.5))
    assert interference(_with_basis(eye[:1]), first) == pytest.approx(1)


def test_interference_of_a_lora_is_that_of_all_its_bases() -> None:
    part = lora(WIDER, "c", seed=1, rank=3)
    for target, down in part.down.items():
        assert interference(_with_basis(down), part) == pytest.approx(1)
        assert part.acts_on(target)
    rows = np.linalg.svd(np.vstack(list(part.down.values())))[2]
    assert interference(_with_basis(rows[6:]), part) == pytest.approx(0, abs=1e-5)
    rows = rows.astype(np.float32)
    down = {f"a{i}.attn2.to_k.weight": rows[[i]] for i in range(10)}
    many = replace(part, down=down)
    assert interference(part, many) == pytest.approx(1)

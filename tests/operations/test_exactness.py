"""The same bits whatever computes them: any dtype, order, number of threads and BLAS.

Against `tests.soak.oracle`, which knows whole numbers and no linear algebra library. What is not
on the grid of SPEC.md is seen to differ in the same places, so that these tests could fail.
"""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from hashlib import sha256
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_spec.base import Base
from patch_spec.grid import operator_delta, product, to_grid
from patch_spec.increment import Increment
from sepme_cli.increments import compose
from tests.soak import oracle
from tests.synthetic import DTYPES, Shape, additive, base_of, make_checkpoint, make_patch, operator

TARGET = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
FLOATING = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"]


@st.composite
def stacks(draw: st.DrawFn) -> tuple[np.ndarray, list[tuple[Increment, float]]]:
    """A weight of any shape, in float64, and increments on it."""
    out, width = draw(st.integers(1, 9)), draw(st.integers(2, 33))
    base = Base("sd1", width, {}, {TARGET: "0" * 64}, {TARGET: (out, width)})
    seeds = draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=4, unique=True))
    scales = st.one_of(st.sampled_from([1.0, -1.0, 0.5]), st.floats(-2, 2).filter(bool))
    make = st.sampled_from([additive, operator])
    stack = [
        (
            draw(make)(
                base,
                f"c{seed}",
                seed=seed,
                rank=draw(st.integers(1, min(width, 8))),
                size=draw(st.sampled_from([1e-4, 0.02, 0.7])),
            ),
            draw(scales),
        )
        for seed in seeds
    ]
    weight = np.random.default_rng(seeds[0]).standard_normal((out, width)) * 0.1
    return weight, stack


def stored(weight: np.ndarray, stack: list[tuple[Increment, float]], dtype: str) -> bytes:
    """What the oracle says of the composed weight."""
    wide = weight.astype(np.float64)
    changes = [(part.digest, scale, oracle.delta(part, TARGET, wide)) for part, scale in stack]
    return oracle.stored(oracle.compose(wide, changes), dtype)


@settings(max_examples=150, deadline=None)
@given(stacks(), st.sampled_from(FLOATING), st.data())
def test_any_dtype_order_scale_and_subset_is_what_whole_numbers_give(
    made: tuple[np.ndarray, list[tuple[Increment, float]]], dtype: str, data: st.DataObject
) -> None:
    weight, stack = made[0].astype(DTYPES[dtype]), made[1]
    shuffled = data.draw(st.permutations(stack))
    assert compose(weight, shuffled, TARGET).tobytes() == stored(weight, stack, dtype)
    left = data.draw(st.integers(0, len(stack)))
    subset = shuffled[:left]
    assert compose(weight, subset, TARGET).tobytes() == stored(weight, subset, dtype)
    other = data.draw(st.sampled_from(FLOATING[:4]))
    converted = compose(weight, stack, TARGET, DTYPES[other])
    assert converted.tobytes() == stored(weight, stack, other)


def test_all_orders_of_four_have_one_digest() -> None:
    weight, base = np.linspace(-1, 1, 6 * 16).reshape(6, 16).astype("<f2"), _base(6, 16)
    made = [(additive, 1.0), (operator, 0.3), (additive, -0.7), (operator, 1.0)]
    stack = [(make(base, f"c{i}", seed=i), scale) for i, (make, scale) in enumerate(made)]
    found = {sha256(compose(weight, p, TARGET).tobytes()).hexdigest() for p in permutations(stack)}
    assert found == {sha256(stored(weight, stack, "F16")).hexdigest()}


def _base(out: int, width: int) -> Base:
    return Base("sd1", width, {}, {TARGET: "0" * 64}, {TARGET: (out, width)})


def products(left: np.ndarray, right: np.ndarray) -> dict[str, bytes]:
    """left @ right by four libraries; zeros made positive, as `product` does."""
    a, b = torch.from_numpy(left), torch.from_numpy(right)
    found = {
        "numpy's BLAS": left @ right,
        "torch's BLAS": (a @ b).numpy(),
        "torch's, transposed": (b.T.contiguous() @ a.T.contiguous()).T.numpy(),
        "no BLAS": np.einsum("ir,rj->ij", left, right, optimize=False),
    }
    return {name: np.ascontiguousarray(value + 0.0).tobytes() for name, value in found.items()}


def test_two_blas_and_none_agree_on_the_grid_and_nowhere_else() -> None:
    rng = np.random.default_rng(0)
    up = rng.uniform(-1, 1, (320, 77)).astype(np.float16).astype(np.float64)
    basis = to_grid(rng.uniform(-1, 1, (77, 768))).astype(np.float64)
    whole = np.rint(up * 2**24).astype(np.int64) @ np.rint(basis * 2**22).astype(np.int64)
    exact = np.ldexp(whole.astype(np.float64), -46).tobytes()
    assert set(products(up, basis).values()) == {exact}
    assert product(up, basis).tobytes() == exact

    off = rng.uniform(-1, 1, (77, 768))
    assert len(set(products(up, off).values())) > 1, "that the line above could fail"


def test_the_long_inner_sum_of_an_operator_agrees_too() -> None:
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(320, 2048)).astype(np.float16)
    base = _base(320, 2048)
    part = operator(base, "c", seed=2, rank=16)
    expected = oracle.delta(part, TARGET, weight.astype(np.float64))
    assert part.shift is not None and expected is not None
    found = operator_delta(weight, part.shift, part.shift_exponent, part.basis)
    assert found.tobytes() == expected.tobytes()
    # weight @ shift without the grids in between: 2048 terms, and the libraries part.
    off = rng.uniform(-1, 1, (2048, 16))
    assert len(set(products(rng.normal(size=(320, 2048)), off).values())) > 1


CHILD = """
import os, sys
from hashlib import sha256
from pathlib import Path
os.cpu_count = lambda: int(sys.argv[4])
import numpy as np
from sepme_cli.operations.apply import apply
model, patch, output = map(Path, sys.argv[1:4])
apply(model, [patch], output, force=True)
rng = np.random.default_rng(0)
off = rng.uniform(-1, 1, (512, 768)) @ rng.uniform(-1, 1, (768, 64))
print(sha256(output.read_bytes()).hexdigest(), sha256(off.tobytes()).hexdigest())
"""


def child(folder: Path, workers: int, settings: Mapping[str, str]) -> tuple[str, str]:
    """Digests of a patched file, and of a product that is not on the grid."""
    names = [folder / name for name in ("m.safetensors", "p.sepme", "out.safetensors")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **settings}
    command = [sys.executable, "-c", CHILD, *map(str, names), str(workers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    file, off = done.stdout.split()
    return file, off


@pytest.mark.slow
def test_threads_and_processors_change_no_bit_of_a_file(tmp_path: Path) -> None:
    shape = Shape(width=768, channels=(320,), attention=(False,))
    model = make_checkpoint(tmp_path / "m.safetensors", shape)
    base = base_of(model)
    parts = [additive(base, "a", seed=1, rank=64), operator(base, "o", seed=2, rank=64)]
    make_patch(tmp_path / "p.sepme", base, *parts)
    kernels = ["Nehalem", "Sandybridge", "Haswell"] if platform.machine() == "x86_64" else []
    found = [
        child(tmp_path, workers, settings)
        for workers, settings in [
            (1, {}),
            (8, {}),
            (2, {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}),
            *[(1, {"OPENBLAS_CORETYPE": kernel}) for kernel in kernels],
        ]
    ]
    assert len({file for file, _ in found}) == 1
    if kernels:
        assert len({off for _, off in found}) > 1, "that the line above could fail"

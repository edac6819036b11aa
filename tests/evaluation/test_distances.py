"""The distances agree with closed forms and with the definitions, term by term."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sepme_cli.errors import SystemFailure, UnsupportedError, UsageError
from sepme_cli.evaluation.distances import (
    Measures,
    check_references,
    frechet_distance,
    kernel_distance,
    load_features,
    perceptual_distance,
)


def features(n: int, d: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64)


def square_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def by_definition(a: torch.Tensor, b: torch.Tensor) -> float:
    """Heusel et al. 2017, eq. 6, with the trace of (A^(1/2) B A^(1/2))^(1/2)."""
    x, y = a.numpy(), b.numpy()
    first, second = np.cov(x.T), np.cov(y.T)
    root = square_root(first)
    both = square_root(root @ second @ root)
    means = np.square(x.mean(0) - y.mean(0)).sum()
    return float(means + np.trace(first) + np.trace(second) - 2 * np.trace(both))


@pytest.mark.parametrize(("n", "m", "d"), [(50, 80, 6), (9, 7, 20)])
def test_the_frechet_distance_is_the_defined_one(n: int, m: int, d: int) -> None:
    a, b = features(n, d, 1), 2 * features(m, d, 2) + 0.5
    assert frechet_distance(a, b) == pytest.approx(by_definition(a, b), rel=1e-6)


def test_the_frechet_distance_of_shifted_features_is_the_shift() -> None:
    a = features(40, 5, 3)
    assert frechet_distance(a, a + 2) == pytest.approx(5 * 4)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_the_frechet_distance_of_scaled_features_is_that_of_their_deviations() -> None:
    a = features(40, 5, 3)
    a = a - a.mean(0)
    # tr(A + 9 A - 2 (9 A A)^(1/2)) = 4 tr A
    assert frechet_distance(a, 3 * a) == pytest.approx(4 * float(torch.trace(torch.cov(a.T))))


def test_the_kernel_distance_is_the_sum_over_pairs() -> None:
    a, b = features(4, 3, 5), features(5, 3, 6) + 1

    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x @ y / 3 + 1) ** 3)

    within_a = np.mean([kernel(a[i], a[j]) for i in range(4) for j in range(4) if i != j])
    within_b = np.mean([kernel(b[i], b[j]) for i in range(5) for j in range(5) if i != j])
    between = np.mean([kernel(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * between)


def test_the_kernel_distance_of_the_same_distribution_is_about_zero() -> None:
    same = kernel_distance(features(400, 4, 1), features(400, 4, 2))
    other = kernel_distance(features(400, 4, 1), features(400, 4, 2) + 1)
    assert abs(same) < 0.1 < other


def test_what_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UnsupportedError, match="sepme\\[lpips\\]"):
        perceptual_distance()
    with pytest.raises(UsageError, match="goes together"):
        check_references(tmp_path, None)
    with pytest.raises(SystemFailure, match="no such folder"):
        check_references(tmp_path / "missing", "model")
    with pytest.raises(UnsupportedError, match="hf download"):
        Measures.of(tmp_path, "nobody/no-such-model", "cpu", lpips=False)
    nothing = Measures.of(None, None, "cpu", lpips=False)
    assert nothing.compare(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)) is None


def of_columns() -> object:
    return lambda images: images.mean((1, 2))


def test_features_of_ones_own() -> None:
    found = load_features("tests.evaluation.test_distances:of_columns", "cpu")
    images = torch.rand(2, 3, 4, 4)
    assert found(images).dtype == torch.float64
    assert found(images).equal(images.mean((1, 2)).double())
    for spec, said in (("os:getcwd", "does not return features"), ("nonsense:x", "No module")):
        with pytest.raises(UsageError, match=said):
            load_features(spec, "cpu")

import pytest
import torch

from sepme_cli.erasure.subspace import Weighing, metric, row_space


def rows(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(
        count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def test_row_space_spans_the_rows_and_nothing_else() -> None:
    given = rows(3, 8, 0)
    given = torch.cat([given, given[:1] + given[1:2]])
    basis = row_space(given, 1e-9)
    assert basis.shape == (3, 8)
    torch.testing.assert_close(basis @ basis.T, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(given @ basis.T @ basis, given)


def test_row_space_leaves_out_what_carries_no_energy() -> None:
    strong, weak = torch.eye(2, 5, dtype=torch.float64)
    given = torch.stack([strong, 1e-3 * weak])
    assert len(row_space(given, 1e-2)) == 1
    assert len(row_space(given, 1e-4)) == 2


NONE = rows(0, 6, 9)
LAST = torch.eye(6, dtype=torch.float64)[5:]


def test_admissible_directions_see_neither_the_blank_nor_the_separable_rows() -> None:
    blank, separable = rows(3, 12, 1), rows(4, 12, 11)
    found = metric(rows(5, 12, 2), blank, separable, rows(6, 12, 3), Weighing(tolerance=1e-9))
    assert found.null.shape == (5, 12)
    for kept in (blank, separable):
        assert (kept @ found.null.T).abs().max() < 1e-12


def test_the_blank_is_exact_whatever_the_tolerance() -> None:
    blank = torch.cat([rows(1, 6, 1), 1e-5 * rows(1, 6, 2)])
    found = metric(rows(5, 6, 3), blank, NONE, NONE, Weighing(tolerance=0.5))
    assert (blank @ found.null.T).abs().max() < 1e-15


def test_what_the_tolerance_lets_through_is_dear() -> None:
    separable = torch.diag(torch.tensor([1.0, 1e-3, 0, 0, 0, 0], dtype=torch.float64))[:2]
    found = metric(rows(5, 6, 4), LAST, separable, NONE, Weighing(tolerance=0.1, insistence=1e8))
    cost = found.of(torch.eye(6, dtype=torch.float64)[1:3])
    assert cost[0, 0] > 1000 * cost[1, 1] > 0


def test_protected_directions_cost_more() -> None:
    protected = torch.eye(6, dtype=torch.float64)[:1]
    found = metric(rows(5, 6, 4), LAST, NONE, protected, Weighing())
    cost = found.of(torch.eye(6, dtype=torch.float64)[:2])
    assert cost[0, 0] > 1000 * cost[1, 1] > 0


def test_no_direction_is_left_when_the_blank_spans_everything() -> None:
    found = metric(rows(3, 6, 5), torch.eye(6, dtype=torch.float64), NONE, NONE, Weighing())
    assert found.null.shape == (0, 6)


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_the_ridge_is_relative_to_the_embeddings_scale(factor: float) -> None:
    concept = rows(5, 6, 7)
    one = metric(concept, LAST, NONE, NONE, Weighing()).cost
    other = metric(factor * concept, LAST, NONE, NONE, Weighing()).cost
    torch.testing.assert_close(other, factor**2 * one)

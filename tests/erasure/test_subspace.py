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


def test_admissible_directions_do_not_see_separable_rows() -> None:
    separable = rows(4, 12, 1)
    found = metric(rows(5, 12, 2), separable, rows(6, 12, 3), Weighing(tolerance=1e-9))
    assert found.null.shape == (8, 12)
    torch.testing.assert_close(separable @ found.null.T, torch.zeros(4, 8, dtype=torch.float64))


def test_protected_directions_cost_more() -> None:
    protected = torch.eye(6, dtype=torch.float64)[:1]
    found = metric(rows(5, 6, 4), torch.eye(6, dtype=torch.float64)[5:], protected, Weighing())
    cost = found.of(torch.eye(6, dtype=torch.float64)[:2])
    assert cost[0, 0] > 1000 * cost[1, 1] > 0


def test_no_direction_is_left_when_separable_rows_span_everything() -> None:
    found = metric(rows(3, 4, 5), torch.eye(4, dtype=torch.float64), rows(0, 4, 6), Weighing())
    assert found.null.shape == (0, 4)


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_the_ridge_is_relative_to_the_embeddings_scale(factor: float) -> None:
    concept, none = rows(5, 6, 7), rows(0, 6, 8)
    separable = torch.eye(6, dtype=torch.float64)[5:]
    one = metric(concept, separable, none, Weighing(insistence=0)).cost
    other = metric(factor * concept, separable, none, Weighing(insistence=0)).cost
    torch.testing.assert_close(other, factor**2 * one)

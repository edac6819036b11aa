import pytest
import torch

from sepme_cli.erasure.settings import CostWeights
from sepme_cli.erasure.subspace import Preservation, energy, row_space


def rows(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(
        count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def unit(*places: int, width: int = 6) -> torch.Tensor:
    return torch.eye(width, dtype=torch.float64)[list(places)]


NONE = energy(rows(0, 6, 9))


def test_row_space_spans_the_rows_and_nothing_else() -> None:
    given = rows(3, 8, 0)
    given = torch.cat([given, given[:1] + given[1:2]])
    basis = row_space(given)
    assert basis.shape == (3, 8)
    torch.testing.assert_close(basis @ basis.T, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(given @ basis.T @ basis, given)


def test_the_blank_is_out_of_reach_however_little_energy_it_has() -> None:
    blank = torch.cat([rows(1, 6, 1), 1e-5 * rows(1, 6, 2)])
    preservation = Preservation.of(blank, [rows(5, 6, 3)], NONE, CostWeights())
    assert preservation.null.shape == (4, 6)
    assert (blank @ preservation.null.T).abs().max() < 1e-12
    assert (blank @ preservation.solve(rows(3, 6, 4)).T).abs().max() < 1e-9


def test_solving_is_the_inverse_of_the_cost_where_it_may_act() -> None:
    preservation = Preservation.of(
        unit(5), [rows(5, 6, 4), rows(4, 6, 5)], energy(rows(2, 6, 6)), CostWeights()
    )
    given = rows(3, 6, 7)
    solved = preservation.solve(given)
    torch.testing.assert_close((solved @ preservation.cost)[:, :5], given[:, :5])
    assert not solved[:, 5].any()


@pytest.mark.parametrize(
    ("concepts", "protected"), [([unit(0)], NONE), ([1e-9 * unit(1)], energy(unit(0)))]
)
def test_what_must_stay_is_dear(concepts: list[torch.Tensor], protected: torch.Tensor) -> None:
    preservation = Preservation.of(unit(5), concepts, protected, CostWeights())
    cost = (preservation.cost.diagonal()[:2]).tolist()
    assert cost[0] > 1000 * cost[1] > 0


def test_no_direction_is_left_when_the_blank_spans_everything() -> None:
    preservation = Preservation.of(unit(*range(6)), [rows(3, 6, 5)], NONE, CostWeights())
    assert preservation.null.shape == (0, 6)
    assert preservation.taken == 6


def test_dimensions_are_taken_by_what_carries_energy() -> None:
    weak = 1e-3 * unit(1)
    preservation = Preservation.of(
        unit(5), [torch.cat([unit(0), weak])], energy(unit(2)), CostWeights(protection=300.0)
    )
    assert preservation.taken == 3


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_the_cost_is_relative_to_the_embeddings_scale(factor: float) -> None:
    concept = rows(5, 6, 7)
    one = Preservation.of(unit(5), [concept], NONE, CostWeights()).cost
    other = Preservation.of(unit(5), [factor * concept], NONE, CostWeights()).cost
    torch.testing.assert_close(other, factor**2 * one)

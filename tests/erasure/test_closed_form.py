import pytest
import torch

from sepme_cli.erasure.closed_form import reduce, solve
from sepme_cli.erasure.settings import CostWeights
from sepme_cli.erasure.subspace import Preservation, energy
from tests.erasure.test_subspace import rows


def operator_of(
    concept: torch.Tensor, anchor: torch.Tensor, preservation: Preservation, insistence: float
) -> torch.Tensor:
    left, right = solve(concept, anchor, preservation, insistence)
    return left @ right


def test_without_a_ridge_the_concept_is_mapped_exactly() -> None:
    concept, anchor, blank = rows(3, 16, 0), rows(3, 16, 1), rows(5, 16, 2)
    weights = CostWeights(ridge=1e-10, insistence=1.0, protection=0.0)
    operator = operator_of(
        concept, anchor, Preservation.of(blank, [concept], energy(blank), weights), 1.0
    )
    torch.testing.assert_close(concept + concept @ operator.T, anchor, rtol=1e-5, atol=1e-5)
    assert (blank @ operator.T).abs().max() < 1e-7


@pytest.mark.parametrize("insistence", [0.5, 1.0, 300.0])
def test_the_solution_is_the_minimum(insistence: float) -> None:
    """Of the concept's fit and what keeping the others costs, the concept not among them."""
    concept, anchor, other = rows(6, 8, 4), rows(6, 8, 5), rows(3, 8, 7)
    weights = CostWeights(insistence=insistence)
    preservation = Preservation.of(rows(2, 8, 6), [concept, other], energy(rows(4, 8, 8)), weights)
    operator = operator_of(concept, anchor, preservation, insistence)
    cost = preservation.cost - insistence * energy(concept)

    def objective(t: torch.Tensor) -> torch.Tensor:
        fit = (concept @ t.T - (anchor - concept)).pow(2).sum() / len(concept)
        return fit + torch.trace(t @ cost @ t.T)

    best = objective(operator)
    inside = preservation.null.T @ preservation.null
    torch.testing.assert_close(operator @ inside, operator)
    for seed in range(20):
        assert objective(operator + 1e-3 * rows(8, 8, seed) @ inside) > best


def test_further_rows_are_not_taken_for_what_the_cost_counts() -> None:
    concept, anchor, more = rows(4, 8, 4), rows(6, 8, 5), rows(2, 8, 7)
    weights = CostWeights(insistence=3.0)
    preservation = Preservation.of(rows(2, 8, 6), [concept], energy(rows(4, 8, 8)), weights)
    both = torch.cat([concept, more])
    left, right = solve(both, anchor, preservation, 3.0, len(concept))
    cost = preservation.cost - 3.0 * energy(concept)

    def objective(t: torch.Tensor) -> torch.Tensor:
        fit = (both @ t.T - (anchor - both)).pow(2).sum() / len(concept)
        return fit + torch.trace(t @ cost @ t.T)

    inside = preservation.null.T @ preservation.null
    for seed in range(20):
        assert objective(left @ right + 1e-3 * rows(8, 8, seed) @ inside) > objective(left @ right)
    whole = (
        solve(concept, anchor[:4], preservation, 3.0),
        solve(concept, anchor[:4], preservation, 3.0, 4),
    )
    for one, other in zip(*whole, strict=True):
        torch.testing.assert_close(one, other)


def test_others_are_left_alone_the_more_the_dearer_they_are() -> None:
    concept, anchor, other = rows(4, 12, 1), rows(4, 12, 2), rows(3, 12, 3)
    leaks = []
    for insistence in (1.0, 100.0, 10000.0):
        preservation = Preservation.of(
            rows(1, 12, 4),
            [concept, other],
            energy(rows(0, 12, 5)),
            CostWeights(insistence=insistence),
        )
        leaks.append(
            float((other @ operator_of(concept, anchor, preservation, insistence).T).norm())
        )
    assert leaks[0] > 10 * leaks[1] > 100 * leaks[2]


def test_reducing_to_full_rank_changes_nothing_and_keeps_the_basis_admissible() -> None:
    concept, anchor, blank = rows(4, 10, 8), rows(4, 10, 9), rows(3, 10, 10)
    preservation = Preservation.of(blank, [concept], energy(rows(0, 10, 11)), CostWeights())
    left, right = solve(concept, anchor, preservation, CostWeights().insistence)
    shift, basis = reduce(left, right, concept, 10)
    assert basis.shape == (4, 10)
    torch.testing.assert_close(basis @ basis.T, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(concept @ basis.T @ shift.T, concept @ right.T @ left.T)
    assert (basis @ blank.T).abs().max() < 1e-9


def test_a_lower_rank_keeps_the_best_part() -> None:
    concept, anchor = rows(9, 10, 12), rows(9, 10, 13)
    preservation = Preservation.of(
        rows(1, 10, 14), [concept], energy(rows(0, 10, 15)), CostWeights()
    )
    left, right = solve(concept, anchor, preservation, CostWeights().insistence)
    moved = concept @ right.T @ left.T
    shift, basis = reduce(left, right, concept, 3)
    assert shift.shape == (10, 3)
    lost = (moved - concept @ basis.T @ shift.T).pow(2).sum()
    best = torch.linalg.svdvals(moved)[3:].pow(2).sum()  # Eckart and Young
    torch.testing.assert_close(lost, best)

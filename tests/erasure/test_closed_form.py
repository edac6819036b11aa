import torch

from sepme_cli.erasure.closed_form import reduce, solve
from sepme_cli.erasure.subspace import Weighing, metric
from tests.erasure.test_subspace import rows

NEARLY_FREE = Weighing(tolerance=1e-9, ridge=1e-12, insistence=0)


def test_without_a_ridge_the_concept_is_mapped_exactly() -> None:
    concept, instead, separable = rows(3, 16, 0), rows(3, 16, 1), rows(5, 16, 2)
    cost = metric(concept, separable, rows(0, 16, 3), rows(0, 16, 3), NEARLY_FREE)
    operator = solve(concept, instead, cost)
    torch.testing.assert_close(concept + concept @ operator.T, instead, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        separable @ operator.T, torch.zeros(5, 16, dtype=torch.float64), rtol=0, atol=1e-9
    )


def test_the_solution_is_the_minimum() -> None:
    concept, instead = rows(6, 8, 4), rows(6, 8, 5)
    cost = metric(concept, rows(2, 8, 6), rows(0, 8, 6), rows(4, 8, 7), Weighing())
    operator = solve(concept, instead, cost)

    def objective(t: torch.Tensor) -> torch.Tensor:
        fit = (concept @ t.T - (instead - concept)).pow(2).sum() / len(concept)
        return fit + torch.trace(t @ cost.null.T @ cost.cost @ cost.null @ t.T)

    best = objective(operator)
    inside = cost.null.T @ cost.null
    for seed in range(20):
        assert objective(operator + 1e-3 * rows(8, 8, seed) @ inside) > best


def test_reducing_to_full_rank_changes_nothing_and_keeps_the_basis_admissible() -> None:
    concept, instead, separable = rows(4, 10, 8), rows(4, 10, 9), rows(3, 10, 10)
    cost = metric(concept, separable, rows(0, 10, 11), rows(0, 10, 11), Weighing())
    operator = solve(concept, instead, cost)
    shift, basis = reduce(operator, concept, 10)
    assert basis.shape == (4, 10)
    torch.testing.assert_close(basis @ basis.T, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(concept @ basis.T @ shift.T, concept @ operator.T)
    assert (basis @ separable.T).abs().max() < 1e-9


def test_a_lower_rank_keeps_the_best_part() -> None:
    concept, instead = rows(9, 10, 12), rows(9, 10, 13)
    cost = metric(concept, rows(1, 10, 14), rows(0, 10, 15), rows(0, 10, 15), Weighing())
    operator = solve(concept, instead, cost)
    moved = concept @ operator.T
    shift, basis = reduce(operator, concept, 3)
    assert shift.shape == (10, 3)
    lost = (moved - concept @ basis.T @ shift.T).pow(2).sum()
    best = torch.linalg.svdvals(moved)[3:].pow(2).sum()  # Eckart and Young
    torch.testing.assert_close(lost, best)

import pytest
import torch

from sepme_cli.erasure.reachability import Grams, derived, reachability
from tests.erasure.test_subspace import rows

LAYERS = [rows(9, 6, seed) for seed in range(3)]
SHIFT, BASIS = 0.5 * rows(2, 6, 10).T, torch.linalg.qr(rows(2, 6, 11).T)[0].T
CONCEPT, ANCHOR = rows(4, 6, 12), rows(4, 6, 13)


def edited(weight: torch.Tensor) -> torch.Tensor:
    return weight + weight @ SHIFT @ BASIS


def test_an_operator_is_the_same_change_of_every_layer() -> None:
    gram = sum(w.T @ w for w in LAYERS)
    assert isinstance(gram, torch.Tensor)
    found = Grams.of_operator(gram, SHIFT, BASIS)
    told = Grams.of((w, edited(w)) for w in LAYERS)
    for one, other in ((found.before, told.before), (found.across, told.across)):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(found.after, told.after)


def test_derived_embeddings_reach_the_erased_keys_and_values_best() -> None:
    grams = Grams.of((w, edited(w)) for w in LAYERS)
    best, price = derived(CONCEPT, grams, 0.2), 0.2 * grams.before.trace() / 6

    def objective(c: torch.Tensor) -> torch.Tensor:
        missed = sum((c @ edited(w).T - CONCEPT @ w.T).pow(2).sum() for w in LAYERS)
        return missed + price * c.pow(2).sum()

    for seed in range(20):
        assert objective(best + 1e-3 * rows(4, 6, seed)) > objective(best)


def test_reachability_is_the_share_of_the_way_that_is_left() -> None:
    grams = Grams.of((w, edited(w)) for w in LAYERS)
    c = derived(CONCEPT, grams)
    missed = sum((c @ edited(w).T - CONCEPT @ w.T).pow(2).sum() for w in LAYERS)
    whole = sum(((ANCHOR - CONCEPT) @ w.T).pow(2).sum() for w in LAYERS)
    assert reachability(CONCEPT, ANCHOR, grams) == pytest.approx(float(missed / whole))


def test_original_weights_reach_all_and_those_without_a_direction_nothing_of_it() -> None:
    same = Grams.of((w, w) for w in LAYERS)
    assert reachability(CONCEPT, ANCHOR, same, 1e-9) < 1e-6
    # A low rank can be undone by a large embedding, unless a direction is gone.
    whole = torch.eye(6, dtype=torch.float64)
    gone = whole.clone()
    gone[0, 0] = 0
    concept, anchor = 2 * whole[:1], whole[1:2] - whole[1:2]
    assert reachability(concept, anchor, Grams.of([(whole, gone)]), 1e-9) == pytest.approx(1)
    assert reachability(whole[2:3], anchor, Grams.of([(whole, gone)]), 1e-9) < 1e-6
    hardly = gone.clone()
    hardly[0, 0] = 0.01
    assert reachability(concept, anchor, Grams.of([(whole, hardly)]), 1e-9) < 0.01
    assert reachability(concept, anchor, Grams.of([(whole, hardly)]), 0.1) > 0.9


def test_an_anchor_with_the_same_keys_and_values_leaves_nothing_to_reach() -> None:
    assert reachability(CONCEPT, CONCEPT, Grams.of((w, w) for w in LAYERS)) == 0

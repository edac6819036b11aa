from dataclasses import replace

import numpy as np
import pytest
import torch

from patch_spec.grid import GRID
from sepme_cli.erasure.concept import EmbeddingPairs
from sepme_cli.erasure.increment import (
    Admissible,
    LeakageProbes,
    additive_factors,
    admissible,
    operator_factors,
)
from sepme_cli.erasure.settings import Settings
from sepme_cli.erasure.subspace import CostWeights, Preservation, energy
from sepme_cli.errors import RefusedError
from tests.erasure.test_subspace import rows, unit

SETTINGS = Settings(rank=3, insistence=2.0, erase_scale=1.5)
PAIRS = EmbeddingPairs(rows(5, 12, 0), rows(5, 12, 1))
BLANK = rows(2, 12, 2)
GRAM = energy(rows(20, 12, 9))


def preservation_of(pairs: EmbeddingPairs, protected: torch.Tensor | None = None) -> Preservation:
    kept = energy(rows(3, 12, 3)) if protected is None else protected
    weights = CostWeights(SETTINGS.insistence, protection=1.0)
    return Preservation.of(BLANK, [pairs.concept], kept, weights)


def found(
    pairs: EmbeddingPairs = PAIRS,
    preservation: Preservation | None = None,
    *,
    alone: bool = True,
) -> Admissible:
    return admissible(
        "ink", pairs, preservation or preservation_of(pairs), SETTINGS, GRAM, alone=alone
    )


def test_a_basis_is_orthonormal_on_the_grid_and_leaves_the_blank_alone() -> None:
    basis = found().basis
    assert basis.shape == (3, 12)
    assert basis.dtype == torch.float64
    torch.testing.assert_close(basis @ basis.T, torch.eye(3).double(), rtol=0, atol=1e-5)
    assert torch.equal((basis / GRID).round(), basis / GRID)
    assert float((BLANK @ basis.T).abs().max()) < 1e-5


def test_erasing_what_restores_a_concept_leaves_less_to_reach() -> None:
    """And costs some of its separability; nothing is measured where nothing was asked."""
    free = replace(SETTINGS, rank=12)
    assert found().reachability is None
    one, two = (
        admissible("ink", PAIRS, preservation_of(PAIRS), asked, GRAM, alone=True)
        for asked in (
            replace(free, robust="phrasings"),
            replace(free, robust="embeddings", robust_rounds=3),
        )
    )
    assert one.reachability is not None and two.reachability is not None
    assert two.reachability > one.reachability
    assert two.separability < one.separability


def test_separability_is_the_share_of_the_way_that_is_covered() -> None:
    space = found()
    way = PAIRS.anchor - PAIRS.concept
    covered = PAIRS.concept @ space.basis.T @ (space.shift / SETTINGS.erase_scale).T
    left = (covered - way).pow(2).sum() / way.pow(2).sum()
    assert space.separability == pytest.approx(1 - float(left))
    assert 0.1 < space.separability < 1


def test_the_cost_is_that_of_everything_but_the_concept() -> None:
    preservation, space = preservation_of(PAIRS), found()
    others = preservation.cost - SETTINGS.insistence * energy(PAIRS.concept)
    torch.testing.assert_close(space.cost, space.basis @ others @ space.basis.T)


def test_more_is_moved_in_proportion() -> None:
    plain = admissible(
        "ink", PAIRS, preservation_of(PAIRS), replace(SETTINGS, erase_scale=1.0), GRAM, alone=True
    )
    torch.testing.assert_close(found().shift, 1.5 * plain.shift)
    assert found().separability == plain.separability


def test_what_lies_in_what_must_stay_is_refused_unless_others_can_go() -> None:
    preservation = preservation_of(PAIRS, 1e6 * energy(PAIRS.concept))
    with pytest.raises(RefusedError, match="'ink' cannot be separated") as caught:
        found(preservation=preservation)
    assert caught.value.expected == "separability of at least 0.1"
    among_others = found(preservation=preservation, alone=False)
    assert float(str(caught.value.found)) == pytest.approx(among_others.separability, abs=1e-3)
    assert among_others.separability < 0.1


@pytest.mark.parametrize(
    ("pairs", "blank"),
    [(PAIRS, unit(*range(12), width=12)), (replace(PAIRS, anchor=PAIRS.concept), BLANK)],
    ids=["no direction is free", "it acts like what it should already"],
)
@pytest.mark.parametrize("alone", [True, False])
def test_where_there_is_nothing_to_do_is_refused(
    pairs: EmbeddingPairs, blank: torch.Tensor, alone: bool
) -> None:
    preservation = Preservation.of(blank, [pairs.concept], energy(rows(0, 12, 0)), CostWeights())
    with pytest.raises(RefusedError, match="nothing is left") as caught:
        found(pairs, preservation, alone=alone)
    assert caught.value.found == "0.000"


def test_leakage_is_the_largest_relative_change_of_a_prompts_keys_and_values() -> None:
    states = torch.stack([rows(4, 6, seed) for seed in range(3)])
    weights, factors, basis = (
        [rows(5, 6, 7), rows(3, 6, 8)],
        [rows(5, 2, 9), rows(3, 2, 10)],
        rows(2, 6, 11),
    )
    probes = LeakageProbes.of("abc", states, sum(w.T @ w for w in weights))  # type: ignore[arg-type]
    inner = sum(f.T @ f for f in factors)
    moved = torch.cat([states @ (f @ basis).T for f in factors], 2).norm(dim=(1, 2))
    whole = torch.cat([states @ w.T for w in weights], 2).norm(dim=(1, 2))
    ratios = dict(zip("abc", (moved / whole).tolist(), strict=True))
    worst, second, _ = sorted(ratios, key=lambda prompt: -ratios[prompt])
    leakage = probes.leakage
    assert leakage(basis, inner) == pytest.approx(ratios[worst], rel=1e-4)  # type: ignore[arg-type]
    assert leakage(basis, inner, worst) == pytest.approx(ratios[second], rel=1e-4)  # type: ignore[arg-type]
    assert leakage(basis, inner, "abc") == 0.0  # type: ignore[arg-type]
    assert leakage(basis, 0 * inner) == 0.0  # type: ignore[arg-type]


def test_factors_are_kept_within_the_formats_precision() -> None:
    ups = {"one": 3 * rows(4, 2, 1), "two": 0.01 * rows(5, 2, 2)}
    kept, exponents = additive_factors(ups)
    assert kept.keys() == exponents.keys() == ups.keys()
    for name, up in ups.items():
        assert kept[name].dtype == np.float16
        again = np.ldexp(kept[name].astype(float), exponents[name])
        np.testing.assert_allclose(again, up.numpy(), rtol=1e-3, atol=1e-3 * float(up.abs().max()))
    shift = 5 * rows(6, 2, 3)
    steps, exponent = operator_factors(shift)
    assert steps.dtype == np.float32
    np.testing.assert_allclose(np.ldexp(steps.astype(float), exponent), shift.numpy(), atol=1e-5)

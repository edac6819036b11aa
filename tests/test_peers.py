"""Each closed form among the peers is the minimum that its paper asks for."""

import torch
from torch import Tensor

from benchmarks.choice import Choice, figures
from benchmarks.peers.interface import identity
from benchmarks.peers.least_squares import least_squares
from benchmarks.peers.sepme_paper import null_space as sepme_null_space
from benchmarks.peers.speed import null_space, solve
from examples.emoji.judging import OBJECT_NAMES, STYLE_NAMES, Caption, Verdict
from tests.erasure.test_subspace import rows


def weight(seed: int) -> Tensor:
    return rows(5, 12, seed)


def test_uce_and_mace_satisfy_their_normal_equations() -> None:
    concept, instead, kept, w = rows(4, 12, 0), rows(4, 12, 1), rows(6, 12, 2), weight(3)
    edited = w @ least_squares(concept, instead, kept, erase=2.0, keep=3.0, ridge=0.5)
    gradient = 2.0 * (edited @ concept.T - w @ instead.T) @ concept
    gradient += 3.0 * (edited - w) @ kept.T @ kept + 0.5 * (edited - w)
    torch.testing.assert_close(gradient, torch.zeros_like(w), rtol=0, atol=1e-9)


def test_without_preservation_the_name_is_retargeted_exactly() -> None:
    concept, instead, w = rows(4, 12, 4), rows(4, 12, 5), weight(6)
    none = concept[:0]
    edited = w @ least_squares(concept, instead, none, erase=1.0, keep=0.0, ridge=1e-9)
    torch.testing.assert_close(edited @ concept.T, w @ instead.T, rtol=1e-5, atol=1e-5)


def test_speed_minimises_under_its_constraints() -> None:
    concept, instead, retained = rows(3, 12, 7), rows(3, 12, 8), rows(4, 12, 9)
    invariant, w = rows(2, 12, 10), weight(11)
    projector = null_space(retained, 1e-9)
    change = w @ solve(concept, instead, projector, invariant)
    nothing = torch.zeros(5, 4, dtype=torch.float64)
    torch.testing.assert_close(change @ retained.T, nothing, rtol=0, atol=1e-9)
    torch.testing.assert_close(change @ invariant.T, nothing[:, :2], rtol=0, atol=1e-9)
    # What the objective still asks for lies where the constraints forbid it.
    gradient = ((w + change) @ concept.T - w @ instead.T) @ concept + change
    taken = torch.cat([retained, invariant])
    allowed = identity(12) - torch.linalg.pinv(taken) @ taken
    torch.testing.assert_close(gradient @ allowed, torch.zeros_like(w), rtol=0, atol=1e-9)


def test_sepme_as_published_takes_every_direction_of_the_null_space() -> None:
    constrained = rows(5, 12, 12)
    free = sepme_null_space(constrained)
    assert free.shape == (7, 12)
    assert (free @ constrained.T).abs().max() < 1e-9


def test_figures_tell_erased_kept_and_beside_apart() -> None:
    def caption(style: str, obj: str) -> Caption:
        return Caption("", STYLE_NAMES.index(style), OBJECT_NAMES.index(obj))

    captions = [caption("ink", "cat"), caption("ink", "dog"), caption("noto", "dog")]
    judged = Verdict(torch.tensor([True, False, True]), torch.tensor([False, True, True]))
    assert figures(judged, captions, ["ink"]) == {
        "erased": [1, 2],
        "same": [1, 1],
        "beside": [1, 2],
        "other": [2, 3],
    }
    assert figures(judged, captions, ["ink", "cat"]) == {
        "erased": [1, 3],
        "same": [2, 2],
        "beside": [1, 1],
        "other": [1, 1],
    }


def test_a_choice_is_fixed_and_fills_up_with_other_seeds() -> None:
    choice = Choice(erased=20, kept=30, unseen=12)
    captions, rounds = choice.asked(["cat"])
    assert (captions, rounds) == choice.asked(["cat"])
    named = [(c.style, r) for c, r in zip(captions, rounds, strict=True) if c.names("cat")]
    assert len(named) == len(set(named)) == 20
    assert len(captions) == 50
    assert all(c.names("cat") for c in choice.unseen_of(["cat"]))

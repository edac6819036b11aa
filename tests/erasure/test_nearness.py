from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sepme_cli.erasure.drag import drag
from sepme_cli.erasure.increment import Admissible
from sepme_cli.erasure.nearness import Nearness, holds
from tests.erasure.test_subspace import rows


@pytest.mark.parametrize(
    ("whole", "part"),
    [
        ("Claude Monet", "Monet"),
        ("cats", "cat"),
        ("cat", "cats"),
        ("boxes", "box"),
        ("ponies", "pony"),
        ("horses", "horse"),
        ("a Cat", "the cat"),
        ("the art of Van Gogh", "van gogh"),
    ],
)
def test_names_that_hold_another(whole: str, part: str) -> None:
    assert holds(whole, part)


@pytest.mark.parametrize(
    ("whole", "part"),
    [
        ("Monet", "Claude Monet"),
        ("catalogue", "cat"),
        ("Van Dyck", "Van Gogh"),
        ("glass", "gla"),
        ("Gogh van", "van Gogh"),
        ("cat", "the"),
    ],
)
def test_names_that_do_not(whole: str, part: str) -> None:
    assert not holds(whole, part)


class Given:
    """Embeddings of words, as they are given."""

    def __init__(self, **ends: list[float]) -> None:
        self.known = ends

    def ends(self, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([self.known[prompt] for prompt in prompts])


def test_what_all_words_have_in_common_brings_none_together() -> None:
    encoder = Given(a=[9, 1, 0], b=[9, 1, 0.1], c=[9, 0, 1], d=[9, -1, 0], word=[9, 0, 0])
    nearness = Nearness.of(encoder, ["a", "b", "c", "d"], ["word"])
    assert nearness.same("a", "b")
    assert not nearness.same("a", "c")
    assert nearness.between("a", "d") == pytest.approx(-1)
    assert nearness.nearest(["a"], ["d", "c", "b"]) == ["b", "c", "d"]
    assert nearness.nearest(["a", "d"], ["c", "b"]) == ["b", "c"]


def test_drag_is_the_relative_change_of_keys_and_values() -> None:
    ends, layers = rows(4, 6, 0).float(), [rows(5, 6, 1), rows(3, 6, 2)]
    spaces = [
        Admissible(rows(6, 2, seed), rows(2, 6, seed + 1), torch.eye(2), 1.0) for seed in (3, 5)
    ]
    found = drag(spaces, ends, layers)
    for space, row in zip(spaces, found, strict=True):
        operator = space.shift @ space.basis
        change = torch.cat([w @ operator @ ends.double().T for w in layers])
        whole = torch.cat([w @ ends.double().T for w in layers])
        torch.testing.assert_close(row, change.norm(dim=0) / whole.norm(dim=0), rtol=1e-4, atol=0)
    assert drag(spaces, ends[:0], layers).shape == (2, 0)

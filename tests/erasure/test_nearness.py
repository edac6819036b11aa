from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sepme_cli.erasure.nearness import Nearness, holds


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


def nearness_of(encoder: Given, words: Sequence[str], vocabulary: Sequence[str]) -> Nearness:
    return Nearness.of(encoder, words, vocabulary, encoder.ends(vocabulary))


def test_what_all_words_have_in_common_brings_none_together() -> None:
    encoder = Given(
        a=[9, 1, 0], b=[9, 1, 0.1], c=[9, 0, 1], d=[9, -1, 0], left=[9, 0, 2], right=[9, 0, -2]
    )
    nearness = nearness_of(encoder, ["a", "b", "c", "d"], ["left", "right"])
    assert nearness.between("a", "b") > 0.99
    assert nearness.between("a", "c") == pytest.approx(0, abs=1e-6)
    assert nearness.between("a", "d") == pytest.approx(-1)
    assert nearness.nearest(["a"], ["d", "c", "b"]) == ["b", "c", "d"]
    assert nearness.nearest(["a", "d"], ["c", "b"]) == ["b", "c"]


def test_two_words_are_the_same_if_most_words_are_not_as_near_to_any() -> None:
    generator = torch.Generator().manual_seed(0)
    apart = {f"w{i}": torch.randn(40, generator=generator) for i in range(60)}
    close = {
        f"{word}!": end + 0.3 * torch.randn(40, generator=generator)
        for word, end in list(apart.items())[:3]
    }
    encoder = Given(**{word: end.tolist() for word, end in {**apart, **close}.items()})
    nearness = nearness_of(encoder, [*close], [*apart])
    assert nearness.alike(["w0", "w1"], ["w0!"]) == {("w0", "w0!")}
    # The same encoder with everything twice as near to everything: no more words are the same.
    shrunk = {
        w: (e + 0.5 * torch.ones(40) * (i % 2)).tolist()
        for i, (w, e) in enumerate({**apart, **close}.items())
    }
    again = nearness_of(Given(**shrunk), [*close], [*apart])
    assert again.alike(["w0", "w1"], ["w0!"]) == {("w0", "w0!")}


def test_a_word_is_of_the_kind_of_those_that_are_like_it() -> None:
    generator = torch.Generator().manual_seed(1)
    ends = {
        f"{name}{i}": [side, *torch.randn(2, generator=generator).tolist()]
        for name, side in (("style", 1.0), ("object", -1.0))
        for i in range(60)
    }
    encoder = Given(**ends, a=[3.0, 0.5, 0], b=[-3.0, 0, 0.5])
    styles, objects = ([w for w in ends if w.startswith(name)] for name in ("style", "object"))
    nearness = nearness_of(encoder, ["a", "b"], [*ends])
    found = nearness.kinds([["a"], ["b"], ["a", "b"]], styles, objects)
    assert found == ["style", "object", "any"]


def test_kinds_are_those_of_a_ridge_regression() -> None:
    """Written out as least squares, each kind weighing half; "any" below a tenth."""
    generator = torch.Generator().manual_seed(2)

    def some(name: str, side: float, count: int) -> dict[str, list[float]]:
        rows = torch.randn(count, 5, generator=generator) + side * torch.eye(5)[0]
        return {f"{name}{i}": row.tolist() for i, row in enumerate(rows)}

    styles, objects, others = some("style", 1, 40), some("object", -1, 8), some("w", 0, 100)
    encoder = Given(**styles, **objects, **others)
    nearness = nearness_of(encoder, [*others], [*styles, *objects])
    ends = encoder.ends([*styles, *objects, *others]).double()
    rows = torch.nn.functional.normalize(ends - ends[:48].mean(0))
    weights = torch.tensor([0.5 / 40] * 40 + [0.5 / 8] * 8).double()
    mean = weights @ rows[:48]
    left = weights.sqrt()[:, None] * (rows[:48] - mean)
    right = weights.sqrt() * torch.tensor([1.0] * 40 + [-1.0] * 8).double()
    ridge = 0.3 * left.pow(2).sum() / 5
    left = torch.cat([left, ridge.sqrt() * torch.eye(5)])
    normal = torch.linalg.lstsq(left, torch.cat([right, torch.zeros(5).double()])[:, None])
    scores = ((rows[48:] - mean) @ normal.solution).flatten().tolist()
    expected = ["any" if abs(s) < 0.1 else "style" if s > 0 else "object" for s in scores]
    assert nearness.kinds([[word] for word in others], [*styles], [*objects]) == expected
    assert set(expected) == {"any", "style", "object"}


def test_names_that_hold_another_are_alike_however_far_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    words = ["R&B", "Claude Monet", "R", "Monets", "owl", *(f"w{i}" for i in range(60))]
    encoder = Given(**{w: torch.randn(40, generator=generator).tolist() for w in words})
    nearness = nearness_of(encoder, [], words)
    names, others = ["R&B", "Monets"], ["Claude Monet", "R", "owl"]
    assert nearness.alike(names, others) == {("R&B", "R"), ("Monets", "Claude Monet")}

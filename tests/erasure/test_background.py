from collections.abc import Sequence
from hashlib import sha256
from itertools import combinations

import pytest
import torch
from torch import Tensor

from sepme_cli.erasure.background import _CAPTIONS as FORMS
from sepme_cli.erasure.background import Background, captions, is_held_out, steps
from sepme_cli.erasure.collateral import HeldOut
from sepme_cli.planning.vocabulary import caption_words, everything
from tests.erasure.test_subspace import rows

WIDTH, POSITIONS = 12, 10


class Hashed:
    """A causal encoder without weights: a token's state is a function of all ids up to it."""

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        ids = [[1, *[2 + sum(map(ord, w)) % 90 for w in p.split()][:7], 99] for p in prompts]
        return torch.tensor([row + [0] * (POSITIONS - len(row)) for row in ids])

    def encode(
        self, prompts: Sequence[str], positions: int | None = None, paddings: int | None = None
    ) -> Tensor:
        ids = self.tokens(prompts)[:, :positions]
        seen = ids.cumsum(1)[..., None] * torch.arange(1, WIDTH + 1)
        return torch.sin(seen.float())

    def ends(self, prompts: Sequence[str]) -> Tensor:
        ids = self.tokens(prompts)
        return self.encode(prompts)[torch.arange(len(ids)), ids.argmax(1)]


def test_the_sample_is_the_same_everywhere() -> None:
    sample = captions(caption_words())
    assert (len(sample.protected), len(sample.held_out)) == (1000, 300)
    assert sample == captions(caption_words())
    # Another sample makes other patches: raise VERSION with it.
    text = "\n".join([*sample.protected, *sample.held_out])
    assert sha256(text.encode()).hexdigest().startswith("3bce2e9a6d4b6b3f")


def test_what_is_measured_took_no_part() -> None:
    sample = captions(caption_words())
    assert not {*sample.protected} & {*sample.held_out}
    things = [word for word in caption_words().things if " " not in word]
    held_out = {word for word in things if is_held_out(word)}
    assert len(things) / 7 < len(held_out) < len(things) / 4
    in_forms = {word for form in FORMS for word in form.split()}
    spoken = [{*text.replace(",", "").split()} for text in sample.protected]
    assert not [words for words in spoken if words & (held_out - in_forms - in_styles())]


def in_styles() -> set[str]:
    """Words that are part of a style's name, or a plural of something else."""
    return {word for style in caption_words().styles for word in style.split()}


def test_a_background_is_the_mean_of_all_its_tokens() -> None:
    sample, words = captions(caption_words(), 30, 10), everything()[:20]
    told = []
    background = Background.of([Hashed()], sample, words, lambda: told.append(1))
    assert len(told) == steps(sample, words)
    everywhere = Hashed().encode(sample.protected).double()
    ids = Hashed().tokens(sample.protected)
    kept = [everywhere[i, : int(row.argmax()) + 3] for i, row in enumerate(ids)]
    distinct = torch.unique(torch.cat(kept), dim=0)
    assert background.moment.shape == (WIDTH, WIDTH)
    assert float(background.moment.trace()) == pytest.approx(
        float(distinct.pow(2).sum(1).mean()), rel=0.1
    )
    torch.testing.assert_close(background.ends, Hashed().ends(sample.held_out))
    torch.testing.assert_close(background.word_ends, Hashed().ends(words))


@pytest.fixture
def held_out() -> HeldOut:
    background = Background(
        torch.eye(6).double(),
        ("a cat", "two dogs", "a house", "trees"),
        rows(4, 6, 0).float(),
        ("cats", "dog", "kitten"),
        rows(3, 6, 1).float(),
    )
    weights = [rows(5, 6, 2), rows(3, 6, 3)]
    return HeldOut.of(background, sum(w.T @ w for w in weights))  # type: ignore[arg-type]


def test_collateral_is_the_relative_change_of_keys_and_values(held_out: HeldOut) -> None:
    weights, shift, basis = [rows(5, 6, 2), rows(3, 6, 3)], rows(6, 2, 4), rows(2, 6, 5)
    inner = sum((w @ shift).T @ (w @ shift) for w in weights)
    found = held_out.changes(basis, inner)  # type: ignore[arg-type]
    ends = torch.cat([held_out.background.ends, held_out.background.word_ends]).double()
    change = torch.cat([w @ shift @ basis @ ends.T for w in weights])
    whole = torch.cat([w @ ends.T for w in weights])
    expected = (change.norm(dim=0) / whole.norm(dim=0)).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_what_names_the_concept_is_left_out(held_out: HeldOut) -> None:
    basis, inner = rows(2, 6, 5), torch.eye(2).double()
    changes = held_out.changes(basis, inner)
    collateral = held_out.collateral(basis, inner, lambda text: "cat" in text)
    assert collateral.captions == 3
    assert collateral.median == pytest.approx(float(changes[1:4].median()))
    assert {word for word, _ in collateral.worst} == {"dog", "kitten"}
    ordered = [far for _, far in collateral.worst]
    assert all(a >= b for a, b in combinations(ordered, 2))

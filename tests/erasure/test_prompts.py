from collections.abc import Sequence

import torch

from sepme_cli.erasure.concept import Concept, Lexicon, Protected, describe
from sepme_cli.erasure.prompts import Phrase, pairs, phrases, renamed
from sepme_cli.erasure.words import Item


def test_every_phrase_names_the_concept_and_its_counterpart_does_not() -> None:
    for phrase in phrases("Monet", "any"):
        assert "Monet" in phrase.text
        assert "Monet" not in phrase.without


def test_articles_follow_the_word() -> None:
    texts = [phrase.text for phrase in phrases("owl", "object")]
    assert "a picture of an owl" in texts
    assert not [text for text in texts if "a owl" in text]


def test_companions_stand_beside_the_concept_in_turn() -> None:
    found = phrases("ink", "style", ("cat", "owl"))
    assert Phrase("cat in ink style", "cat") in found
    assert Phrase("an owl in ink style", "an owl") in found


def test_pairs_spread_over_both() -> None:
    found = pairs(["a1", "b1", "c1"], ["x", "y", "z", "w"], 6)
    assert len(set(found)) == 6
    assert len(pairs(["a1", "b1", "c1"], ["x", "y", "z"], 100)) == 9
    for word in ("a1", "b1", "c1", "x", "y", "z", "w"):
        assert any(word in prompt for prompt in found)


def test_protected_words_say_what_they_are() -> None:
    found = Protected.parse(["style:noto", "object:cat", "owl"], "object")
    assert found == Protected(("noto",), ("cat", "owl"))


def test_a_concept_acts_like_the_most_general_word_of_its_kind() -> None:
    concept = describe(Item("ink", "style"), Protected(("noto", "mono"), ("cat",)))
    by_text = dict(zip(concept.prompts, concept.answers, strict=True))
    assert concept.like == "art"
    assert by_text["cat in ink style"] == "cat in art style"
    assert by_text["a picture in the style of ink"] == "a picture in the style of art"
    assert describe(Item("ink", "object"), Protected()).like == "thing"
    assert describe(Item("ink"), Protected()).like == "art or thing"
    assert not any("noto" in answer for answer in concept.answers)


def test_a_concept_is_asked_for_under_all_of_its_names_and_prompts() -> None:
    item = Item("Monet", "style", ("Claude Monet",), ("Monet's garden",), like="noto")
    concept = describe(item, Protected((), ("cat",)))
    assert {"in Monet style", "in Claude Monet style", "cat in Claude Monet style"} < set(
        concept.prompts
    )
    assert concept.phrases[-1] == Phrase("Monet's garden", "garden")
    assert [answer for answer in concept.answers if "Claude" in answer] == []
    by_text = dict(zip(concept.prompts, concept.answers, strict=True))
    assert by_text["in Claude Monet style"] == by_text["in Monet style"] == "in noto style"
    assert by_text["Monet's garden"] == "noto's garden"


def test_what_a_concept_should_act_like_can_be_said() -> None:
    concept = describe(Item("ink", "any", like="owl"), Protected(("noto", "mono"), ("cat",)))
    by_text = dict(zip(concept.prompts, concept.answers, strict=True))
    assert concept.like == "owl"
    assert by_text["a picture of an ink"] == "a picture of an owl"
    assert by_text["cat in ink style"] == "cat in owl style"


def test_a_name_is_cut_out_with_the_word_that_it_is_part_of() -> None:
    assert renamed("a pond by Monet, at dawn", "Monet", "Dali") == (
        Phrase("a pond by Dali, at dawn", "a pond by , at dawn")
    )
    assert renamed("two cats on a cat bed", "cat", "owl") == (
        Phrase("two owls on an owl bed", "two on a bed")
    )
    assert renamed("C++ code", "C++", "Lisp") == Phrase("Lisp code", "code")
    assert renamed("the cat's", "cat", "cat") == Phrase("the cat's", "the")


class Letters:
    """A text encoder whose states are the numbers of the letters: of two words, [2, 1] or less."""

    def tokens(self, prompts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([[1, ord(prompt[-1]), 999] for prompt in prompts])

    def encode(
        self, prompts: Sequence[str], positions: int | None = None, paddings: int | None = None
    ) -> torch.Tensor:
        return self.tokens(prompts)[:, :positions, None].float()


def test_every_embedding_of_a_concept_has_its_answer() -> None:
    concept = Concept("a", ("a",), "style", (Phrase("a", ""),), "c", ("c",))
    wanted = Lexicon(Letters(), "ac").wanted(concept)
    assert wanted.concept.flatten().tolist() == [1, ord("a"), 999]
    assert wanted.instead.flatten().tolist() == [1, ord("c"), 999]

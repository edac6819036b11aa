from collections.abc import Sequence

import pytest
import torch

from sepme_cli.erasure.concept import Concept, Lexicon, Protected, describe, endings
from sepme_cli.erasure.prompts import (
    NEUTRAL,
    Kind,
    Phrase,
    kind_told,
    pairs,
    phrases,
    renamed,
)
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


@pytest.mark.parametrize("kind", ["style", "object"])
def test_a_kind_is_told_by_the_prompts_that_were_made_for_it(kind: Kind) -> None:
    prompts = [phrase.text for phrase in phrases("ink", kind)]
    assert kind_told("ink", prompts) == kind
    assert kind_told("ink", prompts[-1:]) == kind_told("owl", prompts) == "any"
    assert kind_told("ink", [phrase.text for phrase in phrases("ink", "any")]) == "any"
    assert kind_told("ink", ["ink"]) == kind_told("ink", []) == "any"


def test_a_few_phrases_are_the_first_of_either_kind() -> None:
    all_of_it = phrases("ink", "style", ("cat",))
    assert phrases("ink", "style", ("cat",), 3) == all_of_it[:3]
    assert all_of_it[:3] == (
        Phrase("ink", ""),
        Phrase("cat in ink style", "cat"),
        Phrase("ink style", "style"),
    )
    # The bare word stands for either kind.
    assert len(phrases("ink", "any", most=3)) == 2 * 3 - 1


def test_pairs_spread_over_both() -> None:
    found = [text for *_, text in pairs(["a1", "b1", "c1"], ["x", "y", "z", "w"], 6)]
    assert len(set(found)) == 6
    assert len(list(pairs(["a1", "b1", "c1"], ["x", "y", "z"], 100))) == 9
    for word in ("a1", "b1", "c1", "x", "y", "z", "w"):
        assert any(word in prompt for prompt in found)


def test_protected_words_say_what_they_are() -> None:
    found = Protected.parse(["style:noto", "object:cat", "owl"], "object")
    assert found == Protected(("noto",), ("cat", "owl"))


def test_protected_words_are_kept_once() -> None:
    found = Protected(("noto",), ("cat",)).beside(
        [("owl", "any"), ("noto", "style"), ("cat", "object")]
    )
    assert found == Protected(("noto", "owl"), ("cat", "owl"))
    assert found.words == ("noto", "owl", "cat")
    assert (found.of("style"), found.of("object")) == (found.styles, found.objects)


def test_protected_prompts_hold_every_word_alone_and_beside_others() -> None:
    protected = Protected(("noto", "mono"), ("cat", "dog"))
    prompts = protected.prompts()
    assert prompts[: len(NEUTRAL)] == NEUTRAL
    assert len(set(prompts)) == len(prompts)
    for word, kind, beside in (
        ("noto", "style", ("cat", "dog")),
        ("dog", "object", ("noto", "mono")),
    ):
        texts = {phrase.text for phrase in phrases(word, kind, beside)}  # type: ignore[arg-type]
        assert texts < set(prompts)
    together = {text for *_, text in pairs(protected.styles, protected.objects, 4)}
    assert together < set(prompts)
    # Four words share twenty prompts; and of many words each has three.
    own = set(protected.prompts(20)) - together - {*NEUTRAL}
    assert 4 * 4 <= len(own) <= 20
    many = Protected(tuple(f"style{i}" for i in range(30))).prompts(20)
    assert all(sum(f"style{i}" in text.split() for text in many) == 3 for i in range(30))


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
    """A text encoder of eight positions whose states are the numbers of the letters."""

    def __init__(self) -> None:
        self.asked: list[tuple[int | None, int | None]] = []

    def tokens(self, prompts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([[1, *map(ord, p), 999, *[0] * (6 - len(p))] for p in prompts])

    def encode(
        self, prompts: Sequence[str], positions: int | None = None, paddings: int | None = None
    ) -> torch.Tensor:
        self.asked.append((positions, paddings))
        return self.tokens(prompts)[:, :positions, None].float()


def test_every_embedding_of_a_concept_has_its_answer() -> None:
    concept = Concept("a", ("a",), "style", (Phrase("a", ""),), "c", ("c",))
    found = Lexicon([Letters()], "ac").embedding_pairs(concept)
    assert found.concept.flatten().tolist() == [0, 1, ord("a"), 999]
    assert found.anchor.flatten().tolist() == [0, 1, ord("c"), 999]


def test_embeddings_that_are_one_count_once_for_each_of_their_answers() -> None:
    concept = Concept(
        "a", ("a",), "any", tuple(Phrase(p, "") for p in ("a", "aa")), "c", ("c", "cd")
    )
    found = Lexicon([Letters()], ["a", "aa", "c", "cd"]).embedding_pairs(concept)
    pairs = torch.cat([found.concept, found.anchor], 1).tolist()
    assert pairs == [[0, 0], [1, 1], [97, 99], [97, 100], [999, 999]]


def test_a_row_has_the_weight_of_its_most_certain_prompt() -> None:
    """In the normal equations, with a mean of 1; a weight of all the same is none."""
    phrases_ = tuple(Phrase(p, "") for p in ("a", "b"))
    concept = Concept("a", ("a", "b"), "any", phrases_, "c", ("c", "c"), (1.0, 0.25))
    pairs = Lexicon([Letters()], ["a", "b", "c"]).embedding_pairs(concept)
    # Of b's rows only its letter is no row of a's.
    weights = torch.tensor([1, 1, 1, 0.25, 1], dtype=torch.float64) * 5 / 4.25
    asked = torch.tensor([0, 1, ord("a"), ord("b"), 999], dtype=torch.float64)
    answers = torch.tensor([0, 1, ord("c"), ord("c"), 999], dtype=torch.float64)
    torch.testing.assert_close(pairs.concept[:, 0] ** 2, weights * asked**2)
    torch.testing.assert_close(pairs.anchor[:, 0] ** 2, weights * answers**2)
    words = Lexicon([Letters()], ["a", "b"])
    squares = words.rows(["a", "b"], [0.5, 0.25])[:, 0] ** 2
    torch.testing.assert_close(squares, 2 * asked**2 * torch.tensor([1, 1, 1, 0.5, 1]) * 2.5 / 4.5)
    assert torch.equal(words.rows(["a", "b"], [0.5, 0.5]), words.rows(["a", "b"]))
    assert torch.equal(words.rows([], []), words.rows([]))


def test_a_prompt_matters_as_much_as_the_word_in_it_that_matters_least() -> None:
    kept = Protected(("noto", "mono"), ("cat", "dog"), {"dog": 0.5, "mono": 0.2}).beside(
        [("owl", "object")]
    )
    weights = kept.weighted_prompts()
    assert tuple(weights) == kept.prompts()
    assert weights[""] == weights["noto"] == weights["cat in noto style"] == 1
    assert weights["a dog"] == 0.5
    assert weights["in mono style"] == 0.2
    assert {w for text, w in weights.items() if "mono" in text} == {0.2}
    assert {w for text, w in weights.items() if "dog" in text and "mono" not in text} == {0.5}


def test_an_alias_has_its_weight_in_all_of_its_phrases() -> None:
    item = Item("cat", "object", ("kitten", "puss"), ("the cat's",), weights={"kitten": 0.9})
    concept = describe(item, Protected(("noto",)))
    told = dict(zip(concept.prompts, concept.weights, strict=True))
    assert told["a photo of a kitten"] == told["kitten in noto style"] == 0.9
    assert {w for text, w in told.items() if "kitten" not in text} == {1.0}


def test_an_attribute_of_one_thing_leaves_other_things_and_attributes_alone() -> None:
    item = Item("ink", "style", ("sumi",), ("a fat cat in ink",), erase_from="cat")
    concept = describe(item, Protected(("noto", "inks"), ("dog", "cats")))
    by_text = dict(zip(concept.prompts, concept.answers, strict=True))
    assert (concept.name, concept.like, concept.erase_from) == ("ink from cat", "cat", "cat")
    assert by_text["cat in ink style"] == by_text["cat in sumi style"] == "cat"
    assert by_text["a cat by ink"] == "a cat" == concept.answers[0].replace("cat", "a cat")
    assert by_text["a fat cat in ink"] == "a fat cat in"
    assert {"dog in ink style", "dog in sumi style", "cat in noto style", "a cat", "ink"} <= set(
        concept.kept
    )
    assert not set(concept.kept) & {*concept.prompts}
    assert not any("cats" in text or "inks" in text for text in concept.kept)
    assert len(concept.counterparts) == len(concept.prompts)
    together = dict(zip(concept.prompts, concept.counterparts, strict=True))
    assert together["cat in sumi style"] == ("dog in sumi style", "cat in noto style")
    assert together["a fat cat in ink"] == ("a fat dog in ink", "a fat cat in noto")
    assert concept.asked_for_in("Cats, inks") and not concept.asked_for_in("a dog in ink")
    other = describe(Item("ink", "style", like="noto", erase_from="cat"), Protected())
    assert dict(zip(other.prompts, other.answers, strict=True))["ink cat"] == "noto cat"
    assert other.like == "noto cat"
    assert (
        "a photo of a red apple"
        in describe(Item("red", "object", erase_from="apple"), Protected()).prompts
    )


class Reader(Letters):
    """Whose states have read what comes before them: they are sums of letters."""

    def encode(
        self, prompts: Sequence[str], positions: int | None = None, paddings: int | None = None
    ) -> torch.Tensor:
        return super().encode(prompts, positions, paddings).cumsum(1)


def test_an_attribute_goes_where_both_words_are_read() -> None:
    """What comes before one of them is any other thing's, or any other attribute's."""
    concept = Concept(
        "r from a", ("r",), "style", (Phrase("xr a", ""),), "a", ("x a",), (1.0,), "a",
        (("xr !", "x! a"),),
    )  # fmt: skip
    lexicon = Lexicon([Reader()], ["xr a", "x a", "xr !", "x! a"])
    found = lexicon.embedding_pairs(concept).concept.flatten() / 3**0.5
    whole = lexicon.states(["xr a"]).flatten().double()
    # Not the start, x, r, and the space; the letter a, the end, and padding.
    assert sorted(found.tolist()) == pytest.approx(sorted(set(whole[4:].tolist())))


def test_of_more_phrasings_the_end_alone_counts() -> None:
    concept = describe(Item("ink", "style", ("sumi",), weights={"sumi": 0.5}), Protected())
    more = endings(Item("ink", "style", ("sumi",), like="noto", weights={"sumi": 0.5}))
    told = {asked: (answer, weight) for asked, answer, weight in more}
    assert told["inspired by ink"] == ("inspired by noto", 1.0)
    assert told["inspired by sumi"] == ("inspired by noto", 0.5)
    assert not set(told) & set(concept.prompts)
    assert endings(Item("ink", "style", erase_from="cat")) == ()
    pairs = Lexicon([Reader()], ["a", "c", "ab", "cb"]).embedding_pairs(
        Concept("a", ("a",), "any", (Phrase("a", ""),), "c", ("c",), endings=(("ab", "cb", 1.0),))
    )
    ends = (ord("a") + ord("b") + 1000, ord("c") + ord("b") + 1000)
    found = torch.cat([pairs.concept, pairs.anchor], 1).tolist()
    assert list(map(float, ends)) in found
    assert [float(ord("a") + ord("b") + 1), float(ord("c") + ord("b") + 1)] not in found


def test_two_encoders_have_rows_of_their_own() -> None:
    """Each answers its own tokens; what is read of both is one set of rows."""
    concept = Concept("a", ("a",), "any", (Phrase("a", ""),), "c", ("cd",))
    found = Lexicon([Letters(), Letters()], ["a", "cd"])
    assert found.states(["a"]).shape == (1, 12, 1)
    assert found.rows(["a"]).flatten().tolist() == [0, 1, 97, 999]
    pairs = found.embedding_pairs(concept)
    one = Lexicon([Letters()], ["a", "cd"]).embedding_pairs(concept)
    assert torch.equal(pairs.concept, one.concept) and torch.equal(pairs.anchor, one.anchor)


def test_a_lexicon_has_the_longest_text_and_a_little_padding() -> None:
    encoder = Letters()
    words = Lexicon([encoder], ["a", "abc", "a"])
    # Start, three letters, end, two of padding.
    assert encoder.asked == [(7, 2)]
    assert words.states(["a", "abc"]).shape == (2, 7, 1)
    assert words.rows(["a"]).flatten().tolist() == [0, 1, 97, 999]
    assert words.rows(["a"]).dtype == torch.float64
    full = Letters()
    Lexicon([full], ["abcdef"])
    assert full.asked == [(8, 2)]

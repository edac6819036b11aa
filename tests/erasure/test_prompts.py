from sepme_cli.erasure.concept import Protected, describe
from sepme_cli.erasure.prompts import Phrase, pairs, phrases


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


def test_protected_words_of_the_same_kind_are_siblings() -> None:
    concept = describe("ink", "style", Protected(("noto", "mono"), ("cat",)))
    assert len(concept.siblings) == 2
    for sibling in concept.siblings:
        assert len(sibling) == len(concept.phrases)
    assert "cat in ink style" in concept.prompts
    assert concept.siblings[0][0].text == "noto"

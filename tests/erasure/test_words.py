"""Names as users give them: what cannot be one is said with the option, what looks like another
program's syntax with a hint."""

import unicodedata

import pytest

from sepme_cli.erasure.syntax import taken_literally
from sepme_cli.erasure.words import Item, given_name, same_name
from sepme_cli.errors import UsageError
from sepme_cli.planning.request import EraseRequest

#: What cannot be a name, and what is said to be wrong with it.
WRONG = {
    "": "wrong length",
    "   ": "wrong length",
    "style:": "wrong length",
    "object: ": "wrong length",
    "m" * 201: "wrong length",
    "style:" + "m" * 201: "wrong length",
    "モネ" * 40: "wrong length",
    "Mo\nnet": "control character",
    "Mo\x00net": "control character",
    "Monet\u202e": "control character",
}


@pytest.mark.parametrize("name", WRONG, ids=[f"wrong{i}" for i in range(len(WRONG))])
@pytest.mark.parametrize("option", ["--concept", "--to", "--protect"])
def test_what_cannot_be_a_name_is_said_with_its_option(name: str, option: str) -> None:
    said = {"concepts": ["Monet"], "to": None, "protect": []}
    key = {"--concept": "concepts", "--to": "to", "--protect": "protect"}[option]
    said[key] = name if key == "to" else [name]
    with pytest.raises(UsageError, match=f"^{option}: the name .*{WRONG[name]}") as caught:
        EraseRequest.of("m.safetensors", **said)
    assert caught.value.expected and caught.value.found is not None
    assert caught.value.status == 2


def test_a_name_has_a_length_of_its_own() -> None:
    with pytest.raises(UsageError, match=r"--concept: the name .*wrong length"):
        given_name("m" * 201, "--concept")


def test_a_word_says_what_it_is_and_so_does_what_it_acts_like() -> None:
    assert Item.parse("style:noto") == Item("noto", "style")
    assert Item.parse("noto", "object") == Item("noto", "object")
    assert Item.parse("noto") == Item("noto", "any")
    assert Item.parse("m:noto").name == "m:noto"
    # The anchor is of the concept's kind, whatever is said.
    assert Item.parse("object:cat", "style", "style:owl") == Item("cat", "object", like="owl")
    assert Item("cat", aliases=("kitten",)).names == ("cat", "kitten")
    for words, option in (((" ",), "--concept"), (("cat", "any", " "), "--to")):
        with pytest.raises(UsageError, match=f"^{option}: the name"):
            Item.parse(*words)  # type: ignore[arg-type]


def test_what_can_be_a_name() -> None:
    for name in ("Monet", "m" * 200, "モネ", "Martin Luther King, Jr.", "AC/DC", "a (b) c", "R&B"):
        assert given_name(f" {name} ", "--concept") == unicodedata.normalize("NFC", name)
        assert taken_literally(name, name=True) is None


@pytest.mark.parametrize(
    "name", ["van gogh", "Van Gogh", "van_gogh", "Van-Gogh", " v\u00e1n  gogh "]
)
def test_spellings_of_one_name(name: str) -> None:
    assert same_name(name) == "van gogh"


def test_spellings_of_two_names() -> None:
    assert same_name("C++") != same_name("C#")
    # Without its mark the Japanese word is another one.
    assert same_name("\u30c0\u30ea") != same_name("\u30bf\u30ea")
    assert same_name("\u30bf\u3099\u30ea") == same_name("\u30c0\u30ea")


@pytest.mark.parametrize(
    ("text", "sign"),
    [
        ("(monet:1.2)", "(monet:1.2)"),
        ("a garden, (monet : 1.2), lake", "(monet : 1.2)"),
        ("[monet:0.5]", "[monet:0.5]"),
        ("((monet))", "((monet))"),
        ("[[monet]]", "[[monet]]"),
        ("(monet)", "(monet)"),
        ("[monet]", "[monet]"),
        ("monet BREAK lake", "BREAK"),
        ("monet AND manet", "AND"),
        ("<lora:monet:0.8>", "<lora:monet:0.8>"),
        ("embedding:monet", "embedding:monet"),
        ("{monet|manet}", "{monet|manet}"),
        ("by __artist__", "__artist__"),
    ],
)
def test_the_syntax_of_web_uis_is_pointed_out(text: str, sign: str) -> None:
    for name in (True, False):
        warning = taken_literally(text, name=name)
        assert warning is not None and repr(sign) in warning and "word for word" in warning


@pytest.mark.parametrize("text", ["Monet; Manet", "Monet;Manet", "Monet | Manet"])
def test_several_names_in_one_are_pointed_out(text: str) -> None:
    assert "repeat --concept" in (taken_literally(text, name=True) or "")
    assert taken_literally(text, name=False) is None


@pytest.mark.parametrize(
    "text", ["a cat; a dog", "Monet's garden", "candle break", "sand and sea", "at 4:30", "a [b] c"]
)
def test_plain_prompts_are_plain(text: str) -> None:
    assert taken_literally(text, name=False) is None

"""Recipes are read strictly, and every complaint names its line."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sepme_cli.erasure.settings import AllowedValues
from sepme_cli.erasure.words import Item
from sepme_cli.errors import MalformedError, SystemFailure
from sepme_cli.recipe import TEMPLATE, Recipe, parse_recipe, read_recipe

SETTINGS = {
    "rank": AllowedValues(int, 1, 77),
    "ridge": AllowedValues(float, 0),
    "dtype": AllowedValues(str, choices=("fp32", "bf16")),
    "robust": AllowedValues(str, choices=("none", "both")),
}
HERE = Path("policy.yaml")
FROM = "version: 1\nconcepts:\n- {name: red, from: apple}\n"
ALIASES = "version: 1\nconcepts:\n- {name: a, aliases: "


def parsed(text: str) -> Recipe:
    return parse_recipe(text.encode(), HERE, SETTINGS)


def test_a_recipe_says_what_to_take_out_what_to_keep_and_how() -> None:
    recipe = parsed(
        """
version: 1
concepts:
  - Dali
  - name: Monet
    kind: style
    aliases: [Claude Monet]
    prompts: ["a pond by {c}", "Monet's garden"]
    like: impressionism
protect:
  styles: [noto, ink]
  objects: [cat]
  any: [blue]
method: sepme
settings: {rank: 8, ridge: 1, dtype: bf16}
"""
    )
    prompts = ("a pond by Monet", "Monet's garden")
    monet = Item("Monet", "style", ("Claude Monet",), prompts, "impressionism")
    assert recipe.concepts == (Item("Dali"), monet)
    assert recipe.protect == ("style:noto", "style:ink", "object:cat", "blue")
    assert recipe.method == "sepme"
    assert recipe.settings == {"rank": 8, "ridge": 1.0, "dtype": "bf16"}


def test_the_template_is_a_recipe() -> None:
    recipe = parsed(TEMPLATE)
    assert [item.name for item in recipe.concepts] == ["Monet"]
    assert "style:watercolor" in recipe.protect
    uncommented = TEMPLATE.replace("# method", "method").replace("# settings", "settings")
    assert parsed(uncommented.replace("#   rank", "  rank")).settings == {"rank": 8}


def test_a_power_without_a_point_is_a_number() -> None:
    recipe = parsed("version: 1\nconcepts: [Monet]\nsettings: {ridge: 1e-4}\n")
    assert recipe.settings == {"ridge": 1e-4}


def test_a_name_may_say_what_it_is() -> None:
    recipe = parsed("version: 1\nconcepts: ['style:ink', {name: 'object:cat', kind: style}]\n")
    assert recipe.concepts == (Item("ink", "style"), Item("cat", "object"))


def test_less_certain_names_and_less_dear_neighbours_weigh_less() -> None:
    recipe = parsed(
        """
version: 1
concepts:
  - {name: cat, aliases: [{name: kitten, weight: 0.9}, puss, {name: 'object:tom'}]}
protect:
  styles: [{name: noto, weight: 1}]
  objects: [{name: dog, weight: 0.5}, owl]
"""
    )
    assert recipe.concepts == (
        Item("cat", aliases=("kitten", "puss", "tom"), weights={"kitten": 0.9}),
    )
    assert recipe.protect == ("style:noto", "object:dog", "object:owl")
    assert recipe.weights == {"dog": 0.5}
    assert parsed("version: 1\nconcepts: [a]\nprotect: [{name: dog, weight: 1.e-3}]").weights == {
        "dog": 1e-3
    }


def test_an_attribute_may_be_erased_from_one_thing() -> None:
    recipe = parsed(
        """
version: 1
concepts:
  - {name: red, from: apple, like: green}
  - {name: red, from: 'object:car', prompts: ["a very {c} car"]}
  - {name: woodcut, kind: style}
"""
    )
    assert recipe.concepts == (
        Item("red", like="green", erase_from="apple"),
        Item("red", prompts=("a very red car",), erase_from="car"),
        Item("woodcut", "style"),
    )
    assert [item.label for item in recipe.concepts][:2] == ["red from apple", "red from car"]
    assert recipe.concepts[0].slug == "red-from-apple"
    plain = "version: 1\nconcepts: [{name: red%s}]\n"
    assert len({parsed(plain % said).digest for said in ("", ", from: car", ", from: hat")}) == 3


def test_a_weight_of_one_says_nothing() -> None:
    text = "version: 1\nconcepts: [{name: cat, aliases: [%s, puss]}]\nprotect: [%s]\n"
    plain = parsed(text % ("kitten", "'object:dog'"))
    said = parsed(text % ("{name: kitten, weight: 1}", "{name: 'object:dog', weight: 1.0}"))
    less = parsed(text % ("{name: kitten, weight: 0.5}", "'object:dog'"))
    other = parsed(text % ("kitten", "{name: 'object:dog', weight: 0.5}"))
    assert plain == said and plain.digest == said.digest
    assert len({recipe.digest for recipe in (plain, less, other)}) == 3


def test_the_digest_of_what_older_recipes_could_say_stays() -> None:
    recipe = parsed("version: 1\nconcepts: [{name: cat, aliases: [puss]}]\nprotect: [dog]\n")
    assert recipe.digest == "a03fafe5c53de94c6e66c785802ef1c57e83b978655985c5180331bd15f76bdc"


def test_the_digest_is_of_what_is_said() -> None:
    one = parsed("version: 1\nconcepts: [Monet, Dali]\nmethod: sepme\n")
    same = parsed("# policy\nmethod: 'sepme'\nconcepts:\n- name: Monet\n- Dali\nversion: 1\n")
    other = parsed("version: 1\nconcepts: [Monet, Klimt]\nmethod: sepme\n")
    assert one.digest == same.digest != other.digest
    assert len(one.digest) == 64


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("version: 1\nconcepts: [Monet]\nstpes: 3\n", 3, "stpes"),
        ("version: 1\nconcepts: [Monet]\nversion: 1\n", 3, "twice"),
        ("version: 2\nconcepts: [Monet]\n", 1, "version"),
        ("version: '1'\nconcepts: [Monet]\n", 1, "type"),
        ("version: 1\n", 1, "concepts is missing"),
        ("version: 1\nconcepts: []\n", 2, "no concept"),
        ("version: 1\nconcepts: Monet\n", 2, "a list"),
        ("version: 1\nconcepts:\n  - kind: style\n", 3, "name is missing"),
        ("version: 1\nconcepts:\n  - name: Monet\n    kind: painter\n", 4, "painter"),
        ("version: 1\nconcepts:\n  - Monet\n  - monet\n", 4, "two concepts"),
        ("version: 1\nconcepts:\n  - name: M\n    prompts: [a pond]\n", 4, "does not ask"),
        ("version: 1\nconcepts: [Monet]\nsettings:\n  rank: 2.5\n", 4, "type"),
        ("version: 1\nconcepts: [Monet]\nsettings:\n  rank: yes\n", 4, "type"),
        ("version: 1\nconcepts: [Monet]\nsettings:\n  rank: 0\n", 4, "out of range"),
        ("version: 1\nconcepts: [Monet]\nsettings:\n  ridge: .nan\n", 4, "out of range"),
        ("version: 1\nconcepts: [Monet]\nsettings:\n  ridge: .inf\n", 4, "out of range"),
        ("version: 1\nconcepts: [Monet]\nsettings:\n  ridge: 'le-4'\n", 4, "type"),
        ("version: 1\nconcepts: [Monet]\nsettings:\n  dtype: fp64\n", 4, "fp64"),
        ("version: 1\nconcepts: ['style:']\n", 2, "length"),
        ("version: 1\nconcepts: [" + "x" * 201 + "]\n", 2, "length"),
        ("version: 1\nconcepts: [a]\nprotect:\n  - " + "x" * 201, 4, "length"),
        ("version: 1\nconcepts:\n- Claude Monet\n- Claude-Monet\n", 4, "two concepts"),
        ("version: 1\nconcepts:\n- Dali\n- {name: Monet, like: dali}\n", 4, "the anchor of"),
        ("version: 1\nconcepts:\n- {name: Monet, like: Monet}\n", 3, "the anchor of"),
        ("version: 1\nconcepts: [Monet]\nsettings:\n  rnak: 2\n", 4, "rnak"),
        ("version: 1\nconcepts: [Monet]\nmethod: magic\n", 3, "magic"),
        (ALIASES + "[{name: b, weight: 0}]}\n", 3, "weight out of range"),
        (ALIASES + "[{name: b, weight: 1.5}]}\n", 3, "weight out of range"),
        (ALIASES + "[{name: b, weight: -1}]}\n", 3, "weight out of range"),
        (ALIASES + "[{name: b, weight: .nan}]}\n", 3, "weight out of range"),
        (ALIASES + "[{name: b, weight: heavy}]}\n", 3, "type"),
        (ALIASES + "[{name: b, weight: true}]}\n", 3, "type"),
        (ALIASES + "[{name: b, weight: [1]}]}\n", 3, "type"),
        (ALIASES + "[{weight: 1}]}\n", 3, "name is missing"),
        (ALIASES + "[{name: b, wieght: 1}]}\n", 3, "wieght"),
        (ALIASES + "[{name: 'style:', weight: 1}]}\n", 3, "length"),
        (ALIASES + "[b,\n  {name: B, weight: 0.5}]}\n", 4, "two weights"),
        (ALIASES + "[{name: a, weight: 0.5}]}\n", 3, "two weights"),
        ("version: 1\nconcepts: [a]\nprotect:\n- {name: b, weight: 2}\n", 4, "out of range"),
        ("version: 1\nconcepts: [a]\nprotect:\n- b\n- {name: b, weight: .5}\n", 5, "two weights"),
        (FROM + "- {name: Red, from: Apple}\n", 4, "two concepts"),
        (FROM + "- red\n", 3, "from one thing and from everything"),
        (FROM + "- apple\n", 3, "erased itself"),
        (FROM + "- {name: pip, aliases: [apple]}\n", 3, "which loses 'red', is erased itself"),
        ("version: 1\nconcepts:\n- {name: a, from: A}\n", 3, "erased itself"),
        ("version: 1\nconcepts:\n- {name: a, from: b, like: a}\n", 3, "the anchor of"),
        ("version: 1\nconcepts:\n- {name: a, from: ''}\n", 3, "one line"),
        ("version: 1\nconcepts:\n- {name: a, from: [b]}\n", 3, "text"),
        ("version: 1\nconcepts:\n- {name: a, from: b, prompts: [an a]}\n", 3, "ask for 'b'"),
        (f"version: 1\nconcepts:\n- {{name: {'a' * 150}, from: {'b' * 150}}}\n", 3, "too long"),
        ("version: 1\nconcepts: [a]\nsettings:\n  robust: very\n", 4, "very"),
        ("version: 1\nconcepts: [&a Monet]\n", 2, "anchors"),
        ("version: 1\nconcepts: [Monet\n", 3, ""),
        ('version: 1\nconcepts: ["a\\nb"]\n', 2, "one line"),
        ("version: 1\nconcepts: [[Monet]]\n", 2, "fields"),
        ("- Monet\n", 1, "fields"),
    ],
)
def test_every_complaint_names_its_line(text: str, line: int, told: str) -> None:
    with pytest.raises(MalformedError) as caught:
        parsed(text)
    assert caught.value.message.startswith(f"policy.yaml:{line}: ")
    assert told in caught.value.message
    assert caught.value.file == "policy.yaml"


@pytest.mark.parametrize("text", ["", "--- 1\n--- 2\n", "\x00", "a: !!python/object:os.system x"])
def test_what_is_no_recipe(text: str) -> None:
    with pytest.raises(MalformedError):
        parsed(text)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    with pytest.raises(SystemFailure):
        read_recipe(path, SETTINGS)
    path.write_bytes(b"#" * 2**21)
    with pytest.raises(MalformedError, match="too large"):
        read_recipe(path, SETTINGS)
    path.write_text(TEMPLATE)
    assert read_recipe(path, SETTINGS) == parsed(TEMPLATE)


@given(st.one_of(st.binary(max_size=300), st.text(max_size=300).map(str.encode)))
def test_any_bytes_are_a_recipe_or_malformed(text: bytes) -> None:
    with contextlib.suppress(MalformedError):
        parse_recipe(text, HERE, SETTINGS)


@given(st.data())
def test_any_change_of_a_recipe_is_one_or_malformed(data: st.DataObject) -> None:
    text = TEMPLATE.encode()
    at = data.draw(st.integers(0, len(text) - 1))
    size = data.draw(st.integers(0, 9))
    changed = text[:at] + data.draw(st.binary(max_size=9)) + text[at + size :]
    with contextlib.suppress(MalformedError):
        parse_recipe(changed, HERE, SETTINGS)

"""What callers may say shorter."""

import io
from pathlib import Path

import pytest

from sepme_cli.arguments import (
    as_output,
    as_path,
    as_paths,
    as_place,
    as_places,
    scales_in,
    several,
)
from sepme_cli.errors import UsageError
from sepme_cli.places import HubPlace


def test_one_thing_is_a_list_of_one() -> None:
    stream = io.BytesIO()
    assert several("Monet") == ("Monet",)
    assert several(Path("a")) == (Path("a"),)
    assert several(stream) == (stream,)
    assert several(HubPlace("a/b")) == (HubPlace("a/b"),)
    assert several(["Monet", "Klimt"]) == ("Monet", "Klimt")
    assert several(()) == ()


def test_paths_may_be_text() -> None:
    stream = io.BytesIO()
    assert as_path("a/b") == as_path(Path("a/b")) == Path("a/b")
    assert as_path(None) is None
    assert as_path(stream) is stream
    assert as_paths("a") == (Path("a"),)
    assert as_paths(["a", Path("b")]) == (Path("a"), Path("b"))


def test_text_names_a_place_as_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place, stream = HubPlace("someone/model"), io.BytesIO()
    assert as_place("someone/model") == as_place("hf://someone/model") == as_place(place) == place
    assert as_place(Path("someone/model")) == Path("someone/model")
    assert as_place("model.safetensors") == Path("model.safetensors")
    assert as_place(None) is None
    assert as_place(stream) is stream
    assert as_places(place) == as_places(["someone/model"]) == (place,)
    (tmp_path / "someone").mkdir()
    assert as_place("someone/model") == Path("someone/model")
    with pytest.raises(UsageError):
        as_place("hf://nonsense")


def test_what_is_written_goes_to_the_hub_only_where_text_says_so() -> None:
    place, stream = HubPlace("a/b", None, "c.sepme"), io.BytesIO()
    assert as_output("hf://a/b/c.sepme") == as_output(place) == place
    assert as_output("a/b") == as_output(Path("a/b")) == Path("a/b")
    assert as_output(None) is None
    assert as_output(stream) is stream


@pytest.mark.parametrize(
    ("text", "scales"),
    [
        ("", {}),
        (" \n\n", {}),
        ("Monet", {"Monet": 1.0}),
        ("Monet: 0.5\r\n Van Gogh :-1\ncastle", {"Monet": 0.5, "Van Gogh": -1.0, "castle": 1.0}),
        ("Dune: Part Two", {"Dune: Part Two": 1.0}),
        ("Dune: Part Two: .5", {"Dune: Part Two": 0.5}),
    ],
)
def test_scales_in_a_text_field(text: str, scales: dict[str, float]) -> None:
    assert scales_in(text) == scales


def test_a_concept_that_is_named_twice() -> None:
    with pytest.raises(UsageError, match="'Monet' is named twice"):
        scales_in("Monet\nMonet: 0.5")

"""What callers may say shorter."""

import io
from pathlib import Path

import pytest

from sepme_cli.arguments import as_path, as_paths, scales_in, several
from sepme_cli.errors import UsageError


def test_one_thing_is_a_list_of_one() -> None:
    stream = io.BytesIO()
    assert several("Monet") == ("Monet",)
    assert several(Path("a")) == (Path("a"),)
    assert several(stream) == (stream,)
    assert several(["Monet", "Klimt"]) == ("Monet", "Klimt")
    assert several(()) == ()


def test_paths_may_be_text() -> None:
    stream = io.BytesIO()
    assert as_path("a/b") == as_path(Path("a/b")) == Path("a/b")
    assert as_path(None) is None
    assert as_path(stream) is stream
    assert as_paths("a") == (Path("a"),)
    assert as_paths(["a", Path("b")]) == (Path("a"), Path("b"))


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

"""What a place on the command line means, and which files of a repository are fetched."""

import re
from pathlib import Path

import pytest

from sepme_cli.checkpoints.hub.cache import fetched_from
from sepme_cli.checkpoints.structure.folders import one_copy
from sepme_cli.errors import UsageError
from sepme_cli.places import HubPlace, parse_output, parse_place


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("someone/model", HubPlace("someone/model")),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5@fp16", None),
        ("some.one/model-1.5", HubPlace("some.one/model-1.5")),
        ("hf://someone/model", HubPlace("someone/model")),
        ("hf://someone/model@v1", HubPlace("someone/model", "v1")),
        ("hf://someone/model@refs/pr/3/a.sepme", HubPlace("someone/model", "refs/pr/3", "a.sepme")),
        ("hf://someone/model/in/a.sepme", HubPlace("someone/model", None, "in/a.sepme")),
    ],
)
def test_what_is_on_the_hub(text: str, expected: HubPlace | None) -> None:
    name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    found = parse_place(text)
    assert found == (expected or HubPlace(name, "fp16"))
    assert parse_place(str(found)) == found


@pytest.mark.parametrize(
    "text",
    [
        "-", "model", "model.safetensors", "./someone/model", "/someone/model", "a/b/c",
        "someone/model.safetensors", "someone/monet.sepme", "someone/model.CKPT",
        "models/missing", ".hidden/model", "../someone/model", "some one/model",
    ],
)  # fmt: skip
def test_what_is_a_path(text: str) -> None:
    assert parse_place(text) == Path(text)


@pytest.mark.parametrize(
    ("text", "name"), [("a/sd-1.5", "sd-1.5"), ("hf://a/b/in/monet.sepme", "monet")]
)
def test_what_a_place_on_the_hub_is_called(text: str, name: str) -> None:
    found = parse_place(text)
    assert isinstance(found, HubPlace)
    assert found.stem == name


def test_what_is_written_goes_to_the_hub_only_where_that_is_said() -> None:
    assert parse_output("someone/model") == Path("someone/model")
    assert parse_output("hf://a/b/c.sepme") == HubPlace("a/b", None, "c.sepme")


@pytest.mark.parametrize("text", ["hf://", "hf://a", "hf://a/b@", "hf://spaces/a/b", "hf://a//b"])
def test_what_makes_no_sense(text: str) -> None:
    with pytest.raises(UsageError):
        parse_place(text)


@pytest.mark.parametrize("path", ["", "in/a.sepme"])
def test_a_place_is_named_with_its_commit(path: str) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    cached = Path("/snapshots/hub/models--a--b/snapshots") / commit / path
    named = fetched_from(HubPlace("a/b", "main", path), cached)
    assert parse_place(named) == HubPlace("a/b", commit, path)
    assert fetched_from(Path("x"), Path("x")) == "x"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("m.safetensors m.fp16.safetensors m.bin config.json", "m.safetensors config.json"),
        ("m.fp16.safetensors m.non_ema.safetensors m.bin", "m.fp16.safetensors"),
        ("m.non_ema.safetensors", "m.non_ema.safetensors"),
        ("m.bin config.json", "m.bin config.json"),
        (
            "m-00001-of-00002.safetensors m.safetensors.index.json m.fp16.safetensors",
            "m-00001-of-00002.safetensors m.safetensors.index.json",
        ),
        (
            "m.fp16-00001-of-00002.safetensors m.safetensors.index.fp16.json m.bin",
            "m.fp16-00001-of-00002.safetensors m.safetensors.index.fp16.json",
        ),
        ("vocab.json merges.txt", "vocab.json merges.txt"),
    ],
)
def test_one_copy_of_a_network(names: str, expected: str) -> None:
    def full(text: str) -> set[str]:
        words = text.split()
        return {f"diffusion_pytorch_model{w[1:]}" if w[:2] in ("m.", "m-") else w for w in words}

    assert set(one_copy(sorted(full(names)))) == full(expected)


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ("https://huggingface.co/a/b", "hf://a/b"),
        ("https://huggingface.co/a/b/", "hf://a/b"),
        ("https://huggingface.co/a/b/tree/main", "hf://a/b"),
        ("https://huggingface.co/a/b/tree/fp16", "hf://a/b@fp16"),
        ("https://huggingface.co/a/b/resolve/main/c/d.safetensors", "hf://a/b/c/d.safetensors"),
        (
            "https://huggingface.co/a/b/resolve/main/d.safetensors?download=true",
            "hf://a/b/d.safetensors",
        ),
        ("http://hf.co/a/b/blob/v1/d.sepme", "hf://a/b@v1/d.sepme"),
        ("https://civitai.com/api/download/models/1?type=Model", "download the file"),
        ("https://example.org/a/b/m.safetensors", "download the file"),
        ("ftp://example.org/m.safetensors", "download the file"),
        ("s3://bucket/m.safetensors", "download the file"),
        ("gs://bucket/m.safetensors", "download the file"),
        ("file:///tmp/m.safetensors", "without file://"),
    ],
)
def test_an_address_is_no_place_and_what_is_one_is_said(text: str, instead: str) -> None:
    for parse in (parse_place, parse_output):
        with pytest.raises(UsageError, match=re.escape(instead)) as caught:
            parse(text)
        assert caught.value.found == text and caught.value.expected

"""Statements: what they say, one spelling, and nothing else is one."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patch_spec.canonical import canonical_json
from patch_spec.errors import FormatError
from patch_spec.stack import StackEntry, StackRecord
from sepme_cli.errors import MalformedError, SystemFailure
from sepme_cli.signing.statement import Statement, is_statement, read_statement

RECORD = StackRecord(
    "b" * 64,
    "sd1",
    (StackEntry("2" * 64, "Monet", "monet", 1.0), StackEntry("1" * 64, "Klimt", "klimt", 0.5)),
    "sepme 1",
    ("f" * 64,),
)
STATEMENT = Statement({"unet/b": "a" * 64, "a": "c" * 64}, RECORD)


def test_the_layout_is_that_of_in_toto() -> None:
    value = json.loads(STATEMENT.to_bytes())
    assert value.keys() == {"_type", "subject", "predicateType", "predicate"}
    assert value["_type"] == "https://in-toto.io/Statement/v1"
    assert value["subject"] == [
        {"name": "a", "digest": {"sha256": "c" * 64}},
        {"name": "unet/b", "digest": {"sha256": "a" * 64}},
    ]
    assert value["predicateType"] == "urn:sepme:composition:v1"
    predicate = value["predicate"]
    assert predicate == json.loads(RECORD.to_metadata())
    assert [(one["concept"], one["scale"]) for one in predicate["increments"]] == [
        ("Klimt", 0.5),
        ("Monet", 1),
    ]


digests = st.text("0123456789abcdef", min_size=64, max_size=64)


names = st.text(st.characters(codec="utf-8"), max_size=20)


@given(st.dictionaries(names, digests, min_size=1, max_size=3))
def test_reading_gives_what_was_written(subject: dict[str, str]) -> None:
    statement = Statement(subject, RECORD)
    data = statement.to_bytes()
    assert Statement.from_bytes(data) == statement
    assert Statement(dict(reversed(subject.items())), RECORD).to_bytes() == data


def change(**members: object) -> bytes:
    return canonical_json(json.loads(STATEMENT.to_bytes()) | members)


ONE = {"name": "a", "digest": {"sha256": "c" * 64}}
WRONG = {
    "nothing": b"",
    "text": b"Alice made it",
    "a list": b"[]",
    "spaces": json.dumps(json.loads(STATEMENT.to_bytes())).encode(),
    "a line end": STATEMENT.to_bytes() + b"\n",
    "a field twice": STATEMENT.to_bytes().replace(b'{"_type', b'{"_type":"x","_type', 1),
    "another type": change(_type="https://in-toto.io/Statement/v0.1"),
    "another predicate": change(predicateType="urn:sepme:composition:v2"),
    "one field more": change(extra=1),
    "no subject": change(subject=[]),
    "a subject without a digest": change(subject=[{"name": "a"}]),
    "a subject with a weak digest": change(subject=[{"name": "a", "digest": {"sha1": "c" * 40}}]),
    "two digests": change(subject=[{**ONE, "digest": {**ONE["digest"], "sha512": "c" * 128}}]),
    "half a digest": change(subject=[{"name": "a", "digest": {"sha256": "c" * 32}}]),
    "a subject twice": change(subject=[ONE, ONE]),
    "subjects out of order": change(subject=[{**ONE, "name": "b"}, ONE]),
    "a name that is a number": change(subject=[{**ONE, "name": 1}]),
    "a predicate that is no record": change(predicate={}),
    "a predicate in words": change(predicate="Monet is out"),
    "a predicate of no increments": change(
        predicate=json.loads(RECORD.to_metadata()) | {"increments": []}
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_statement(wrong: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        Statement.from_bytes(WRONG[wrong])
    file = tmp_path / "statement.json"
    file.write_bytes(WRONG[wrong])
    with pytest.raises(MalformedError, match=r"statement\.json"):
        read_statement(file)


@given(st.binary(max_size=100))
def test_anything_else_is_malformed(data: bytes) -> None:
    with pytest.raises(FormatError):
        Statement.from_bytes(data)


def test_a_file_that_never_ends_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(MalformedError, match="too large"):
        read_statement(Path("/dev/zero"))
    with pytest.raises(SystemFailure):
        read_statement(tmp_path / "missing")


def test_it_is_told_from_other_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(STATEMENT.to_bytes())
    (tmp_path / "b").write_bytes(b"\x7b\0\0\0\0\0\0\0{}")
    (tmp_path / "c").write_bytes(b"")
    assert [is_statement(tmp_path / name) for name in "abc"] == [True, False, False]

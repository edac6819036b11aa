"""The vectors are read as SPEC.md says, and every rule of SPEC.md has one that breaks it."""

import io
import json
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from safetensors.numpy import load

from patch_spec import limits, make_vectors
from patch_spec.canonical import canonical_json
from patch_spec.cases.examples import DTYPES
from patch_spec.cases.tools import parts
from patch_spec.compose import compose
from patch_spec.container import patch_bytes, patch_digest, read_manifest, read_patch
from patch_spec.digest import tensor_fingerprint
from patch_spec.errors import FormatError
from patch_spec.header import DTYPE_BITS, Header, read_header
from patch_spec.make_vectors import VECTORS
from patch_spec.manifest import Manifest
from patch_spec.stack import StackRecord
from patch_spec.undo import HEADER_TENSOR, original_header, undo_record

SPEC = VECTORS.with_name("SPEC.md").read_text()
INDEX = json.loads((VECTORS / "index.json").read_text())
REFUSALS = json.loads(Path(__file__).with_name("refusals.json").read_text())
SCHEMA = jsonschema.Draft202012Validator(json.loads(VECTORS.with_name("schema.json").read_text()))


def header_of(data: bytes) -> Header:
    return read_header(io.BytesIO(data), len(data))


def tensor(data: bytes, name: str) -> np.ndarray:
    header = header_of(data)
    entry = header.by_name[name]
    begin, end = (header.data_start + offset for offset in (entry.begin, entry.end))
    return np.frombuffer(data[begin:end], DTYPES[entry.dtype]).reshape(entry.shape)


def read_any(kind: str, data: bytes) -> None:
    """Reads a file of any kind of the index as far as its rules go."""
    if kind == "patch":
        read_patch(data)
        return
    header = header_of(data)
    if kind == "stack":
        StackRecord.from_metadata(header.metadata["sepme"])
    elif kind == "undo":
        undo_record(header)
        original_header(header, tensor(data, HEADER_TENSOR).tobytes())
    else:
        for entry in header.tensors:
            tensor_fingerprint(tensor(data, entry.name))


def rules_of_the_spec() -> set[str]:
    return set(re.findall(r"^- \*\*([HJPVFCSU]\d+)\*\* ", SPEC, re.MULTILINE))


def said(error: FormatError) -> str:
    """What users read, without Python's own words on a JSON text, which change."""
    return re.sub(r"(not a JSON text): .*(?= \[rule)", r"\1", str(error))


@pytest.mark.parametrize("case", INDEX["invalid"], ids=lambda case: case["file"])
def test_invalid_files_are_refused_with_their_rule(case):
    with pytest.raises(FormatError) as caught:
        read_any(case["kind"], (VECTORS / case["file"]).read_bytes())
    assert caught.value.rule == case["rule"], caught.value
    # What is wrong, where, what was expected and what was found; see refusals.py.
    assert said(caught.value) == REFUSALS[case["file"]]


@pytest.mark.parametrize("case", INDEX["valid"], ids=lambda case: case["file"])
def test_valid_patches(case):
    data = (VECTORS / case["file"]).read_bytes()
    patch = read_patch(VECTORS / case["file"])
    assert patch_bytes(patch) == data
    assert read_patch(data) == patch == read_patch(io.BytesIO(data))
    assert read_manifest(data) == patch.manifest == read_manifest(io.BytesIO(data))
    assert patch_digest(patch) == case["patch_digest"]
    assert patch.base.digest == case["base_digest"]
    assert {i.slug: i.digest for i in patch.increments} == case["increments"]


@pytest.mark.parametrize("case", INDEX["valid"], ids=lambda case: case["file"])
def test_other_tools_can_open_a_patch(case):
    tensors = load((VECTORS / case["file"]).read_bytes())
    patch = read_patch(VECTORS / case["file"])
    for increment in patch.increments:
        for name, array in increment.factors.items():
            np.testing.assert_array_equal(tensors[f"{increment.slug}.{name}"], array)


def test_fingerprints():
    data = (VECTORS / INDEX["weights"]["file"]).read_bytes()
    expected = INDEX["weights"]["fingerprints"]
    assert {name: tensor_fingerprint(tensor(data, name)) for name in expected} == expected
    assert expected["key.F16"] == expected["key.F32"] != expected["key.BF16"]


@pytest.mark.parametrize("case", INDEX["compose"])
def test_composition(case):
    weight = tensor((VECTORS / INDEX["weights"]["file"]).read_bytes(), case["weight"])
    increments = {i.slug: i for i in read_patch(VECTORS / case["patch"]).increments}
    terms = [(increments[term["slug"]], term["scale"]) for term in case["terms"]]
    if "rule" in case:
        with pytest.raises(FormatError) as caught:
            compose(weight, terms, case["target"])
        assert caught.value.rule == case["rule"]
        return
    for order in (terms, terms[::-1]):
        result = compose(weight, order, case["target"])
        assert result.dtype == weight.dtype
        assert result.tobytes().hex() == case["result"]


def test_stack_and_journal():
    data = (VECTORS / INDEX["stack"]["file"]).read_bytes()
    record = StackRecord.from_metadata(header_of(data).metadata["sepme"])
    assert record.base == INDEX["stack"]["base"]
    data = (VECTORS / INDEX["stack_of_layers"]["file"]).read_bytes()
    of_layers = StackRecord.from_metadata(header_of(data).metadata["sepme"])
    # What layers are changed does not tell bases apart.
    assert of_layers.base == record.base
    assert of_layers.layers == INDEX["stack_of_layers"]["layers"]
    journal = (VECTORS / INDEX["undo"]["file"]).read_bytes()
    original = (VECTORS / INDEX["undo"]["original"]).read_bytes()
    read_any("undo", journal)
    restored = tensor(journal, HEADER_TENSOR).tobytes()
    for entry in header_of(original).tensors:
        restored += tensor(journal, entry.name).tobytes()
    assert restored == original


def test_the_vectors_are_what_would_be_made_and_small():
    made = make_vectors.vectors()
    there = {p.relative_to(VECTORS).as_posix(): p for p in VECTORS.rglob("*") if p.is_file()}
    assert made.keys() == there.keys()
    assert [name for name, path in there.items() if path.read_bytes() != made[name]] == []
    assert sum(map(len, made.values())) < 500_000


def test_check_notices_a_changed_a_missing_and_a_strange_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_vectors, "VECTORS", tmp_path)
    assert make_vectors.main([]) == make_vectors.main(["--check"]) == 0
    (tmp_path / "valid/both.sepme").write_bytes(b"")
    (tmp_path / "invalid/H2-empty.sepme").unlink()
    (tmp_path / "stranger").write_bytes(b"")
    assert make_vectors.main(["--check"]) == 1
    named = {line.split()[0] for line in capsys.readouterr().err.splitlines()}
    assert named == {"valid/both.sepme", "invalid/H2-empty.sepme", "stranger"}
    assert make_vectors.main([]) == make_vectors.main(["--check"]) == 0
    assert make_vectors.main(["--help-me"]) == 2


def test_every_rule_has_a_reason_a_vector_and_an_error():
    rules = rules_of_the_spec()
    items = re.findall(r"^- \*\*([HJPVFCSU]\d+)\*\* (.*?)(?=^- |^\n|\Z)", SPEC, re.M | re.S)
    assert [rule for rule, text in items if "*Because*" not in text] == []
    broken = {case["rule"] for case in INDEX["invalid"]}
    broken |= {case["rule"] for case in INDEX["compose"] if "rule" in case}
    assert broken == rules
    code = "".join(path.read_text() for path in VECTORS.parent.glob("*.py"))
    assert set(re.findall(r'"([HJPVFCSU]\d+)"', code)) - DTYPE_BITS.keys() == rules


def test_the_numbers_of_the_spec_are_those_of_the_code():
    numbers = {int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", SPEC.split("## 3.")[0])}
    named = {name: value for name, value in vars(limits).items() if name.isupper()}
    del named["SAFE_INTEGER"]
    assert {name: value for name, value in named.items() if value not in numbers} == {}


@pytest.mark.parametrize("case", INDEX["valid"], ids=lambda case: case["file"])
def test_the_schema_takes_what_is_valid(case):
    SCHEMA.validate(json.loads(read_manifest(VECTORS / case["file"]).to_text()))


def test_the_schema_refuses_what_a_schema_can_see():
    unseen = {"J5-concept-decomposed", "J5-concept-too-long", "J5-created-no-day"}
    seen = {"J3", "J4", "J5", "J6", "J7", "J8", "J9", "P1", "P2"}
    accepted = set()
    for case in INDEX["invalid"]:
        if case["kind"] == "patch" and case["rule"] in seen:
            members, _ = parts((VECTORS / case["file"]).read_bytes())
            if SCHEMA.is_valid(json.loads(members["__metadata__"]["sepme"])):
                accepted.add(Path(case["file"]).stem)
    assert accepted == unseen


def test_the_dtypes_of_the_spec_are_those_of_the_code():
    listed = re.search(r"`dtype` MUST be one of ([^.]*)\.", SPEC)
    assert listed and set(re.split(r",\s+", listed[1])) == DTYPE_BITS.keys()


def objects(value, path=()):
    """Every object in a JSON value whose fields are fixed."""
    open_objects = {"text_encoders", "targets", "layers", "settings", "exponents"}
    if isinstance(value, dict):
        if not path or path[-1] not in open_objects:
            yield path
        for name, member in value.items():
            yield from objects(member, (*path, name))
    elif isinstance(value, list):
        for index, member in enumerate(value):
            yield from objects(member, (*path, index))


def test_schema_and_reader_refuse_an_unknown_field_in_every_object():
    text = read_manifest(VECTORS / "valid/both.sepme").to_text()
    paths = list(objects(json.loads(text)))
    assert len(paths) == 1 + 1 + 2 + 2 * 3  # manifest, base, targets, increments and their parts
    for path in paths:
        manifest = json.loads(text)
        member = manifest
        for step in path:
            member = member[step]
        member["surprise"] = 1
        assert not SCHEMA.is_valid(manifest), path
        with pytest.raises(FormatError) as caught:
            Manifest.from_text(canonical_json(manifest).decode())
        assert caught.value.rule == "J3", path

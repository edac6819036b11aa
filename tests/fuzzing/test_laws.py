"""What is written can be read, and what can be read is written again as the same bytes.

Hypothesis draws the mutants' choices here, so that it can shrink what breaks a law.
"""

import io
import json
import tempfile
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patch_spec.canonical import canonical_json, parse_json_strict
from patch_spec.cases.examples import numbers, tensor_file
from patch_spec.errors import FormatError
from patch_spec.header import read_header
from patch_spec.undo import UndoRecord
from sepme_cli.checkpoints.journals.undo import Kept, State, open_undo, write_undo
from sepme_cli.errors import SepmeError
from tests.fuzzing.json_mutants import mutate_text
from tests.fuzzing.targets import TARGETS, Target
from tests.patch_spec.strategies import digests

patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(-(2.0**53), 2.0**53).filter(lambda x: x != 0 and not x.is_integer())
    | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


@patient
@given(values)
def test_a_value_has_one_canonical_text(value: object) -> None:
    text = canonical_json(value)
    assert parse_json_strict(text) == value
    assert canonical_json(parse_json_strict(text)) == text


@patient
@given(st.dictionaries(texts, values, max_size=4), st.randoms(use_true_random=False))
def test_the_strict_reader_reads_what_others_read_or_nothing(
    members: dict[str, object], rng: Random
) -> None:
    text = mutate_text(rng, json.dumps(members)).encode("utf-8", "surrogatepass")
    try:
        found = parse_json_strict(text)
    except FormatError as error:
        assert error.rule == "J1"
        return
    assert found == json.loads(text)
    json.dumps(found, allow_nan=False, ensure_ascii=False).encode()


@pytest.fixture(scope="module", params=["patch", "header", "record", "recipe"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    return TARGETS[request.param](tmp_path_factory.mktemp(request.param))


@patient
@given(rng=st.randoms(use_true_random=False))
def test_what_is_accepted_is_right(target: Target, rng: Random) -> None:
    with suppress(SepmeError, FormatError):
        target.check(target.mutant(rng))


names = st.text("abc._-é/0", min_size=1, max_size=8).filter(
    lambda name: name[0] != "/" and ".." not in name and name != "header"
)


@patient
@given(
    st.dictionaries(names, st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=4),
    st.dictionaries(texts.filter(str.isalnum), texts, max_size=2),
    digests,
    st.data(),
)
def test_a_journal_gives_back_what_it_was_given(
    shapes: dict[str, list[int]], metadata: dict[str, str], digest: str, data: st.DataObject
) -> None:
    arrays = {name: numbers(name, *shape).astype("<f2") for name, shape in shapes.items()}
    file = tensor_file(metadata, arrays)
    header = read_header(io.BytesIO(file), len(file))
    touched = data.draw(st.lists(st.sampled_from(header.tensors), unique=True))
    with tempfile.TemporaryDirectory() as folder, _file(Path(folder) / "m", file) as model:
        start = header.data_start
        kept = [Kept(entry, model.fileno(), start + entry.begin) for entry in touched]
        state = State(file[:start], kept)
        record = UndoRecord(digest, digest)
        write_undo(Path(folder) / "undo", state, record)
        with open_undo(Path(folder) / "undo") as journal:
            assert (journal.record, journal.header_bytes) == (record, file[: header.data_start])
            assert set(journal.touched) == set(touched)
            for entry in touched:
                assert journal.read_bytes(entry.name) == arrays[entry.name].tobytes()


def _file(path: Path, data: bytes) -> io.BufferedReader:
    path.write_bytes(data)
    return path.open("rb")

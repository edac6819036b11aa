"""Stack and undo records, and the texts in them."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patch_spec.cases.examples import base, stack
from patch_spec.errors import FormatError
from patch_spec.stack import StackEntry, StackRecord
from patch_spec.text import FORBIDDEN, clean_text, slugify, unique_slug
from patch_spec.undo import UndoRecord
from tests.patch_spec.strategies import digests, texts


@given(
    st.lists(
        st.tuples(digests, texts, st.floats(0.01, 100)),
        min_size=1,
        max_size=4,
        unique_by=lambda x: x[0],
    )
)
def test_stack_records_round_trip(entries):
    record = StackRecord(
        base().digest,
        "sdxl",
        tuple(StackEntry(d, concept, slugify(concept), s) for d, concept, s in entries),
        "sepme 0.1.0",
        tuple(d for d, _, _ in entries),
    )
    assert StackRecord.from_metadata(record.to_metadata()) == record


def test_a_stack_record_is_in_order() -> None:
    entries = tuple(StackEntry(digit * 64, digit, digit, 1.0) for digit in "cab")
    record = StackRecord("d" * 64, "sd1", entries, "test 1", tuple(digit * 64 for digit in "fde"))
    assert [entry.slug for entry in record.entries] == ["a", "b", "c"]
    assert [digest[0] for digest in record.patches] == ["d", "e", "f"]


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
def test_a_stack_record_is_checked_before_it_is_written(scale):
    entry = replace(stack().entries[0], scale=scale)
    with pytest.raises(FormatError):
        replace(stack(), entries=(entry,)).to_metadata()
    with pytest.raises(FormatError) as caught:
        replace(stack(), entries=stack().entries * 2).to_metadata()
    assert caught.value.rule == "S1"


@given(digests, digests)
def test_undo_records_round_trip(one, other):
    record = UndoRecord(one, other)
    assert UndoRecord.from_metadata(record.to_metadata()) == record


@pytest.mark.parametrize(
    ("concept", "slug"),
    [
        ("Vincent van Gogh", "vincent-van-gogh"),
        ("  Mickey's  Mouse! ", "mickey-s-mouse"),
        ("Café", "cafe"),
        ("-rf", "rf"),
        ("x" * 90, "x" * 64),
        ("x" * 63 + " y", "x" * 63),
        ("葛飾北斎", "concept-d76f9fac"),
    ],
)
def test_slugs(concept, slug):
    assert slugify(concept) == slug


def test_slugs_that_are_taken():
    assert unique_slug("Monet", ()) == "monet"
    assert unique_slug("Monet", {"monet", "monet-2"}) == "monet-3"
    assert unique_slug("x" * 70, {"x" * 64}) == "x" * 62 + "-2"


@given(st.text(max_size=40))
def test_clean_text_gives_what_the_format_takes(text):
    try:
        cleaned = clean_text(text)
    except FormatError as error:
        assert error.rule == "J5"
        assert FORBIDDEN.search(text) or not text.strip()
    else:
        assert clean_text(cleaned) == cleaned

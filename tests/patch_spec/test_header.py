"""The header's parser: what it takes it gives back, and nothing makes it fail otherwise."""

import io
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patch_spec.errors import FormatError
from patch_spec.header import (
    DTYPE_BITS,
    Header,
    TensorEntry,
    encode_header,
    parse_header,
    read_header,
)
from patch_spec.limits import HEADER_PARTS, PATCH_HEADER_BYTES
from patch_spec.text import FORBIDDEN

texts = st.text(max_size=8).filter(lambda text: not FORBIDDEN.search(text))
names = st.text("abcdefg._-é/0", min_size=1, max_size=12).filter(
    lambda name: name[0] != "/" and ".." not in name
)
whole = [dtype for dtype, bits in DTYPE_BITS.items() if bits % 8 == 0]


@st.composite
def headers(draw):
    position, entries = 0, []
    for name in draw(st.lists(names, max_size=5, unique=True)):
        dtype = draw(st.sampled_from(whole))
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
        size = DTYPE_BITS[dtype] // 8
        for dimension in shape:
            size *= dimension
        entries.append(TensorEntry(name, dtype, shape, position, position + size))
        position += size
    return draw(st.dictionaries(texts, texts, max_size=3)), entries, position


def parse(data: bytes, size: int | None = None) -> Header:
    return parse_header(data[:8], data[8:], len(data) if size is None else size)


@given(headers())
def test_what_is_encoded_is_parsed(made):
    metadata, entries, size = made
    data = encode_header(metadata, entries)
    header = parse(data, len(data) + size)
    assert dict(header.metadata) == metadata
    assert set(header.tensors) == set(entries)
    assert [entry.begin for entry in header.tensors] == sorted(e.begin for e in entries)
    assert (header.data_start, header.data_length) == (len(data), size)
    assert len(data) % 8 == 0
    assert encode_header(header.metadata, header.tensors) == data
    assert all(header.by_name[entry.name] == entry for entry in entries)


@given(headers(), st.integers(0, 400))
def test_padding_keeps_the_data_where_it_is_if_the_header_fits(made, minimum):
    metadata, entries, size = made
    tight = len(encode_header({}, entries).rstrip(b" ")) - 8 if not metadata else None
    data = encode_header(metadata, entries, minimum_length=minimum)
    header = parse(data, len(data) + size)
    assert header.length >= minimum
    if len(data.rstrip(b" ")) - 8 <= minimum:
        assert header.length == minimum
    else:
        assert header.length % 8 == 0
    assert tight is None or header.length >= tight


@given(st.binary(max_size=200), st.integers(0, 300))
def test_bytes_without_sense_are_refused(junk, size):
    data = len(junk).to_bytes(8, "little") + junk
    try:
        parse(data, size)
    except FormatError:
        return
    assert junk.strip() == b"{}"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["U8", "F32", "x", "\ud800"])
    | st.lists(st.integers(-1, 5), max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "x", "../x"]), inner
        )
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["__metadata__", "x", "y", "", "\ud800"]), json_values))
def test_nearly_right_headers_are_refused_or_right(members):
    text = json.dumps(members).encode()
    data = len(text).to_bytes(8, "little") + text
    for size in (len(data), len(data) + 3):
        try:
            header = parse(data, size)
        except FormatError as error:
            assert error.rule[0] == "H"
            assert str(error)
        else:
            assert header.data_start + header.data_length == size


@given(headers(), st.data())
def test_one_changed_byte_is_refused_or_still_adds_up(made, data):
    metadata, entries, size = made
    good = bytearray(encode_header(metadata, entries))
    position = data.draw(st.integers(0, len(good) - 1))
    good[position] = data.draw(st.integers(0, 255))
    file = io.BytesIO(bytes(good) + bytes(size))
    try:
        header = read_header(file, len(good) + size)
    except FormatError:
        return
    assert header.data_start + header.data_length == len(good) + size


class Endless(io.RawIOBase):
    """A file that says it is large and counts what is asked of it."""

    asked = 0

    def read(self, size=-1):
        self.asked = max(self.asked, size)
        return (2**60).to_bytes(8, "little")[:size]


def test_a_length_that_lies_reserves_nothing():
    file = Endless()
    with pytest.raises(FormatError) as caught:
        read_header(file, 2**61)
    assert caught.value.rule == "H1"
    assert file.asked == 8


def test_a_limit_of_the_callers_own():
    data = encode_header({"a": "b" * 100}, [])
    with pytest.raises(FormatError) as caught:
        read_header(io.BytesIO(data), len(data), limit=64)
    assert caught.value.rule == "H1"


def test_a_header_that_is_right_but_for_spaces_is_fine_in_a_checkpoint():
    text = b'{"x": {"shape": [], "dtype": "U8", "data_offsets": [0, 1]} }   '
    data = len(text).to_bytes(8, "little") + text + b"!"
    assert read_header(io.BytesIO(data), len(data)).tensors[0].shape == ()


@pytest.mark.parametrize("unit", [b"[],", b"{},", b'{"a":1},', b"-9,"])
def test_a_header_of_too_many_parts_is_refused_before_it_is_parsed(unit):
    text = b'{"x":[' + unit * (HEADER_PARTS // sum(map(unit.count, (b"[", b"{", b","))) + 1)
    data = len(text).to_bytes(8, "little") + text
    tracemalloc.start()
    with pytest.raises(FormatError) as caught:
        parse_header(data[:8], text, len(data))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert caught.value.rule == "H1"


def test_a_patch_cannot_have_too_many_parts():
    """The shortest list of prompts has six bytes, in a text in JSON, for each of its commas."""
    assert len(json.dumps('"a",')[1:-1]) == 6
    assert PATCH_HEADER_BYTES / 6 < HEADER_PARTS

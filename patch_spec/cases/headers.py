"""Files that break the rules of the header, H1 to H12."""

from collections.abc import Iterator
from typing import Any

from patch_spec import limits
from patch_spec.canonical import canonical_json
from patch_spec.cases.examples import small_patch
from patch_spec.cases.tools import Invalid, parts, raw
from patch_spec.container import assemble
from patch_spec.header import PREFIX_BYTES


def header_cases() -> Iterator[Invalid]:
    """Files whose header no reader may accept."""
    yield from _lengths()
    yield from _texts()
    yield from _entries()
    yield from _offsets()
    yield from _names()


def _lengths() -> Iterator[Invalid]:
    good = assemble(small_patch())
    too_long = (limits.PATCH_HEADER_BYTES + 1).to_bytes(PREFIX_BYTES, "little")
    yield Invalid("H1", "header-over-16-mib", too_long + b"{}")
    yield Invalid("H1", "header-length-all-ones", b"\xff" * PREFIX_BYTES + b"{}")
    yield Invalid("H2", "empty", b"")
    yield Invalid("H2", "five-bytes", good[:5])
    yield Invalid("H2", "ends-in-header", good[:100])
    yield Invalid("H11", "byte-too-many", good + b"\0")
    yield Invalid("H11", "byte-too-few", good[:-1])
    yield Invalid("H11", "no-data", good[: -len(parts(good)[1])])


def _texts() -> Iterator[Invalid]:
    for about, text in {
        "not-json": b"{nonsense}",
        "begins-with-space": b' {"__metadata__":{}}',
        "byte-order-mark": b"\xef\xbb\xbf{}",
        "not-utf8": b'{"\xff":0}',
        "list": b"[]",
        "two-values": b"{}{}",
        "ends-with-newline": b"{}\n",
        "nan": b'{"x":NaN}',
        "number-overflows": b'{"x":1e999}',
        "half-a-surrogate-pair": b'{"\\ud800":{}}',
        "deep": b'{"x":' + b"[" * 1500,
    }.items():
        yield Invalid("H3", about, raw(text))
    entry = b'"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    for about, text in {
        "tensor": b"{" + entry + b"," + entry + b"}",
        "metadata": b'{"__metadata__":{},"__metadata__":{}}',
        "metadata-key": b'{"__metadata__":{"a":"1","\\u0061":"2"}}',
        "field": b"{" + entry.replace(b"[0],", b'[0],"shape":[0],', 1) + b"}",
    }.items():
        yield Invalid("H4", f"{about}-twice", raw(text))
    yield Invalid("H5", "metadata-number", raw(b'{"__metadata__":{"a":1}}'))
    yield Invalid("H5", "metadata-list", raw(b'{"__metadata__":[]}'))


def _tensor(**fields: Any) -> bytes:
    """A file with one tensor of four bytes, some of its fields changed."""
    whole = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} | fields
    return raw(canonical_json({"x": whole}), b"1234")


def _entries() -> Iterator[Invalid]:
    yield Invalid("H6", "tensor-is-a-list", raw(b'{"x":[]}'))
    yield Invalid("H6", "unknown-field", _tensor(strides=[1]))
    yield Invalid("H6", "no-shape", raw(b'{"x":{"dtype":"U8","data_offsets":[0,0]}}'))
    yield Invalid("H7", "unknown-dtype", _tensor(dtype="F128"))
    yield Invalid("H7", "dtype-is-a-list", _tensor(dtype=["U8"]))
    for about, shape in {
        "negative": [-4],
        "true": [True, 4],
        "null": None,
        "text": ["4"],
        "33-dimensions": [1] * limits.DIMENSIONS + [4],
    }.items():
        yield Invalid("H8", f"shape-{about}", _tensor(shape=shape))
    # What canonical JSON cannot say.
    for about, number in {"float": b"4.0", "beyond-2-53": b"9007199254740992"}.items():
        text = b'{"x":{"data_offsets":[0,4],"dtype":"U8","shape":[%s]}}' % number
        yield Invalid("H8", f"shape-{about}", raw(text, b"1234"))
    text = b'{"x":{"data_offsets":[0,0],"dtype":"U8","shape":[-0]}}'
    yield Invalid("H8", "shape-negative-zero", raw(text))


def _offsets() -> Iterator[Invalid]:
    for about, offsets in {
        "reversed": [4, 0],
        "three": [0, 4, 4],
        "too-short": [0, 3],
        "too-long": [0, 5],
        "negative": [-4, 0],
        "text": "04",
    }.items():
        yield Invalid("H9", f"offsets-{about}", _tensor(data_offsets=offsets))
    text = b'{"x":{"data_offsets":[-0,4],"dtype":"U8","shape":[4]}}'
    yield Invalid("H9", "offsets-negative-zero", raw(text, b"1234"))
    yield Invalid("H9", "size-overflows", _tensor(shape=[2**52] * 8))
    yield Invalid("H9", "half-a-byte", _tensor(dtype="F4", shape=[7]))
    two = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
    for about, begin in {"hole": 3, "overlap": 1, "same-place": 0}.items():
        text = canonical_json({"a": two, "b": {**two, "data_offsets": [begin, begin + 2]}})
        yield Invalid("H10", about, raw(text, b"12345"[: begin + 2]))
    yield Invalid(
        "H10", "begins-late", raw(canonical_json({"a": {**two, "data_offsets": [1, 3]}}), b"123")
    )


def _names() -> Iterator[Invalid]:
    tensor = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    for about, name in {
        "empty": "",
        "climbs": "../../etc/passwd",
        "climbs-backslash": "a\\..\\b",
        "absolute": "/etc/passwd",
        "newline": "a\nb",
        "escape-sequence": "\x1b[2J",
        "right-to-left": "a\u202eb",
        "too-long": "x" * (limits.TENSOR_NAME_BYTES + 1),
    }.items():
        yield Invalid("H12", f"name-{about}", raw(canonical_json({name: tensor})))

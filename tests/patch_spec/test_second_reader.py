"""A second reader, written from SPEC.md with the standard library alone, agrees on the vectors.

It shares no line with the package: where the two differ, the text or the code is wrong.
"""

import json
import re
import struct
from fractions import Fraction
from hashlib import sha256
from pathlib import Path

import pytest

VECTORS = Path(__file__).parents[2] / "patch_spec/vectors"
INDEX = json.loads((VECTORS / "index.json").read_text())
LETTERS = {"F64": "d", "F32": "f", "F16": "e"}


def read(path):
    """Metadata, and name to (dtype, shape, bytes)."""
    data = (VECTORS / path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = entry["dtype"], entry["shape"], data[begin:end]
    return metadata, tensors


def matrix(tensor):
    """Rows of fractions."""
    dtype, (rows, columns), data = tensor
    if dtype == "BF16":
        pairs = [data[i : i + 2] for i in range(0, len(data), 2)]
        values = [struct.unpack("<f", b"\0\0" + pair)[0] for pair in pairs]
    else:
        values = struct.unpack(f"<{rows * columns}{LETTERS[dtype]}", data)
    exact = [Fraction(value) for value in values]
    return [exact[row * columns : (row + 1) * columns] for row in range(rows)]


def canonical(value):
    """RFC 8785, as far as the vectors need it: all their keys sort alike in UTF-8 and UTF-16."""
    if isinstance(value, dict):
        members = (f"{canonical(key)}:{canonical(value[key])}" for key in sorted(value))
        return "{" + ",".join(members) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    if isinstance(value, float):
        return re.sub(r"e([+-])0", r"e\1", repr(value))
    return json.dumps(value, ensure_ascii=False)


def digest(value):
    return sha256(canonical(value).encode()).hexdigest()


def product(left, right):
    columns = list(zip(*right, strict=True))
    return [[sum(map(Fraction.__mul__, row, col)) for col in columns] for row in left]


def leading(values, bits):
    """Rounded to multiples of 2**(e - bits), 2**e the least power of two not below the largest."""
    largest = max(abs(x) for row in values for x in row)
    unit = Fraction(1, 2**200)
    while unit < largest:
        unit *= 2
    unit /= 2**bits
    return [[round(x / unit) * unit for x in row] for row in values]


def half(x):
    return Fraction(struct.unpack("<e", struct.pack("<e", float(x)))[0])


VECTORS_READ_BY = (
    "add_embedding.linear_1.weight",
    "time_text_embed.text_embedder.linear_1.weight",
)


ROWS_READ_BY = re.compile(
    r"(?!(transformer_)?blocks\.)([a-z0-9_]+\.)+attn2\.to_[kv]\.weight|context_embedder\.weight"
    r"|condition_embedder\.text_embedder\.linear_1\.weight"
)


def within(target):
    """What stands before the factors' names, of the stream that a target reads."""
    return "pooled." if target in VECTORS_READ_BY else ""


def delta(increment, tensors, target, weight):
    slug = increment["slug"]
    if increment["kind"] == "mask":
        return None
    if increment["kind"] in ("additive", "lora"):
        if target not in increment["exponents"]:
            return None
        exponent = increment["exponents"][target]
        rows = f"{within(target)}basis" if increment["kind"] == "additive" else f"down.{target}"
        up = matrix(tensors[f"{slug}.up.{target}"])
        exact = product(up, matrix(tensors[f"{slug}.{rows}"]))
    else:
        name = f"{slug}.{within(target)}"
        reads = target in VECTORS_READ_BY or ROWS_READ_BY.fullmatch(target)
        if not reads or f"{name}basis" not in tensors:
            return None
        of = increment["pooled"] if within(target) else increment
        exponent = of["shift_exponent"]
        bits = min(20, 31 - (len(weight[0]) - 1).bit_length())
        q = leading([[half(x) for x in row] for row in weight], bits)
        m = leading(product(q, matrix(tensors[f"{name}shift"])), 24)
        exact = product(m, matrix(tensors[f"{name}basis"]))
    return [[float(x * Fraction(2) ** exponent) for x in row] for row in exact]


def positions(increment, tensors, layer):
    """(row, column) of each weight that a mask makes zero."""
    if layer not in increment.get("masks", {}):
        return []
    found, at, masked = [], -1, increment["masks"][layer]
    for byte in tensors[f"{increment['slug']}.mask.{layer}"][2]:
        at += 255 if byte == 255 else byte + 1
        found += [] if byte == 255 else [divmod(at, masked["shape"][1])]
    assert len(found) == masked["count"]
    return found


def to_bytes(x, dtype):
    """Rounded once: struct rounds half to even, and bfloat16 is the upper half of a float32."""
    if dtype != "BF16":
        return struct.pack(f"<{LETTERS[dtype]}", x)
    below = struct.unpack("<I", struct.pack("<f", x))[0] >> 16
    near = [struct.pack("<H", bits) for bits in (below - 1, below, below + 1)]
    distances = [
        abs(Fraction(struct.unpack("<f", b"\0\0" + bits)[0]) - Fraction(x)) for bits in near
    ]
    return min(zip(distances, near, strict=True), key=lambda pair: (pair[0], pair[1][0] & 1))[1]


@pytest.mark.parametrize("case", INDEX["valid"], ids=lambda case: case["file"])
def test_digests(case):
    metadata, tensors = read(case["file"])
    manifest = json.loads(metadata["sepme"])
    assert canonical(manifest) == metadata["sepme"]
    assert sha256((VECTORS / case["file"]).read_bytes()).hexdigest() == case["patch_digest"]
    base = manifest["base"]
    del base["text_encoders"]
    base.pop("layers", None)
    assert digest(base) == case["base_digest"]
    found = {}
    for increment in manifest["increments"]:
        slug = increment.pop("slug")
        stored = increment.pop("digest")
        own = {
            name.removeprefix(f"{slug}."): {"sha256": sha256(data).hexdigest(), "shape": shape}
            for name, (_, shape, data) in tensors.items()
            if name.startswith(f"{slug}.")
        }
        found[slug] = digest({"increment": increment, "tensors": own})
        assert found[slug] == stored
    assert found == case["increments"]


def test_fingerprints():
    _, tensors = read(INDEX["weights"]["file"])
    found = {}
    for name, tensor in tensors.items():
        values = [x for row in matrix(tensor) for x in row]
        data = struct.pack(f"<{len(values)}e", *map(float, values))
        found[name] = sha256(data).hexdigest()
    assert found == INDEX["weights"]["fingerprints"]


@pytest.mark.parametrize("case", [case for case in INDEX["compose"] if "result" in case])
def test_compositions(case):
    metadata, tensors = read(case["patch"])
    increments = {i["slug"]: i for i in json.loads(metadata["sepme"])["increments"]}
    tensor = read(INDEX["weights"]["file"])[1][case["weight"]]
    weight = matrix(tensor)
    total = [[float(x) for x in row] for row in weight]
    for term in case["terms"]:
        for row, column in positions(increments[term["slug"]], tensors, case["target"]):
            total[row][column] = 0.0
    for term in sorted(case["terms"], key=lambda term: increments[term["slug"]]["digest"]):
        change = delta(increments[term["slug"]], tensors, case["target"], weight)
        if change is not None:
            total = [
                [x + term["scale"] * dx for x, dx in zip(*rows, strict=True)]
                for rows in zip(total, change, strict=True)
            ]
    result = b"".join(to_bytes(x, tensor[0]) for row in total for x in row)
    assert result.hex() == case["result"]

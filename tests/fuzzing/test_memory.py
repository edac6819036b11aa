"""What a file claims takes no memory: sizes are checked before anything is allocated.

The files are inspected in a process of their own, which may have little more address space than
it needed to start.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HEADER = 100_000_000
"""Bytes: the longest header that safetensors itself allows."""

_CHILD = """
import json, resource, sys
from pathlib import Path
from sepme_cli.errors import MalformedError
from sepme_cli.operations.inspect import inspect

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def kind(path):
    try:
        inspect(Path(path))
    except MalformedError as error:
        return str(error.message)
    return "accepted"

room, first, *paths = sys.argv[1:]
kind(first)  # whatever it imports and keeps
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + int(room),) * 2)
before = peak()
print(json.dumps([[kind(path), peak() - before] for path in paths]))
"""


def inspected(paths: Sequence[Path], room: int) -> list[tuple[str, int]]:
    """Of each file what was said of it, and by how much memory had grown then; room: in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(room), paths[0], *paths],
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return [(told, grown) for told, grown in json.loads(done.stdout)]


def junk(unit: bytes, begin: bytes, end: bytes) -> bytes:
    """A file that is a header as long as may be, with one thing in it over and over."""
    text = begin + unit * ((HEADER - len(begin) - len(end)) // len(unit)) + end
    return len(text).to_bytes(8, "little") + text


def test_a_hundred_megabytes_of_junk(tmp_path: Path) -> None:
    small = tmp_path / "small.safetensors"
    small.write_bytes(one_tensor(shape=[-1]))
    for name, (unit, begin, end) in {
        "objects": (b'{"a":1},', b'{"x":[', b"0]}"),
        "record": (b"[],", b'{"__metadata__":{"sepme":"[', b'0]"}}'),
        "name": (b"x", b'{"', b'":0}'),
    }.items():
        (tmp_path / f"{name}.safetensors").write_bytes(junk(unit, begin, end))
    paths = [small, *sorted(set(tmp_path.iterdir()) - {small})]
    found = dict(zip((path.stem for path in paths), inspected(paths, 5 * HEADER), strict=True))
    assert "H6" in found["name"][0] or "H12" in found["name"][0]
    assert "too many parts" in found["objects"][0] and "too many parts" in found["record"][0]
    assert max(grown for _, grown in found.values()) < 3.5 * HEADER


def one_tensor(**fields: object) -> bytes:
    whole = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} | fields
    text = json.dumps({"x": whole}).encode()
    return len(text).to_bytes(8, "little") + text + b"1234"


CLAIMS = {
    "length 2**63": (2**63).to_bytes(8, "little") + b"{}",
    "length 10**8": HEADER.to_bytes(8, "little") + b"{}",
    "overflow": one_tensor(shape=[2**52, 2**10]),
    "a terabyte": one_tensor(shape=[2**40], data_offsets=[0, 2**40]),
    "2**1696 elements": one_tensor(shape=[2**53 - 1] * 32),
    "a million dimensions": one_tensor(shape=[1] * 1_000_000),
    "of no elements": one_tensor(dtype="F64", shape=[2**31, 2**31, 0], data_offsets=[0, 2**50]),
    "begins beyond": one_tensor(data_offsets=[2**53 - 5, 2**53 - 1]),
}


def test_sizes_that_are_only_claimed(tmp_path: Path) -> None:
    """Of the million dimensions, the text itself is three megabytes."""
    paths = []
    for name, data in CLAIMS.items():
        for suffix in ("safetensors", "sepme"):
            paths.append(tmp_path / f"{name}.{suffix}")
            paths[-1].write_bytes(data)
    found = inspected(paths, 64 * 2**20)
    refused = ("[rule H", "nor any other kind of file that sepme knows", "is cut off")
    assert [told for told, _ in found if not any(words in told for words in refused)] == []
    assert found[-1][1] < 32 * 2**20

"""What once got through, or crashed: each must be refused, with a typed error, for good.

`crashers/` holds the texts; here they are put where a reader meets them.
"""

import json
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest

from tests.fuzzing import corpus
from tests.fuzzing.guard import Guard
from tests.fuzzing.targets import TARGETS, Target

CRASHERS = Path(__file__).with_name("crashers")
PATIENT = 60.0
"""Seconds of the processor: that nothing hangs, not how fast a machine is."""


def whole_file(header: bytes) -> bytes:
    """A safetensors file of zeros with this header."""
    sizes = {"F16": 2, "U8": 1}
    tensors = json.loads(header).values()
    data = sum(sizes[one["dtype"]] * prod(one["shape"]) for one in tensors)
    return len(header).to_bytes(8, "little") + header + bytes(data)


def journal_of(target: Target, names: bytes) -> bytes:
    """The journal of an interrupted write, telling of other files."""
    return corpus.renamed(target.examples[0], names.decode())


PLACES: dict[str, tuple[str, Callable[[Target, bytes], bytes]]] = {
    "recipe": ("recipe", lambda target, text: text),
    "index": ("folder", lambda target, text: b"\0" + text),
    "pending": ("pending", journal_of),
    "header": ("checkpoint", lambda target, text: whole_file(text)),
    "vocab": ("tokenizer", lambda target, text: b"\0" + text),
    "merges": ("tokenizer", lambda target, text: b"\1" + text),
    "tokenizer_config": ("tokenizer", lambda target, text: b"\2" + text),
}
CASES = sorted(path for path in CRASHERS.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_what_crashed_is_refused(path: Path, tmp_path: Path) -> None:
    name, place = PLACES[path.parent.name]
    target = TARGETS[name](tmp_path)
    outcome = Guard(tmp_path, PATIENT).run(target.check, place(target, path.read_bytes()))
    assert outcome.crash is None
    assert outcome.label.split()[0] in ("malformed", "unsupported")


@pytest.mark.parametrize("name", list(TARGETS))
def test_the_examples_are_read(name: str, tmp_path: Path) -> None:
    """Otherwise every mutant would be refused for one and the same reason."""
    target = TARGETS[name](tmp_path)
    guard = Guard(tmp_path, PATIENT)
    outcomes = [guard.run(target.check, example) for example in target.examples]
    assert [one for one in outcomes if one.crash] == []
    expected = "unsupported" if name == "lora" else "accepted"
    assert expected in {one.label for one in outcomes}

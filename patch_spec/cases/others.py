"""Stack records (S), undo journals (U) and weights without a fingerprint (F) that break a rule."""

import json
from collections.abc import Iterator

import numpy as np

from patch_spec.canonical import canonical_json
from patch_spec.cases.examples import KEY, TEXT_LAYER, VALUE, journal, stack, tensor_file, weights
from patch_spec.cases.tools import Change, Invalid, Members, put, raw


def other_cases() -> Iterator[Invalid]:
    """Files that are not patches."""
    for rule, about, change in (
        ("S1", "unordered", _reverse),
        ("S1", "increment-twice", _repeat),
        ("S2", "scale-0", put("increments", 0, "scale", to=0)),
        ("J7", "stack-empty", put("increments", to=[])),
        ("J7", "stack-no-layers", put("layers", to={})),
        ("J8", "stack-layer-fingerprint", put("layers", to={TEXT_LAYER: "0" * 63})),
        ("P1", "stack-layer-target", put("layers", to={KEY: "0" * 64})),
        ("J9", "stack-version-2", put("version", to=2)),
    ):
        yield Invalid(rule, about, _stack_file(change), "stack")
    yield Invalid("U1", "second-entry", journal({}, {"sepme_undo": "{}", "title": "tiny"}), "undo")
    yield Invalid("U2", "header-fp32", journal({"header": np.zeros(4, np.float32)}), "undo")
    yield Invalid("U3", "stranger", journal({VALUE: weights()["value.F16"]}), "undo")
    yield Invalid("U3", "other-dtype", journal({KEY: weights()["key.F32"]}), "undo")
    garbage = np.frombuffer(raw(b"x"), np.uint8)
    yield Invalid("H3", "original-header-garbage", journal({"header": garbage}), "undo")
    large = np.array([[65520.0]], np.float32)
    yield Invalid("F1", "beyond-fp16", tensor_file({}, {KEY: large}), "weights")
    nan = np.array([[np.nan]], np.float16)
    yield Invalid("F1", "not-a-number", tensor_file({}, {KEY: nan}), "weights")


def _stack_file(change: Change) -> bytes:
    members = json.loads(stack().to_metadata())
    change(members)
    return tensor_file({"sepme": canonical_json(members).decode()}, {KEY: weights()["key.F16"]})


def _reverse(record: Members) -> None:
    record["increments"].reverse()


def _repeat(record: Members) -> None:
    record["increments"].append(record["increments"][-1])

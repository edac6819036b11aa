"""Telling from its opcodes what a pickle would cost."""

import io
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from sepme_cli.checkpoints.reading import opcodes
from sepme_cli.checkpoints.reading.opcodes import check_cost


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_what_people_save_passes_and_a_stream_stops_behind_it(protocol: int) -> None:
    value = {"a": [(1, (2.5, "x")), {"b"}, b"bytes"], ("k", 1): None, "again": "a"}
    stream = io.BytesIO(pickle.dumps(value, protocol) + b"rest")
    check_cost(stream)
    assert stream.read() == b"rest"


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("wide", [2, 3, 5])
def test_tuples_that_unfold(wide: int, protocol: int) -> None:
    value: Any = ("x",)
    for level in range(100):
        if wide**level > 10**4:
            break
        value = (value,) * wide
    check_cost(pickle.dumps(value, protocol))
    for _ in range(12):
        value = (value,) * wide
    with pytest.raises(ValueError, match="more time or memory"):
        check_cost(pickle.dumps([value], protocol))


def test_too_many_opcodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opcodes, "_OPCODES", 50)
    check_cost(pickle.dumps([[]] * 5))
    with pytest.raises(ValueError, match="more time or memory"):
        check_cost(pickle.dumps([[] for _ in range(100)]))


@pytest.mark.parametrize(
    "data", [b"", b"\x80", b"\x80\x02(", b"nonsense", b"\x80\x02X\xff\xff\xff\x7f"]
)
def test_what_is_no_pickle(data: bytes) -> None:
    with pytest.raises(ValueError):
        check_cost(data)


@pytest.mark.parametrize("opcode", [b"\x8d", b"\x8e", b"\x96"])
def test_a_length_that_lies_takes_no_memory(opcode: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.pkl").write_bytes(b"\x80\x05" + opcode + (2**40).to_bytes(8, "little") + b"x.")
    with (tmp_path / "m.pkl").open("rb") as file:
        tracemalloc.start()
        with pytest.raises(ValueError):
            check_cost(file)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()

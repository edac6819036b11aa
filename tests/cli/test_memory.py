"""What torch says where memory ends is no bug of ours, and says what helps."""

import pytest
import torch

from sepme_cli.app import _typed
from sepme_cli.errors import SystemFailure
from sepme_cli.render.console import Output
from tests.cli.conftest import Run


def refused_by_the_processor() -> Exception:
    try:
        torch.empty(2**58)
    except RuntimeError as error:
        return error
    raise AssertionError("so much memory there is not")


@pytest.mark.parametrize(
    "error",
    [
        refused_by_the_processor(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.0 GB)"),
    ],
    ids=["cpu", "cuda", "mps"],
)
def test_too_little_memory(error: Exception) -> None:
    told = _typed(error)
    assert isinstance(told, SystemFailure)
    assert "--low-memory" in told.message


def test_another_error_of_torch_is_a_bug(sepme: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(_: object) -> None:
        torch.empty(2, 3) @ torch.empty(2, 3)

    monkeypatch.setattr(Output, "__enter__", bug)
    assert sepme("inspect", "x", "--json").json["error"]["kind"] == "internal"

"""Pickles as training programs write them: weights wherever they are, and whatever is beside."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.errors import MalformedError
from tests.layouts import Tensors, parts, to_torch, write_ckpt
from tests.synthetic import checkpoint_tensors, make_checkpoint


def state(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {name: to_torch(value) for name, (_, value) in tensors.items()}


def each(tensors: Tensors) -> dict[str, Any]:
    """A dictionary for each module, as the demo of ESD saved them."""
    found: dict[str, Any] = {}
    for name, value in state(tensors).items():
        module, leaf = name.rsplit(".", 1) if "." in name else ("other", name)
        found.setdefault(module, {})[leaf] = value
    return found


PICKLES: dict[str, Callable[[Tensors], dict[str, Any]]] = {
    "bare": state,
    "Lightning": lambda t: {"state_dict": state(t), "global_step": 1},
    "a training loop": lambda t: {"model_state_dict": state(t), "epoch": 3},
    "model": lambda t: {"model": state(t), "optimizer": {"lr": 0.1}},
    "DeepSpeed": lambda t: {"module": state(t), "dp_world_size": 8},
    "networks": lambda t: {n: state(own) for n, own in parts(t).items()},
    "modules": each,
    "DataParallel": lambda t: {f"module.{n}": v for n, v in state(t).items()},
    "numpy scalars": lambda t: {
        "state_dict": state(t),
        "lr_schedulers": [
            {"base_lrs": [np.float64(1e-4)], "step": np.int64(7), "on": np.bool_(True)}
        ],
    },
    "numpy arrays": lambda t: {"state_dict": state(t), "rng": np.arange(5, dtype=np.uint32)},
    "numpy in the state": lambda t: {**state(t), "decay": np.float32(0.999)},
}
"""How a .ckpt holds its weights."""


@pytest.mark.parametrize("case", PICKLES)
@pytest.mark.parametrize("archive", [True, False])
def test_pickles_of_other_programs(case: str, archive: bool, tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    path = tmp_path / "m.ckpt"
    saved = PICKLES[case](tensors)
    torch.save(saved, path, _use_new_zipfile_serialization=archive)
    plain = make_checkpoint(tmp_path / "m.safetensors")
    with open_checkpoint(plain) as one, open_checkpoint(path) as checkpoint:
        assert checkpoint.base(text_encoders=True) == one.base(text_encoders=True)


@pytest.mark.parametrize("old", [False, True])
def test_numpy_of_either_version(old: bool, tmp_path: Path) -> None:
    """numpy 2 moved what its pickles name; the file itself is made with the other name."""
    path = write_ckpt(tmp_path / "m.ckpt", checkpoint_tensors(), lr=np.float64(0.5))
    data = path.read_bytes()
    assert b"numpy._core.multiarray" in data or b"numpy.core.multiarray" in data
    if old:
        torch.save(
            {"state_dict": state(checkpoint_tensors()), "lr": np.float64(0.5)},
            path,
            _use_new_zipfile_serialization=False,
        )
        path.write_bytes(path.read_bytes().replace(b"numpy._core.", b"numpy.core."))
    with open_checkpoint(path) as checkpoint:
        assert len(checkpoint.targets) > 1


def test_two_models_in_a_pickle_are_not_guessed_at(tmp_path: Path) -> None:
    both = {"model": state(checkpoint_tensors()), "module": state(checkpoint_tensors(seed=1))}
    torch.save(both, tmp_path / "m.ckpt")
    with pytest.raises(MalformedError, match=r"several models \(model, module\)"):
        open_checkpoint(tmp_path / "m.ckpt")

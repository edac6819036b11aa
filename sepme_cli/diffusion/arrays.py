"""torch's tensors and numpy's arrays, made of each other without a change of a bit."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sepme_cli.checkpoints.structure.dtypes import FP8, numpy_dtype
from sepme_cli.checkpoints.structure.torch_dtypes import TORCH

Array = npt.NDArray[Any]

_LACKED: Mapping[torch.dtype, np.dtype[Any]] = {
    TORCH[name]: numpy_dtype(name) for name in ("BF16", *FP8)
}
"""The floats that numpy lacks: torch does not know ml_dtypes', but takes and gives their bits."""
_BITS = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.int16)}
"""The integers of so many bytes that stand for bits."""


def to_numpy(tensor: Tensor) -> Array:
    """A copy of a tensor in main memory, the same bits."""
    copied = tensor.detach().to("cpu", copy=True).contiguous()
    wanted = _LACKED.get(tensor.dtype)
    if wanted is not None:
        return copied.view(_BITS[wanted.itemsize][0]).numpy().view(wanted)
    values: Array = copied.numpy()
    return values


def as_tensor(values: Array) -> Tensor:
    """The same memory as a tensor."""
    for ours, theirs in _LACKED.items():
        if values.dtype == theirs:
            return torch.from_numpy(values.view(_BITS[theirs.itemsize][1])).view(ours)
    return torch.from_numpy(values)


def to_torch(values: Array, dtype: torch.dtype) -> Tensor:
    """An array of any float dtype as a tensor of `dtype`, its own memory."""
    return as_tensor(np.array(values)).to(dtype)

"""Tensors of an open checkpoint as torch has them."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.checkpoints.reading.networks import Network
from sepme_cli.checkpoints.reading.text_encoders import transformers_name, unfused
from sepme_cli.checkpoints.structure.dtypes import NAMES
from sepme_cli.diffusion.arrays import to_torch
from sepme_cli.increments import Scaled, compose


def tensors_of(
    network: Network, dtype: torch.dtype, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """A network's floating tensors in `dtype`, read one at a time."""
    return {
        name: to_torch(stored.read(), dtype)
        for name, stored in network.tensors.items()
        if stored.dtype in NAMES and wanted(name) and not name.endswith(_SCALES)
    }


def clip_tensors(network: Network, dtype: torch.dtype) -> dict[str, Tensor]:
    """A text encoder's tensors by transformers' names, without `text_model.`.

    `text_projection.weight` is [out, width], as transformers has it.
    """
    found: dict[str, Tensor] = {}
    for theirs, stored in network.tensors.items():
        if name := transformers_name(network.naming, theirs):
            for part_name, part in unfused(name, stored):
                found[part_name] = to_torch(part, dtype)
        elif theirs in _PROJECTIONS:
            value = to_torch(stored.read(), dtype)
            # OpenCLIP multiplies from the other side.
            found["text_projection.weight"] = value if theirs.endswith(".weight") else value.T
    return _without_unused_layers(found, network.unused_layers)


_SCALES = (".scale_weight", ".weight_scale", ".scale_input", "scaled_fp8")
"""How the tensors end that scale fp8 weights: what is read has them in it."""
_PROJECTIONS = ("text_projection", "text_projection.weight")


def _without_unused_layers(tensors: Mapping[str, Tensor], unused: int) -> dict[str, Tensor]:
    last = count_layers(tensors) - unused
    dropped = tuple(f"encoder.layers.{i}." for i in range(last, last + unused))
    return {name: value for name, value in tensors.items() if not name.startswith(dropped or "\0")}


def count_layers(names: Mapping[str, object]) -> int:
    """How many transformer layers a text encoder with these tensors has."""
    layers = [int(name.split(".")[2]) for name in names if name.startswith("encoder.layers.")]
    return max(layers, default=-1) + 1


def patched_weights(checkpoint: Checkpoint, stack: Sequence[Scaled]) -> dict[str, Tensor]:
    """The targets' weights [out, d] with increments added, in fp32, rounded as `apply` stores
    them."""
    return {
        target.name: to_torch(compose(target.read(), stack, target.name), torch.float32)
        for target in checkpoint.targets
    }

"""Tensors of an open checkpoint as torch has them."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.checkpoints.reading.networks import Network
from sepme_cli.checkpoints.reading.targets import Target
from sepme_cli.checkpoints.reading.tensors import is_companion
from sepme_cli.checkpoints.reading.text_encoders import (
    check_numbers,
    transformers_name,
    unfused,
)
from sepme_cli.checkpoints.structure.dtypes import NAMES
from sepme_cli.checkpoints.structure.layers import WHOLE
from sepme_cli.diffusion.arrays import Array, as_tensor, to_torch
from sepme_cli.increments import Scaled, compose

Value = TypeVar("Value")


def tensors_of(
    network: Network, dtype: torch.dtype, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """A network's floating tensors in `dtype`, read one at a time."""
    return {
        name: to_torch(stored.read(), dtype)
        for name, stored in network.tensors.items()
        if stored.dtype in NAMES and wanted(name) and not is_companion(name)
    }


def mapped_tensors(
    network: Network, dtype: torch.dtype, wanted: Callable[[str], bool]
) -> dict[str, Tensor]:
    """As `tensors_of`; what is stored in `dtype` stays in its file and takes no memory of its own.

    The file must stay open as long as they are used.
    """
    return {
        name: as_tensor(_writable(stored.mapped())).to(dtype)
        for name, stored in network.tensors.items()
        if stored.dtype in NAMES and wanted(name) and not is_companion(name)
    }


def _writable(values: Array) -> Array:
    """Torch takes no others: a copy of what was read, where nothing could be mapped."""
    return values if values.flags.writeable else np.array(values)


def clip_tensors(network: Network, dtype: torch.dtype) -> dict[str, Tensor]:
    """A text encoder's tensors by transformers' names, without `text_model.`.

    `text_projection.weight` is [out, width], as transformers has it.
    """
    found: dict[str, Tensor] = {}
    for theirs, stored in network.tensors.items():
        if name := transformers_name(network.naming, theirs):
            check_numbers(stored)
            for part_name, part in unfused(name, stored):
                found[part_name] = to_torch(part, dtype)
        elif theirs in _PROJECTIONS:
            check_numbers(stored)
            value = to_torch(stored.read(), dtype)
            # OpenCLIP multiplies from the other side.
            found["text_projection.weight"] = value if theirs.endswith(".weight") else value.T
    return _without_unused_layers(found, network.unused_layers)


def clip_shapes(network: Network) -> dict[str, tuple[int, ...]]:
    """The shapes of the same but for the attention's, from the header alone."""
    found: dict[str, tuple[int, ...]] = {}
    for theirs, stored in network.tensors.items():
        if name := transformers_name(network.naming, theirs):
            found[name] = stored.shape
        elif theirs in _PROJECTIONS:
            shape = stored.shape
            found["text_projection.weight"] = shape if theirs.endswith(".weight") else shape[::-1]
    return _without_unused_layers(found, network.unused_layers)


_PROJECTIONS = ("text_projection", "text_projection.weight")


def _without_unused_layers(tensors: Mapping[str, Value], unused: int) -> dict[str, Value]:
    last = count_layers(tensors) - unused
    dropped = tuple(f"encoder.layers.{i}." for i in range(last, last + unused))
    return {name: value for name, value in tensors.items() if not name.startswith(dropped or "\0")}


def count_layers(names: Mapping[str, object]) -> int:
    """How many transformer layers a text encoder with these tensors has."""
    found = (re.match(r"encoder\.layers\.(\d{1,4})\.", name) for name in names)
    return max((int(layer[1]) for layer in found if layer), default=-1) + 1


def patched_weights(checkpoint: Checkpoint, stack: Sequence[Scaled]) -> dict[str, Tensor]:
    """The weights [out, columns] of all targets, and of the layers that increments change, with
    these added, in fp32, rounded as `apply` stores them."""
    layers = checkpoint.layers_of(part for part, _ in stack)
    return {target.name: _patched(target, stack) for target in (*checkpoint.targets, *layers)}


@contextmanager
def replaced_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """A network with some parameters replaced, for the length of the block.

    weights: by the parameters' names; of a kernel [out, in, 1, 1] as a matrix.
    """
    parameters = {name: network.get_parameter(name) for name in weights}
    originals = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, weight in weights.items():
            parameters[name].data = weight.to(originals[name]).reshape(originals[name].shape)
        yield
    finally:
        for name, weight in originals.items():
            # The network may have been moved meanwhile.
            parameters[name].data = weight.to(parameters[name])


@contextmanager
def added_products(products: Iterable[tuple[nn.Module, Tensor, Tensor]]) -> Iterator[None]:
    """Linear layers with up @ down added to their weights, for the length of the block;
    differentiable in both. products: layer, down [r, in], up [out, r]."""

    def adder(down: Tensor, up: Tensor) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + nn.functional.linear(nn.functional.linear(inputs[0], down), up)

        return add

    with ExitStack() as stack:
        for layer, down, up in products:
            stack.callback(layer.register_forward_hook(adder(down, up)).remove)
        yield


def _patched(target: Target, stack: Sequence[Scaled]) -> Tensor:
    weight = to_torch(compose(target.read(), stack, target.name), torch.float32)
    stored = target.copies[0]
    if stored.part.columns is None:
        return weight
    beside = replace(stored, part=WHOLE).read()[:, stored.part.columns :]
    return torch.cat([weight, to_torch(beside, torch.float32)], 1)

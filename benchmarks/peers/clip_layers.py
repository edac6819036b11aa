"""The layers of a CLIP text encoder, for peers that train them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from benchmarks.peers.interface import Edit, overwritten
from sepme_cli.diffusion.text_encoder import TextEncoder


@contextmanager
def learning(clip: TextEncoder, chosen: Callable[[str], bool]) -> Iterator[dict[str, nn.Parameter]]:
    """The weight matrices of chosen layers, to be trained in place; their own values come back at
    the end of the block. chosen: whether a parameter is one, by its name."""
    found = {
        name: parameter
        for name, parameter in clip.model.named_parameters()
        if name.startswith("encoder.layers.") and parameter.ndim == 2 and chosen(name)
    }
    own = {name: parameter.detach().clone() for name, parameter in found.items()}
    try:
        for parameter in found.values():
            parameter.requires_grad_()
        yield found
    finally:
        with torch.no_grad():
            for name, parameter in found.items():
                parameter.requires_grad_(False).copy_(own[name])


def as_edit(clip: TextEncoder, learned: dict[str, nn.Parameter]) -> Edit:
    """What was trained, by the names that patches give layers."""
    weights = {name: value.detach().clone() for name, value in learned.items()}
    return overwritten({f"{clip.spec.name}.{name}": value for name, value in weights.items()})


def last_layer(clip: TextEncoder, ids: Tensor) -> Tensor:
    """What the last layer makes of token ids, before the final norm [n, positions, width]."""
    seen: list[Tensor] = []

    def see(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    count = clip.config["num_hidden_layers"]
    layer = clip.model.get_submodule(f"encoder.layers.{count - 1}")
    hook = layer.register_forward_hook(see)
    try:
        clip.encode_tokens(ids)
    finally:
        hook.remove()
    return seen[0]

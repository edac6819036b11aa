"""A transformer's tensors by diffusers' names, whoever named them in the file."""

from collections.abc import Mapping

import torch
from torch import Tensor

from patch_spec.base import Family
from sepme_cli.checkpoints.structure.transformer_names import in_diffusers


def in_diffusers_names(tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """A transformer's tensors by diffusers' names; those that no rule knows are left out.

    tensors: by their authors' names, without what the file puts before all of them.
    """
    found: dict[str, Tensor] = {}
    if "pos_embed" in tensors:  # of Stable Diffusion 3
        found["pos_embed.pos_embed"] = tensors["pos_embed"]
    for name, module in in_diffusers(family, tensors):
        value, leaf = tensors[name], name.rpartition(".")[2]
        if module.exchanged:
            value = torch.cat(value.chunk(2)[::-1])
        for ours, part in zip(module.ours, value.split(module.rows(len(value))), strict=True):
            found[f"{ours}.{'weight' if leaf == 'scale' else leaf}"] = part
    return found

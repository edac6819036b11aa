"""What patches add to the weights of a UNet, for programs that patch in a way of their own."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from sepme_cli.arguments import Words
from sepme_cli.checkpoints.reading.patches import Patches, Scale, with_scales
from sepme_cli.composing.matching import chosen_for
from sepme_cli.diffusion.arrays import to_numpy
from sepme_cli.diffusion.live import CrossAttention
from sepme_cli.increments import delta
from sepme_cli.progress import SILENT, Progress


def deltas(
    weights: Mapping[str, Tensor],
    patches: Patches,
    *,
    only: Words = (),
    scale: Scale = 1.0,
    progress: Progress = SILENT,
) -> dict[str, Tensor]:
    """Compute what patches add to the weights of a UNet, for programs that patch by themselves.

    Args:
        weights: All weights of an unpatched UNet, by their names in diffusers or CompVis (with or
            without "model.diffusion_model.").
        patches: Patches: files, places on the hub, or binary streams.
        only: Use only these concepts or slugs.
        scale: Strength of all increments; or of each concept by name, and 1 for the others.
        progress: Receives warnings.

    Returns:
        For each weight that changes, by its name in `weights`, the sum of scale * dW: fp32
        [out, width] on the CPU.

    Raises:
        RefusedError: No patch has one of the concepts.
        MismatchError: A patch is for another kind of model.
        UnsupportedError: The weights are not those of a supported UNet.
        MalformedError: A patch is damaged, or weights are not finite.
        SystemFailure: A patch cannot be read.
    """
    attention = CrossAttention.of(weights)
    terms = with_scales(chosen_for(attention, patches, only, progress), scale)
    found = {}
    for target, weight in attention.by_name.items():
        own = attention.names[target]
        acting = [(part, factor) for part, factor in terms if factor and part.acts_on(target)]
        if acting:
            values = to_numpy(weight)
            total = sum(factor * delta(part, target, values) for part, factor in acting)
            change = torch.zeros(tuple(weights[own].shape), dtype=torch.float32)
            change[:, : values.shape[1]] = torch.from_numpy(np.asarray(total, np.float32))
            found[own] = change
    return found

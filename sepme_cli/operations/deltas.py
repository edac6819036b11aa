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
    """sum of scale * dW of each weight that the patches change, fp32 [out, d] on the CPU.

    weights: all of a UNet, by its own names (diffusers' or CompVis', with or without
    "model.diffusion_model."), as they are without patches. only, scale: see `patched`.
    Raises as `patched` does for patches that do not fit, and MalformedError for weights that are
    not finite.
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

"""sepme itself, through what its commands call, with the settings it ships with.

What sepme protects of its own accord is part of it; captions that are handed over are not read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from benchmarks.erasing import erase, patch_of
from benchmarks.peers.interface import Edit, Request
from patch_spec.container import patch_bytes
from sepme_cli.diffusion.eraser import ComputedIncrement
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.erasure.concept import Protected
from sepme_cli.erasure.settings import Settings
from sepme_cli.increments import compose


@dataclass(frozen=True)
class Ours:
    """method: as `sepme erase --method` has it."""

    method: Literal["closed-form", "sepme"]
    settings: Settings = Settings()

    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def edit(self, request: Request) -> Edit:
        kept = request.protect
        computed = erase(request.model, request.words, self.method, self.settings, protected=kept)
        return edit_of(request.model, computed, kept)


def edit_of(
    model: StableDiffusion,
    computed: Sequence[ComputedIncrement],
    protected: Protected | None = None,
) -> Edit:
    """What one patch of all these increments does. protected: see `erase`."""
    increments = tuple(one.increment for one in computed)
    patch = patch_bytes(patch_of(model.checkpoint, increments, protected))
    stack = [(increment, 1.0) for increment in increments]
    weights = {
        target.name: torch.from_numpy(compose(target.read(), stack, target.name))
        for target in model.checkpoint.targets
    }
    return Edit(weights, stored=len(patch), increments=increments)

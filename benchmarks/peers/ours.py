"""sepme itself, through what its commands call, with the settings it ships with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from benchmarks.canvas import Canvas
from benchmarks.erasing import erase, patch_of
from benchmarks.peers.interface import Edit, Request
from patch_spec.container import patch_bytes
from sepme_cli.diffusion.eraser import Made
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.erasure.settings import Settings


@dataclass(frozen=True)
class Ours:
    """method: as `sepme erase --method` has it."""

    method: Literal["closed-form", "sepme"]
    settings: Settings = Settings()

    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def edit(self, request: Request) -> Edit:
        return edit_of(
            request.model, erase(request.model, request.words, self.method, self.settings)
        )


def edit_of(model: StableDiffusion, made: Sequence[Made]) -> Edit:
    """What one patch of all these increments does."""
    increments = tuple(m.increment for m in made)
    patch = patch_bytes(patch_of(model.checkpoint, increments))
    weights = Canvas().patched([(increment, 1.0) for increment in increments])
    return Edit(weights, stored=len(patch), increments=increments)

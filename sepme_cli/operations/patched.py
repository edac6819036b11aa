"""Patch a pipeline that is loaded, and put it back exactly. No file is written.

For a block, and of one concept only half::

    with sepme.patched(pipe, "artists.sepme", scale={"Monet": 0.5}):
        pipe("a garden by Monet")
    pipe("a garden by Monet")  # the original weights again, to the last bit

Or for as long as a server runs, with other scales for one call::

    live = sepme.patched(pipe, "artists.sepme")
    with live.scaled({"Monet": 0}):
        pipe("a garden by Monet")
    live.set_scale(0.8)
    live.restore()

What is in the weights is always composed anew from the originals, in one rounding: inside, they are
what `sepme apply` writes with the same patches and scales, whatever was in them in between; several
may be in at once, and go in any order. A UNet has one set of weights: calls at the same time share
them, and threads that want different ones have to take turns.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from torch import nn

from patch_spec.increment import Increment
from sepme_cli.arguments import Words
from sepme_cli.checkpoints.reading.patches import Patches, Scale, with_scales
from sepme_cli.composing.matching import applied_already, chosen_for
from sepme_cli.diffusion.live import LiveWeights
from sepme_cli.errors import RefusedError, UnsupportedError
from sepme_cli.progress import SILENT, Collector, Progress


class LivePatch:
    """Increments that are in a UNet until `restore`, or until the end of a `with` block."""

    def __init__(
        self,
        weights: LiveWeights,
        parts: Sequence[Increment],
        scale: Scale,
        warnings: tuple[str, ...] = (),
    ) -> None:
        """Made by `patched`. warnings: what a user should know."""
        self.warnings = warnings
        self._weights: LiveWeights | None = weights
        self._parts = tuple(parts)
        weights.hold(self, with_scales(self._parts, scale))
        self._scale = scale

    @property
    def concepts(self) -> tuple[str, ...]:
        """The concepts that are taken out, or were."""
        return tuple(part.concept for part in self._parts)

    @property
    def scale(self) -> Scale:
        """How much of each is in there now, as it was last said."""
        return self._scale

    def set_scale(self, scale: Scale) -> None:
        """Have so much of each concept taken out from now on; 0 is nothing.

        Raises UsageError, RefusedError for a concept that is none of these and after `restore`.
        """
        if self._weights is None:
            raise RefusedError(
                "the patch has been put back: patch anew", expected="a patch that is in there"
            )
        self._weights.hold(self, with_scales(self._parts, scale))
        self._scale = scale

    @contextmanager
    def scaled(self, scale: Scale) -> Iterator[Self]:
        """The same for the length of a block; raises as `set_scale` does."""
        before = self._scale
        self.set_scale(scale)
        try:
            yield self
        finally:
            if self._weights is not None:
                self.set_scale(before)

    def restore(self) -> None:
        """Put the concepts back. After the last patch of a UNet, its weights are the original's
        bits. A second time changes nothing.

        Raises RefusedError while a LoRA is fused into the weights, and UnsupportedError while
        they are offloaded layer by layer.
        """
        if self._weights is not None:
            self._weights.drop(self)
            self._weights = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()


def patched(
    pipeline: Any,
    patches: Patches,
    *,
    only: Words = (),
    scale: Scale = 1.0,
    progress: Progress = SILENT,
) -> LivePatch:
    """Take the concepts of patches out of a loaded pipeline, at once; see this module.

    pipeline: a diffusers pipeline with a UNet, or a UNet (diffusers' or CompVis'), on any device,
    in fp64, fp32, fp16, bf16 or fp8. LoRA layers around its own stay, on top. only: of the
    patches, these concepts or slugs. scale: how much of each increment; or {concept: how much},
    of the others all. Any model of the patches' family is taken, as fine-tunes are.
    The originals are kept in main memory meanwhile: in fp16 37 MiB for SD 1.x, 650 MiB for XL.
    What a user should know is in the result's `warnings`.
    Raises UsageError; RefusedError for an unknown concept, for one that is out already, and while
    a LoRA or projections are fused; MismatchError for a patch of another kind of model;
    UnsupportedError for what has no such UNet, for keys or values that are not where they are
    looked for, and for weights that are quantised or offloaded layer by layer or to the disk;
    MalformedError and SystemFailure for files.
    """
    progress = Collector(progress)
    weights = LiveWeights.of(_unet(pipeline))
    parts = chosen_for(weights.attention, patches, only, progress)
    if repeated := [part for part in parts if part.digest in weights.present]:
        raise applied_already("the UNet", repeated)
    return LivePatch(weights, parts, scale, progress.warnings)


def _unet(pipeline: Any) -> nn.Module:
    found = getattr(pipeline, "unet", pipeline)
    if isinstance(found, nn.Module):
        return found
    raise UnsupportedError(
        f"a {type(pipeline).__name__} has no UNet that could be patched",
        expected="a Stable Diffusion pipeline, or a UNet",
        found=type(pipeline).__name__,
    )

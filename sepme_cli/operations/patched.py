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
from sepme_cli.diffusion.live import NAME, LiveWeights
from sepme_cli.errors import RefusedError, UnsupportedError
from sepme_cli.progress import SILENT, Collector, Progress


class LivePatch:
    """Increments in a UNet until `restore`, or until the end of a `with` block. Made by `patched`.

    Attributes:
        concepts: Names of the concepts.
        scale: Strength of the increments, as it was set last.
        warnings: What a user should know.
    """

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
        """Names of the concepts."""
        return tuple(part.concept for part in self._parts)

    @property
    def scale(self) -> Scale:
        """Strength of the increments, as it was set last."""
        return self._scale

    def set_scale(self, scale: Scale) -> None:
        """Set the strength; 0 disables.

        Args:
            scale: Strength of all increments; or of each concept by name, and 1 for the others.

        Raises:
            UsageError: A strength is not a number.
            RefusedError: There is no such concept, or the patch was restored.
        """
        if self._weights is None:
            raise RefusedError(
                "the patch was put back: patch again", expected="a patch that is applied"
            )
        self._weights.hold(self, with_scales(self._parts, scale))
        self._scale = scale

    @contextmanager
    def scaled(self, scale: Scale) -> Iterator[Self]:
        """Set the strength for the length of a `with` block.

        Args:
            scale: Strength of all increments; or of each concept by name, and 1 for the others.

        Yields:
            This patch.

        Raises:
            UsageError: A strength is not a number.
            RefusedError: There is no such concept, or the patch was restored.
        """
        before = self._scale
        self.set_scale(scale)
        try:
            yield self
        finally:
            if self._weights is not None:
                self.set_scale(before)

    def restore(self) -> None:
        """Take the increments out again. Calling it twice is harmless.

        After the last patch of a UNet, its weights are the original's, bit for bit.

        Raises:
            RefusedError: A LoRA is fused into the weights.
            UnsupportedError: The weights are offloaded layer by layer.
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
    """Patch a loaded pipeline in memory.

    The weights are bit for bit those that `apply` writes with the same patches and scales. The
    originals are kept in main memory meanwhile: 37 MiB for SD 1.x and 650 MiB for XL, in fp16. A
    UNet has one set of weights: threads that need different ones must take turns.

    Args:
        pipeline: A diffusers pipeline with a UNet, or a UNet of diffusers or CompVis; on any
            device, in fp64, fp32, fp16, bf16 or fp8. LoRA layers around its own weights stay.
        patches: Patches: files, places on the hub, or binary streams. Any model of their family is
            accepted, fine-tunes too.
        only: Use only these concepts or slugs.
        scale: Strength of all increments; or of each concept by name, and 1 for the others.
        progress: Receives warnings.

    Returns:
        The patch, applied: a context manager that restores the weights at its end. What a user
        should know is in its `warnings`.

    Raises:
        UsageError: There is no patch, or a strength is not a number.
        RefusedError: No patch has one of the concepts, it is erased already, or a LoRA or
            projections are fused.
        MismatchError: A patch is for another kind of model.
        UnsupportedError: There is no such UNet, its keys or values are not found, or they are
            quantised, or offloaded layer by layer or to a disk.
        MalformedError: A patch is damaged or hostile.
        SystemFailure: A patch cannot be read.
    """
    progress = Collector(progress)
    weights = LiveWeights.of(_denoiser(pipeline))
    parts = chosen_for(weights.attention, patches, only, progress)
    if repeated := [part for part in parts if part.digest in weights.present]:
        raise applied_already(NAME, repeated)
    return LivePatch(weights, parts, scale, progress.warnings)


def _denoiser(pipeline: Any) -> nn.Module:
    inner = (getattr(pipeline, name, None) for name in ("unet", "transformer"))
    found = next((one for one in inner if one is not None), pipeline)
    if isinstance(found, nn.Module):
        return found
    raise UnsupportedError(
        f"a {type(pipeline).__name__} has no UNet or transformer that could be patched",
        expected="a Stable Diffusion or Flux pipeline, a UNet, or a transformer",
        found=type(pipeline).__name__,
    )

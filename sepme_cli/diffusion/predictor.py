"""The UNet as the optimisation sees it: a callable that knows no file."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.text import Conditioning


class EditedPredictor:
    """eps'(x_t, c) for one concept's phrases, with increments added to the targets.

    context: of the phrases. See `erasure.optimise.NoisePredictor`.
    """

    def __init__(self, model: StableDiffusion, context: Conditioning) -> None:
        self._model = model
        self._context = context.to(model.device, model.dtype)

    def __call__(
        self, noisy: Tensor, steps: Tensor, prompts: Tensor, up: Mapping[str, Tensor], basis: Tensor
    ) -> Tensor:
        model = self._model
        moved = {name: factor.to(model.device, model.dtype) for name, factor in up.items()}
        edited = partial(self._edited, moved, basis.to(model.device, model.dtype))
        if model.frugal:
            model.unet.enable_gradient_checkpointing(partial(_recomputed, edited))
        with edited():
            predicted = [
                model.predict(
                    noisy[part].to(model.device, model.dtype),
                    steps[part].to(model.device),
                    self._context[prompts[part]],
                )
                for part in torch.arange(len(noisy)).split(model.at_once(len(noisy)))
            ]
        return torch.cat(predicted).float().cpu()

    @contextmanager
    def _edited(self, up: Mapping[str, Tensor], basis: Tensor) -> Iterator[None]:
        """The UNet with increments added."""
        model = self._model
        # Fused attention is several times slower backwards than the plain one on a CPU, which
        # keeps a number for every pair of places.
        plain = model.device.type == "cpu" and not model.frugal
        with (
            model.with_increment(up, basis),
            sdpa_kernel(SDPBackend.MATH) if plain else nullcontext(),
        ):
            yield


def _recomputed(
    edited: Callable[[], AbstractContextManager[None]], block: Callable[..., Any], *inputs: Any
) -> Any:
    """A block whose activations are computed again backwards instead of kept (Chen et al. 2016).

    That is when the increments are no longer in the UNet, so they are added for it again.
    """
    return checkpoint(
        block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), edited())
    )

"""The UNet as the optimisation sees it: a callable that knows no file."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from sepme_cli.diffusion.conditioning import Conditioning
from sepme_cli.diffusion.denoiser import Denoiser


class EditedPredictor:
    """eps'(x_t, c) for one concept's phrases, with increments added to the targets.

    context: of the phrases. See `erasure.optimise.NoisePredictor`.
    """

    def __init__(self, denoiser: Denoiser, context: Conditioning) -> None:
        self._denoiser = denoiser
        self._context = denoiser.machine.put(context)

    def __call__(
        self, noisy: Tensor, steps: Tensor, prompts: Tensor, up: Mapping[str, Tensor], basis: Tensor
    ) -> Tensor:
        machine = self._denoiser.machine
        moved = {name: machine.put(factor) for name, factor in up.items()}
        edited = partial(self._edited, moved, machine.put(basis))
        if machine.frugal:
            self._denoiser.network.enable_gradient_checkpointing(partial(_recomputed, edited))
        with edited():
            predicted = [
                self._denoiser.predict(
                    machine.put(noisy[part]),
                    steps[part].to(machine.device),
                    self._context[prompts[part]],
                )
                for part in torch.arange(len(noisy)).split(machine.at_once(len(noisy)))
            ]
        return torch.cat(predicted).float().cpu()

    @contextmanager
    def _edited(self, up: Mapping[str, Tensor], basis: Tensor) -> Iterator[None]:
        """The UNet with increments added."""
        machine = self._denoiser.machine
        # Fused attention is several times slower backwards than the plain one on a CPU, which
        # keeps a number for every pair of places.
        plain = machine.device.type == "cpu" and not machine.frugal
        with (
            self._denoiser.with_increment(up, basis),
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

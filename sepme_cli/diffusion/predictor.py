"""The UNet as the optimisation sees it: a callable that knows no file."""

from collections.abc import Mapping
from contextlib import nullcontext

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

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
        # Fused attention is several times slower backwards than the plain one on a CPU.
        plain = model.device.type == "cpu"
        moved = {name: factor.to(model.device, model.dtype) for name, factor in up.items()}
        with (
            model.with_increment(moved, basis.to(model.device, model.dtype)),
            sdpa_kernel(SDPBackend.MATH) if plain else nullcontext(),
        ):
            predicted = model.predict(
                noisy.to(model.device, model.dtype), steps.to(model.device), self._context[prompts]
            )
        return predicted.float().cpu()

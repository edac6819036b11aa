"""The UNet of a checkpoint, and the weights in it that a patch may change."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from patch_spec.streams import Stream, stream_of
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.diffusion.arrays import to_torch
from sepme_cli.diffusion.conditioning import Conditioning
from sepme_cli.diffusion.devices import Machine
from sepme_cli.diffusion.loading import load_unet
from sepme_cli.diffusion.schedule import NoiseSchedule
from sepme_cli.diffusion.vae import VAE
from sepme_cli.errors import UnsupportedError

_LARGEST_SIDE = 1024
"""Of a latent; beyond it a configuration speaks of something else."""


@dataclass(frozen=True)
class UNet:
    """Loaded when it is first used, in the machine's dtype; the file may hold another.

    schedule: of the noise that it predicts. vae: of the latents that it reads.
    """

    checkpoint: Checkpoint = field(repr=False)
    machine: Machine
    schedule: NoiseSchedule
    vae: VAE

    @property
    def network(self) -> UNet2DConditionModel:
        """diffusers' model of it; UnsupportedError where the checkpoint does not hold all of it."""
        return self.machine.use(self._network)

    @cached_property
    def _network(self) -> UNet2DConditionModel:
        return load_unet(self.checkpoint, self.machine.dtype)

    @property
    def channels(self) -> int:
        """Of a latent."""
        return self._network.config.out_channels

    @property
    def side(self) -> int:
        """Of the latents that it was trained on: what its configuration says, else its family."""
        network = self.checkpoint.network("denoiser")
        configured = (network.config or {}).get("sample_size") if network is not None else None
        if isinstance(configured, int) and 0 < configured <= _LARGEST_SIDE:
            return configured
        family = self.checkpoint.family
        if family.velocity_side is not None and self.schedule.prediction == "velocity":
            return family.velocity_side
        return family.latent_side

    def predict(self, noisy: Tensor, steps: Tensor | int, asked: Conditioning) -> Tensor:
        """eps(x_t, c) [n, c, h, w] for noisy x_t [n, c, h, w] and t in 0 to 999."""
        added = None if asked.pooled is None else self._added(noisy, asked.pooled)
        inputs = torch.cat([noisy, *self._beside(noisy)], 1)
        told = {} if added is None else {"added_cond_kwargs": added}
        predicted: Tensor = self.network(inputs, steps, asked.states, **told).sample
        return self.schedule.epsilon(predicted, noisy, steps)

    def _added(self, noisy: Tensor, pooled: Tensor) -> dict[str, Tensor]:
        """What XL embeds beside the time step: sizes, crops, and the pooled text."""
        side = [size * self.vae.reduction for size in noisy.shape[-2:]]
        aesthetics = self.checkpoint.family.aesthetics
        sizes = [*side, 0, 0, *(side if aesthetics is None else [aesthetics])]
        times = torch.tensor([sizes], dtype=pooled.dtype, device=pooled.device)
        return {"text_embeds": pooled, "time_ids": times.expand(len(noisy), -1)}

    def _beside(self, noisy: Tensor) -> Sequence[Tensor]:
        """What inpainting and editing models see beside x_t: all is masked, nothing is given."""
        count = self.network.config.in_channels - noisy.shape[1]
        if count == 0:
            return ()
        blank = torch.zeros_like(noisy)
        if count == noisy.shape[1]:
            return (blank,)
        if count == noisy.shape[1] + 1:
            return (torch.ones_like(noisy[:, :1]), self._grey.expand_as(noisy))
        raise UnsupportedError(
            f"{self.checkpoint.path}: the UNet wants {count} channels beside the noise, which "
            "sepme does not know to fill; --method closed-form needs no image",
            file=self.checkpoint.path,
            expected="none, or those of an inpainting or editing model",
            found=count,
        )

    @cached_property
    def _grey(self) -> Tensor:
        """The latent [1, c, 1, 1] of a grey image, which is what a masked one is."""
        if not self.vae.is_there:
            return self.machine.put(torch.zeros(1, self.channels, 1, 1))
        side = 8 * self.vae.reduction
        grey = self.vae.encode(torch.full((1, 3, side, side), 0.5))
        return grey.mean((2, 3), keepdim=True)

    @cached_property
    def targets(self) -> Mapping[str, nn.Linear]:
        """The image-independent layers by the name a patch gives their weights."""
        found = ((f"{name}.weight", module) for name, module in self._network.named_modules())
        return {
            name: module
            for name, module in found
            if stream_of(name) is not None and isinstance(module, nn.Linear)
        }

    def stored_weights(self, stream: Stream = "tokens") -> Iterator[tuple[str, Tensor]]:
        """Every target of a stream, its name and W [out, d] as it is stored, fp32; no UNet is
        loaded."""
        for target in self.checkpoint.targets:
            if stream_of(target.name) == stream:
                yield target.name, to_torch(target.read(), torch.float32)

    @contextmanager
    def with_weights(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """The UNet with some layers' weights replaced, for the length of the block."""
        parameters = {name: self._network.get_parameter(name) for name in weights}
        originals = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, weight in weights.items():
                parameters[name].data = weight.to(originals[name])
            yield
        finally:
            for name, weight in originals.items():
                # The UNet may have been moved meanwhile.
                parameters[name].data = weight.to(parameters[name])

    @contextmanager
    def with_increment(self, up: Mapping[str, Tensor], basis: Tensor) -> Iterator[None]:
        """The UNet with dW = up @ basis added to each target, differentiable in up.

        up: target name -> [out, r]; basis [r, d].
        """

        def adder(factor: Tensor) -> Any:
            def add(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
                return output + nn.functional.linear(nn.functional.linear(inputs[0], basis), factor)

            return add

        hooks = [self.targets[name].register_forward_hook(adder(up[name])) for name in up]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

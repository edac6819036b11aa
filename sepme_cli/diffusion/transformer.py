"""The transformer of Stable Diffusion 3 or Flux.1, which predicts rectified flow's velocity."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sepme_cli.diffusion.conditioning import Conditioning
from sepme_cli.diffusion.denoiser import Denoiser
from sepme_cli.diffusion.loading import load_transformer
from sepme_cli.errors import UnsupportedError

_PATCH = 2
"""Of latents, by which Flux's pipelines pack four pixels in one."""


@dataclass(frozen=True)
class Transformer(Denoiser):
    """What predicts velocity."""

    @property
    def network(self) -> Any:
        """diffusers' model of it; UnsupportedError where the checkpoint does not hold all of it."""
        return self.machine.use(self._network)

    @cached_property
    def _network(self) -> Any:
        network = load_transformer(self.checkpoint, self.machine.dtype)
        given = network.config.in_channels
        # None says as many as go in.
        drawn = network.config.out_channels or given
        if given != drawn:
            raise UnsupportedError(
                f"{self.checkpoint.path}: the transformer reads an image beside the noise, which "
                "sepme does not know to give; erasing and applying patches need none",
                file=self.checkpoint.path,
                expected=f"{drawn} channels",
                found=given,
            )
        return network

    @property
    def channels(self) -> int:
        """Of a latent."""
        channels = int(self._network.config.in_channels)
        return channels // _PATCH**2 if self._packs else channels

    @property
    def side(self) -> int:
        """Of the latents that it was trained on: what its configuration says, else its family."""
        network = self.checkpoint.network("denoiser")
        said = (network.config or {}).get("sample_size") if network is not None else None
        return said if isinstance(said, int) and said > 0 else self.checkpoint.family.latent_side

    @property
    def patch(self) -> int:
        """What the side of a latent must be a multiple of."""
        return _PATCH if self._packs else int(self._network.config.patch_size)

    @property
    def largest_side(self) -> int | None:
        """Of the latents that Stable Diffusion 3 has positions for; Flux.1 computes them."""
        if self._packs:
            return None
        return self.patch * int(self._network.config.pos_embed_max_size)

    @property
    def _packs(self) -> bool:
        return self.checkpoint.family.name == "flux"

    def predict(
        self,
        noisy: Tensor,
        steps: Tensor | float,
        asked: Conditioning,
        scale: float | None = None,
    ) -> Tensor:
        """v(x_t, c) [n, c, h, w] for noisy x_t [n, c, h, w] and t in 0 to 1000.

        scale: of the guidance that Flux.1 dev reads as a number.
        """
        times = torch.as_tensor(steps, dtype=torch.float32, device=noisy.device).expand(len(noisy))
        if not self._packs:
            found: Tensor = self.network(noisy, asked.states, asked.pooled, times).sample
            return found
        height, width = (size // _PATCH for size in noisy.shape[-2:])
        guidance = None
        if self.network.config.guidance_embeds:
            guidance = torch.full_like(times, 1.0 if scale is None else scale)
        places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(noisy)
        packed = self.network(
            _packed(noisy),
            asked.states,
            asked.pooled,
            timestep=times.to(noisy.dtype) / 1000,
            guidance=guidance,
            img_ids=torch.cat([torch.zeros_like(places[:, :1]), places], 1),
            txt_ids=noisy.new_zeros(asked.states.shape[1], 3),
        ).sample
        return _unpacked(packed, height, width)

    def guided(
        self, noisy: Tensor, t: float, asked: Conditioning, blank: Conditioning, scale: float
    ) -> Tensor:
        """As `Denoiser.guided`. Flux.1 was distilled: dev reads the scale, schnell knows none."""
        if self._packs:
            return self.predict(noisy, t, asked, scale)
        return super().guided(noisy, t, asked, blank, scale)


def _packed(latents: Tensor) -> Tensor:
    """[n, c, 2 h, 2 w] as [n, h w, 4 c]."""
    count, channels, height, width = latents.shape
    cut = latents.view(count, channels, height // _PATCH, _PATCH, width // _PATCH, _PATCH)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _unpacked(packed: Tensor, height: int, width: int) -> Tensor:
    """[n, h w, 4 c] as [n, c, 2 h, 2 w]."""
    cut = packed.view(len(packed), height, width, -1, _PATCH, _PATCH)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(len(packed), -1, _PATCH * height, _PATCH * width)

"""The networks of a checkpoint, and the weights in them that a patch may change."""

import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.modeling_utils import ModelMixin
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from sepme_cli.checkpoints.reader import Checkpoint
from sepme_cli.diffusion.configs import (
    SCHEDULE,
    TEXT,
    UNET,
    VAE,
    Config,
    Shapes,
    text_config,
    unet_config,
    vae_config,
)
from sepme_cli.diffusion.tokenizer import tokenize
from sepme_cli.errors import UnsupportedError

# Both warn about what nothing here uses or does: image processors, a cast after loading.
for library in ("transformers", "diffusers"):
    logging.getLogger(library).setLevel(logging.ERROR)

Network = TypeVar("Network", bound=ModelMixin)
TensorsByName = Mapping[str, Tensor]

_NETWORKS = {"unet": "UNet", "vae": "VAE", "text": "text encoder"}


@dataclass(frozen=True)
class StableDiffusion:
    """A checkpoint's text encoder, UNet and VAE, each loaded when it is first used.

    path: a single-file SD 1.x checkpoint (safetensors) that `checkpoints` has accepted.
    dtype: what the networks compute in; the file may hold another.
    """

    path: Path
    device: torch.device
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Self:
        """The networks of an open checkpoint; UnsupportedError for a family not known here."""
        if checkpoint.family.name != "sd1":
            raise UnsupportedError(
                f"{checkpoint.path}: sepme patches {checkpoint.family.title} but cannot run it yet",
                file=checkpoint.path,
                expected="Stable Diffusion 1.x",
                found=checkpoint.family.title,
            )
        return cls(checkpoint.path, device, dtype)

    def _tensors(self, prefix: str) -> dict[str, Tensor]:
        with safe_open(self.path, framework="pt") as file:
            return {
                name: file.get_tensor(name).to(self.dtype)
                for name in file.keys()  # noqa: SIM118  (safe_open is no mapping)
                if name.startswith(prefix)
            }

    def _configured(self, configure: Callable[[Shapes], Config], tensors: TensorsByName) -> Config:
        """A network's configuration; UnsupportedError where the file does not hold all of it."""
        try:
            return configure({name: tuple(value.shape) for name, value in tensors.items()})
        except (KeyError, IndexError) as error:
            what = configure.__name__.removesuffix("_config")
            raise UnsupportedError(
                f"{self.path}: the file does not hold a whole {_NETWORKS[what]}; drawing and "
                "erasing need one, applying a patch does not",
                file=self.path,
                expected=str(error.args[0]) if isinstance(error, KeyError) else _NETWORKS[what],
                found=f"{len(tensors)} tensors of it",
            ) from error

    def _network(
        self, kind: type[Network], prefix: str, configure: Callable[[Shapes], Config]
    ) -> Network:
        tensors = self._tensors(prefix)
        config = self._configured(configure, tensors)
        with tempfile.TemporaryDirectory() as folder:
            text = json.dumps({"_class_name": kind.__name__, **config})
            (Path(folder) / "config.json").write_text(text)
            network = kind.from_single_file(tensors, config=folder, torch_dtype=self.dtype)
        return network.to(self.device).requires_grad_(False).eval()

    @cached_property
    def unet(self) -> UNet2DConditionModel:
        return self._network(UNet2DConditionModel, UNET, unet_config)

    @cached_property
    def vae(self) -> AutoencoderKL:
        return self._network(AutoencoderKL, VAE, vae_config)

    @cached_property
    def text_encoder(self) -> CLIPTextModel:
        tensors = {
            name.removeprefix(TEXT).removeprefix("text_model."): value
            for name, value in self._tensors(TEXT).items()
            if not name.endswith("position_ids")
        }
        config = self._configured(text_config, tensors)
        encoder = CLIPTextModel(CLIPTextConfig(**config)).to(self.dtype)
        encoder.load_state_dict(tensors)
        return encoder.to(self.device).requires_grad_(False).eval()

    @cached_property
    def schedule(self) -> DDIMScheduler:
        return DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids [len(prompts), positions], padded as SD 1.x does."""
        return tokenize(prompts, self.text_encoder.config.max_position_embeddings)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch: int = 64) -> Tensor:
        """e(c): hidden states of prompts [len(prompts), positions, width], one row a token."""
        ids = self.tokens(prompts).to(self.device)
        return torch.cat([self.text_encoder(part).last_hidden_state for part in ids.split(batch)])

    def predict(self, noisy: Tensor, steps: Tensor | int, context: Tensor) -> Tensor:
        """eps(x_t, c) [n, c, h, w] for noisy x_t [n, c, h, w], t in 0 to 999 and e(c)
        [n, positions, d]."""
        predicted: Tensor = self.unet(noisy, steps, context).sample
        return predicted

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 32) -> Tensor:
        """Latents [n, 4, h, w] as pictures [n, 3, H, W] in [0, 1], fp32, on the CPU."""
        scale = self.vae.config.scaling_factor
        drawn = [self.vae.decode(part / scale).sample for part in latents.split(batch)]
        return (torch.cat(drawn).float() / 2 + 0.5).clamp(0, 1).cpu()

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor, batch: int = 32) -> Tensor:
        """Pictures [n, 3, H, W] in [0, 1] as latents [n, 4, h, w], at their distribution's mean."""
        inputs = (pictures * 2 - 1).to(self.device, self.dtype)
        means = [self.vae.encode(part).latent_dist.mean for part in inputs.split(batch)]
        return torch.cat(means) * self.vae.config.scaling_factor

    @cached_property
    def picture_size(self) -> int:
        """The side in pixels that the model was trained at: what its metadata says (ModelSpec's
        `modelspec.resolution`), else 64 latent pixels, which is SD 1.x's 512."""
        with safe_open(self.path, framework="pt") as file:
            said = re.match(r"(\d+)", (file.metadata() or {}).get("modelspec.resolution", ""))
        return int(said[1]) if said else 64 * self._reduction

    @property
    def _reduction(self) -> int:
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def latent_shape(self, size: int | None = None) -> tuple[int, int, int]:
        """The shape of one latent for pictures of size pixels; the model's own size if None."""
        side = (size or self.picture_size) // self._reduction
        return (self.unet.config.in_channels, side, side)

    @cached_property
    def targets(self) -> Mapping[str, nn.Linear]:
        """The image-independent layers by the name a patch gives them: cross-attention K and V."""
        return {
            f"{name}.weight": module
            for name, module in self.unet.named_modules()
            if name.endswith(("attn2.to_k", "attn2.to_v")) and isinstance(module, nn.Linear)
        }

    @contextmanager
    def with_weights(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """The same networks with some targets' weights replaced, for the length of the block."""
        originals = {name: self.targets[name].weight.data for name in weights}
        try:
            for name, weight in weights.items():
                self.targets[name].weight.data = weight.to(self.device, self.dtype)
            yield
        finally:
            for name, weight in originals.items():
                self.targets[name].weight.data = weight

    @contextmanager
    def with_increment(self, up: Mapping[str, Tensor], basis: Tensor) -> Iterator[None]:
        """The same networks with dW = up @ basis added to each target, differentiable in up.

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

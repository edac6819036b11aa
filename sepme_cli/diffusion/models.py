"""The networks of a checkpoint, and the weights in them that a patch may change."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from patch_spec.streams import Stream, stream_of
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.checkpoints.reading.prediction import told_prediction
from sepme_cli.checkpoints.structure.families import Prediction, TextStream
from sepme_cli.diffusion.arrays import to_torch
from sepme_cli.diffusion.configs import SCHEDULE
from sepme_cli.diffusion.devices import DTYPES, Residence
from sepme_cli.diffusion.loading import load_unet, load_vae
from sepme_cli.diffusion.text import Conditioning, TextEncoder, check_together, condition
from sepme_cli.diffusion.tokenizer import END, has_tokenizer
from sepme_cli.errors import UnsupportedError
from sepme_cli.progress import SILENT, Progress

# Both warn about what nothing here uses or does: image processors, a cast after loading.
for library in ("transformers", "diffusers"):
    logging.getLogger(library).setLevel(logging.ERROR)

_LARGEST_SIDE = 1024
"""Of a latent; beyond it a configuration speaks of something else."""
_FEW = 2
"""Pictures at once where memory is to be spared."""


@dataclass(frozen=True)
class StableDiffusion:
    """A checkpoint's text encoders, UNet and VAE, each loaded when it is first used.

    checkpoint: open, and kept open while networks are still to be loaded. dtype: what the UNet
    computes in; the file may hold another. Text is encoded in fp32, which costs little and which
    increments are made from; the VAE overflows in fp16 and then takes fp32 too. prediction: what
    the UNet was trained to predict. tokenizer: a folder with a tokenizer's files, None for the
    model's or CLIP's own. frugal: see `Computing`.
    """

    checkpoint: Checkpoint = field(repr=False)
    device: torch.device
    dtype: torch.dtype = torch.float32
    prediction: Prediction = "epsilon"
    tokenizer: Path | None = None
    frugal: bool = False

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        prediction: Prediction | None = None,
        tokenizer: Path | None = None,
        frugal: bool = False,
        progress: Progress = SILENT,
    ) -> Self:
        """The networks of an open checkpoint. prediction: told from the checkpoint if None, see
        `told_prediction`."""
        if prediction is None:
            told = told_prediction(checkpoint)
            prediction = told.prediction
            for said in told.unknown:
                progress.warn(f"{said}, which sepme does not know; --prediction says what it is")
            if told.source is not None or not checkpoint.family.usually_epsilon:
                source = told.source or "nothing says otherwise"
                progress.say(f"taken to predict {prediction} ({source}); --prediction overrides")
        return cls(checkpoint, device, dtype, prediction, tokenizer, frugal)

    @property
    def dtype_name(self) -> str:
        """What people call the dtype: "fp32"."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    @cached_property
    def _residence(self) -> Residence:
        return Residence(self.device, alone=self.frugal)

    def at_once(self, count: int) -> int:
        """How many of so many pictures to take at once, when the memory is to be spared."""
        return min(count, _FEW) if self.frugal else count

    @cached_property
    def encoders(self) -> tuple[TextEncoder, ...]:
        """The text encoders of the family, in order.

        Raises UnsupportedError if one is not there or is none that can be used, MismatchError if
        they are not this UNet's.
        """
        streams = self.checkpoint.family.streams
        encoders = tuple(self._encoder(stream) for stream in streams)
        check_together(encoders, self.checkpoint.width, self.checkpoint.path)
        return encoders

    def _encoder(self, stream: TextStream) -> TextEncoder:
        network = self.checkpoint.network(stream.name)
        if network is None:
            raise UnsupportedError(
                f"{self.checkpoint.path} does not hold its text encoder ({stream.name}), which "
                "erasing and drawing need; name a model that does with --text-encoder",
                file=self.checkpoint.path,
                expected=f"a text encoder ({stream.name})",
                found=self.checkpoint.title,
            )
        own = network.tokenizer if network.tokenizer and has_tokenizer(network.tokenizer) else None
        return TextEncoder(
            network,
            self._residence,
            penultimate=self.checkpoint.family.penultimate,
            pads=stream.pads,
            tokenizer=self.tokenizer or own,
        )

    @property
    def unet(self) -> UNet2DConditionModel:
        return self._residence.use(self._unet)

    @cached_property
    def _unet(self) -> UNet2DConditionModel:
        return load_unet(self.checkpoint, self.dtype)

    @property
    def vae(self) -> AutoencoderKL:
        return self._residence.use(self._vae)

    @cached_property
    def _vae(self) -> AutoencoderKL:
        fits = self.dtype != torch.float16
        return load_vae(self.checkpoint, self.dtype if fits else torch.float32)

    def load(self) -> None:
        """Load everything that drawing needs; UnsupportedError where that is not all there."""
        self.condition([""])
        _ = self.unet, self.vae

    @cached_property
    def schedule(self) -> DDIMScheduler:
        """Of noise; whatever the UNet predicts, `predict` gives epsilon."""
        folder = self.checkpoint.folder
        said = (folder.config("scheduler", "scheduler_config.json") if folder else None) or {}
        betas = {name: said.get(name, value) for name, value in SCHEDULE.items()}
        return DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids [len(prompts), positions] of the first text encoder, padded as it does.

        The end has the highest: words that were added to CLIP's have negative ones here.
        """
        ids = self.encoders[0].tokens(prompts)
        return torch.where(ids > END, -ids, ids)

    @property
    def room(self) -> int:
        """How many tokens of a prompt are read: all positions but those of its start and end."""
        return self.encoders[0].positions - 2

    def unread(self, prompt: str) -> str:
        """The words at a prompt's end that there is no room for."""
        return self.encoders[0].unread(prompt)

    def encode(
        self, prompts: Sequence[str], positions: int | None = None, paddings: int | None = None
    ) -> Tensor:
        """e(c): hidden states of prompts [len(prompts), positions, width], one row a token.

        Of two text encoders the states stand side by side, each token's in its place. positions
        and paddings: see `condition`; with either, many prompts take a fraction of the time.
        """
        return condition(
            self.encoders, prompts, pooled=False, positions=positions, paddings=paddings
        ).states

    @torch.no_grad()
    def ends(self, prompts: Sequence[str]) -> Tensor:
        """The embedding of the end of each prompt [len(prompts), d], fp32, on the CPU.

        It stands for the whole of a few words, and takes less time than any of their padding.
        """
        return torch.cat([encoder.ends(prompts) for encoder in self.encoders], dim=-1).cpu()

    def condition(self, prompts: Sequence[str]) -> Conditioning:
        """All that the UNet reads of prompts."""
        return condition(self.encoders, prompts, pooled=self.checkpoint.family.pools)

    def predict(self, noisy: Tensor, steps: Tensor | int, asked: Conditioning) -> Tensor:
        """eps(x_t, c) [n, c, h, w] for noisy x_t [n, c, h, w] and t in 0 to 999.

        Of a UNet that predicts velocity v (Salimans and Ho 2022, eq. 10 and on):
        eps = sqrt(abar_t) v + sqrt(1 - abar_t) x_t.
        """
        added = None if asked.pooled is None else self._added(noisy, asked.pooled)
        inputs = torch.cat([noisy, *self._beside(noisy)], 1)
        told = {} if added is None else {"added_cond_kwargs": added}
        predicted: Tensor = self.unet(inputs, steps, asked.states, **told).sample
        if self.prediction == "epsilon":
            return predicted
        kept = self.schedule.alphas_cumprod.to(noisy)[torch.as_tensor(steps).cpu()]
        kept = kept.reshape(-1, 1, 1, 1)
        return kept.sqrt() * predicted + (1 - kept).sqrt() * noisy

    def _added(self, noisy: Tensor, pooled: Tensor) -> dict[str, Tensor]:
        """What XL embeds beside the time step: sizes, crops, and the pooled text."""
        side = [size * self._reduction for size in noisy.shape[-2:]]
        aesthetics = self.checkpoint.family.aesthetics
        sizes = [*side, 0, 0, *(side if aesthetics is None else [aesthetics])]
        times = torch.tensor([sizes], dtype=pooled.dtype, device=pooled.device)
        return {"text_embeds": pooled, "time_ids": times.expand(len(noisy), -1)}

    def _beside(self, noisy: Tensor) -> Sequence[Tensor]:
        """What inpainting and editing models see beside x_t: all is masked, nothing is given."""
        count = self.unet.config.in_channels - noisy.shape[1]
        if count == 0:
            return ()
        blank = torch.zeros_like(noisy)
        if count == noisy.shape[1]:
            return (blank,)
        if count == noisy.shape[1] + 1:
            return (torch.ones_like(noisy[:, :1]), self._grey.expand_as(noisy))
        raise UnsupportedError(
            f"{self.checkpoint.path}: the UNet wants {count} channels beside the noise, which "
            "sepme does not know to fill; --method closed-form needs no picture",
            file=self.checkpoint.path,
            expected="none, or those of an inpainting or editing model",
            found=count,
        )

    @cached_property
    def _grey(self) -> Tensor:
        """The latent [1, c, 1, 1] of a grey picture, which is what a masked one is."""
        if self.checkpoint.network("vae") is None:
            shape = (1, self.unet.config.out_channels, 1, 1)
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        side = 8 * self._reduction
        grey = self.encode_pictures(torch.full((1, 3, side, side), 0.5))
        return grey.mean((2, 3), keepdim=True)

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 32) -> Tensor:
        """Latents [n, 4, h, w] as pictures [n, 3, H, W] in [0, 1], fp32, on the CPU."""
        vae = self.vae
        scaled = (latents / vae.config.scaling_factor).to(vae.dtype)
        drawn = [vae.decode(part).sample for part in scaled.split(self.at_once(batch))]
        return (torch.cat(drawn).float() / 2 + 0.5).clamp(0, 1).cpu()

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor, batch: int = 32) -> Tensor:
        """Pictures [n, 3, H, W] in [0, 1] as latents [n, 4, h, w], at their distribution's mean."""
        vae = self.vae
        inputs = (pictures * 2 - 1).to(self.device, vae.dtype)
        parts = inputs.split(self.at_once(batch))
        means = [vae.encode(part).latent_dist.mean for part in parts]
        return (torch.cat(means) * vae.config.scaling_factor).to(self.dtype)

    @cached_property
    def picture_size(self) -> int:
        """The side in pixels that the model was trained at: what its metadata says (ModelSpec's
        `modelspec.resolution`) or its configuration, else what its family draws."""
        # Trainers write what they were told, and people edit it: no nonsense is believed.
        resolution = self.checkpoint.metadata.get("modelspec.resolution", "")
        said = re.match(r"([0-9]{1,4})(?![0-9])", resolution)
        if said and int(said[1]) >= self._reduction:
            return int(said[1])
        unet = self.checkpoint.network("unet")
        configured = (unet.config or {}).get("sample_size") if unet is not None else None
        if not isinstance(configured, int) or not 0 < configured <= _LARGEST_SIDE:
            configured = self._usual_side
        return configured * self._reduction

    @property
    def _usual_side(self) -> int:
        family = self.checkpoint.family
        if family.velocity_side is not None and self.prediction == "velocity":
            return family.velocity_side
        return family.latent_side

    @cached_property
    def _reduction(self) -> int:
        """How many pixels a latent pixel is wide; 8 in every published model."""
        if self.checkpoint.network("vae") is None:
            return 8
        return int(2 ** (len(self._vae.config.block_out_channels) - 1))

    def latent_shape(self, size: int | None = None) -> tuple[int, int, int]:
        """The shape of one latent for pictures of size pixels; the model's own size if None."""
        side = (size or self.picture_size) // self._reduction
        return (self._unet.config.out_channels, side, side)

    @cached_property
    def targets(self) -> Mapping[str, nn.Linear]:
        """The image-independent layers by the name a patch gives their weights."""
        found = ((f"{name}.weight", module) for name, module in self._unet.named_modules())
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
        """The same networks with some targets' weights replaced, for the length of the block."""
        originals = {name: self.targets[name].weight.data for name in weights}
        try:
            for name, weight in weights.items():
                self.targets[name].weight.data = weight.to(originals[name])
            yield
        finally:
            for name, weight in originals.items():
                # The UNet may have been moved meanwhile.
                self.targets[name].weight.data = weight.to(self.targets[name].weight)

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

"""A Stable Diffusion checkpoint as its parts, each of which can be had without the others."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from patch_spec.streams import network_of
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.checkpoints.reading.prediction import recorded_prediction
from sepme_cli.checkpoints.structure.families import Prediction
from sepme_cli.diffusion.denoiser import Denoiser
from sepme_cli.diffusion.devices import Machine
from sepme_cli.diffusion.schedule import FlowSchedule, NoiseSchedule
from sepme_cli.diffusion.text import TextEncoders
from sepme_cli.diffusion.transformer import Transformer
from sepme_cli.diffusion.unet import UNet
from sepme_cli.diffusion.vae import VAE
from sepme_cli.diffusion.weights import replaced_weights
from sepme_cli.errors import UnsupportedError, UsageError
from sepme_cli.progress import SILENT, Progress

# Both warn about what nothing here uses or does: image processors, a cast after loading.
for library in ("transformers", "diffusers"):
    logging.getLogger(library).setLevel(logging.ERROR)


@dataclass(frozen=True)
class StableDiffusion:
    """The parts of a checkpoint. Their networks are each loaded when they are first used.

    checkpoint: open, and kept open as long as the networks are used, which read from it. machine:
    what they all compute on. text: reads prompts. denoiser: predicts noise, and has the weights
    that a patch changes. vae: images as latents. schedule: how noise is added and taken away.
    """

    checkpoint: Checkpoint = field(repr=False)
    machine: Machine
    text: TextEncoders
    denoiser: Denoiser
    vae: VAE
    schedule: NoiseSchedule | FlowSchedule

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        prediction: Prediction | None = None,
        tokenizer: Path | None = None,
        t5: bool = True,
        frugal: bool = False,
        progress: Progress = SILENT,
    ) -> Self:
        """The parts of an open checkpoint.

        device, dtype, frugal: see `Machine`. prediction: what the UNet was trained to predict;
        read from the checkpoint if None, see `recorded_prediction`. tokenizer, t5:
        see `TextEncoders`.
        """
        if prediction is None and checkpoint.family.flow is None:
            recorded = recorded_prediction(checkpoint)
            prediction = recorded.prediction
            for said in recorded.unknown:
                progress.warn(f"{said}, which sepme does not know; --prediction says what it is")
            if recorded.source is not None or not checkpoint.family.usually_epsilon:
                source = recorded.source or "nothing says otherwise"
                progress.say(f"taken to predict {prediction} ({source}); --prediction overrides")
        machine = Machine(device, dtype, frugal)
        vae = VAE(checkpoint, machine)
        text = TextEncoders(checkpoint, machine, tokenizer, t5, progress)
        if checkpoint.family.denoiser == "transformer":
            denoiser = Transformer(checkpoint, machine, vae)
            return cls(checkpoint, machine, text, denoiser, vae, FlowSchedule(checkpoint))
        schedule = NoiseSchedule(checkpoint, prediction or "epsilon")
        unet = UNet(checkpoint, machine, vae, schedule)
        return cls(checkpoint, machine, text, unet, vae, schedule)

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The schedule of a model that diffuses; UnsupportedError of one of rectified flow."""
        if isinstance(self.schedule, NoiseSchedule):
            return self.schedule
        raise UnsupportedError(
            f"{self.checkpoint.path} is {self.checkpoint.family.title}, a rectified flow, and this "
            "method works with the noise of diffusion; use --method closed-form",
            file=self.checkpoint.path,
            expected="a model that predicts noise or the velocity of diffusion",
            found=self.checkpoint.family.title,
        )

    @contextmanager
    def with_weights(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """The model with weights replaced, for the length of the block.

        weights: by the names that patches give targets and layers, those of text encoders too.
        """
        with ExitStack() as stack:
            own = {n: w for n, w in weights.items() if network_of(n) in (None, "denoiser")}
            stack.enter_context(self.denoiser.with_weights(own))
            for clip in self.text.clips if len(own) < len(weights) else ():
                name = clip.spec.name
                of_clip = {
                    layer.removeprefix(f"{name}."): weight
                    for layer, weight in weights.items()
                    if network_of(layer) == name
                }
                stack.enter_context(replaced_weights(clip.model, of_clip))
            yield

    def load(self) -> None:
        """Load everything that generating needs; UnsupportedError where that is not all there."""
        self.text.condition([""])
        _ = self.denoiser.network, self.vae.network

    @property
    def image_size(self) -> int:
        """The side in pixels that the model was trained at: what its metadata says (ModelSpec's
        `modelspec.resolution`), else what its UNet's configuration or its family does."""
        # Trainers write what they were told, and people edit it: no nonsense is believed.
        resolution = self.checkpoint.metadata.get("modelspec.resolution", "")
        said = re.match(r"([0-9]{1,4})(?![0-9])", resolution)
        if said and int(said[1]) >= self.vae.reduction:
            return int(said[1])
        return self.denoiser.side * self.vae.reduction

    def scale_of(self, guidance: float | None) -> float:
        """The scale of the guidance; what the family is used with if None."""
        return self.checkpoint.family.guidance if guidance is None else guidance

    def latent_shape(self, size: int | None = None) -> tuple[int, int, int]:
        """The shape [c, h, w] of one latent for images of size pixels, or of a little less where
        that is what the denoiser can read; the model's own size if None.

        Raises UsageError for a size that it cannot generate.
        """
        asked, reduction = size or self.image_size, self.vae.reduction
        least, most = self.denoiser.patch, self.denoiser.largest_side
        side = asked // reduction // least * least
        if not side or (most is not None and side > most):
            end = "more" if most is None else most * reduction
            raise UsageError(
                f"{self.checkpoint.path} generates no images of {asked} pixels",
                expected=f"{least * reduction} to {end}",
                found=asked,
            )
        return (self.denoiser.channels, side, side)

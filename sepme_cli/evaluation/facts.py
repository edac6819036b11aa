"""What a report's figures hold for, and what decides its images."""

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import torch

from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.checkpoints.reading.patches import PatchFile
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.evaluation.protocol import SamplingOptions
from sepme_cli.version import __version__


def facts_of(
    model: str,
    network: StableDiffusion,
    judge: str,
    files: Sequence[PatchFile],
    sampling: SamplingOptions,
) -> tuple[tuple[str, str], ...]:
    """What the figures hold for."""
    checkpoint = network.checkpoint
    last = sampling.seed + sampling.images - 1
    on, size = network.machine, sampling.size or network.image_size
    guidance = network.scale_of(sampling.guidance)
    few = ", few at once" if on.frugal else ""
    return (
        ("model", f"{model}, {checkpoint.title}"),
        ("sha-256 of its weights", _digest(checkpoint)),
        *((f"patch {Path(file.name).name}", f"sha-256 {file.digest}") for file in files),
        ("judge", judge),
        ("images", f"{sampling.images} of each concept, seeds {sampling.seed} to {last}"),
        (
            "sampler",
            f"{network.schedule.sampler}, {sampling.steps} steps, guidance {guidance:g}, "
            f"{size} pixels, predicting {network.schedule.prediction}",
        ),
        ("computed on", f"{on.device.type}, {on.dtype}{few}".replace("torch.", "")),
        ("with", f"sepme {__version__}, torch {torch.__version__}"),
    )


def _digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of every network's tensors: of names, dtypes, shapes and bytes."""
    digest = sha256()
    names = {"denoiser": checkpoint.family.denoiser, "vae": "vae"}
    names |= {spec.name: spec.name for spec in checkpoint.family.text_encoders}
    for part, name in names.items():
        network = checkpoint.network(part)
        for tensor, stored in network.tensors.items() if network else ():
            digest.update(json.dumps([name, tensor, stored.dtype, stored.shape]).encode())
            data = stored.file.read_range(stored.entry.begin, stored.entry.end, stored.name)
            digest.update(data)
    return digest.hexdigest()


def key_of(network: StableDiffusion, facts: Sequence[tuple[str, str]]) -> str:
    """All that decides an image beside sampling options, increments, prompt and seed."""
    decisive = dict(facts)
    said = [decisive[name] for name in ("sha-256 of its weights", "computed on", "with")]
    words = network.text.clips[0].tokens(["a picture by Monet, 1899"]).tolist()
    return json.dumps([said, network.schedule.prediction, network.schedule.digest, words])

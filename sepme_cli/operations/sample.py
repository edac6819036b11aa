"""Draw pictures with a checkpoint, with and without patches."""

import io
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from sepme_cli.arguments import (
    FilePath,
    PlaceLike,
    Places,
    Words,
    as_path,
    as_place,
    as_places,
    several,
)
from sepme_cli.checkpoints.disk.files import check_writable, new_file, only_writer, write_all
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.checkpoints.reading.lent import lend_text_encoders
from sepme_cli.checkpoints.reading.patches import Patches, read_patch_files, select
from sepme_cli.composing.matching import check_fits
from sepme_cli.diffusion.devices import DTYPES, computing
from sepme_cli.diffusion.loading import unet_parameters
from sepme_cli.diffusion.models import Prediction, StableDiffusion
from sepme_cli.diffusion.sampler import draw_pictures
from sepme_cli.diffusion.weights import patched_weights
from sepme_cli.evaluation.sheets import contact_sheet
from sepme_cli.planning.said import misread_prompts
from sepme_cli.progress import SILENT, Progress

_BATCH = 8
"""Pictures drawn at once."""


@dataclass(frozen=True)
class SampleResult:
    """output: the contact sheet. images: how many pictures are on it."""

    output: str
    prompts: tuple[str, ...]
    images: int
    seconds: float


def sample(
    model: PlaceLike,
    prompts: Words,
    *,
    patches: Patches = (),
    output: FilePath,
    seed: int = 0,
    count: int = 1,
    steps: int = 20,
    guidance: float = 7.5,
    scale: float = 1.0,
    only: Words = (),
    device: str | None = None,
    dtype: str = "auto",
    low_memory: bool = False,
    size: int | None = None,
    text_encoders: Places = (),
    tokenizer: FilePath | None = None,
    prediction: Prediction | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> SampleResult:
    """Write a contact sheet (PNG): a row for each prompt, count pictures each.

    With patches, each prompt gets a second row from the patched weights, in memory, with the same
    seeds. Pictures of one column share a seed: seed, seed + 1, …
    Raises what opening the checkpoint and the patches raises, and SystemFailure for the output.
    """
    started = time.monotonic()
    output, prompts = as_path(output), several(prompts)
    check_writable(output, 0, force=force)
    files = read_patch_files(patches)
    chosen = select(files, only) if files else ()
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(as_place(model), progress))
        lend_text_encoders(checkpoint, as_places(text_encoders), stack)
        for file in files:
            check_fits(checkpoint, file, [i for i in file.patch.increments if i in chosen])
        patched = patched_weights(checkpoint, [(part, scale) for part in chosen]) if chosen else {}
        chosen_unit = computing(
            "drawing",
            device=device,
            dtype=dtype,
            low_memory=low_memory,
            unet=unet_parameters(checkpoint),
            pictures=_BATCH,
            progress=progress,
        )
        network = StableDiffusion.of(
            checkpoint,
            chosen_unit.device,
            DTYPES[chosen_unit.dtype],
            frugal=chosen_unit.frugal,
            prediction=prediction,
            tokenizer=as_path(tokenizer),
            progress=progress,
        )
        for warning in misread_prompts(network, prompts):
            progress.warn(warning)
        asked = [prompt for prompt in prompts for _ in range(count)]
        seeds = [seed + i for _ in prompts for i in range(count)]
        progress.stage("drawing", len(asked) * (2 if chosen else 1))

        def draw() -> torch.Tensor:
            pictures = draw_pictures(
                network,
                asked,
                seeds,
                steps=steps,
                guidance=guidance,
                size=size,
                batch=_BATCH,
                advance=progress.advance,
            )
            return pictures.view(len(prompts), count, *pictures.shape[1:])

        sheets = [draw()]
        if chosen:
            with network.with_weights(patched):
                sheets.append(draw())
    labels = [label for p in prompts for label in ([p, "  patched"] if chosen else [p])]
    rows = torch.stack(sheets, 1).flatten(0, 1)
    _write(rows, labels, output, force)
    return SampleResult(str(output), prompts, rows.shape[0] * count, time.monotonic() - started)


def _write(rows: torch.Tensor, labels: Sequence[str], output: Path, force: bool) -> None:
    memory = io.BytesIO()
    contact_sheet(rows, memory, rows=labels)
    data = memory.getvalue()
    with only_writer(output), new_file(output, len(data), force=force) as descriptor:
        write_all(descriptor, data, 0)

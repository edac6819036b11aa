"""Draw pictures with a checkpoint, with and without patches."""

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from patch_spec.increment import Increment
from sepme_cli.arguments import FilePath, PlaceLike, Words, as_path, as_place, several
from sepme_cli.checkpoints.disk.output import check_output, write_output
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.checkpoints.reading.patches import Patches, PatchFile, read_patch_files, select
from sepme_cli.composing.matching import ROUNDS_TWICE, applied_already, both_act, fit, split_applied
from sepme_cli.diffusion.opening import opened_model
from sepme_cli.diffusion.options import ModelOptions
from sepme_cli.diffusion.sampler import draw_pictures
from sepme_cli.diffusion.weights import patched_weights
from sepme_cli.evaluation.protocol import Drawing
from sepme_cli.evaluation.sheets import contact_sheet
from sepme_cli.planning.misread import misread_prompts
from sepme_cli.progress import SILENT, Collector, Progress

_BATCH = 8
"""Pictures drawn at once."""


@dataclass(frozen=True)
class SampleResult:
    """output: the contact sheet. images: how many pictures are on it."""

    output: str
    prompts: tuple[str, ...]
    images: int
    seconds: float
    warnings: tuple[str, ...]


def sample(
    model: PlaceLike,
    prompts: Words,
    *,
    patches: Patches = (),
    output: FilePath,
    drawing: Drawing = Drawing(pictures=1),
    scale: float = 1.0,
    only: Words = (),
    options: ModelOptions = ModelOptions(),
    force: bool = False,
    progress: Progress = SILENT,
) -> SampleResult:
    """Write a contact sheet (PNG): a row for each prompt, as many pictures in it as `drawing` says.

    With patches, each prompt gets a second row from the patched weights, in memory, with the same
    seeds. Pictures of one column share a seed: the first, one more, …
    Raises what opening the checkpoint and the patches raises, MismatchError for a patch of another
    model, RefusedError for one that is in the checkpoint, and SystemFailure for the output.
    """
    started, progress = time.monotonic(), Collector(progress)
    output, prompts = as_path(output), several(prompts)
    check_output(output, (model, *several(patches), *several(options.text_encoders)), force=force)
    files = read_patch_files(patches)
    chosen = select(files, only) if files else ()
    with opened_model(as_place(model), options, images=_BATCH, progress=progress) as network:
        checkpoint = network.checkpoint
        if chosen:
            _check(checkpoint, files, chosen, progress)
        patched = patched_weights(checkpoint, [(part, scale) for part in chosen]) if chosen else {}
        progress.warn_all(misread_prompts(network.text, prompts))
        count = drawing.pictures
        asked = [prompt for prompt in prompts for _ in range(count)]
        seeds = [drawing.seed + i for _ in prompts for i in range(count)]
        progress.stage("drawing", len(asked) * (2 if chosen else 1))

        def draw() -> torch.Tensor:
            pictures = draw_pictures(
                network,
                asked,
                seeds,
                steps=drawing.steps,
                guidance=drawing.guidance,
                size=drawing.size,
                batch=_BATCH,
                advance=progress.advance,
            )
            return pictures.view(len(prompts), count, *pictures.shape[1:])

        sheets = [draw()]
        if chosen:
            with network.denoiser.with_weights(patched):
                sheets.append(draw())
    labels = [label for p in prompts for label in ([p, "  patched"] if chosen else [p])]
    rows = torch.stack(sheets, 1).flatten(0, 1)
    _write(rows, labels, output, force, progress)
    return SampleResult(
        str(output),
        prompts,
        rows.shape[0] * count,
        time.monotonic() - started,
        progress.warnings,
    )


def _check(
    checkpoint: Checkpoint,
    files: Sequence[PatchFile],
    chosen: Sequence[Increment],
    progress: Progress,
) -> None:
    """Raise, or say, what `apply` would of these patches and the checkpoint."""
    progress.warn_all(fit(checkpoint, files, chosen).compared(checkpoint).warnings)
    new, repeated = split_applied(checkpoint, chosen)
    if repeated:
        raise applied_already(checkpoint.path, repeated)
    if checkpoint.stack is not None:
        progress.warn(ROUNDS_TWICE)
    progress.warn_all(both_act(checkpoint, new))


def _write(
    rows: torch.Tensor, labels: Sequence[str], output: Path, force: bool, progress: Progress
) -> None:
    memory = io.BytesIO()
    contact_sheet(rows, memory, rows=labels)
    write_output(output, memory.getvalue(), force=force, progress=progress)

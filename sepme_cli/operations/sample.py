"""Generate images with a checkpoint, with and without patches."""

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

import torch

from patch_spec.increment import Increment
from sepme_cli.arguments import FilePath, PlaceLike, Words, as_path, as_place, check_known, several
from sepme_cli.checkpoints.disk.output import check_output, write_output
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.checkpoints.reading.patches import (
    Patches,
    PatchFile,
    read_patch_files,
    select,
    with_scales,
)
from sepme_cli.composing.matching import (
    ROUNDS_TWICE,
    applied_already,
    both_act,
    check_masks,
    fit,
    split_applied,
)
from sepme_cli.diffusion.opening import opened_model
from sepme_cli.diffusion.options import ModelOptions
from sepme_cli.diffusion.sampler import generate_images
from sepme_cli.diffusion.weights import patched_weights
from sepme_cli.evaluation.protocol import SamplingOptions
from sepme_cli.evaluation.sheets import contact_sheet
from sepme_cli.planning.misread import misread_prompts
from sepme_cli.progress import SILENT, Collector, Progress

_BATCH = 8
"""Images generated at once."""


@dataclass(frozen=True)
class SampleResult:
    """Result of `sample`.

    Attributes:
        output: The contact sheet.
        prompts: The prompts, from top to bottom.
        images: Number of images on it.
        seconds: Duration.
        warnings: All warnings of the run.
    """

    output: str
    prompts: tuple[str, ...]
    images: int
    seconds: float
    warnings: tuple[str, ...]


class Patching(TypedDict, total=False):
    """What `sample` applies to the model.

    Attributes:
        patches: Patches: files, places on the hub, or binary streams; by default none.
        only: Use only these concepts or slugs.
        scale: Strength of the patches; 1 is full.
    """

    patches: Patches
    only: Words
    scale: float


def sample(
    model: PlaceLike,
    prompts: Words,
    *,
    output: FilePath,
    sampling: SamplingOptions = SamplingOptions(images=1),
    options: ModelOptions = ModelOptions(),
    force: bool = False,
    progress: Progress = SILENT,
    **patching: Unpack[Patching],
) -> SampleResult:
    """Generate images, and write them as one contact sheet (PNG).

    Each prompt has a row; with patches, a second one from the patched weights, in memory and with
    the same seeds. Images of one column have the same seed.

    Args:
        model: Checkpoint: a file, a folder, or a place on the hub.
        prompts: One or more prompts.
        output: Image to write.
        sampling: How images are generated.
        options: How to open the model, and what to compute on.
        force: Overwrite an existing output.
        progress: Receives progress and warnings.
        **patching: Patches, and how to apply them; see `Patching`.

    Returns:
        What was written.

    Raises:
        RefusedError: No patch has one of the concepts, or it is erased already.
        MismatchError: A patch is for another kind of model.
        MalformedError: A file is damaged or hostile.
        UnsupportedError: The model is of a kind that is not supported.
        SystemFailure: A file cannot be read or written.
    """
    started, progress = time.monotonic(), Collector(progress)
    check_known(patching, Patching)
    output, prompts, patches = as_path(output), several(prompts), patching.get("patches", ())
    check_output(output, (model, *several(patches), *several(options.text_encoders)), force=force)
    files = read_patch_files(patches)
    chosen = select(files, patching.get("only", ())) if files else ()
    terms = with_scales(chosen, patching.get("scale", 1.0))
    with opened_model(as_place(model), options, images=_BATCH, progress=progress) as network:
        checkpoint = network.checkpoint
        if chosen:
            _check(checkpoint, files, chosen, progress)
        patched = patched_weights(checkpoint, terms) if chosen else {}
        progress.warn_all(misread_prompts(network.text, prompts))
        count = sampling.images
        asked = [prompt for prompt in prompts for _ in range(count)]
        seeds = [sampling.seed + i for _ in prompts for i in range(count)]
        progress.stage("generating images", len(asked) * (2 if chosen else 1))

        def generate() -> torch.Tensor:
            images = generate_images(
                network,
                asked,
                seeds,
                steps=sampling.steps,
                guidance=network.scale_of(sampling.guidance),
                size=sampling.size,
                batch=_BATCH,
                advance=progress.advance,
            )
            return images.view(len(prompts), count, *images.shape[1:])

        sheets = [generate()]
        if chosen:
            with network.with_weights(patched):
                sheets.append(generate())
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
        check_masks(checkpoint, new, "the checkpoint from before any patch")
        progress.warn(ROUNDS_TWICE)
    progress.warn_all(both_act(checkpoint, new))


def _write(
    rows: torch.Tensor, labels: Sequence[str], output: Path, force: bool, progress: Progress
) -> None:
    memory = io.BytesIO()
    contact_sheet(rows, memory, rows=labels)
    write_output(output, memory.getvalue(), force=force, progress=progress)

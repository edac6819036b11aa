"""sepme sample."""

from pathlib import Path
from typing import Annotated

import typer

from sepme_cli.commands.options import (
    Device,
    Dtype,
    Force,
    Guidance,
    Json,
    LowMemory,
    Model,
    Only,
    PlaceOption,
    PredictionOption,
    Quiet,
    Seed,
    Size,
    Steps,
    T5Option,
    TextEncoders,
    Tokenizer,
    Verbose,
    is_output_stream,
    output_for,
)
from sepme_cli.diffusion.options import ModelOptions
from sepme_cli.errors import UsageError
from sepme_cli.evaluation.protocol import SamplingOptions
from sepme_cli.places import parse_place
from sepme_cli.render import results


def sample(
    model: Model,
    prompts: Annotated[
        list[str],
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="Prompt; the image has one row for each. Repeatable.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            readable=False,
            metavar="PNG",
            help="Image to write, a grid of all that were generated.",
            show_default=False,
        ),
    ],
    force: Force = False,
    patches: Annotated[
        list[PlaceOption] | None,
        typer.Option(
            "--patch",
            parser=parse_place,
            metavar="PATCH",
            help="Generate with this patch applied in memory. Repeatable.",
            show_default=False,
        ),
    ] = None,
    only: Only = None,
    scale: Annotated[
        float, typer.Option(metavar="X", help="Strength of the patches; 1 is full.")
    ] = 1.0,
    seed: Seed = 0,
    count: Annotated[
        int, typer.Option(min=1, metavar="N", help="Number of images per prompt.")
    ] = 1,
    steps: Steps = 20,
    guidance: Guidance = None,
    size: Size = None,
    text_encoders: TextEncoders = None,
    tokenizer: Tokenizer = None,
    t5: T5Option = True,
    prediction: PredictionOption = None,
    device: Device = None,
    dtype: Dtype = "auto",
    low_memory: LowMemory = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Generate images with MODEL, with or without patches.

    MODEL is a Stable Diffusion or Flux checkpoint; it is only read, and no patched copy is
    written. With patches, each prompt gets a row before and a row after.

    Example:

    \b
      sepme sample sd15.safetensors --patch monet.sepme --prompt "a garden by Monet" -o grid.png
    """
    if is_output_stream(output):
        raise UsageError("sample writes its image to a file: give one with -o")
    from sepme_cli.operations.sample import sample as operation

    with output_for(as_json=as_json, quiet=quiet, verbose=verbose) as out:
        result = operation(
            model,
            prompts,
            patches=patches or (),
            output=output,
            sampling=SamplingOptions(count, seed, steps, guidance, size),
            scale=scale,
            only=only or (),
            options=ModelOptions(
                text_encoders or (), tokenizer, t5, prediction, device, dtype, low_memory
            ),
            force=force,
            progress=out.progress,
        )
        out.show(result, results.sample)

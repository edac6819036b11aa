"""sepme apply."""

from pathlib import Path
from typing import Annotated

import typer

from sepme_cli.commands.options import (
    Base,
    Force,
    InPlace,
    Json,
    Model,
    Only,
    OptionalOutput,
    Patches,
    Quiet,
    Verbose,
    output_for,
    sources,
    target,
)
from sepme_cli.render import results


def apply(
    model: Model,
    patches: Patches,
    output: OptionalOutput = None,
    in_place: InPlace = False,
    force: Force = False,
    only: Only = None,
    scale: Annotated[
        float, typer.Option(metavar="X", help="Strength of the patches; 1 is full.")
    ] = 1.0,
    base: Base = None,
    check: Annotated[
        bool, typer.Option("--check", help="Show what would be done, and write nothing.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Convert all floating-point tensors to fp16, bf16 or fp32; by default each keeps "
            "its type.",
            show_default=False,
        ),
    ] = None,
    statement: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            metavar="JSON",
            help="Also write a statement of which files went in and came out, to be signed and "
            "verified.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Apply patches: write a checkpoint without their concepts.

    MODEL is a Stable Diffusion or Flux checkpoint, PATCH a .sepme file or - for standard input.

    A patch is not a lock: whoever has MODEL or the patch can put its concepts back, and fine-tuning
    or a learned embedding may.

    Examples:

    \b
      sepme apply sd15.safetensors monet.sepme -o clean.safetensors
      sepme apply sd15.safetensors artists.sepme --only "Monet" --in-place
      sepme apply sd15/ monet.sepme -o clean/ --statement clean.json
      sepme erase sd15.safetensors -c Monet -o - | sepme apply sd15.safetensors - --in-place
    """
    from sepme_cli.operations.apply import apply as operation

    with output_for(as_json=as_json, quiet=quiet, verbose=verbose, output=output) as out:
        result = operation(
            model,
            sources(patches),
            output=target(output, in_place=in_place, needed=not check),
            in_place=in_place,
            only=only or (),
            scale=scale,
            base=base,
            check=check,
            dtype=dtype,
            statement=statement,
            force=force,
            progress=out.progress,
        )
        out.show(result, results.apply)

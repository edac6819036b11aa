"""sepme export."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sepme_cli.commands.options import (
    Force,
    Json,
    Only,
    PlaceOption,
    Quiet,
    Verbose,
    destination,
    output_for,
    parse_model,
    source,
)
from sepme_cli.errors import UsageError
from sepme_cli.places import parse_place
from sepme_cli.render import exchange


def export(
    patch: Annotated[PlaceOption, typer.Argument(metavar="PATCH", hidden=True, parser=parse_place)],
    to: Annotated[
        Literal["kohya", "peft"],
        typer.Option(
            help="kohya is for A1111, Forge, ComfyUI, kohya's scripts and diffusers; peft is for "
            "PEFT and diffusers, which reads Stable Diffusion 3, Flux.1 and Wan 2.1 in no other.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            readable=False,
            metavar="LORA",
            help="LoRA to write; - is standard output. By default NAME.safetensors in the current "
            "folder, after the first concept.",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
    only: Only = None,
    scale: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X",
            help="Strength of the increments; CONCEPT=X is for one concept. Repeatable.  [default:"
            " 1.0]",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        PlaceOption | None,
        typer.Option(
            metavar="MODEL",
            parser=parse_model,
            help="Model to compute weights with, for increments of the closed form: they have no "
            "weights of their own.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="TYPE", help="Store the LoRA as fp16, bf16 or fp32.")
    ] = "fp16",
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a patch as a LoRA, for other programs.

    PATCH is a .sepme file or - for standard input. All its concepts become one LoRA. The
    rounding error is measured and shown.

    Examples:

    \b
      sepme export monet.sepme --to kohya --base sd15.safetensors -o monet.safetensors
      sepme export artists.sepme --to peft --only "Monet" --scale 0.8
    """
    from sepme_cli.operations.export import export as operation

    with output_for(as_json=as_json, quiet=quiet, verbose=verbose, output=output) as out:
        result = operation(
            source(patch),
            to,
            None if output is None else destination(output),
            only=only or (),
            scale=_scale(scale or ()),
            base=base,
            dtype=dtype,
            force=force,
            progress=out.progress,
        )
        out.show(result, exchange.export)


def _scale(given: list[str] | tuple[()]) -> float | dict[str, float]:
    """One for all concepts, or those of single ones; UsageError for no number, and for both."""
    scales: dict[str, float] = {}
    for text in given:
        concept, _, number = text.rpartition("=")
        try:
            scales[concept] = float(number)
        except ValueError:
            raise UsageError(
                f"--scale {text}: this is no number", expected="X or CONCEPT=X", found=number
            ) from None
    if "" not in scales:
        return scales or 1.0
    if len(given) > 1:
        raise UsageError("--scale X is for all concepts: give it once, or CONCEPT=X for each")
    return scales[""]

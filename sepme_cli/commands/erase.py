"""sepme erase."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sepme_cli import render
from sepme_cli.commands.options import (
    Device,
    Dtype,
    Force,
    Json,
    Model,
    PredictionOption,
    Quiet,
    TextEncoders,
    Tokenizer,
    Verbose,
    destination,
    output_for,
)
from sepme_cli.erasure.prompts import AsKind
from sepme_cli.erasure.settings import Settings

Method = Literal["sepme", "closed-form"]


def erase(
    model: Model,
    concepts: Annotated[
        list[str],
        typer.Option(
            "--concept",
            "-c",
            metavar="NAME",
            help="What to take out, as a prompt would say it; style:NAME or object:NAME says what "
            "it is. Repeat it for more: one increment each, which can be applied and taken back "
            "alone.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATCH",
            help="The patch file; - is standard output. The concept's name with .sepme, in the "
            "current folder, if left out.",
            show_default=False,
        ),
    ] = None,
    apply_to: Annotated[
        Path | None,
        typer.Option(
            "--apply",
            metavar="CLEAN",
            help="Also write MODEL with the patch applied.",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
    kind: Annotated[
        AsKind, typer.Option("--as", help="What the concepts are, where their names do not say it.")
    ] = "any",
    method: Annotated[
        Method | None,
        typer.Option(
            help="closed-form takes seconds and no picture; sepme optimises from there on "
            "pictures of the concept. closed-form if left out, unless --images or --joint ask "
            "for sepme.",
            show_default=False,
        ),
    ] = None,
    protect: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A neighbour that must stay as it is; style:NAME or object:NAME says what it "
            "is. Repeatable.",
            show_default=False,
        ),
    ] = None,
    known: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATCH",
            help="A patch made before: its concepts are left alone, so that both patches can be "
            "combined. Repeatable.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Optimise on these pictures of the concept instead of ones that MODEL draws.",
            show_default=False,
        ),
    ] = None,
    joint: Annotated[
        bool, typer.Option("--joint", help="Optimise the concepts together, not one by one.")
    ] = False,
    steps: Annotated[
        int, typer.Option(min=1, metavar="N", help="At most so many steps.")
    ] = Settings.steps,
    lr: Annotated[float, typer.Option(metavar="X", help="Learning rate.")] = Settings.lr,
    threshold: Annotated[
        float,
        typer.Option(
            metavar="X",
            help="Stop when the correlation with the concept, 1 at the start, is down to this.",
        ),
    ] = Settings.threshold,
    rank: Annotated[
        int, typer.Option(min=1, metavar="N", help="At most this rank for an increment.")
    ] = Settings.rank,
    seed: Annotated[
        int, typer.Option(metavar="N", help="The same seed gives the same patch.")
    ] = Settings.seed,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Noisy pictures a step.")
    ] = Settings.batch_size,
    pictures: Annotated[
        int,
        typer.Option(
            min=2, metavar="N", help="How many pictures of a concept MODEL draws to learn from."
        ),
    ] = Settings.pictures,
    sampling_steps: Annotated[
        int, typer.Option(min=1, metavar="N", help="Steps in which it draws each.")
    ] = Settings.sampling_steps,
    text_encoders: TextEncoders = None,
    tokenizer: Tokenizer = None,
    prediction: PredictionOption = None,
    device: Device = None,
    dtype: Dtype = Settings.dtype,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make a patch that takes concepts out of MODEL.

    MODEL is a Stable Diffusion checkpoint; it is only read. The patch changes nothing for
    the empty prompt, nor for the other concepts of this patch and of those named by --known.

    Example:

    \b
      sepme erase sd15.safetensors --concept "Monet" --as style -o monet.sepme
    """
    from sepme_cli.operations.erase import erase as operation

    settings = Settings(
        steps=steps,
        lr=lr,
        threshold=threshold,
        rank=rank,
        seed=seed,
        batch_size=batch_size,
        pictures=pictures,
        sampling_steps=sampling_steps,
        device=device,
        dtype=dtype,
    )
    with output_for(as_json=as_json, quiet=quiet, verbose=verbose, output=output) as out:
        result = operation(
            model,
            concepts,
            output=None if output is None else destination(output),
            apply_to=apply_to,
            method=method,
            kind=kind,
            protect=protect or (),
            known=known or (),
            images=images,
            settings=settings,
            joint=joint,
            text_encoders=text_encoders or (),
            tokenizer=tokenizer,
            prediction=prediction,
            force=force,
            progress=out.progress,
        )
        out.show(result, render.erase)

"""sepme evaluate."""

from pathlib import Path
from typing import Annotated

import typer

from sepme_cli.commands.options import (
    Device,
    Dtype,
    Json,
    LowMemory,
    Model,
    Only,
    Patches,
    PredictionOption,
    Quiet,
    TextEncoders,
    Tokenizer,
    Verbose,
    command_line,
    output_for,
    sources,
)
from sepme_cli.diffusion.options import ModelOptions
from sepme_cli.erasure.prompts import AsKind
from sepme_cli.evaluation.protocol import Drawing
from sepme_cli.exit_status import ExitStatus
from sepme_cli.render import results


def evaluate(
    context: typer.Context,
    model: Model,
    patches: Patches,
    judge: Annotated[
        str,
        typer.Option(
            metavar="JUDGE",
            help="Who says what a picture shows: a transformers image classifier or CLIP model, "
            "as a folder or a hub id that was downloaded; or package.module:function, which "
            "returns a judge of your own.",
            show_default=False,
        ),
    ],
    report: Annotated[
        Path,
        typer.Option(
            readable=False,
            metavar="DIR",
            help="The folder for the report: a page (report.html), JSON, CSV, contact sheets and "
            "pictures. What an interrupted run left there is gone on with.",
            show_default=False,
        ),
    ],
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            "-f",
            help="Replace a report that is there; pictures that still hold are kept.",
        ),
    ] = False,
    retain: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A neighbour that must have stayed; style:NAME or object:NAME says what it is. "
            "Some of what the recipe protects, or the judge knows, if left out. Repeatable.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            metavar="YAML",
            help="The recipe that the patches were made by: it says what the concepts are.",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[
        AsKind,
        typer.Option(
            "--as",
            help="What the erased concepts are, where neither the recipe nor the patch says it.",
        ),
    ] = "any",
    only: Only = None,
    restore: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Put at most so many concepts back, each alone while the others stay out.",
        ),
    ] = Drawing.restore,
    pictures: Annotated[
        int, typer.Option(min=2, metavar="N", help="Pictures of each concept.")
    ] = Drawing.pictures,
    seed: Annotated[
        int, typer.Option(metavar="N", help="The same seed draws the same pictures.")
    ] = Drawing.seed,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Sampling steps.")] = Drawing.steps,
    guidance: Annotated[
        float, typer.Option(metavar="X", help="Classifier-free guidance.")
    ] = Drawing.guidance,
    size: Annotated[
        int | None,
        typer.Option(
            min=8,
            metavar="N",
            help="Pixels on a side; what MODEL is made for if left out.",
            show_default=False,
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            metavar="DIR",
            help="Pictures to tell FID and KID of the retained concepts from, on what --features "
            "sees.",
            show_default=False,
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A transformers vision model, as a folder or a hub id that was downloaded.",
            show_default=False,
        ),
    ] = None,
    lpips: Annotated[
        bool, typer.Option("--lpips", help="Measure LPIPS too: pip install 'sepme[lpips]'.")
    ] = False,
    fail_unless_erased: Annotated[
        bool,
        typer.Option(
            "--fail-unless-erased",
            help="End with status 1 unless every concept is erased, and restored exactly.",
        ),
    ] = False,
    text_encoders: TextEncoders = None,
    tokenizer: Tokenizer = None,
    prediction: PredictionOption = None,
    device: Device = None,
    dtype: Dtype = "auto",
    low_memory: LowMemory = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Judge what patches take out, what stays, what returns.

    MODEL is a Stable Diffusion checkpoint without patches; it is only read, and no patched copy
    is written. PATCH is a .sepme file or - for standard input. Pictures are drawn with the same
    seeds before, after and restored. The exit status is 0 whatever the judge says, unless
    --fail-unless-erased is given.

    Examples:

    \b
      sepme evaluate sd15.safetensors monet.sepme --judge openai/clip-vit-base-patch32
          --retain "style:Van Gogh" --retain object:cat --report monet-report
      sepme evaluate sd15.safetensors monet.sepme --judge mypackage.judging:judge --report out
    """
    from sepme_cli.operations.evaluate import evaluate as operation

    drawing = Drawing(pictures, seed, steps, guidance, size, restore)
    with output_for(as_json=as_json, quiet=quiet, verbose=verbose) as out:
        result = operation(
            model,
            sources(patches),
            judge=judge,
            report=report,
            only=only or (),
            retain=retain or (),
            recipe=recipe,
            kind=kind,
            drawing=drawing,
            reference=reference,
            features=features,
            lpips=lpips,
            options=ModelOptions(
                text_encoders or (), tokenizer, prediction, device, dtype, low_memory
            ),
            command=command_line(context),
            force=force,
            progress=out.progress,
        )
        out.show(result, results.evaluate)
    if fail_unless_erased and not (result.all_erased and result.restored_identical):
        raise typer.Exit(ExitStatus.NO)

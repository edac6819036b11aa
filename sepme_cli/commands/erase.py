"""sepme erase."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sepme_cli.commands.hyperparameters import (
    HYPERPARAMETERS,
    BatchSize,
    LearningRate,
    Neighbours,
    Pictures,
    Rank,
    SamplingSteps,
    Seed,
    Steps,
    Threshold,
    is_given,
)
from sepme_cli.commands.options import (
    Device,
    Dtype,
    Force,
    Json,
    LowMemory,
    Model,
    PlaceOption,
    PredictionOption,
    Quiet,
    TextEncoders,
    Tokenizer,
    Verbose,
    destination,
    output_for,
)
from sepme_cli.diffusion.options import ModelOptions
from sepme_cli.erasure.methods import METHODS
from sepme_cli.erasure.prompts import AsKind
from sepme_cli.erasure.settings import Settings
from sepme_cli.places import parse_output, parse_place
from sepme_cli.render import plan, results

if TYPE_CHECKING:
    Method = str
else:
    Method = Literal[tuple(METHODS)]


def erase(
    model: Model,
    context: typer.Context,
    concepts: Annotated[
        list[str] | None,
        typer.Option(
            "--concept",
            "-c",
            metavar="NAME",
            help="What to take out, as a prompt would say it; style:NAME or object:NAME says what "
            "it is. Repeat it for more: one increment each, which can be applied and taken back "
            "alone.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            metavar="YAML",
            help="Take the concepts, what to keep, the method and its settings from a recipe (see "
            "sepme recipe); options of this command line override its method and settings.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        PlaceOption | None,
        typer.Option(
            "--output",
            "-o",
            parser=parse_output,
            metavar="PATCH",
            help="The patch file; - is standard output, hf://OWNER/NAME/FILE publishes it on the "
            "hub. The first concept's or the recipe's name with .sepme, in the current folder, if "
            "left out.",
            show_default=False,
        ),
    ] = None,
    apply_to: Annotated[
        Path | None,
        typer.Option(
            "--apply",
            readable=False,
            metavar="CLEAN",
            help="Also write MODEL with the patch applied.",
            show_default=False,
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Write nothing; show how well the concepts can be told from what must stay, what "
            "else would change at several strengths, and how long it will take.",
        ),
    ] = False,
    force: Force = False,
    kind: Annotated[
        AsKind, typer.Option("--as", help="What the concepts are, where their names do not say it.")
    ] = "any",
    to: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What the concepts should act like instead, as a prompt would say it; the most "
            "general word of their kind if left out.",
            show_default=False,
        ),
    ] = None,
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
    neighbours: Neighbours = Settings.neighbours,
    known: Annotated[
        list[PlaceOption] | None,
        typer.Option(
            metavar="PATCH",
            parser=parse_place,
            help="A patch made before: its concepts are left alone, so that both patches can be "
            "combined. Repeatable.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            metavar="DIR",
            help="Optimise on these pictures of the concept instead of ones that MODEL draws.",
            show_default=False,
        ),
    ] = None,
    joint: Annotated[
        bool, typer.Option("--joint", help="Optimise the concepts together, not one by one.")
    ] = False,
    steps: Steps = Settings.steps,
    lr: LearningRate = Settings.lr,
    threshold: Threshold = Settings.threshold,
    rank: Rank = Settings.rank,
    seed: Seed = Settings.seed,
    batch_size: BatchSize = Settings.batch_size,
    pictures: Pictures = Settings.pictures,
    sampling_steps: SamplingSteps = Settings.sampling_steps,
    text_encoders: TextEncoders = None,
    tokenizer: Tokenizer = None,
    prediction: PredictionOption = None,
    device: Device = None,
    dtype: Dtype = "auto",
    aliases: Annotated[
        Literal["none", "auto"],
        typer.Option(
            help="auto also erases words that are nearly the same as the concept (kitten with "
            "cat); --check lists them.",
        ),
    ] = "none",
    force_collateral: Annotated[
        bool,
        typer.Option(
            "--force-collateral",
            help="Make the patch even if it changes much that nobody named.",
        ),
    ] = False,
    no_cache: Annotated[
        bool,
        typer.Option(
            "--no-cache",
            help="Neither read nor keep what the text encoder makes of ordinary captions.",
        ),
    ] = False,
    low_memory: LowMemory = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make a patch that takes concepts out of MODEL.

    MODEL is a Stable Diffusion checkpoint; it is only read. The patch changes nothing for
    the empty prompt, nor for the other concepts of this patch and of those named by --known.

    Examples:

    \b
      sepme erase sd15.safetensors --concept "Monet" --as style -o monet.sepme
      sepme erase sd15.safetensors -c "Monet" --as style --to "watercolor"
      sepme erase sd15.safetensors -c "Monet" --as style --protect-neighbours 8
      sepme erase sd15.safetensors --recipe policy.yaml --check
    """
    from sepme_cli.operations.erase import erase as operation
    from sepme_cli.operations.plan import plan_erasure
    from sepme_cli.planning.request import Wishes

    with output_for(as_json=as_json, quiet=quiet, verbose=verbose, output=output) as out:
        wishes: Wishes = {
            "recipe": recipe,
            "method": method,
            "kind": kind,
            "to": to,
            "protect": protect or (),
            "known": known or (),
            "images": images,
            "joint": joint,
            "aliases": aliases,
            "settings": {n: context.params[n] for n in HYPERPARAMETERS if is_given(context, n)},
            "options": ModelOptions(
                text_encoders or (),
                tokenizer,
                prediction,
                device,
                dtype if is_given(context, "dtype") else None,
                low_memory,
            ),
            "cache": not no_cache,
        }
        if check:
            found = plan_erasure(model, concepts or (), progress=out.progress, **wishes)
            out.show(found, plan.erasure)
            return
        result = operation(
            model,
            concepts or (),
            output=None if output is None else destination(output),
            apply_to=apply_to,
            force=force,
            force_collateral=force_collateral,
            progress=out.progress,
            **wishes,
        )
        out.show(result, results.erase)

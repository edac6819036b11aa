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
    RobustOption,
    RobustRounds,
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
    T5Option,
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
            help="Concept to erase, as a prompt would name it; style:NAME or object:NAME gives its"
            " kind. Repeatable; each concept gets an increment of its own.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            metavar="YAML",
            help="Read concepts, protected names, method and settings from a recipe (see sepme "
            "recipe). Options on the command line override its method and settings.",
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
            help="Patch to write; - is standard output, hf://OWNER/NAME/FILE publishes it on the "
            "hub. By default NAME.sepme in the current folder, after the first concept or the"
            " recipe.",
            show_default=False,
        ),
    ] = None,
    apply_to: Annotated[
        Path | None,
        typer.Option(
            "--apply",
            readable=False,
            metavar="CLEAN",
            help="Also write MODEL with the patch applied, to this file.",
            show_default=False,
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Show what would be done, and write nothing: how separable the concepts are, what"
            " else would change at several strengths of protection, and how long it will "
            "take.",
        ),
    ] = False,
    force: Force = False,
    kind: Annotated[
        AsKind,
        typer.Option(
            "--as", help="Kind of the concepts whose names do not give it; any detects it."
        ),
    ] = "any",
    to: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Anchor: what to generate instead of the concepts, as a prompt would name it; by "
            "default the most general word of their kind.",
            show_default=False,
        ),
    ] = None,
    erase_from: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="THING",
            help="Erase the concepts from this one thing only, as its attributes: --concept red "
            "--from apple. Other things keep them, and the thing keeps its others.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        Method | None,
        typer.Option(
            help="closed-form takes seconds and needs no images; sepme then optimises on images of"
            " the concept; text-encoder changes how prompts are read; concept-prune makes the"
            " UNet's weights zero that draw the concept. By default closed-form, or sepme with"
            " --images or --joint.",
            show_default=False,
        ),
    ] = None,
    protect: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Protect this name: prompts with it must not change. style:NAME or object:NAME "
            "gives its kind. Repeatable.",
            show_default=False,
        ),
    ] = None,
    neighbours: Neighbours = Settings.neighbours,
    known: Annotated[
        list[PlaceOption] | None,
        typer.Option(
            metavar="PATCH",
            parser=parse_place,
            help="Existing patch to combine with: the new increments leave its concepts alone. "
            "Repeatable.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            metavar="DIR",
            help="Folder with images of the concept to optimise on; by default MODEL generates "
            "them.",
            show_default=False,
        ),
    ] = None,
    joint: Annotated[
        bool, typer.Option("--joint", help="Optimise all concepts together instead of one by one.")
    ] = False,
    steps: Steps = Settings.steps,
    lr: LearningRate = Settings.lr,
    threshold: Threshold = Settings.threshold,
    rank: Rank = Settings.rank,
    seed: Seed = Settings.seed,
    batch_size: BatchSize = Settings.batch_size,
    pictures: Pictures = Settings.pictures,
    sampling_steps: SamplingSteps = Settings.sampling_steps,
    robust: RobustOption = Settings.robust,
    robust_rounds: RobustRounds = Settings.robust_rounds,
    text_encoders: TextEncoders = None,
    tokenizer: Tokenizer = None,
    t5: T5Option = True,
    prediction: PredictionOption = None,
    device: Device = None,
    dtype: Dtype = "auto",
    aliases: Annotated[
        Literal["none", "auto"],
        typer.Option(
            help="auto also erases words that are nearly the same as the concept (kitten for cat);"
            " --check lists them.",
        ),
    ] = "none",
    streams: Annotated[
        Literal["all", "tokens", "pooled"],
        typer.Option(
            help="What of a prompt to erase from: tokens, which cross-attention reads; pooled, the "
            "vector that XL, Stable Diffusion 3 and Flux.1 also read; or all.",
        ),
    ] = "all",
    force_collateral: Annotated[
        bool,
        typer.Option(
            "--force-collateral",
            help="Make the patch even if it would change other prompts much.",
        ),
    ] = False,
    no_cache: Annotated[
        bool,
        typer.Option(
            "--no-cache",
            help="Do not use the cache of ordinary captions' embeddings.",
        ),
    ] = False,
    low_memory: LowMemory = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make a patch that erases concepts from MODEL.

    MODEL is a Stable Diffusion or Flux checkpoint; it is only read. Only the name of a concept is
    needed: its kind and its anchor (what is generated instead) are chosen, and its nearest words
    and ordinary captions are protected. The empty prompt, the other concepts of this patch and
    those of --known patches are left alone too.

    Examples:

    \b
      sepme erase sd15.safetensors --concept "Monet"
      sepme erase sd15.safetensors -c style:Monet --to "watercolor" -o monet.sepme
      sepme erase sd15.safetensors -c style:Monet --protect style:Renoir --check
      sepme erase sd15.safetensors -c red --from apple
      sepme erase sd15.safetensors --recipe policy.yaml --check
    """
    from sepme_cli.operations.erase import erase as operation
    from sepme_cli.operations.plan import plan_erasure
    from sepme_cli.planning.request import EraseOptions

    with output_for(as_json=as_json, quiet=quiet, verbose=verbose, output=output) as out:
        options: EraseOptions = {
            "recipe": recipe,
            "method": method,
            "kind": kind,
            "to": to,
            "erase_from": erase_from,
            "protect": protect or (),
            "known": known or (),
            "images": images,
            "joint": joint,
            "aliases": aliases,
            "settings": {n: context.params[n] for n in HYPERPARAMETERS if is_given(context, n)},
            "options": ModelOptions(
                text_encoders or (),
                tokenizer,
                t5,
                prediction,
                device,
                dtype if is_given(context, "dtype") else None,
                low_memory,
            ),
            "cache": not no_cache,
            "streams": streams,
        }
        if check:
            found = plan_erasure(model, concepts or (), progress=out.progress, **options)
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
            **options,
        )
        out.show(result, results.erase)

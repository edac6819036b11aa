"""sepme attack."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sepme_cli.commands.options import (
    Device,
    Dtype,
    Guidance,
    Json,
    LowMemory,
    Model,
    Patches,
    PlaceOption,
    PredictionOption,
    Quiet,
    Size,
    Steps,
    T5Option,
    TextEncoders,
    Tokenizer,
    Verbose,
    command_line,
    output_for,
    parse_model,
    sources,
)
from sepme_cli.diffusion.options import ModelOptions
from sepme_cli.erasure.prompts import AsKind
from sepme_cli.evaluation.protocol import SamplingOptions
from sepme_cli.render import results


def attack(
    context: typer.Context,
    model: Model,
    patches: Patches,
    judge: Annotated[
        str,
        typer.Option(
            metavar="JUDGE",
            help="Classifier that judges the images, as for sepme evaluate.",
            show_default=False,
        ),
    ],
    report: Annotated[
        Path,
        typer.Option(
            readable=False,
            metavar="DIR",
            help="Folder for the report: a page (attack.html), JSON, CSV and images. An "
            "interrupted run is continued.",
            show_default=False,
        ),
    ],
    concept: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Concept to attack; may be left out where the patches erase one.",
            show_default=False,
        ),
    ] = None,
    attacks: Annotated[
        list[str] | None,
        typer.Option(
            "--attack",
            metavar="NAME",
            help="Attack, or group of attacks: text, sampling, optimising or relearning. "
            "Repeatable; by default all.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        Literal["quick", "standard", "thorough"],
        typer.Option(help="How much of each attack is tried."),
    ] = "standard",
    descriptions: Annotated[
        list[str] | None,
        typer.Option(
            "--description",
            metavar="TEXT",
            help="Prompt that describes the concept without its name. Repeatable.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            metavar="DIR",
            help="Folder with images of the concept; by default MODEL generates them.",
            show_default=False,
        ),
    ] = None,
    floor: Annotated[
        PlaceOption | None,
        typer.Option(
            metavar="MODEL",
            parser=parse_model,
            help="Model that never knew the concept: the same attacks on it show what they teach.",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[
        AsKind, typer.Option("--as", help="Kind of the concept, if the patch does not give it.")
    ] = "any",
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            "-f",
            help="Replace an existing report; trials that are still valid are reused.",
        ),
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="K/N",
            help="Try only part K of N, for a report that is made later: by the same command "
            "without --shard, when all parts are done. auto: as accelerate launch or torchrun "
            "tells each process.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Random seed of images and attacks.")
    ] = SamplingOptions.seed,
    steps: Steps = SamplingOptions.steps,
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
    """Try to have a patched model draw an erased concept again.

    MODEL is a Stable Diffusion or Flux checkpoint without patches; it is only read. PATCH is a
    .sepme file or - for standard input. Attacks are by other words and text embeddings (text), by
    seeds, noise and given images (sampling), by tokens and embeddings learned through the denoiser
    (optimising), and by fine-tuning (relearning). Each is also tried on the original: the most that
    it can reach. What shows images of the concept can teach any model: see --floor.

    Examples:

    \b
      sepme attack sd15.safetensors monet.sepme --judge openai/clip-vit-base-patch32
          --report monet-attacked --budget quick
      sepme attack sd15.safetensors cat.sepme --judge mypackage.judging:judge --report out
          --attack text --attack unlearndiffatk --description "a pet that meows"
    """
    from sepme_cli.operations import attack as operations

    sampling = SamplingOptions(seed=seed, steps=steps, guidance=guidance, size=size)
    options = ModelOptions(
        text_encoders or (), tokenizer, t5, prediction, device, dtype, low_memory
    )
    ways = operations.Ways(
        concept=concept,
        kind=kind,
        attacks=attacks or (),
        budget=budget,
        descriptions=descriptions or (),
        images=images,
        floor=floor,
    )
    with output_for(as_json=as_json, quiet=quiet, verbose=verbose) as out:
        if shard is not None:
            part = operations.attack_shard(
                model,
                sources(patches),
                shard=shard,
                judge=judge,
                report=report,
                sampling=sampling,
                options=options,
                progress=out.progress,
                **ways,
            )
            out.show(part, results.shard)
            return
        result = operations.attack(
            model,
            sources(patches),
            judge=judge,
            report=report,
            sampling=sampling,
            options=options,
            command=command_line(context),
            force=force,
            progress=out.progress,
            **ways,
        )
        out.show(result, results.attack)

"""sepme evaluate."""

from pathlib import Path
from typing import Annotated

import typer

from sepme_cli.commands.options import (
    Device,
    Dtype,
    Guidance,
    Json,
    LowMemory,
    Model,
    Only,
    Patches,
    PredictionOption,
    Quiet,
    Seed,
    Size,
    Steps,
    T5Option,
    TextEncoders,
    Tokenizer,
    Verbose,
    command_line,
    output_for,
    sources,
)
from sepme_cli.diffusion.options import ModelOptions
from sepme_cli.erasure.prompts import AsKind
from sepme_cli.errors import UsageError
from sepme_cli.evaluation.protocol import SamplingOptions
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
            help="Classifier that judges the images: a transformers image classifier or CLIP model"
            " (a folder, or the hub id of a downloaded model), nudenet for nudity (pip install "
            "'sepme[nudenet]'), or package.module:function, which returns a judge of your own.",
            show_default=False,
        ),
    ],
    report: Annotated[
        Path,
        typer.Option(
            readable=False,
            metavar="DIR",
            help="Folder for the report: a page (report.html), JSON, CSV, contact sheets and "
            "images. An interrupted run is continued.",
            show_default=False,
        ),
    ],
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            "-f",
            help="Replace an existing report; images that are still valid are reused.",
        ),
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="K/N",
            help="Generate only part K of N of the images, for a report that is made later: by the "
            "same command without --shard, when all parts are done. auto: as accelerate launch or "
            "torchrun tells each process.",
            show_default=False,
        ),
    ] = None,
    images_from: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            readable=False,
            metavar="DIR",
            help="Also use the images of this folder, which --shard made elsewhere. Repeatable.",
            show_default=False,
        ),
    ] = None,
    retain: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Concept that should be unchanged; style:NAME or object:NAME gives its kind. By "
            "default some that the recipe protects or the judge knows. Repeatable.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            metavar="YAML",
            help="Recipe that the patches were made by; it gives the kinds of the concepts.",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[
        AsKind,
        typer.Option(
            "--as",
            help="Kind of the erased concepts, if neither the recipe nor the patch gives it.",
        ),
    ] = "any",
    only: Only = None,
    restore: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Maximum number of concepts to restore, one at a time, to see whether each comes "
            "back.",
        ),
    ] = SamplingOptions.restore,
    pictures: Annotated[
        int, typer.Option(min=2, metavar="N", help="Number of images per concept.")
    ] = SamplingOptions.images,
    seed: Seed = SamplingOptions.seed,
    steps: Steps = SamplingOptions.steps,
    guidance: Guidance = None,
    size: Size = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            metavar="DIR",
            help="Folder with reference images: also compute FID and KID of the retained concepts,"
            " with --features.",
            show_default=False,
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="What computes the features for FID, KID and --training-images: a vision model of "
            "transformers (a folder, or the hub id of a downloaded model), or "
            "package.module:function, which returns a function of your own.",
            show_default=False,
        ),
    ] = None,
    training_images: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            metavar="DIR",
            help="Folder with training images and their captions (name.png with name.txt, or "
            "metadata.jsonl): also see whether they are drawn again, with --features.",
            show_default=False,
        ),
    ] = None,
    replication_threshold: Annotated[
        float,
        typer.Option(
            min=-1.0,
            max=1.0,
            metavar="X",
            help="Cosine similarity from which an image counts as a replica; 0.5 is meant for "
            "features of a copy detector.",
        ),
    ] = 0.5,
    lpips: Annotated[
        bool, typer.Option("--lpips", help="Also compute LPIPS; needs pip install 'sepme[lpips]'.")
    ] = False,
    fail_unless_erased: Annotated[
        bool,
        typer.Option(
            "--fail-unless-erased",
            help="Exit with status 1 unless every concept is erased, and can be restored exactly.",
        ),
    ] = False,
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
    """Generate images before and after patches, and judge them.

    MODEL is a Stable Diffusion or Flux checkpoint without patches; it is only read, and no
    patched copy is written. PATCH is a .sepme file or - for standard input. The report says how
    often each concept is recognised: with the original weights, with the patches, and restored,
    always with the same prompts and seeds. The exit status is 0 whatever the judge recognises,
    unless --fail-unless-erased is given.

    Examples:

    \b
      sepme evaluate sd15.safetensors monet.sepme --judge openai/clip-vit-base-patch32
          --retain "style:Van Gogh" --retain object:cat --report monet-report
      sepme evaluate sd15.safetensors monet.sepme --judge mypackage.judging:judge --report out
      sepme evaluate sd15.safetensors monet.sepme --judge openai/clip-vit-base-patch32
          --report monet-report --shard 3/16
    """
    from sepme_cli.operations import evaluate as operations

    if shard is not None and (images_from or fail_unless_erased):
        raise UsageError(
            "--shard judges nothing: --from and --fail-unless-erased are for the report",
            expected="one or the other",
        )
    sampling = SamplingOptions(pictures, seed, steps, guidance, size, restore)
    options = ModelOptions(
        text_encoders or (), tokenizer, t5, prediction, device, dtype, low_memory
    )
    scope = operations.Scope(
        only=only or (),
        retain=retain or (),
        recipe=recipe,
        kind=kind,
        reference=reference,
        features=features,
        lpips=lpips,
        training_images=training_images,
        replication_threshold=replication_threshold,
    )
    with output_for(as_json=as_json, quiet=quiet, verbose=verbose) as out:
        if shard is not None:
            part = operations.evaluate_shard(
                model,
                sources(patches),
                shard=shard,
                judge=judge,
                report=report,
                sampling=sampling,
                options=options,
                force=force,
                progress=out.progress,
                **scope,
            )
            out.show(part, results.shard)
            return
        result = operations.evaluate(
            model,
            sources(patches),
            judge=judge,
            report=report,
            sampling=sampling,
            options=options,
            images_from=images_from or (),
            command=command_line(context),
            force=force,
            progress=out.progress,
            **scope,
        )
        out.show(result, results.evaluate)
    if fail_unless_erased and not (result.all_erased and result.restored_identical):
        raise typer.Exit(ExitStatus.NO)

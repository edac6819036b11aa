"""sepme import."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from patch_spec import limits
from sepme_cli.commands.options import (
    Force,
    Json,
    PlaceOption,
    Quiet,
    Verbose,
    destination,
    output_for,
    parse_model,
)
from sepme_cli.erasure.prompts import AsKind
from sepme_cli.errors import UsageError
from sepme_cli.render import exchange


def import_(
    lora: Annotated[
        PlaceOption | None, typer.Argument(metavar="LORA", hidden=True, parser=parse_model)
    ] = None,
    base: Annotated[
        PlaceOption | None,
        typer.Option(
            metavar="MODEL",
            parser=parse_model,
            help="Model that the LoRA is for, or that was edited: a patch records which weights it"
            " is for.  [required]",
            show_default=False,
        ),
    ] = None,
    edited: Annotated[
        PlaceOption | None,
        typer.Option(
            metavar="MODEL",
            parser=parse_model,
            help="Instead of a LoRA: the same model after another method edited it, or only the "
            "edited weights (as UCE and ESD save them).",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            readable=False,
            metavar="PATCH",
            help="Patch to write; - is standard output. By default NAME.sepme in the current "
            "folder, after the concept.",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
    concept: Annotated[
        str | None,
        typer.Option(
            "--concept",
            "-c",
            metavar="NAME",
            help="Concept that the increment erases, as a prompt would name it; by default the "
            "LoRA's title or the file's name.",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[AsKind, typer.Option("--as", help="Kind of the concept.")] = "any",
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=limits.RANK,
            metavar="N",
            help="Rank of the increment, whatever error it gives.",
            show_default=False,
        ),
    ] = None,
    error: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="X",
            help="Use the lowest rank with at most this relative error in every weight; by default"
            " 0.01 for a LoRA and 0.05 for an edited model.",
            show_default=False,
        ),
    ] = None,
    text_layers_only: Annotated[
        bool,
        typer.Option(
            "--text-layers-only",
            help="Take only what is done to weights that read the text and nothing else.",
        ),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Turn a LoRA, or another method's edit, into a patch.

    LORA is a file of kohya's scripts, PEFT or diffusers. What it changes in the weights of linear
    layers, CLIP's text encoders included, becomes one increment, which can be applied, combined and
    reverted exactly like any other. Everything else is left out, and listed. The difference between
    two checkpoints (--base and --edited) is treated in the same way. With --text-layers-only the
    increment is of the keys and values of the cross-attention (of a transformer: of the layer that
    takes the text in), where it depends on no image.

    Examples:

    \b
      sepme import slider.safetensors --base sd15.safetensors -c "Monet" -o monet.sepme
      sepme import --base sd15.safetensors --edited esd.safetensors -c "Monet" --as style
    """
    from sepme_cli.operations.extract import ERROR as EXTRACTION_ERROR
    from sepme_cli.operations.extract import extract
    from sepme_cli.operations.import_lora import ERROR as LORA_ERROR
    from sepme_cli.operations.import_lora import import_lora

    if lora is not None and edited is not None:
        raise UsageError("name a LORA, or an --edited model: one of the two")
    if base is None:
        raise UsageError(
            "name the model with --base: a patch says which weights it was made for",
            expected="--base MODEL",
            found="none",
        )
    with output_for(as_json=as_json, quiet=quiet, verbose=verbose, output=output) as out:
        wanted: dict[str, Any] = {
            "output": None if output is None else destination(output),
            "concept": concept,
            "kind": kind,
            "rank": rank,
            "text_layers_only": text_layers_only,
            "force": force,
            "progress": out.progress,
        }
        if lora is not None:
            result = import_lora(lora, base, error=_given(error, LORA_ERROR), **wanted)
        elif edited is not None:
            result = extract(base, edited, error=_given(error, EXTRACTION_ERROR), **wanted)
        else:
            raise UsageError("name a LORA, or the --edited model beside its --base")
        out.show(result, partial(exchange.imported, whole=verbose))


def _given(error: float | None, usual: float) -> float:
    return usual if error is None else error

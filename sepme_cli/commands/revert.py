"""sepme revert."""

from pathlib import Path
from typing import Annotated

import typer

from sepme_cli.commands.completing import names_of_concepts
from sepme_cli.commands.options import (
    Base,
    Force,
    InPlace,
    Json,
    Model,
    OptionalOutput,
    PlaceOption,
    Quiet,
    Verbose,
    output_for,
    sources,
    target,
)
from sepme_cli.places import parse_place
from sepme_cli.render import results


def revert(
    model: Model,
    patches: Annotated[
        list[PlaceOption] | None,
        typer.Argument(metavar="PATCH", hidden=True, parser=parse_place),
    ] = None,
    concepts: Annotated[
        list[str] | None,
        typer.Option(
            "--concept",
            "-c",
            metavar="NAME",
            help="Restore this concept. Repeatable.",
            show_default=False,
            autocompletion=names_of_concepts,
        ),
    ] = None,
    output: OptionalOutput = None,
    in_place: InPlace = False,
    force: Force = False,
    base: Base = None,
    undo: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            metavar="FILE",
            help="Undo journal that apply wrote; by default the one beside MODEL.",
            show_default=False,
        ),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Fail, and write nothing, if the result would not be exact."),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Restore concepts that patches erased.

    MODEL is a checkpoint with patches in it, PATCH a .sepme file or - for standard input. Name
    concepts with --concept, or patches to restore all of theirs; with neither, everything is
    restored. With the undo journal or the original (--base), the result is exact: byte for byte as
    if the concept had never been erased.

    Examples:

    \b
      sepme revert clean.safetensors --in-place
      sepme revert clean.safetensors --concept "Monet" --base sd15.safetensors -o some.safetensors
    """
    from sepme_cli.operations.revert import revert as operation

    with output_for(as_json=as_json, quiet=quiet, verbose=verbose, output=output) as out:
        result = operation(
            model,
            sources(patches or []),
            concepts=concepts or (),
            output=target(output, in_place=in_place),
            in_place=in_place,
            base=base,
            undo=undo,
            exact=exact,
            force=force,
            progress=out.progress,
        )
        out.show(result, results.revert)

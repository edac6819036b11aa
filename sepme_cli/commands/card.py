"""sepme card."""

from pathlib import Path
from typing import Annotated

import typer

from sepme_cli.commands.options import Json, PlaceOption, Quiet, Verbose, output_for
from sepme_cli.places import parse_place
from sepme_cli.render import results


def card(
    files: Annotated[
        list[PlaceOption], typer.Argument(metavar="FILE", hidden=True, parser=parse_place)
    ],
    base_model: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Id of the base on the hub.", show_default=False),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            metavar="DIR",
            help="Report of sepme evaluate: its folder, or the report.json in it.",
            show_default=False,
        ),
    ] = None,
    attacks: Annotated[
        list[Path] | None,
        typer.Option(
            "--attacks",
            readable=False,
            metavar="DIR",
            help="Report of sepme attack: its folder, or the attack.json in it. Repeatable.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Print a model card that says what was erased.

    FILES are patches, or a patched checkpoint and its patches. The card is Markdown with the front
    matter that the hub reads: what was erased and how, from which model, what was measured, how to
    verify and revert it, and its limits.

    Examples:

    \b
      sepme card monet.sepme --base-model someone/model > README.md
      sepme card clean.safetensors monet.sepme --report monet-report > README.md
    """
    from sepme_cli.operations.card import card as operation

    with output_for(as_json=as_json, quiet=quiet, verbose=verbose) as out:
        result = operation(
            files,
            base_model=base_model,
            report=report,
            attacks=attacks or (),
            progress=out.progress,
        )
        out.show(result, results.card)

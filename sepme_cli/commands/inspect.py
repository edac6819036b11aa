"""sepme inspect."""

from functools import partial
from typing import Annotated

import typer

from sepme_cli.commands.options import Json, PlaceOption, Quiet, Verbose, output_for, source
from sepme_cli.places import parse_place
from sepme_cli.render import results


def inspect(
    file: Annotated[PlaceOption, typer.Argument(metavar="FILE", hidden=True, parser=parse_place)],
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show what a patch or a checkpoint contains.

    FILE is a checkpoint or a .sepme file; - is a patch on standard input. Only the header is read.

    Examples:

    \b
      sepme inspect monet.sepme
      sepme inspect clean.safetensors --json
    """
    from sepme_cli.operations.inspect import inspect as operation

    with output_for(as_json=as_json, quiet=quiet, verbose=verbose) as out:
        out.show(
            operation(source(file), progress=out.progress), partial(results.inspect, whole=verbose)
        )

"""sepme diff."""

from functools import partial
from typing import Annotated

import typer

from sepme_cli.commands.options import Json, PlaceOption, Quiet, Verbose, output_for, parse_model
from sepme_cli.exit_status import ExitStatus
from sepme_cli.render import results


def diff(
    a: Annotated[PlaceOption, typer.Argument(metavar="A", hidden=True, parser=parse_model)],
    b: Annotated[PlaceOption, typer.Argument(metavar="B", hidden=True, parser=parse_model)],
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare checkpoints and patches.

    A and B are two checkpoints, two patches, or a checkpoint and a patch. The exit status is 0 if
    they are the same and 1 if they differ.

    Example:

    \b
      sepme diff sd15.safetensors clean.safetensors
    """
    from sepme_cli.operations.diff import diff as operation

    with output_for(as_json=as_json, quiet=quiet, verbose=verbose) as out:
        result = operation(a, b, progress=out.progress)
        out.show(result, partial(results.diff, whole=verbose))
    if not result.same:
        raise typer.Exit(ExitStatus.NO)

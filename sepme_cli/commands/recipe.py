"""sepme recipe."""

from pathlib import Path
from typing import Annotated

import typer

from sepme_cli.commands.options import (
    STREAM,
    Force,
    Json,
    Quiet,
    Verbose,
    destination,
    output_for,
)
from sepme_cli.exit_status import ExitStatus
from sepme_cli.render import results

recipe = typer.Typer(
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
)


@recipe.callback(invoke_without_command=True)
def group(context: typer.Context) -> None:
    """Write and check recipes: files that say what to erase.

    A recipe is a YAML file with the concepts to erase, their other names, their anchors (what to
    generate instead), what to protect, the method and its settings. `sepme erase MODEL --recipe
    FILE` makes a patch from it.

    Examples:

    \b
      sepme recipe init policy.yaml
      sepme recipe check policy.yaml
    """
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(ExitStatus.USAGE)


@recipe.command()
def init(
    path: Annotated[Path, typer.Argument(readable=False, metavar="[FILE]", hidden=True)] = Path(
        STREAM
    ),
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a commented recipe to start from.

    FILE is the recipe to write; standard output if it is - or not given.

    Examples:

    \b
      sepme recipe init policy.yaml
      sepme recipe init > policy.yaml
    """
    from sepme_cli.operations.recipe import init as operation

    with output_for(as_json=as_json, quiet=quiet, verbose=verbose, output=path) as out:
        to = destination(path, text=True)
        result = operation(to, force=force, progress=out.progress)
        out.show(result, results.recipe_init)


@recipe.command()
def check(
    path: Annotated[Path, typer.Argument(readable=False, metavar="FILE", hidden=True)],
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Read a recipe and show its content, or the line with an error.

    FILE is the recipe. The digest is of its content, without comments and layout; patches made by
    it record the same digest.

    Example:

    \b
      sepme recipe check policy.yaml
    """
    from sepme_cli.operations.recipe import check as operation

    with output_for(as_json=as_json, quiet=quiet, verbose=verbose) as out:
        out.show(operation(path), results.recipe_check)

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
    """Write and check recipes: policies of what to take out of models.

    A recipe is a YAML file that says which concepts to erase, under which names, what they should
    act like, what must stay, and how. `sepme erase MODEL --recipe FILE` makes a patch of it.

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
    """Write a recipe to begin with, all of it explained.

    FILE is the recipe to write; - or nothing is standard output.

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
    """Read a recipe and say what it says, or what is wrong with it and in which line.

    FILE is the recipe. The digest is that of what it says, whatever its comments and layout;
    patches made by it hold the same digest.

    Example:

    \b
      sepme recipe check policy.yaml
    """
    from sepme_cli.operations.recipe import check as operation

    with output_for(as_json=as_json, quiet=quiet, verbose=verbose) as out:
        out.show(operation(path), results.recipe_check)

"""sepme example."""

from pathlib import Path
from typing import Annotated

import typer

from sepme_cli.commands.options import Force, Json, Quiet, Verbose, output_for
from sepme_cli.render import results


def example(
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", readable=False, metavar="MODEL", help="The checkpoint to write."
        ),
    ] = Path("model.safetensors"),
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a small model to try everything on.

    It is a Stable Diffusion 1.x of 66 MB that knows English, and draws 225 objects in 8 styles of
    emoji artwork: "cat in woodcut style". It comes with pip install 'sepme[example]'.

    Examples:

    \b
      sepme example -o model.safetensors
      sepme erase model.safetensors -c woodcut
      sepme sample model.safetensors --prompt "cat in woodcut style" --patch woodcut.sepme \\
        -o grid.png
    """
    from sepme_cli.operations.example import example as operation

    with output_for(as_json=as_json, quiet=quiet, verbose=verbose) as out:
        out.show(operation(output, force=force, progress=out.progress), results.example)

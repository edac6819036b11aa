"""sepme verify."""

from pathlib import Path
from typing import Annotated

import typer

from sepme_cli.commands.options import (
    Base,
    Json,
    PlaceOption,
    Quiet,
    Verbose,
    output_for,
    parse_model,
)
from sepme_cli.exit_status import ExitStatus
from sepme_cli.places import parse_place
from sepme_cli.render import checks


def verify(
    files: Annotated[
        list[PlaceOption], typer.Argument(metavar="FILE", hidden=True, parser=parse_place)
    ],
    base: Base = None,
    model: Annotated[
        PlaceOption | None,
        typer.Option(
            metavar="MODEL",
            parser=parse_model,
            help="The model that the patches were made from: compute again what they leak.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            metavar="YAML",
            help="The recipe that each of the patches should have been made by.",
            show_default=False,
        ),
    ] = None,
    statement: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            metavar="JSON",
            help="What `sepme apply --statement` said of the checkpoint.",
            show_default=False,
        ),
    ] = None,
    allowed_signers: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            metavar="FILE",
            help="Demand signatures, by keys of this file, as git and ssh-keygen have it.",
            show_default=False,
        ),
    ] = None,
    signed_by: Annotated[
        str | None,
        typer.Option(
            metavar="IDENTITY",
            help="Who of the allowed signers must have signed; any of them if left out.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check that patches and patched checkpoints are what they say.

    FILES are patches, or a checkpoint and patches. With the base of a patched checkpoint, or its
    undo journal, and its patches, every weight is held against what composing them gives, and
    everything else against the base. With --model, the leakage that patches record is computed
    again; with --recipe, they must have been made by that recipe, all of it. The exit status is 0
    if all checks hold and 1 if one does not.

    With --allowed-signers every FILE, and the --statement, must have a good signature beside it
    (FILE.sig); the statement's is one of its checkpoint too, and of a folder it is the only one.
    Keys that have expired, or are for something else, do not count. No signature is looked at
    without it. A line of the file is a name and a public key; by hand, the same is

    \b
      ssh-keygen -Y verify -n sepme -I NAME -f ALLOWED -s FILE.sig < FILE

    Examples:

    \b
      sepme verify monet.sepme
      sepme verify monet.sepme --model sd15.safetensors --recipe policy.yaml
      sepme verify clean.safetensors monet.sepme --base sd15.safetensors
      sepme verify monet.sepme --allowed-signers signers --signed-by alice@example.org
      sepme verify clean/ --statement clean.json --allowed-signers signers
    """
    from sepme_cli.operations.verify import verify as operation

    with output_for(as_json=as_json, quiet=quiet, verbose=verbose) as out:
        result = operation(
            files,
            base=base,
            model=model,
            recipe=recipe,
            statement=statement,
            allowed_signers=allowed_signers,
            signed_by=signed_by,
            progress=out.progress,
        )
        out.show(result, checks.verify)
    if not result.ok:
        raise typer.Exit(ExitStatus.NO)

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
            help="Model that the patches were made from: compute their leakage again.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            metavar="YAML",
            help="Recipe that each of the patches must have been made by.",
            show_default=False,
        ),
    ] = None,
    statement: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            metavar="JSON",
            help="Statement that `sepme apply --statement` wrote about the checkpoint.",
            show_default=False,
        ),
    ] = None,
    allowed_signers: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            metavar="FILE",
            help="Require signatures by keys in this file, which has the format that git and "
            "ssh-keygen use.",
            show_default=False,
        ),
    ] = None,
    signed_by: Annotated[
        str | None,
        typer.Option(
            metavar="IDENTITY",
            help="Allowed signer who must have signed; by default any of them.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check patches, patched checkpoints and signatures.

    FILES are patches, or a checkpoint and patches. With a patched checkpoint, its patches, and its
    base or undo journal, every weight is compared with what base and patches give, and everything
    else with the base. With --model, the leakage that patches record is computed again. With
    --recipe, the patches must have been made by exactly that recipe. The exit status is 0 if all
    checks pass and 1 if one fails.

    With --allowed-signers, every FILE and the --statement must have a valid signature beside it
    (FILE.sig). A statement's signature covers its checkpoint too; a folder has no other. Expired
    keys and keys for other purposes are refused. Without this option signatures are not checked.
    Each line of the file is a name and a public key; ssh-keygen does the same check by

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

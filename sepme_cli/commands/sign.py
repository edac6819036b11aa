"""sepme sign."""

from pathlib import Path
from typing import Annotated

import typer

from sepme_cli.commands.options import Force, Json, Quiet, Verbose, output_for
from sepme_cli.render import checks


def sign(
    files: Annotated[list[Path], typer.Argument(readable=False, metavar="FILE", hidden=True)],
    key: Annotated[
        Path,
        typer.Option(
            readable=False,
            metavar="KEY",
            help="OpenSSH private key, or a public key whose private half is in ssh-agent.",
            show_default=False,
        ),
    ],
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Sign patches, checkpoints and statements with an SSH key.

    FILE is a patch, a checkpoint of one file, or a statement that `sepme apply --statement` wrote,
    which is how a model's folder is signed. The signature, FILE.sig, covers every byte of FILE;
    `sepme verify` checks it. ssh-keygen makes the same signature by

    \b
      ssh-keygen -Y sign -n sepme -f KEY FILE

    ssh-keygen asks for a passphrase on the terminal; without a terminal, add the key to ssh-agent
    first.

    Examples:

    \b
      sepme sign monet.sepme --key ~/.ssh/id_ed25519
      sepme sign monet.sepme clean.json --key ~/.ssh/id_ed25519.pub
    """
    from sepme_cli.operations.sign import sign as operation

    with output_for(as_json=as_json, quiet=quiet, verbose=verbose) as out:
        out.show(operation(files, key, force=force, progress=out.progress), checks.sign)

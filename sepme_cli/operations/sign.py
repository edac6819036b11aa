"""Sign patches, checkpoints and statements with an SSH key."""

import time
from dataclasses import dataclass
from pathlib import Path

from sepme_cli.arguments import FilePath, Files, as_path, as_paths
from sepme_cli.checkpoints.disk.failures import reading
from sepme_cli.checkpoints.disk.files import check_writable
from sepme_cli.checkpoints.disk.output import write_output
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.checkpoints.reading.kinds import kind_of
from sepme_cli.checkpoints.reading.patches import read_patch_file
from sepme_cli.errors import UnsupportedError, UsageError
from sepme_cli.progress import SILENT, Progress
from sepme_cli.signing import openssh
from sepme_cli.signing.sidecar import sidecar
from sepme_cli.signing.statement import is_statement, read_statement


@dataclass(frozen=True)
class SignedFile:
    """file: what was signed. signature: the file with the signature. key: type and fingerprint."""

    file: str
    signature: str
    key: str


@dataclass(frozen=True)
class SignResult:
    """Result of `sign`.

    Attributes:
        signatures: For each file, its signature's file, and the key's type and fingerprint.
        seconds: Duration.
    """

    signatures: tuple[SignedFile, ...]
    seconds: float


def sign(
    files: Files, key: FilePath, *, force: bool = False, progress: Progress = SILENT
) -> SignResult:
    """Sign files with an SSH key, each into a file beside it: `monet.sepme` into `monet.sepme.sig`.

    Args:
        files: Patches, checkpoints of one file, or statements. Each is read and checked first.
        key: OpenSSH private key, or a public key whose private half is in ssh-agent.
        force: Overwrite existing signatures.
        progress: Receives progress and warnings.

    Returns:
        The signatures.

    Raises:
        UsageError: There is no file.
        MalformedError: A file is damaged or hostile.
        UnsupportedError: A file cannot be signed, or the key is of no use.
        SystemFailure: A file cannot be read or written, or ssh-keygen fails.
    """
    started = time.monotonic()
    paths, key = tuple(dict.fromkeys(as_paths(files))), as_path(key)
    if not paths:
        raise UsageError("name a patch, a checkpoint or a statement to sign")
    openssh.check_key(key)
    for path in paths:
        _check(path, progress)
        check_writable(sidecar(path), 0, force=force)
    signatures = tuple(_sign(path, key, force, progress) for path in paths)
    return SignResult(signatures, time.monotonic() - started)


def _sign(file: Path, key: Path, force: bool, progress: Progress) -> SignedFile:
    # No stage: its bar would be drawn over ssh-keygen's question for the passphrase.
    progress.say(f"signing {file} with {key}")
    with reading(file), file.open("rb") as opened:
        signature = openssh.sign(opened, key, progress.say)
    path = sidecar(file)
    write_output(path, signature.data, force=force, progress=progress)
    return SignedFile(str(file), str(path), signature.key)


def _check(file: Path, progress: Progress) -> None:
    """Whether it is something of ours, whole; raises what reading it does."""
    if file.is_dir():
        raise UnsupportedError(
            f"{file} is a folder, and a signature is of one file: let sepme apply write a "
            "--statement about it, and sign that",
            file=file,
            expected="a patch, a checkpoint of one file or a statement",
            found="a folder",
        )
    if is_statement(file):
        read_statement(file)
        return
    kind = kind_of(file)
    if kind == "undo":
        raise UnsupportedError(
            f"{file} is an undo journal, which is of no use elsewhere",
            file=file,
            expected="a patch, a checkpoint of one file or a statement",
            found="an undo journal",
        )
    if kind == "patch":
        read_patch_file(file)
    else:
        with open_checkpoint(file, progress):
            pass

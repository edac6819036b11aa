"""Signing and checking by ssh-keygen, with the keys that people have for ssh and git.

Needs OpenSSH 8.2 or later and no network. What is signed is the bytes of a file, in the namespace
"sepme", so that no signature for anything else can pass for one of ours.
"""

import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from sepme_cli.checkpoints.disk.failures import reading
from sepme_cli.errors import MalformedError, SystemFailure
from sepme_cli.signing.sidecar import Signature, parse_signature

NAMESPACE = "sepme"

_PROGRAM = "ssh-keygen"
_SIGNERS = "allowed_signers"
_SIGNERS_BYTES = 2**20


def check_key(key: Path) -> None:
    """SystemFailure if `key` is not there, MalformedError if it is no key; private or public."""
    with reading(key), key.open("rb"):
        pass
    # Of a device ssh-keygen would read for ever.
    done = _run(["-l", "-f", str(key)]) if key.is_file() else None
    if done is None or done.returncode:
        raise MalformedError(
            f"{key}: {'this is no file' if done is None else _said(done.stderr)}",
            file=key,
            expected="an OpenSSH private key, or a public key whose private half ssh-agent holds",
            found="something else",
        )


def sign(file: BinaryIO, key: Path, say: Callable[[str], None]) -> Signature:
    """Sign all of an open file, named by its `name`. say: told when a security key must be touched.

    A passphrase is asked for on the terminal, if there is one, or by the program SSH_ASKPASS if
    SSH_ASKPASS_REQUIRE says so. Raises SystemFailure if it cannot be signed with that key.
    """
    arguments = ["-Y", "sign", "-n", NAMESPACE, "-f", str(key)]
    environment, advice = dict(os.environ), ""
    if environment.setdefault("SSH_ASKPASS_REQUIRE", "never") == "never" and not _on_a_terminal():
        # Without a terminal ssh-keygen would take the file's first line for the passphrase.
        arguments += ["-P", ""]
        advice = "; there is no terminal to ask for a passphrase on, so add the key to ssh-agent"
    lines = []
    with _started(arguments, file, env=environment) as process:
        assert process.stderr is not None and process.stdout is not None
        for line in process.stderr:
            lines.append(line)
            if line.startswith(b"Confirm "):  # a security key waits to be touched
                say(line.decode(errors="replace").strip())
        data = process.stdout.read()
    if process.returncode:
        why = _said(b"".join(lines))
        more = advice if "passphrase" in why else ""
        raise SystemFailure(f"{file.name} was not signed with {key}: {why}{more}", file=key)
    return _held_against(file, parse_signature(data))


def _held_against(file: BinaryIO, signature: Signature) -> Signature:
    """The signature, if it is one of the whole file as it is now; SystemFailure if not."""
    with TemporaryDirectory() as folder:
        Path(folder, "signature").write_bytes(signature.data)
        question = ["-Y", "check-novalidate", "-n", NAMESPACE, "-s", "signature"]
        done = _run(question, file, folder)
    if done.returncode:
        raise SystemFailure(
            f"{file.name}: the signature is not one of the file as it is now; does something else "
            "write to it?",
            file=file.name,
        )
    return signature


@dataclass(frozen=True)
class AllowedSigners:
    """Whose signatures count: a copy of an allowed signers file, in a folder of our own.

    The format is that of ssh-keygen(1), "ALLOWED SIGNERS", and of git's
    gpg.ssh.allowedSignersFile: who, and which key; until when and for what, where it says so.
    """

    _folder: Path

    def principals(self, signature: Signature) -> tuple[str, ...]:
        """The names that the signing key goes by, whatever it signed; none for a stranger's."""
        done = self._ask("find-principals", signature)
        return tuple(done.stdout.decode(errors="replace").splitlines()) * (not done.returncode)

    def refusal(self, file: BinaryIO, signature: Signature, identity: str) -> str | None:
        """Why a signature of an open file does not count as `identity`'s; None if it does."""
        done = self._ask("verify", signature, "-I", identity, "-n", NAMESPACE, file=file)
        if not done.returncode:
            return None
        return _said(done.stderr) or "the key does not go by that name"

    def stranger(self, signature: Signature) -> str:
        """Why `principals` knows nobody."""
        return _said(self._ask("find-principals", signature).stderr)

    def _ask(
        self, question: str, signature: Signature, *more: str, file: BinaryIO | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        (self._folder / "signature").write_bytes(signature.data)
        arguments = ["-Y", question, "-s", "signature", "-f", _SIGNERS, *more]
        return _run(arguments, file, self._folder)


@contextmanager
def allowed_signers(path: Path) -> Iterator[AllowedSigners]:
    """The signers of a file, read once. Raises SystemFailure, MalformedError if it is huge."""
    with reading(path), path.open("rb") as file:
        data = file.read(_SIGNERS_BYTES + 1)
    if len(data) > _SIGNERS_BYTES:
        raise MalformedError(
            f"{path} is too large", file=path, expected=f"{_SIGNERS_BYTES} bytes", found="more"
        )
    with TemporaryDirectory() as folder:
        Path(folder, _SIGNERS).write_bytes(data)
        yield AllowedSigners(Path(folder))


def _run(
    arguments: Sequence[str], file: BinaryIO | None = None, folder: str | Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    with _started(arguments, file, cwd=folder) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def _started(
    arguments: Sequence[str],
    file: BinaryIO | None,
    *,
    cwd: str | Path | None = None,
    env: dict[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    stdin: int | BinaryIO = subprocess.DEVNULL
    if file is not None:
        stdin = file
        os.lseek(file.fileno(), 0, os.SEEK_SET)  # whoever read it before has moved its place
    try:
        return subprocess.Popen(
            [_PROGRAM, *arguments], stdin=stdin, stdout=pipe, stderr=pipe, cwd=cwd, env=env
        )
    except FileNotFoundError:
        raise SystemFailure(
            f"{_PROGRAM} was not found: signatures are made and checked by OpenSSH, 8.2 or later; "
            "install it",
            file=_PROGRAM,
        ) from None


def _on_a_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True


def _said(stderr: bytes) -> str:
    """What ssh-keygen complained of, in one line."""
    lines = [line.strip() for line in stderr.decode(errors="replace").splitlines()]
    return "; ".join(line for line in lines if line.strip("@ ") and "Signing" not in line)

"""Signatures as files beside what they sign: the format of OpenSSH's PROTOCOL.sshsig.

ssh-keygen passes over what it does not need: white space, whatever comes after the last line.
Here a signature has one spelling, so that no bit of the file can change and the file still count.
"""

import binascii
from base64 import b64decode, b64encode
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from sepme_cli.checkpoints.disk.failures import reading
from sepme_cli.errors import MalformedError

SUFFIX = ".sig"
"""What ssh-keygen itself appends."""

_BEGIN, _END = b"-----BEGIN SSH SIGNATURE-----", b"-----END SSH SIGNATURE-----"
_MAGIC = b"SSHSIG"
_VERSION = 1
_BYTES = 64 * 1024
"""More than a certificate with an RSA signature of 16384 bits takes."""


@dataclass(frozen=True)
class Signature:
    """A signature, of which only ssh-keygen can say whether it is good.

    data: the file's bytes. namespace: what it was made for. key: the signing key, as ssh-keygen
    shows it: "ssh-ed25519 SHA256:…".
    """

    data: bytes = field(repr=False)
    namespace: str
    key: str


def sidecar(file: Path) -> Path:
    """Where the signature of a file lies: beside it."""
    return file.with_name(file.name + SUFFIX)


def read_signature(path: Path) -> Signature:
    """A signature from its file. Raises MalformedError, and SystemFailure if it cannot be read."""
    with reading(path), path.open("rb") as file:
        data = file.read(_BYTES + 1)
    try:
        return parse_signature(data)
    except MalformedError as error:
        raise MalformedError(
            f"{path}: {error.message}", file=path, expected=error.expected, found=error.found
        ) from None


def parse_signature(data: bytes) -> Signature:
    """A signature from the bytes of its file; MalformedError for what is none."""
    fields = _Reader(_dearmoured(data))
    if fields.take(len(_MAGIC)) != _MAGIC or fields.number() != _VERSION:
        raise _malformed("SSHSIG, version 1")
    key, namespace, reserved, _, _ = (fields.string() for _ in range(5))
    if reserved or fields.rest:
        raise _malformed("five fields, the third of them empty")
    kind = _Reader(key).string()
    fingerprint = b64encode(sha256(key).digest()).rstrip(b"=").decode()
    if not (kind.isascii() and namespace.isascii()):
        raise _malformed("names in ASCII")
    return Signature(data, namespace.decode(), f"{kind.decode()} SHA256:{fingerprint}")


def _dearmoured(data: bytes) -> bytes:
    """What stands between the two lines. All lines are as long as the first, but for the last."""
    lines = data.split(b"\n")
    if len(data) > _BYTES or len(lines) < 4 or (lines[0], *lines[-2:]) != (_BEGIN, _END, b""):
        raise _malformed("the lines that ssh-keygen writes, and nothing else")
    body = lines[1:-2]
    width = len(body[0])
    if not all(len(line) == width for line in body[:-1]) or not 0 < len(body[-1]) <= width:
        raise _malformed("lines of one length")
    text = b"".join(body)
    try:
        blob = b64decode(text, validate=True)
    except binascii.Error:
        raise _malformed("base64") from None
    if b64encode(blob) != text:
        raise _malformed("base64 in its one spelling")
    return blob


class _Reader:
    """Takes the parts of a message of the SSH protocol (RFC 4251, section 5)."""

    def __init__(self, data: bytes) -> None:
        self.rest = data

    def take(self, count: int) -> bytes:
        if count > len(self.rest):
            raise _malformed(f"{count} more bytes")
        taken, self.rest = self.rest[:count], self.rest[count:]
        return taken

    def number(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def string(self) -> bytes:
        return self.take(self.number())


def _malformed(expected: str) -> MalformedError:
    return MalformedError("this is not an SSH signature", expected=expected, found="something else")

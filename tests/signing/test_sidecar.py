"""A signature file has one spelling, and nothing that is none is taken for one."""

import struct
from base64 import b64encode
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sepme_cli.errors import MalformedError, SystemFailure
from sepme_cli.signing.sidecar import parse_signature, read_signature


def string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def blob(
    *, magic: bytes = b"SSHSIG", version: int = 1, reserved: bytes = b"", after: bytes = b""
) -> bytes:
    fields = (string(b"ssh-ed25519") + string(b"k" * 32), b"sepme", reserved, b"sha512", b"s" * 83)
    return magic + struct.pack(">I", version) + b"".join(map(string, fields)) + after


def blob_of(more: int) -> bytes:
    """One that is so many bytes longer."""
    return blob()[:-87] + string(b"s" * (83 + more))


ALPHABET = (ascii_uppercase + ascii_lowercase + digits + "+/").encode()


def armoured(data: bytes, width: int = 70) -> bytes:
    text = b64encode(data)
    lines = [text[at : at + width] for at in range(0, len(text), width)]
    ends = (b"-----BEGIN SSH SIGNATURE-----", b"-----END SSH SIGNATURE-----\n")
    return b"\n".join((ends[0], *lines, ends[1]))


@pytest.mark.parametrize("width", [20, 64, 70, 76, 1000])
def test_what_it_says(width: int) -> None:
    signature = parse_signature(armoured(blob(), width))
    assert signature.namespace == "sepme"
    assert signature.key.startswith("ssh-ed25519 SHA256:")


@pytest.mark.parametrize(
    "data",
    [
        blob(magic=b"SSHSIH"),
        blob(version=2),
        blob(reserved=b"x"),
        blob(after=b"x"),
        blob()[:-1],
        blob()[:6],
        b"",
        blob().replace(b"sepme", b"sepm\xff"),
    ],
)
def test_what_is_in_it_must_be_a_signature(data: bytes) -> None:
    parse_signature(armoured(blob()))
    with pytest.raises(MalformedError):
        parse_signature(armoured(data))


def test_a_last_line_that_is_longer_or_blank() -> None:
    good = armoured(blob()).split(b"\n")
    for lines in (
        [*good[:-3], good[-3] + b"A" * 68, *good[-2:]],
        [*good[:-2], b"", *good[-2:]],
        [good[0], b"", *good[1:]],
        [good[0], good[1] + b" ", *good[2:]],
    ):
        with pytest.raises(MalformedError):
            parse_signature(b"\n".join(lines))


def test_bits_that_base64_passes_over_must_be_none() -> None:
    data = next(one for one in map(blob_of, range(3)) if armoured(one).count(b"==\n") == 1)
    good = armoured(data)
    assert parse_signature(good).namespace == "sepme"
    at = good.index(b"==\n") - 1
    for bit in range(4):  # of the last digit before two signs of padding
        digit = ALPHABET[ALPHABET.index(good[at]) ^ 1 << bit]
        with pytest.raises(MalformedError, match="not an SSH signature"):
            parse_signature(good[:at] + bytes([digit]) + good[at + 1 :])


@given(st.binary(max_size=300))
def test_anything_else_is_malformed(data: bytes) -> None:
    for text in (data, armoured(data), armoured(b"SSHSIG\0\0\0\1" + data)):
        with pytest.raises(MalformedError):
            parse_signature(text)


def test_a_file_that_never_ends_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(MalformedError, match="/dev/zero"):
        read_signature(Path("/dev/zero"))
    with pytest.raises(SystemFailure):
        read_signature(tmp_path / "missing")

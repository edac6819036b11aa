"""SSH keys for tests, and files that say whose they are."""

import shutil
import subprocess
from pathlib import Path

import pytest

OPENSSH = shutil.which("ssh-keygen") is not None


def make_key(path: Path, *, passphrase: str = "", kind: str = "ed25519") -> Path:
    """A private key, its public half beside it. Skips the test where there is no OpenSSH."""
    if not OPENSSH:
        pytest.skip("needs ssh-keygen")
    command = ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", path.name, "-f", path]
    subprocess.run(command, check=True)
    return path


def line(name: str, key: Path, options: str = "") -> str:
    """A line of an allowed signers file."""
    kind, public, *_ = key.with_name(f"{key.name}.pub").read_text().split()
    return " ".join(filter(None, (name, options, kind, public)))


def by_hand(file: Path, key: Path, *, namespace: str = "sepme") -> Path:
    """The signature beside a file that ssh-keygen itself makes."""
    made = file.with_name(f"{file.name}.sig")
    made.unlink(missing_ok=True)
    command = ["ssh-keygen", "-Y", "sign", "-n", namespace, "-f", key, file]
    subprocess.run(command, check=True, capture_output=True)
    return made

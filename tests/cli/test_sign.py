"""sign: what it writes, what it refuses, and where it asks for a passphrase."""

import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import SEPME, Run
from tests.keys import by_hand, line, make_key


@pytest.fixture
def here(scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("model.safetensors", "monet.sepme", "klimt.sepme", "clean.safetensors"):
        shutil.copy(scene / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    make_key(tmp_path / "key")
    (tmp_path / "signers").write_text(line("alice", tmp_path / "key") + "\n")
    return tmp_path


@pytest.fixture
def locked(here: Path) -> Path:
    """A key with the passphrase "secret"."""
    key = make_key(here / "locked", passphrase="secret")
    (here / "signers").write_text(line("alice", key) + "\n")
    return key


@pytest.fixture
def agent(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An ssh-agent without keys."""
    socket = here / "agent"
    with subprocess.Popen(["ssh-agent", "-D", "-a", socket], stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        running.stdout.readline()
        monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
        yield
        running.terminate()


def good(file: str) -> bool:
    """Whether ssh-keygen itself, as people would call it, finds the signature good."""
    command = ["ssh-keygen", "-Y", "verify", "-n", "sepme", "-I", "alice", "-f", "signers"]
    with Path(file).open("rb") as signed:
        done = subprocess.run([*command, "-s", f"{file}.sig"], stdin=signed, capture_output=True)
    return done.returncode == 0


def test_a_signature_is_what_ssh_keygen_makes(here: Path, sepme: Run) -> None:
    done = sepme("sign", "monet.sepme", "clean.safetensors", "--key", "key", "--json").json
    assert [signed["signature"] for signed in done["signatures"]] == [
        "monet.sepme.sig",
        "clean.safetensors.sig",
    ]
    assert good("monet.sepme") and good("clean.safetensors")
    ours = Path("monet.sepme.sig").read_bytes()
    # Ed25519 signs without chance, so that the same signature must come out.
    assert by_hand(Path("monet.sepme"), Path("key")).read_bytes() == ours
    shown = subprocess.run(["ssh-keygen", "-l", "-f", "key"], capture_output=True, text=True).stdout
    assert done["signatures"][0]["key"] == f"ssh-ed25519 {shown.split()[1]}"
    assert sepme("verify", "monet.sepme", "--allowed-signers", "signers").status == 0


def test_nothing_is_overwritten_and_nothing_half_done(here: Path, sepme: Run) -> None:
    Path("klimt.sepme.sig").write_text("mine")
    refused = sepme("sign", "monet.sepme", "klimt.sepme", "--key", "key")
    assert refused.status == 5 and "--force" in refused.err
    assert not Path("monet.sepme.sig").exists()
    assert Path("klimt.sepme.sig").read_text() == "mine"
    assert sepme("sign", "klimt.sepme", "monet.sepme", "--key", "key", "-f").status == 0
    assert good("klimt.sepme")
    assert sorted(path.name for path in here.glob(".*")) == []


def alone(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`sepme` where there is no terminal, not even one behind the streams."""
    command = [SEPME, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, start_new_session=True, timeout=60, check=False
    )


def test_without_a_terminal_nobody_is_asked(locked: Path) -> None:
    done = alone("sign", "monet.sepme", "--key", locked)
    assert done.returncode == 5
    assert "no terminal to ask for a passphrase on" in done.stderr
    assert "ssh-agent" in done.stderr
    assert not Path("monet.sepme.sig").exists()


def test_what_is_signed_is_never_taken_for_the_passphrase(locked: Path, here: Path) -> None:
    """Which ssh-keygen would do: it reads one from standard input, as it does what to sign."""
    file = here / "file"
    file.write_bytes(b"secret\nand the rest")
    signature = here / "file.sig"
    code = (
        "import sys; from pathlib import Path; from sepme_cli.signing import openssh\n"
        f"made = openssh.sign(open({str(file)!r}, 'rb'), Path({str(locked)!r}), print)\n"
        f"Path({str(signature)!r}).write_bytes(made.data)"
    )
    for asked, says in (
        ({}, "incorrect passphrase"),
        ({"SSH_ASKPASS_REQUIRE": "prefer"}, "not one of the file as it is now"),
    ):
        environment = {**os.environ, **asked}
        environment.pop("DISPLAY", None)
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            start_new_session=True,
            env=environment,
            check=False,
        )
        assert "SystemFailure" in done.stderr and says in done.stderr
        assert not signature.exists()


def test_a_program_is_asked_where_the_user_said_so(
    locked: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = here / "askpass"
    program.write_text("#!/bin/sh\necho secret\n")
    program.chmod(0o755)
    monkeypatch.setenv("SSH_ASKPASS", str(program))
    assert alone("sign", "monet.sepme", "--key", locked).returncode == 5
    monkeypatch.setenv("SSH_ASKPASS_REQUIRE", "force")
    assert alone("sign", "monet.sepme", "--key", locked).returncode == 0
    assert good("monet.sepme")


def test_on_a_terminal_the_passphrase_is_asked_for(locked: Path, here: Path) -> None:
    child, terminal = pty.fork()
    if child == 0:
        os.execv(SEPME, [str(SEPME), "sign", "monet.sepme", "--key", str(locked)])
    shown = b""
    while b"passphrase" not in shown:
        shown += os.read(terminal, 1024)
    os.write(terminal, b"secret\n")
    try:
        while chunk := os.read(terminal, 1024):
            shown += chunk
    except OSError:  # Linux says EIO where the other end has closed
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(terminal)
    assert b"secret" not in shown
    assert good("monet.sepme")


@pytest.mark.usefixtures("agent")
def test_the_agent_signs_for_a_public_key(here: Path, sepme: Run) -> None:
    Path("key").rename("elsewhere")
    refused = sepme("sign", "monet.sepme", "--key", "key.pub")
    assert refused.status == 5 and "key.pub" in refused.err
    subprocess.run(["ssh-add", "-q", "elsewhere"], check=True)
    assert sepme("sign", "monet.sepme", "--key", "key.pub").status == 0
    assert good("monet.sepme")


def test_a_file_that_changes_meanwhile_is_not_signed(here: Path, sepme: Run) -> None:
    # A program of that name that signs something else, as ssh-keygen would have read it before.
    real, folder = shutil.which("ssh-keygen"), here / "bin"
    folder.mkdir()
    script = folder / "ssh-keygen"
    script.write_text(
        f'#!/bin/sh\ncase "$2" in sign) echo other | {real} "$@";; *) exec {real} "$@";; esac\n'
    )
    script.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        refused = sepme("sign", "monet.sepme", "--key", "key")
    assert refused.status == 5 and "not one of the file as it is now" in refused.err
    assert not Path("monet.sepme.sig").exists()


@pytest.mark.parametrize(
    ("status", "command"),
    [
        (2, "sign --key key"),
        (2, "sign monet.sepme"),
        (5, "sign monet.sepme --key missing"),
        (5, "sign monet.sepme --key ."),
        (3, "sign monet.sepme --key /dev/zero"),
        (3, "sign monet.sepme --key monet.sepme"),
        (5, "sign monet.sepme --key signers"),
        (5, "sign monet.sepme missing.sepme --key key"),
        (3, "sign monet.sepme signers --key key"),
        (3, "sign monet.sepme key --key key"),
        (3, "sign . --key key"),
    ],
)
def test_what_is_not_signed(status: int, command: str, here: Path, sepme: Run) -> None:
    assert sepme(*command.split()).status == status
    assert not list(here.glob("*.sig"))


def test_an_undo_journal_is_not_signed(here: Path, sepme: Run) -> None:
    assert sepme("apply", "model.safetensors", "monet.sepme", "--in-place").status == 0
    done = sepme("sign", "model.safetensors.sepme-undo", "--key", "key")
    assert done.status == 3 and "undo journal" in done.err

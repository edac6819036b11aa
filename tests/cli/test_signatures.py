"""verify with a signature demanded: 0 only for a good one, whatever is wrong with the others."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sepme_cli.errors import SepmeError
from sepme_cli.operations.verify import verify
from tests.cli.conftest import Run
from tests.keys import by_hand, line, make_key

ALICE = "alice@example.org"


@pytest.fixture(scope="module")
def signed(scene: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Patches, a signature of one, keys and signers; not to be changed."""
    folder = tmp_path_factory.mktemp("signed")
    for name in ("monet.sepme", "klimt.sepme", "model.safetensors", "clean.safetensors"):
        shutil.copy(scene / name, folder)
    for name in ("alice", "bob", "mallory"):
        make_key(folder / name)
    lines = [line(ALICE, folder / "alice"), line("bob@example.org", folder / "bob")]
    (folder / "signers").write_text("\n".join(lines) + "\n")
    by_hand(folder / "monet.sepme", folder / "alice")
    return folder


@pytest.fixture
def here(signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "signed"
    shutil.copytree(signed, folder)
    monkeypatch.chdir(folder)
    return folder


DEMANDED = "verify monet.sepme --allowed-signers signers"
SIGNATURE = Path("monet.sepme.sig")


def sig(change: Callable[[bytes], bytes]) -> None:
    SIGNATURE.write_bytes(change(SIGNATURE.read_bytes()))


def signers(options: str, key: str = "alice", name: str = ALICE) -> None:
    Path("signers").write_text(line(name, Path(key), options) + "\n")


def of_other_bytes() -> None:
    by_hand(Path("klimt.sepme"), Path("alice")).rename(SIGNATURE)


#: What is wrong; what is said of it.
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no signature": (SIGNATURE.unlink, "not signed"),
    "a signature of other bytes": (of_other_bytes, "incorrect signature"),
    "another patch": (lambda: shutil.copy("klimt.sepme", "monet.sepme"), "incorrect signature"),
    "by a stranger": (lambda: by_hand(Path("monet.sepme"), Path("mallory")), "by nobody known"),
    "for git": (
        lambda: by_hand(Path("monet.sepme"), Path("alice"), namespace="git"),
        "made for 'git'",
    ),
    "a key that has expired": (lambda: signers('valid-before="20200101"'), "expired"),
    "a key of the future": (lambda: signers('valid-after="20990101"'), "not yet valid"),
    "a key for git": (lambda: signers('namespaces="git"'), "not permitted"),
    "a plain key where a certificate should be": (lambda: signers("cert-authority"), "by nobody"),
    "nobody is allowed": (lambda: Path("signers").write_text(""), "by nobody known"),
    "signers that are none": (lambda: Path("signers").write_text("garbage\n"), "by nobody known"),
    "signers that are a signature": (lambda: shutil.copy(SIGNATURE, "signers"), "by nobody known"),
    "an empty signature": (lambda: sig(lambda _: b""), "not an SSH signature"),
    "text": (lambda: sig(lambda _: b"signed, Alice\n"), "not an SSH signature"),
    "cut short": (lambda: sig(lambda data: data[:-1]), "not an SSH signature"),
    "cut in the middle": (lambda: sig(lambda data: data[:120]), "not an SSH signature"),
    "with something after it": (lambda: sig(lambda data: data + b"\n"), "not an SSH signature"),
    "with something before it": (lambda: sig(lambda data: b"\n" + data), "not an SSH signature"),
    "twice": (lambda: sig(lambda data: data * 2), "not an SSH signature"),
    "with DOS line ends": (lambda: sig(lambda data: data.replace(b"\n", b"\r\n")), "not an SSH"),
    "huge": (lambda: sig(lambda data: data * 1000), "not an SSH signature"),
    "a private key": (lambda: shutil.copy("alice", SIGNATURE), "not an SSH signature"),
    "the patch": (lambda: shutil.copy("monet.sepme", SIGNATURE), "not an SSH signature"),
    "a link to nowhere": (
        lambda: (SIGNATURE.unlink(), SIGNATURE.symlink_to("nowhere")),
        "not signed",
    ),
}


@pytest.mark.parametrize("wrong", REFUSED)
@pytest.mark.usefixtures("here")
def test_a_signature_that_is_none_is_a_no(wrong: str, sepme: Run) -> None:
    assert sepme(*DEMANDED.split()).status == 0
    break_it, says = REFUSED[wrong]
    break_it()
    for more in ([], ["--signed-by", ALICE]):
        done = sepme(*DEMANDED.split(), *more, "--json")
        assert done.status == 1
        (check,) = (check for check in done.json["checks"] if "signature" in check["name"])
        assert not check["ok"] and says in check["detail"] and not done.json["ok"]


@pytest.mark.parametrize("who", ["bob@example.org", "carol@example.org", "*", "alice", "-n", "!x"])
@pytest.mark.usefixtures("here")
def test_another_name_is_a_no(who: str, sepme: Run) -> None:
    assert sepme(*DEMANDED.split(), "--signed-by", ALICE).status == 0
    done = sepme(*DEMANDED.split(), f"--signed-by={who}")
    assert done.status == 1
    assert f"not by {who}; by the key of {ALICE}" in done.out.decode()


def test_every_file_needs_one(here: Path, sepme: Run) -> None:
    both = "verify clean.safetensors monet.sepme --base model.safetensors --allowed-signers signers"
    done = sepme(*both.split())
    assert done.status == 1 and "clean.safetensors.sig" in done.out.decode()
    by_hand(here / "clean.safetensors", here / "bob")
    assert sepme(*both.split()).status == 0
    done = sepme(*both.split(), "--signed-by", ALICE)
    assert done.status == 1 and f"not by {ALICE}; by the key of bob" in done.out.decode()


@pytest.mark.parametrize(
    ("status", "command"),
    [
        (2, "verify monet.sepme --signed-by alice@example.org"),
        (2, "verify monet.sepme --allowed-signers signers --signed-by="),
        (2, "verify monet.sepme --statement clean.json"),
        (5, "verify monet.sepme --allowed-signers missing"),
        (5, "verify monet.sepme --allowed-signers ."),
        (5, "verify monet.sepme --allowed-signers="),
        (3, "verify monet.sepme --allowed-signers /dev/zero"),
    ],
)
@pytest.mark.usefixtures("here")
def test_what_cannot_be_asked(status: int, command: str, sepme: Run) -> None:
    assert sepme(*command.split()).status == status


def test_a_signature_that_cannot_be_read(here: Path, sepme: Run) -> None:
    SIGNATURE.unlink()
    SIGNATURE.mkdir()
    assert sepme(*DEMANDED.split()).status == 5


def test_without_ssh_keygen(here: Path, sepme: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(here))
    for command in (DEMANDED, "sign klimt.sepme --key alice"):
        error = sepme(*command.split(), "--json")
        assert error.status == 5
        assert "install it" in error.json["error"]["message"]
    assert not Path("klimt.sepme.sig").exists()


def test_what_was_not_looked_at_is_no_ok(here: Path, sepme: Run) -> None:
    told = sepme("verify", "monet.sepme", "--json").json
    assert told["unchecked"] == ["monet.sepme: its signature: needs --allowed-signers"]
    assert not any("signature" in check["name"] for check in told["checks"])
    SIGNATURE.unlink()
    assert sepme("verify", "monet.sepme", "--json").json["unchecked"] == []


@pytest.mark.parametrize(
    ("name", "options"),
    [("*@example.org", ""), (f"root,{ALICE}", ""), (ALICE, 'namespaces="git,sepme"')],
)
@pytest.mark.usefixtures("here")
def test_what_a_line_may_say(name: str, options: str, sepme: Run) -> None:
    signers(options, name=name)
    for more in ([], ["--signed-by", ALICE]):
        assert sepme(*DEMANDED.split(), *more).status == 0


def test_certificates(here: Path, sepme: Run) -> None:
    authority = make_key(here / "authority")
    certify = ["ssh-keygen", "-q", "-s", authority, "-I", "alice", "-n", ALICE, "alice.pub"]
    subprocess.run(certify, check=True)
    SIGNATURE.unlink()
    assert sepme("sign", "monet.sepme", "--key", "alice-cert.pub").status == 0
    signers("cert-authority", key="authority", name="*@example.org")
    assert sepme(*DEMANDED.split(), "--signed-by", ALICE).status == 0
    done = sepme(*DEMANDED.split(), "--signed-by", "bob@example.org")
    assert done.status == 1
    assert sepme(*DEMANDED.split()).status == 0
    signers("cert-authority", key="bob", name="*@example.org")
    assert sepme(*DEMANDED.split()).status == 1


@pytest.mark.parametrize("kind", ["rsa", "ecdsa"])
def test_other_kinds_of_keys(kind: str, here: Path, sepme: Run) -> None:
    make_key(here / kind, kind=kind)
    assert sepme("sign", "klimt.sepme", "--key", kind).status == 0
    signers("", key=kind)
    assert sepme("verify", "klimt.sepme", "--allowed-signers", "signers").status == 0


def verified() -> bool:
    try:
        return verify([Path("monet.sepme")], allowed_signers=Path("signers"), signed_by="alice").ok
    except SepmeError as error:
        assert error.status != 0
        return False


@pytest.mark.parametrize(
    ("name", "step"), [("monet.sepme", 23), ("monet.sepme.sig", 1), ("signers", 1)]
)
@pytest.mark.slow
def test_no_single_bit_can_change(name: str, step: int, here: Path) -> None:
    # A name and a key and nothing else: one bit makes a pattern of a name with a dot in it, which
    # that name still matches, and what a comment says is for people.
    Path("signers").write_text(line("alice", Path("alice")))
    file, passed = Path(name), []
    data = file.read_bytes()
    assert verified()
    for place in range(0, len(data), step):
        changed = bytearray(data)
        changed[place] ^= 1 << place * 5 // 3 % 8  # every bit has its turn
        file.write_bytes(changed)
        if verified():
            passed.append(bytes(changed))
    assert passed == []
    file.write_bytes(data)
    assert verified()

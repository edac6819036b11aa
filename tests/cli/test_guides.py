"""docs/signing.md does what it says; what erasing does not do is said where it is met."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import SEPME, Run
from tests.keys import line, make_key
from tests.layouts import write_layout

ROOT = Path(__file__).parents[2]


def commands() -> list[str]:
    """The guide's command lines, in order."""
    text = (ROOT / "docs/signing.md").read_text()
    lines = [one.strip() for one in text.splitlines() if one.startswith("    ")]
    return [one for one in lines if one.startswith(("sepme ", "ssh-keygen ", "openssl ", "model_"))]


def test_the_commands_of_the_guide(scene: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "monet.sepme", "klimt.sepme"):
        shutil.copy(scene / name, tmp_path)
    shutil.copytree(write_layout("folder", tmp_path), tmp_path / "clean")
    key = make_key(tmp_path / "id_ed25519")
    (tmp_path / "allowed_signers").write_text(line("alice@example.org", key, 'namespaces="sepme"'))
    path = f"{SEPME.parent}{os.pathsep}{os.environ['PATH']}"
    found = commands()
    assert len(found) == 11
    for command in found:
        if shutil.which(command.split()[0], path=path) is None:
            continue  # model_signing is nobody's dependency here
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, (command, done.stderr)


@pytest.mark.parametrize("where", ["README.md", "docs/security.md", "apply --help", "a report"])
def test_the_limits_are_said(where: str, sepme: Run) -> None:
    if where == "a report":
        text = (ROOT / "sepme_cli/evaluation/templates/report.html.jinja").read_text()
    elif where == "apply --help":
        text = sepme(*where.split()).out.decode()
        assert "put its concepts back" in " ".join(text.split())
    else:
        text = (ROOT / where).read_text()
        words = " ".join(text.replace("**", "").split()).lower()
        assert "whoever holds the base and the sanitised checkpoint can subtract" in words
        assert "whoever holds the patch can undo it" in words
    words = " ".join(text.split())
    assert "fine-tuning" in words and "learned embedding" in words


def test_security_tells_how_to_report_and_names_no_host() -> None:
    text = (ROOT / "docs/security.md").read_text()
    assert "security advisories" in text and "privately" in text
    assert "://" not in text and "@" not in text

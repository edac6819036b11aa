"""The documentation does what it says: its commands run, and its links lead somewhere."""

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from sepme_cli.app import run

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MODEL = ROOT / "examples" / "english-sd.safetensors"
#: What a page expects to lie in the folder, beside the model: a recipe, a patch of three concepts.
RECIPE = """\
version: 1
concepts: [{name: woodcut, kind: style}]
protect: {styles: [gouache, crayon], objects: [cat]}
"""
ARTISTS = "sepme erase model.safetensors -c woodcut -c stencil -c crayon -o artists.sepme"
PLAIN = re.compile(r"sepme [^|<>$*;&`]+")
"""A command that needs no shell."""

pytestmark = pytest.mark.slow


def commands(page: Path) -> list[str]:
    """What a page's bash blocks say to type, one command each."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", "").splitlines()]


def ended(line: str, cwd: Path) -> tuple[int, str]:
    """The status of a command, and what it says. `sepme` alone is run in this process: to load
    torch takes longer than most of what it does."""
    if PLAIN.fullmatch(line):
        with chdir(cwd), redirect_stdout(io.StringIO()) as said, redirect_stderr(said):
            return run(shlex.split(line, comments=True)[1:]), said.getvalue()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=cwd,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What lies in the folder where a how-to begins: a model, a recipe and a patch."""
    folder = tmp_path_factory.mktemp("start")
    shutil.copy(MODEL, folder / "model.safetensors")
    (folder / "policy.yaml").write_text(RECIPE)
    assert ended(ARTISTS, folder)[0] == 0
    return folder


@pytest.fixture
def folder(start: Path, tmp_path: Path) -> Path:
    return shutil.copytree(start, tmp_path, dirs_exist_ok=True)


def run_all(page: Path, cwd: Path) -> None:
    lines = commands(page)
    assert lines
    for line in lines:
        status, text = ended(line, cwd)
        said = re.search(r"# status (\d+)", line)
        assert status == (int(said[1]) if said else 0), f"$ {line}\n{text}"


def test_the_tutorial(tmp_path: Path) -> None:
    run_all(DOCS / "tutorial.md", tmp_path)
    assert (tmp_path / "report" / "report.html").is_file()


@pytest.mark.parametrize("page", sorted((DOCS / "how-to").glob("*.md")), ids=lambda p: p.stem)
def test_a_how_to(page: Path, folder: Path) -> None:
    if page.stem == "choose-a-method":
        (folder / "policy.yaml").unlink()
    run_all(page, folder)


def test_the_readme(folder: Path) -> None:
    run_all(ROOT / "README.md", folder)


def test_the_site_builds_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", tmp_path / "site"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "site" / "commands" / "index.html").read_text()
    assert "--protect-neighbours" in reference
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    assert 'id="sepme_cli.erase"' in api and "Maximum number of concepts that" in api
    pages = [page for page in tmp_path.rglob("*.html") if page.name == "index.html"]
    # Nothing is fetched from elsewhere by looking at a page.
    fetched = [
        address
        for page in pages
        for address in re.findall(
            r'<(?:script|img|link)[^>]+(?:src|href)="(http[^"]+)"', page.read_text()
        )
        if "canonical" not in address
    ]
    assert not fetched

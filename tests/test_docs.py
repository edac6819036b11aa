"""The documentation does what it says: its commands run, and its links lead somewhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MODEL = ROOT / "examples" / "english-sd.safetensors"
#: What a page expects to lie in the folder, beside the model: a recipe, a patch of three concepts.
RECIPE = """\
version: 1
concepts: [{name: woodcut, kind: style}]
protect: {styles: [gouache, crayon], objects: [cat]}
"""
ARTISTS = ["-c", "woodcut", "-c", "stencil", "-c", "crayon"]

pytestmark = pytest.mark.slow


def commands(page: Path) -> list[str]:
    """What a page's bash blocks say to type, one command each."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", "").splitlines()]


def sepme(*words: str, cwd: Path) -> None:
    subprocess.run([Path(sys.executable).with_name("sepme"), *words, "-q"], check=True, cwd=cwd)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What lies in the folder where a how-to begins: a model, a recipe and a patch."""
    folder = tmp_path_factory.mktemp("start")
    shutil.copy(MODEL, folder / "model.safetensors")
    (folder / "policy.yaml").write_text(RECIPE)
    sepme("erase", "model.safetensors", *ARTISTS, "-o", "artists.sepme", cwd=folder)
    return folder


@pytest.fixture
def folder(start: Path, tmp_path: Path) -> Path:
    return shutil.copytree(start, tmp_path, dirs_exist_ok=True)


def run_all(page: Path, cwd: Path) -> None:
    lines = commands(page)
    assert lines
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for line in lines:
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=cwd,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        said = re.search(r"# status (\d+)", line)
        wanted = int(said[1]) if said else 0
        assert done.returncode == wanted, f"$ {line}\n{done.stdout}{done.stderr}"


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

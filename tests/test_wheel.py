"""What is installed from built wheels works without the source tree."""

import json
import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has our two wheels, and only borrows what they need."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-index", "--no-deps"]
    # Copies, because building leaves its traces in the tree.
    _copy(ROOT, source := folder / "source")
    wheel = ["wheel", "--no-build-isolation", *offline, "--wheel-dir", folder]
    subprocess.run([*pip, *wheel, source, source / "examples"], check=True)
    venv.create(folder / "venv", with_pip=False)
    programs = folder / "venv" / "bin"
    wheels = sorted(folder.glob("*.whl"))
    assert len(wheels) == 2
    subprocess.run(
        [*pip, "--python", programs / "python", "install", *offline, *wheels], check=True
    )
    (borrowed,) = (path for path in site.getsitepackages() if "site-packages" in path)
    # A path in a .pth file is searched, but what is installed editable in it is not.
    line = "import site; print(site.getsitepackages()[0])"
    own = subprocess.run([programs / "python", "-c", line], capture_output=True, text=True)
    (Path(own.stdout.strip()) / "borrowed.pth").write_text(f"{borrowed}\n")
    return programs


def _copy(source: Path, target: Path) -> None:
    """What git would have of a folder: no builds, no environments."""
    listed = ["git", "-C", source, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, names):
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)


def run(program: Path, *words: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [program, *words], capture_output=True, text=True, cwd=cwd, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_main_job_without_the_source_tree(installed: Path, tmp_path: Path) -> None:
    code = "import sepme_cli, patch_spec, sepme_example as e; print(sepme_cli.__file__, e.__file__)"
    found = run(installed / "python", "-c", code, cwd=tmp_path)
    assert all(str(installed.parent) in path for path in found.split())

    sepme = installed / "sepme"
    run(sepme, "example", cwd=tmp_path)
    erase = ["erase", "model.safetensors", "-c", "woodcut"]
    run(sepme, *erase, cwd=tmp_path)
    run(
        sepme,
        "apply",
        "model.safetensors",
        "woodcut.sepme",
        "-o",
        "clean.safetensors",
        cwd=tmp_path,
    )
    back = ["revert", "clean.safetensors", "--base", "model.safetensors", "-o", "back.safetensors"]
    told = json.loads(run(sepme, *back, "--json", cwd=tmp_path))
    assert (told["exact"], told["restored"]) == (True, ["woodcut"])
    original, restored = (tmp_path / f"{n}.safetensors" for n in ("model", "back"))
    assert original.read_bytes() == restored.read_bytes()


def test_the_format_comes_with_its_specification(installed: Path, tmp_path: Path) -> None:
    code = (
        "from importlib.resources import files\n"
        "every = files('patch_spec')\n"
        "assert every.joinpath('SPEC.md').is_file() and every.joinpath('schema.json').is_file()\n"
        "assert any(every.joinpath('vectors').iterdir())"
    )
    run(installed / "python", "-c", code, cwd=tmp_path)


def test_what_is_no_module_comes_with_the_program(installed: Path, tmp_path: Path) -> None:
    """The stub, from which the public names come, and the templates of the report."""
    code = (
        "import sepme_cli, jinja2\n"
        "assert issubclass(sepme_cli.UsageError, sepme_cli.SepmeError)\n"
        "print(*jinja2.PackageLoader('sepme_cli.evaluation').list_templates())"
    )
    assert run(installed / "python", "-c", code, cwd=tmp_path) == "report.css report.html.jinja\n"


def test_the_judge_comes_with_the_example(installed: Path, tmp_path: Path) -> None:
    code = "import sepme_example; print(len(sepme_example.judge().labels('object')))"
    assert run(installed / "python", "-c", code, cwd=tmp_path) == "225\n"

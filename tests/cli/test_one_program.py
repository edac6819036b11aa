"""The command line and Python are one program: the same JSON, and the same bytes written."""

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sepme_cli as sepme
from sepme_cli.app import COMMANDS
from sepme_cli.operations import recipe
from sepme_cli.render.wording import to_json
from tests.cli.conftest import Run
from tests.keys import OPENSSH, make_key
from tests.small_model import save_small_model

RECIPE = """\
version: 1
concepts: [{name: Monet, kind: style}]
protect: {objects: [cat]}
settings: {rank: 2, ridge: 0.001, dtype: fp32}
"""
#: A report of `sepme evaluate` as far as a card reads it.
REPORT = '{"concepts": {}, "restored_identical": true}'
SAMPLING = sepme.SamplingOptions(images=2, steps=1, restore=0, guidance=3.0)
QUICK = {"steps": 2, "pictures": 2, "sampling_steps": 2, "batch_size": 2}

#: What a user types, and the same in Python. `small` is a model that can be run, `model` is not.
CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "erase": (
        "erase small -c style:Monet -c cat --protect object:dog",
        lambda: sepme.erase("small", ["style:Monet", "cat"], protect="object:dog"),
    ),
    "erase with a recipe": (
        "erase small --recipe policy.yaml --rank 3",
        lambda: sepme.erase("small", recipe="policy.yaml", settings={"rank": 3}),
    ),
    "erase, learning": (
        "erase small -c Monet --as style --method sepme --steps 2 --pictures 2 "
        "--sampling-steps 2 --batch-size 2",
        lambda: sepme.erase("small", "Monet", kind="style", method="sepme", settings=QUICK),
    ),
    "erase and apply": (
        "erase small -c ink --to oil -o p.sepme --apply out",
        lambda: sepme.erase("small", "ink", to="oil", output="p.sepme", apply_to="out"),
    ),
    "erase --check": (
        "erase small --recipe policy.yaml --check --known small.sepme",
        lambda: sepme.plan_erasure("small", recipe="policy.yaml", known="small.sepme"),
    ),
    "apply": (
        "apply model monet.sepme klimt.sepme -o out --scale 0.5",
        lambda: sepme.apply("model", ["monet.sepme", "klimt.sepme"], "out", scale=0.5),
    ),
    "apply in place": (
        "apply model monet.sepme --in-place --statement out.json",
        lambda: sepme.apply("model", "monet.sepme", in_place=True, statement="out.json"),
    ),
    "apply to another model": (
        "apply cousin.safetensors both.sepme --only Monet --dtype fp32 -o out",
        lambda: sepme.apply("cousin.safetensors", "both.sepme", "out", only="Monet", dtype="fp32"),
    ),
    "revert": (
        "revert clean.safetensors --base model -o out",
        lambda: sepme.revert("clean.safetensors", base="model", output="out"),
    ),
    "revert without a base": (
        "revert clean.safetensors monet.sepme -o out",
        lambda: sepme.revert("clean.safetensors", "monet.sepme", output="out"),
    ),
    "diff": (
        "diff model clean.safetensors",
        lambda: sepme.diff("model", "clean.safetensors"),
    ),
    "diff with a patch": (
        "diff model monet.sepme",
        lambda: sepme.diff("model", "monet.sepme"),
    ),
    "inspect": (
        "inspect clean.safetensors",
        lambda: sepme.inspect("clean.safetensors"),
    ),
    "verify": (
        "verify clean.safetensors monet.sepme --base model",
        lambda: sepme.verify(["clean.safetensors", "monet.sepme"], base="model"),
    ),
    "sign": (
        "sign monet.sepme --key key",
        lambda: sepme.sign("monet.sepme", key="key"),
    ),
    "sample": (
        "sample small --patch small.sepme -p 'a pond' -o o.png --steps 1",
        lambda: sepme.sample(
            "small",
            "a pond",
            patches="small.sepme",
            output="o.png",
            sampling=sepme.SamplingOptions(images=1, steps=1),
        ),
    ),
    "evaluate": (
        "evaluate small small.sepme --judge tests.small_judge:judge --report report "
        "--pictures 2 --steps 1 --restore 0 --guidance 3",
        lambda: sepme.evaluate(
            "small",
            "small.sepme",
            judge="tests.small_judge:judge",
            report="report",
            sampling=SAMPLING,
        ),
    ),
    "attack": (
        "attack small small.sepme --judge tests.small_judge:judge --report report "
        "--budget quick --attack misspellings --steps 1 --guidance 3",
        lambda: sepme.attack(
            "small",
            "small.sepme",
            judge="tests.small_judge:judge",
            report="report",
            sampling=SAMPLING,
            budget="quick",
            attacks="misspellings",
        ),
    ),
    "card": (
        "card monet.sepme --report report.json",
        lambda: sepme.card("monet.sepme", report="report.json"),
    ),
    "export": (
        "export monet.sepme --to peft -o new.safetensors",
        lambda: sepme.export("monet.sepme", "peft", "new.safetensors"),
    ),
    "import a LoRA": (
        "import lora.safetensors --base model --concept Monet -o out",
        lambda: sepme.import_lora("lora.safetensors", "model", "out", concept="Monet"),
    ),
    "import an edit": (
        "import --edited clean.safetensors --base model --concept Manet",
        lambda: sepme.extract("model", "clean.safetensors", concept="Manet"),
    ),
    "example": (
        "example -o new.safetensors",
        lambda: sepme.example("new.safetensors"),
    ),
    "recipe init": (
        "recipe init new.yaml",
        lambda: recipe.init("new.yaml"),
    ),
    "recipe check": (
        "recipe check policy.yaml",
        lambda: recipe.check("policy.yaml"),
    ),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    save_small_model(folder / "small")
    sepme.erase(folder / "small", "style:Monet", output=folder / "small.sepme")
    return folder


def without(value: Any, *names: str) -> Any:
    """What two runs have in common: all but how long they took."""
    if isinstance(value, dict):
        return {key: without(item, *names) for key, item in value.items() if key not in names}
    return [without(item, *names) for item in value] if isinstance(value, list | tuple) else value


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the report's, which says what command made it, and when."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} | {
        path.name: path.read_bytes() for path in folder.rglob("*.png")
    }


@pytest.mark.parametrize("case", CASES)
def test_the_command_does_what_the_function_does(
    case: str,
    scene: Path,
    small: Path,
    tmp_path: Path,
    sepme: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if case == "sign" and not OPENSSH:
        pytest.skip("no ssh-keygen here")
    key = tmp_path / "keys" / "key"
    if case == "sign":
        key.parent.mkdir()
        make_key(key)
    line, call = CASES[case]
    words = shlex.split(line)
    found = []
    for name in ("typed", "called"):
        folder = tmp_path / name / "x"  # the same name, which some results carry
        folder.mkdir(parents=True)
        for path in small.iterdir() if words[1] == "small" else scene.glob("*.*"):
            if path.is_file():
                shutil.copy(path, folder)
        if words[1] != "small":
            (folder / "model.safetensors").rename(folder / "model")
        (folder / "policy.yaml").write_text(RECIPE)
        (folder / "report.json").write_text(REPORT)
        if case == "sign":
            for path in key.parent.iterdir():
                shutil.copy(path, folder)
        monkeypatch.chdir(folder)
        said = sepme(*words, "--json").json if name == "typed" else to_json(call())
        # What nothing can go wrong with has no warnings of its own; the JSON always does.
        said = {"warnings": [], **without(said, "seconds", "expected_seconds", "command")}
        found.append((said, contents(folder)))
    (typed, typed_files), (called, called_files) = found
    assert typed == called
    assert typed_files.keys() == called_files.keys()
    assert [name for name in typed_files if typed_files[name] != called_files[name]] == []


def test_every_command_is_among_them() -> None:
    assert set(COMMANDS) <= {line.split()[0] for line, _ in CASES.values()}

"""`import sepme_cli as sepme`, as the README would use it."""

import dataclasses
import inspect
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import sepme_cli as sepme
from sepme_cli.app import COMMANDS
from tests.small_model import SMALL, WIDTH, networks, save_small_model, small_unet
from tests.synthetic import make_checkpoint, make_patches

PAGE = Path(__file__).parent.parent / "docs" / "python.md"
OPERATIONS = {
    "apply", "attack", "attack_shard", "card", "deltas", "diff", "erase", "evaluate",
    "evaluate_shard",
    "example", "export", "extract", "import_lora", "inspect", "patched", "plan_erasure",
    "revert", "sample", "sign", "verify",
}  # fmt: skip
FROZEN = {
    "ApplyResult", "AttackResult", "CardResult", "DiffResult", "SamplingOptions", "ErasePlan",
    "EraseResult", "EvaluateResult", "ExampleResult", "ExportResult", "ImportResult",
    "InspectResult",
    "ModelOptions", "RevertResult", "SampleResult", "Settings", "ShardResult", "SignResult",
    "VerifyResult",
}  # fmt: skip
ERRORS = {
    "MalformedError", "MismatchError", "RefusedError", "SepmeError", "SystemFailure",
    "UnsupportedError", "UsageError",
}  # fmt: skip
OTHERS = {"LivePatch", "Progress"}


def test_a_patch_from_names_to_bytes_and_back(tmp_path: Path) -> None:
    """With text for paths and one word for a list, as people write it."""
    folder = str(tmp_path)
    save_small_model(tmp_path / "sd.safetensors")
    settings = sepme.Settings(rank=2)
    made = sepme.erase(
        f"{folder}/sd.safetensors",
        "Monet",
        kind="style",
        protect="object:cat",
        settings=settings,
        output=f"{folder}/monet.sepme",
    )
    assert made.patch == f"{folder}/monet.sepme"
    assert [part.concept for part in made.increments] == ["Monet"]
    applied = sepme.apply(
        f"{folder}/sd.safetensors", f"{folder}/monet.sepme", f"{folder}/clean.safetensors"
    )
    assert applied.concepts == ("Monet",)
    found = sepme.verify(
        [f"{folder}/clean.safetensors", tmp_path / "monet.sepme"], base=f"{folder}/sd.safetensors"
    )
    assert found.ok
    assert not found.unchecked
    back = sepme.revert(
        f"{folder}/clean.safetensors",
        concepts="monet",
        base=f"{folder}/sd.safetensors",
        output=f"{folder}/back.safetensors",
    )
    assert back.exact
    assert (tmp_path / "back.safetensors").read_bytes() == (
        tmp_path / "sd.safetensors"
    ).read_bytes()
    assert sepme.diff(f"{folder}/sd.safetensors", f"{folder}/back.safetensors").same
    assert sepme.inspect(f"{folder}/monet.sepme").kind == "patch"
    drawn = sepme.sample(
        f"{folder}/sd.safetensors",
        "a garden by Monet",
        patches=f"{folder}/monet.sepme",
        output=f"{folder}/grid.png",
        sampling=sepme.SamplingOptions(images=1, steps=1),
    )
    assert (drawn.prompts, drawn.images) == (("a garden by Monet",), 2)


def test_a_recipe_may_be_a_file(tmp_path: Path) -> None:
    save_small_model(tmp_path / "sd.safetensors")
    recipe = tmp_path / "policy.yaml"
    recipe.write_text("version: 1\nconcepts:\n  - name: Monet\n    kind: style\n")
    planned = sepme.plan_erasure(str(tmp_path / "sd.safetensors"), recipe=str(recipe))
    made = sepme.erase(
        str(tmp_path / "sd.safetensors"), recipe=str(recipe), output=tmp_path / "p.sepme"
    )
    assert [part.concept for part in made.increments] == ["Monet"]
    assert made.recipe is not None
    assert made.recipe == planned.recipe


def test_a_stream_is_one_patch(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m.safetensors")
    data = make_patches(tmp_path, model)[0].read_bytes()
    for patches in (io.BytesIO(data), [io.BytesIO(data)]):
        assert sepme.apply(model, patches, check=True).concepts == ("Monet",)


def test_what_goes_wrong_is_one_tree_of_errors(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m.safetensors")
    with pytest.raises(sepme.SystemFailure) as raised:
        sepme.apply(str(model), "nowhere.sepme", "out.safetensors")
    assert raised.value.file == "nowhere.sepme"
    assert all(issubclass(getattr(sepme, name), sepme.SepmeError) for name in ERRORS)


def test_deltas_are_what_applying_adds(tmp_path: Path) -> None:
    """By the names of the UNet that was asked about; within the rounding of fp32."""
    unet = small_unet(SMALL["sd2"])
    unet.save_pretrained(tmp_path / "unet")
    patches = make_patches(tmp_path, tmp_path / "unet")
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    found = sepme.deltas(unet.state_dict(), patches, scale={"Monet": 0.5, "Klimt": 0})
    changed = {n for n in before if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    assert found.keys() == changed
    with sepme.patched(unet, patches, scale={"Monet": 0.5, "Klimt": 0}):
        after = unet.state_dict()
        for name, change in found.items():
            assert change.dtype == torch.float32
            assert torch.allclose(before[name] + change, after[name], rtol=0, atol=1e-6)
            assert change.abs().max() > 1e-3
    assert sepme.deltas(unet.state_dict(), patches, scale=0) == {}


class Pipe:
    """What the page does with a pipeline: have one, and call it."""

    def __init__(self) -> None:
        self.unet = networks()[0]

    def __call__(self, prompt: str) -> float:
        asked = torch.full((1, 4, 8, 8), 0.1), 10, torch.full((1, 4, WIDTH), len(prompt) / 99)
        with torch.no_grad():
            return float(self.unet(*asked).sample.abs().sum())


def test_the_page_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_small_model(tmp_path / "model.safetensors")
    pipe = Pipe()
    before = pipe("a garden by Monet")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, Any] = {"pipe": pipe}
    for block in blocks:
        exec(block, names)
    said = capsys.readouterr().out
    assert "none of the patches erases 'Manet' one of Monet Manet" in said
    assert "attn2.to_k.weight torch.Size([64, 64])" in said
    model, back = tmp_path / "model.safetensors", tmp_path / "back.safetensors"
    assert back.read_bytes() == model.read_bytes()
    assert pipe("a garden by Monet") == before
    with sepme.patched(pipe, "monet.sepme"):
        assert pipe("a garden by Monet") != before


# What is in it


def test_the_documented_names_are_all_there_are() -> None:
    assert set(sepme.__all__) == OPERATIONS | FROZEN | ERRORS | OTHERS
    assert set(sepme.__all__) <= set(dir(sepme))
    assert all(getattr(sepme, name) is not None for name in sepme.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = sepme.nonsense


def test_every_operation_is_documented_and_annotated_to_the_last_argument() -> None:
    for name in OPERATIONS:
        operation = getattr(sepme, name)
        signature = inspect.signature(operation)
        assert operation.__doc__
        assert "Raises" in operation.__doc__
        assert signature.return_annotation is not signature.empty
        assert all(p.annotation is not p.empty for p in signature.parameters.values())


@pytest.mark.parametrize("name", ["apply", "erase", "evaluate", "plan_erasure", "revert", "sample"])
def test_a_keyword_that_no_operation_has_is_not_passed_over(name: str) -> None:
    needed = {"evaluate": {"judge": "m:j", "report": "r"}, "sample": {"output": "grid.png"}}
    with pytest.raises(TypeError, match="unexpected keyword argument 'onyl'"):
        getattr(sepme, name)("a.safetensors", "b.sepme", onyl="Monet", **needed.get(name, {}))


def test_every_command_is_an_operation_of_that_name() -> None:
    # `import` is no name in Python, and two operations; `recipe` is a group of two.
    assert set(COMMANDS) - {"import", "recipe"} <= OPERATIONS


def test_results_are_frozen() -> None:
    for name in FROZEN:
        for kind in get_args(getattr(sepme, name)) or [getattr(sepme, name)]:
            parameters: Any = kind.__dataclass_params__
            assert dataclasses.is_dataclass(kind)
            assert parameters.frozen


HEAVY = {
    "torch", "numpy", "typer", "rich", "diffusers", "transformers", "huggingface_hub", "jinja2",
}  # fmt: skip


@pytest.mark.parametrize(
    ("line", "heavy"),
    [
        ("import sepme_cli as sepme; dir(sepme); sepme.SepmeError; sepme.Progress", set()),
        ("import sepme_cli; sepme_cli.apply; sepme_cli.inspect; sepme_cli.diff", {"numpy"}),
        ("import sepme_cli; sepme_cli.patched; sepme_cli.deltas", {"torch", "numpy"}),
    ],
)
def test_a_name_loads_what_it_needs_and_no_more(line: str, heavy: set[str]) -> None:
    """`patched` wants torch and no diffusers: the caller's program has loaded its own."""
    code = f"import sys; {line}; print(*{HEAVY!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert set(done.stdout.split()) == heavy

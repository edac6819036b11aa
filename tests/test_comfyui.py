"""The ComfyUI nodes, against what ComfyUI promises a node; ComfyUI itself is not here.

`Patcher` keeps the contract of its ModelPatcher: names are those of the model's state dict; a
patch is a tuple that holds a difference; `get_key_patches` gives the weight as it is without
patches, and what makes a plain tensor of it, before the patches; a clone shares the model and not
the patches; patching adds strength times the difference in fp32 and casts once.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sepme_cli as sepme
from tests.synthetic import additive, base_of, make_checkpoint, make_patch, operator

NODES = Path(__file__).parent.parent / "examples" / "comfyui" / "sepme_nodes.py"
PREFIX = "model.diffusion_model."


class Patcher:
    """See above. tensors: the model's, which clones share."""

    def __init__(self, tensors: dict[str, Tensor], *, old: bool = False) -> None:
        self.tensors, self.old = tensors, old
        self.patches: dict[str, list[tuple[float, tuple[Tensor, ...]]]] = {}
        self.backup: dict[str, Tensor] = {}

    def clone(self) -> "Patcher":
        other = Patcher(self.tensors, old=self.old)
        other.backup = self.backup
        other.patches = {name: list(patches) for name, patches in self.patches.items()}
        return other

    def get_key_patches(self, filter_prefix: str) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for name, tensor in self.tensors.items():
            if name.startswith(filter_prefix):
                weight = self.backup.get(name, tensor)
                first = weight if self.old else (weight, lambda value, **_: value)
                found[name] = [first, *self.patches.get(name, [])]
        return found

    def add_patches(self, patches: dict[str, Any], strength_patch: float = 1.0) -> list[str]:
        taken = [name for name in patches if name in self.tensors]
        for name in taken:
            (difference,) = patches[name]
            assert difference.shape == self.tensors[name].shape
            self.patches.setdefault(name, []).append((strength_patch, patches[name]))
        return taken

    def patch_model(self) -> None:
        for name, patches in self.patches.items():
            weight = self.tensors[name]
            self.backup[name] = weight.clone()
            total = weight.float()
            for strength, (difference,) in patches:
                total += strength * difference.float()
            self.tensors[name] = total.to(weight.dtype)

    def unpatch_model(self) -> None:
        self.tensors.update(self.backup)
        self.backup.clear()


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module as ComfyUI loads it, by its path, with models/ in tmp_path."""
    folders: dict[str, Path] = {}
    fake: Any = ModuleType("folder_paths")
    fake.models_dir = str(tmp_path / "models")
    fake.add_model_folder_path = lambda name, path: folders.update({name: Path(path)})
    fake.get_filename_list = lambda name: sorted(p.name for p in folders[name].iterdir())
    fake.get_full_path = lambda name, file: (
        str(folders[name] / file) if (folders[name] / file).is_file() else None
    )
    monkeypatch.setitem(sys.modules, "folder_paths", fake)
    (tmp_path / "models" / "sepme").mkdir(parents=True)
    spec = importlib.util.spec_from_file_location("sepme_nodes", NODES)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["F16", "F32", "BF16"])
def model(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return make_checkpoint(tmp_path / "model.safetensors", dtype=request.param)


@pytest.fixture
def patches(tmp_path: Path, model: Path, nodes: Any) -> list[Path]:
    """Two files of an additive increment and an operator each."""
    base = base_of(model)
    parts = [make(base, name, seed=i) for i, (make, name) in enumerate(KINDS)]
    folder = tmp_path / "models" / "sepme"
    return [
        make_patch(folder / "artists.sepme", base, *parts[:2]),
        make_patch(folder / "things.sepme", base, *parts[2:]),
    ]


KINDS = ((additive, "Monet"), (operator, "Klimt"), (operator, "castle"), (additive, "dog"))


def loaded(model: Path, **options: bool) -> Patcher:
    tensors = load_file(model)
    return Patcher(
        {n.removeprefix("model."): v for n, v in tensors.items() if n.startswith(PREFIX)}, **options
    )


def applied(nodes: Any, patcher: Patcher, name: str, strength: float, concepts: str = "") -> Any:
    path, _ = nodes.LoadSepmePatch().load(name)
    return nodes.ApplySepmePatch().apply(patcher, path, strength, concepts)[0]


def written(model: Path, *steps: dict[str, Any]) -> dict[str, Tensor]:
    """What `apply` writes, step by step from the base."""
    current = model
    for i, step in enumerate(steps):
        output = model.with_name(f"step-{i}.safetensors")
        sepme.apply(current, **step, output=output, base=model if i else None, force=True)
        current = output
    tensors = load_file(current)
    return {n.removeprefix("model."): v for n, v in tensors.items() if n.startswith(PREFIX)}


def nearly(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """The same within two roundings of what is added and of the sum."""
    return a.keys() == b.keys() and all(
        (a[n].float() - b[n].float()).abs().max()
        <= 2 * torch.finfo(a[n].dtype).eps * b[n].float().abs().max()
        for n in a
    )


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tensors.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_a_patch_is_offered_and_tells_its_concepts(nodes: Any, patches: list[Path]) -> None:
    (patches[0].parent / "notes.txt").write_text("")
    offered = nodes.LoadSepmePatch.INPUT_TYPES()["required"]["patch_name"]
    assert offered == (["artists.sepme", "things.sepme"],)
    assert nodes.LoadSepmePatch().load("artists.sepme") == (str(patches[0]), "Klimt\nMonet")
    before = nodes.LoadSepmePatch.IS_CHANGED("artists.sepme")
    patches[0].write_bytes(patches[1].read_bytes())
    assert nodes.LoadSepmePatch.IS_CHANGED("artists.sepme") != before
    with pytest.raises(sepme.SystemFailure, match="not in models/sepme"):
        nodes.LoadSepmePatch().load("nowhere.sepme")


@pytest.mark.parametrize("old", [False, True])
def test_a_model_is_patched_as_its_file_would_be_and_put_back(
    nodes: Any, model: Path, patches: list[Path], old: bool
) -> None:
    patcher = loaded(model, old=old)
    before = copied(patcher.tensors)
    clean = applied(nodes, patcher, "artists.sepme", 0.75)
    assert not patcher.patches
    clean.patch_model()
    expected = written(model, {"patches": patches[0], "scale": 0.75})
    assert nearly(clean.tensors, expected)
    changed = {name for name in before if not before[name].equal(clean.tensors[name])}
    assert changed == {name for name in before if not before[name].equal(expected[name])} != set()
    clean.unpatch_model()
    assert same(patcher.tensors, before)


def test_each_concept_has_its_own_strength(nodes: Any, model: Path, patches: list[Path]) -> None:
    clean = applied(nodes, loaded(model), "artists.sepme", 0.5, "monet: 0.5\n\n KLIMT \n")
    clean.patch_model()
    assert nearly(
        clean.tensors,
        written(
            model,
            {"patches": patches[0], "only": "Monet", "scale": 0.25},
            {"patches": patches[0], "only": "Klimt", "scale": 0.5},
        ),
    )
    only = applied(nodes, loaded(model), "artists.sepme", 1.0, "Monet")
    only.patch_model()
    assert nearly(only.tensors, written(model, {"patches": patches[0], "only": "Monet"}))


def test_two_nodes_do_what_both_patches_do_in_either_order(
    nodes: Any, model: Path, patches: list[Path]
) -> None:
    """Also where the model is in memory with another patch in it meanwhile."""
    expected = written(model, {"patches": patches})
    for first, second in (("artists", "things"), ("things", "artists")):
        patcher = loaded(model)
        one = applied(nodes, patcher, f"{first}.sepme", 1.0)
        one.patch_model()
        both = applied(nodes, one, f"{second}.sepme", 1.0)
        one.unpatch_model()
        both.patch_model()
        assert nearly(both.tensors, expected)


def test_no_strength_is_the_model_itself(nodes: Any, model: Path, patches: list[Path]) -> None:
    patcher = loaded(model)
    assert applied(nodes, patcher, "artists.sepme", 0.0) is patcher


def test_what_does_not_fit_is_refused(
    nodes: Any, tmp_path: Path, model: Path, patches: list[Path]
) -> None:
    patcher = loaded(model)
    with pytest.raises(sepme.RefusedError, match="'nobody'"):
        applied(nodes, patcher, "artists.sepme", 1.0, "nobody: 0.5")
    with pytest.raises(sepme.UsageError, match="named twice"):
        applied(nodes, patcher, "artists.sepme", 1.0, "Monet\nMonet: 0.5")
    wider = {n: v for n, v in patcher.tensors.items() if "attn2" not in n}
    with pytest.raises(sepme.UnsupportedError, match="what reads the text"):
        applied(nodes, Patcher(wider), "artists.sepme", 1.0)
    save_file({"x": torch.zeros(1)}, tmp_path / "models" / "sepme" / "lora.sepme")
    with pytest.raises(sepme.SepmeError):
        nodes.LoadSepmePatch().load("lora.sepme")
    (tmp_path / "models" / "sepme" / "none.sepme").write_bytes(model.read_bytes())
    with pytest.raises(sepme.MalformedError, match="is no patch"):
        nodes.LoadSepmePatch().load("none.sepme")

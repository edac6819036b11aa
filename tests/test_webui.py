"""The web UI's script, against what the web UIs promise a script; they themselves are not here.

Of AUTOMATIC1111's: `process` comes before anything is drawn, with what `ui` returned; what it
raises is only reported; `p.sample` draws a batch; LoRAs are added to a layer's weights when it is
used, once, and are taken off by way of a copy that was made before (`Layer`). Of Forge: the hook
before every sampling; models that are clones of one another, with patches by name (`Patcher`).
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sepme_cli as sepme
from tests.synthetic import make_checkpoint, make_patches

SCRIPT = Path(__file__).parent.parent / "examples" / "webui" / "scripts" / "sepme.py"
PREFIX = "model.diffusion_model."
OFF = (False, ["monet.sepme"], 1.0, "")


class Component:
    """Any of gradio's: what it was made with."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.arguments, self.options = arguments, options

    def __enter__(self) -> "Component":
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def webui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script's module as a web UI loads it, by its path, with models/ in tmp_path."""
    visible = object()
    parts: dict[str, dict[str, Any]] = {
        "gradio": {"Dropdown": Component, "Slider": Component, "Textbox": Component},
        "modules": {},
        "modules.paths": {"models_path": str(tmp_path)},
        "modules.scripts": {"Script": object, "AlwaysVisible": visible},
        "modules.ui_components": {"InputAccordion": Component},
    }
    for name, contents in parts.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            setattr(sys.modules["modules"], name.partition(".")[2], module)
    spec = importlib.util.spec_from_file_location("webui_sepme", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    # As an import does: a dataclass looks for its module there.
    monkeypatch.setitem(sys.modules, "webui_sepme", found)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(params=["F16", "F32", "BF16"])
def model(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return make_checkpoint(tmp_path / "model.safetensors", dtype=request.param)


@pytest.fixture
def patches(tmp_path: Path, model: Path) -> list[Path]:
    (tmp_path / "sepme").mkdir()
    return make_patches(tmp_path / "sepme", model, ("Monet", "Klimt"))


def unet_tensors(path: Path) -> dict[str, Tensor]:
    tensors = load_file(path)
    return {n.removeprefix(PREFIX): v for n, v in tensors.items() if n.startswith(PREFIX)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


class Layer(nn.Module):
    """A layer of the web UI, to whose weight LoRAs are added when it is next used."""

    def use(self, loras: dict[str, float]) -> None:
        if not hasattr(self, "network_layer_name"):
            return
        wanted = tuple(loras.items())
        if getattr(self, "network_current_names", ()) == wanted:
            return
        if getattr(self, "network_weights_backup", None) is None:
            assert getattr(self, "network_current_names", ()) == ()
            self.network_weights_backup = self.weight.detach().clone()
        self.weight.data.copy_(self.network_weights_backup)
        for amount in loras.values():
            self.weight.data += amount
        self.network_current_names = wanted


def network(tensors: dict[str, Tensor]) -> nn.Module:
    root = Layer()
    for name, value in tensors.items():
        *path, leaf = name.split(".")
        module: nn.Module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, Layer())
            module = module.get_submodule(part)
        module.register_parameter(leaf, nn.Parameter(value.clone(), requires_grad=False))
        if leaf == "weight" and value.dim() == 2:
            module.network_layer_name = name
    return root


class WebUI:
    """AUTOMATIC1111's: one generation after another on one UNet."""

    def __init__(self, webui: Any, tensors: dict[str, Tensor]) -> None:
        self.script = webui.Script()
        self.unet = network(tensors)
        self.told: dict[str, str] = {}

    def generate(
        self,
        arguments: tuple[Any, ...],
        loras: dict[str, float] | None = None,
        *,
        fail: bool = False,
        **fields: Any,
    ) -> dict[str, Tensor]:
        """The weights that are drawn with, in each of two batches."""
        p = SimpleNamespace(
            sd_model=SimpleNamespace(model=SimpleNamespace(diffusion_model=self.unet)),
            extra_generation_params=self.told,
            **{"refiner_checkpoint": None, "hr_checkpoint_name": None, **fields},
        )

        def sample(*, seeds: list[int]) -> dict[str, Tensor]:
            assert seeds == [1]
            for layer in self.unet.modules():
                layer.use(loras or {})
            if fail:
                raise ZeroDivisionError
            return {name: value.clone() for name, value in self.unet.state_dict().items()}

        p.sample = sample
        self.script.process(p, *arguments)
        first = p.sample(seeds=[1])
        assert same(first, p.sample(seeds=[1]))
        return first


def test_the_accordion_offers_what_is_in_the_folder(webui: Any, patches: list[Path]) -> None:
    script = webui.Script()
    enabled, offered, strength, concepts = script.ui(False)
    assert script.show(False) is sys.modules["modules.scripts"].AlwaysVisible
    assert enabled.options["label"] == script.title()
    assert offered.arguments == (["klimt.sepme", "monet.sepme"],)
    assert strength.options["value"] == 1.0
    assert concepts.options["label"] == "Concepts"


def test_a_picture_is_drawn_with_the_weights_of_the_patched_file(
    webui: Any, model: Path, patches: list[Path]
) -> None:
    before = unet_tensors(model)
    ui = WebUI(webui, before)
    sepme.apply(model, patches, model.with_name("out.safetensors"), scale=0.75)
    expected = unet_tensors(model.with_name("out.safetensors"))
    both = ["monet.sepme", "klimt.sepme"]
    assert same(ui.generate((True, both, 0.75, "")), expected)
    assert ui.told == {"SepME": "monet.sepme, klimt.sepme (all; strength 0.75)"}
    assert same(ui.generate(OFF), before)
    assert same(ui.generate((True, both, 0.0, "")), before)
    assert same(ui.generate((True, [], 1.0, "")), before)
    sepme.apply(model, patches[1], model.with_name("one.safetensors"), scale=0.5)
    one = ui.generate((True, both, 1.0, "klimt: 0.5"))
    assert same(one, unet_tensors(model.with_name("one.safetensors")))


@pytest.mark.parametrize("loras", [{"a": 0.5}, {"a": 0.5, "b": 0.25}])
def test_loras_come_on_top_and_go(
    webui: Any, model: Path, patches: list[Path], loras: dict[str, float]
) -> None:
    """Whatever was in the weights before, and whatever comes next."""
    sepme.apply(model, patches[0], model.with_name("out.safetensors"))
    on_file = WebUI(webui, unet_tensors(model.with_name("out.safetensors"))).generate(OFF, loras)
    ui = WebUI(webui, unet_tensors(model))
    plain, with_loras = ui.generate(OFF), ui.generate(OFF, loras)
    on = (True, ["monet.sepme"], 1.0, "")
    assert same(ui.generate(on, loras), on_file)
    assert same(ui.generate(OFF, loras), with_loras)
    ui.generate(on, {"another": 1.0})
    assert same(ui.generate(on, loras), on_file)
    assert same(ui.generate(OFF), plain)


def test_an_error_while_drawing_leaves_nothing_behind(
    webui: Any, model: Path, patches: list[Path]
) -> None:
    before = unet_tensors(model)
    ui = WebUI(webui, before)
    with pytest.raises(ZeroDivisionError):
        ui.generate((True, ["monet.sepme"], 1.0, ""), {"a": 0.5}, fail=True)
    assert same(ui.generate(OFF), before)


def test_no_picture_is_drawn_without_a_patch_that_was_asked_for(
    webui: Any, model: Path, patches: list[Path]
) -> None:
    before = unet_tensors(model)
    ui = WebUI(webui, before)
    on = (True, ["monet.sepme"], 1.0, "")
    with pytest.raises(sepme.RefusedError, match="'nobody'"):
        ui.generate((True, ["monet.sepme"], 1.0, "nobody"))
    with pytest.raises(sepme.SystemFailure):
        ui.generate((True, ["nowhere.sepme"], 1.0, ""))
    for field in ("refiner_checkpoint", "hr_checkpoint_name"):
        with pytest.raises(sepme.UsageError, match=r"other\.safetensors is to draw too"):
            ui.generate(on, **{field: "other.safetensors"})
    layer = next(m for n, m in ui.unet.named_modules() if n.endswith("attn2.to_k"))
    layer.fp16_weight = layer.weight
    with pytest.raises(sepme.UnsupportedError, match="FP16"):
        ui.generate(on)
    assert same({n: v for n, v in ui.generate(OFF).items() if n in before}, before)


class Patcher:
    """Forge's: clones of one model, whose weights are made anew when the patches' names change."""

    def __init__(self, model: nn.Module, loader: Any) -> None:
        self.model, self.lora_loader = model, loader
        self.patches: dict[str, dict[str, Any]] = {}
        self.wrapper: Callable[..., Any] | None = None

    def clone(self) -> "Patcher":
        other = Patcher(self.model, self.lora_loader)
        other.patches = dict(self.patches)
        return other

    def add_patches(self, *, filename: str, patches: dict[str, Any]) -> set[str]:
        known = dict(self.model.named_parameters())
        self.patches[filename] = {name: patches[name] for name in patches if name in known}
        return set(self.patches[filename])

    def set_model_unet_function_wrapper(self, wrapper: Callable[..., Any]) -> None:
        self.wrapper = wrapper

    def draw(self) -> dict[str, Tensor]:
        if self.wrapper is not None:
            self.wrapper(None, None)
        loader, known = self.lora_loader, dict(self.model.named_parameters())
        if loader.names != list(self.patches):
            for name, weight in loader.backup.items():
                known[name].data = weight
            loader.backup, loader.names = {}, list(self.patches)
            for patches in self.patches.values():
                for name, (difference,) in patches.items():
                    loader.backup.setdefault(name, known[name].data)
                    total = known[name].data.float() + difference.float()
                    known[name].data = total.to(difference.dtype)
        return {name.removeprefix("diffusion_model."): v.data.clone() for name, v in known.items()}


class Forge:
    """One generation after another; the model is put together anew for each."""

    def __init__(self, webui: Any, tensors: dict[str, Tensor]) -> None:
        self.script = webui.Script()
        model = nn.Module()
        model.add_module("diffusion_model", network(tensors))
        self.original = Patcher(model, SimpleNamespace(backup={}, names=[]))

    def generate(self, arguments: tuple[Any, ...], lora: Any = None) -> dict[str, Tensor]:
        unet = self.original
        if lora is not None:
            unet = unet.clone()
            unet.add_patches(filename="lora", patches=lora)
        model = SimpleNamespace(forge_objects=SimpleNamespace(unet=unet))
        p = SimpleNamespace(sd_model=model, extra_generation_params={}, sample=None)
        self.script.process(p, *arguments)
        assert p.sample is None
        self.script.process_before_every_sampling(p, *arguments, noise=None)
        drawn: dict[str, Tensor] = model.forge_objects.unet.draw()
        return drawn


def nearly(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        (a[n].float() - b[n].float()).abs().max()
        <= 2 * torch.finfo(a[n].dtype).eps * b[n].float().abs().max()
        for n in a
    )


def test_forge_patches_its_own_way(webui: Any, model: Path, patches: list[Path]) -> None:
    before = unet_tensors(model)
    forge = Forge(webui, before)
    sepme.apply(model, patches, model.with_name("out.safetensors"), scale=0.5)
    expected = unet_tensors(model.with_name("out.safetensors"))
    both = ["monet.sepme", "klimt.sepme"]
    assert same(forge.generate(OFF), before)
    whole = forge.generate((True, both, 1.0, ""))
    assert nearly(forge.generate((True, both, 0.5, "")), expected)
    assert nearly(forge.generate((True, both, 1.0, "monet: 0.5\nklimt: 0.5")), expected)
    assert same(forge.generate((True, both, 1.0, "")), whole)
    assert same(forge.generate(OFF), before)


def test_forge_adds_to_weights_without_the_loras_that_are_in_them(
    webui: Any, model: Path, patches: list[Path]
) -> None:
    forge = Forge(webui, unet_tensors(model))
    name = next(n for n, _ in forge.original.model.named_parameters() if "attn2.to_k" in n)
    weight = dict(forge.original.model.named_parameters())[name]
    lora = {name: (torch.full_like(weight, 4.0),)}
    # An operator's dW depends on the weights: on those with the LoRA it would be another.
    on = (True, ["klimt.sepme"], 1.0, "")
    forge.generate(OFF, lora)
    found = forge.generate(on, lora)
    sepme.apply(model, patches[1], model.with_name("out.safetensors"))
    expected = unet_tensors(model.with_name("out.safetensors"))
    short = name.removeprefix("diffusion_model.")
    change = found.pop(short).float() - 4.0 - expected.pop(short).float()
    assert change.abs().max() <= 8 * torch.finfo(weight.dtype).eps
    assert nearly(found, expected)


def test_forge_draws_nothing_without_a_patch_that_was_asked_for(
    webui: Any, tmp_path: Path, model: Path, patches: list[Path]
) -> None:
    forge = Forge(webui, unet_tensors(model))
    with pytest.raises(sepme.RefusedError, match="'nobody'"):
        forge.generate((True, ["monet.sepme"], 1.0, "nobody"))
    save_file({"x": torch.zeros(1)}, tmp_path / "sepme" / "lora.sepme")
    with pytest.raises(sepme.MalformedError):
        forge.generate((True, ["lora.sepme"], 1.0, ""))
    assert same(forge.generate(OFF), unet_tensors(model))

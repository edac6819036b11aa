"""A new family and a new method are each one description in one place, and all else reads it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import patch_spec.base
import patch_spec.stack
import sepme_cli as sepme
from patch_spec.container import read_patch
from sepme_cli.app import run
from sepme_cli.checkpoints.structure.families import FAMILIES, SD1, Names
from sepme_cli.checkpoints.structure.layout import Layout
from sepme_cli.diffusion.eraser import ComputedIncrement, closed_form_increments
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.opening import opened_model
from sepme_cli.diffusion.study import Study
from sepme_cli.erasure.methods import METHODS, Method
from sepme_cli.erasure.settings import Settings
from sepme_cli.progress import Progress
from tests.small_model import save_small_model

MARK = "made_up.version"


def is_made_up(tensors: Names, layout: Layout) -> bool:
    return MARK in tensors


FAMILY = replace(
    SD1,
    name="made-up",
    title="A family that was made up",
    matches=is_made_up,
    kohya="made_up_v1",
    modelspec="made-up-v1",
    heads=None,
    latent_scale=0.5,
    usually_epsilon=False,
)


def half(
    model: StableDiffusion,
    studies: Sequence[Study],
    settings: Settings,
    images: Tensor | None,
    progress: Progress,
) -> list[ComputedIncrement]:
    """The closed form, half the way."""
    spaces = [replace(study.space, shift=study.space.shift / 2) for study in studies]
    nearer = [replace(study, space=space) for study, space in zip(studies, spaces, strict=True)]
    made = closed_form_increments(model, nearer, settings)
    names = [replace(one.increment.method, name="half") for one in made]
    return [
        replace(one, increment=replace(one.increment, method=name))
        for one, name in zip(made, names, strict=True)
    ]


METHOD = Method("half", f"{__name__}:half")


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> None:
    """The made-up family beside the others, also in the format's list."""
    known = {FAMILY.name: FAMILY, **FAMILIES}
    monkeypatch.setattr("sepme_cli.checkpoints.structure.families.FAMILIES", known)
    for module in ("operations.export", "operations.card"):
        monkeypatch.setattr(f"sepme_cli.{module}.FAMILIES", known)
    for module in (patch_spec.base, patch_spec.stack):
        monkeypatch.setattr(module, "FAMILIES", tuple(known))


def test_the_format_knows_the_families() -> None:
    assert set(patch_spec.base.FAMILIES) >= FAMILIES.keys()


def test_a_made_up_family(family: None, tmp_path: Path) -> None:
    plain, model, patch = (
        tmp_path / name for name in ("a.safetensors", "b.safetensors", "p.sepme")
    )
    save_small_model(plain)
    tensors = load_file(plain)
    save_file({**tensors, MARK: tensors[next(iter(tensors))][:1].clone()}, model)
    with opened_model(plain) as one, opened_model(model) as other:
        assert (one.checkpoint.family, other.checkpoint.family) == (SD1, FAMILY)
        scales = [network.vae.network.config.scaling_factor for network in (one, other)]
        assert scales == [0.18215, 0.5]
        assert one.denoiser.network.config.attention_head_dim == 8
        assert other.denoiser.network.config.attention_head_dim == [1, 1]
    sepme.erase(model, "style:Monet", output=patch)
    assert read_patch(patch).base.family == "made-up"
    with pytest.raises(sepme.MismatchError):
        sepme.apply(plain, patch, check=True)
    assert sepme.apply(model, patch, tmp_path / "clean.safetensors").family == "made-up"
    assert "A family that was made up" in sepme.card(patch).card
    sepme.export(patch, "kohya", tmp_path / "lora.safetensors", base=model)
    with safe_open(tmp_path / "lora.safetensors", "np") as lora:
        said = lora.metadata()
    assert said["ss_base_model_version"] == "made_up_v1"
    assert said["modelspec.architecture"] == "made-up-v1/lora"


def test_a_made_up_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, policy = tmp_path / "m.safetensors", tmp_path / "policy.yaml"
    save_small_model(model)
    with pytest.raises(sepme.UsageError, match="no method 'half'"):
        sepme.erase(model, "style:Monet", method="half", output=tmp_path / "x.sepme")
    monkeypatch.setitem(METHODS, METHOD.name, METHOD)
    policy.write_text("version: 1\nconcepts: [{name: Monet, kind: style}]\nmethod: half\n")
    whole, halved = tmp_path / "whole.sepme", tmp_path / "half.sepme"
    sepme.erase(model, "style:Monet", output=whole)
    sepme.erase(model, recipe=policy, output=halved)
    (one,), (other,) = (read_patch(path).increments for path in (whole, halved))
    assert other.method.name == "half"
    assert other.shift is not None and one.shift is not None
    assert (other.shift == one.shift).all()
    assert other.shift_exponent == one.shift_exponent - 1
    assert sepme.plan_erasure(model, recipe=policy).method == "half"
    with pytest.raises(sepme.UsageError, match="--joint"):
        sepme.erase(model, recipe=policy, joint=True)


def test_the_command_line_offers_what_is_registered(capsys: pytest.CaptureFixture[str]) -> None:
    run(["erase", "--help"])
    said = capsys.readouterr().out
    assert "|".join(METHODS) in said

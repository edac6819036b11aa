"""What a patch promises is looked at again, and whatever does not hold is said."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from patch_spec.container import patch_bytes, read_patch
from patch_spec.increment import Increment
from patch_spec.manifest import Patch
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.study import leakages
from sepme_cli.erasure.settings import Settings
from sepme_cli.errors import MalformedError, UnsupportedError, UsageError
from sepme_cli.operations.erase import erase
from sepme_cli.operations.verify import VerifyResult, verify
from sepme_cli.recipe import SETTINGS, read_recipe
from tests.small_model import save_small_model
from tests.synthetic import additive, base_of, make_checkpoint

POLICY = """
version: 1
concepts: [{name: ink, kind: style, aliases: [sumi], prompts: ["{c}!"]}, {name: cat, kind: object}]
method: closed-form
settings: {rank: 3, insistence: 1.0, protection: 1.0}
"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "policy.yaml"
    path.write_text(POLICY)
    return path


@pytest.fixture(scope="module")
def patch(small_model: Path, policy: Path) -> Path:
    output = policy.with_name("policy.sepme")
    erase(small_model, recipe=read_recipe(policy, SETTINGS), output=output)
    return output


def failed(result: VerifyResult) -> list[str]:
    names = [check.name.split(": ")[-1] for check in result.checks if not check.ok]
    assert result.ok == (not names)
    return names


def changed(patch: Path, folder: Path, **fields: Any) -> Path:
    """A copy of the patch that says something else."""
    path = folder / "changed.sepme"
    path.write_bytes(patch_bytes(replace(read_patch(patch), **fields)))
    return path


def first_changed(patch: Path, **fields: Any) -> tuple[Increment, ...]:
    first, *rest = read_patch(patch).increments
    return (replace(first, **fields), *rest)


def test_all_of_it_holds(small_model: Path, policy: Path, patch: Path) -> None:
    result = verify([patch], model=small_model, recipe=policy)
    assert failed(result) == []
    names = {check.name.split(": ")[-1] for check in result.checks}
    assert {"recipe", "concepts", "settings", "model", "leakage of ink", "leakage of cat"} <= names


def test_a_leakage_that_is_not_found_again_fails(
    small_model: Path, patch: Path, tmp_path: Path
) -> None:
    first, _ = read_patch(patch).increments
    for factor in (0.5, 0.9, 1.1):
        assert first.measured.leakage is not None
        measured = replace(first.measured, leakage=first.measured.leakage * factor)
        lying = changed(patch, tmp_path, increments=first_changed(patch, measured=measured))
        assert failed(verify([lying], model=small_model)) == ["leakage of cat"]


def test_so_does_an_increment_that_does_more_than_it_says(
    small_model: Path, patch: Path, tmp_path: Path
) -> None:
    first, _ = read_patch(patch).increments
    stronger = first_changed(patch, shift_exponent=first.shift_exponent + 1)
    lying = changed(patch, tmp_path, increments=stronger)
    assert failed(verify([lying], model=small_model)) == ["leakage of cat"]


def test_so_does_a_promise_that_is_not_kept(small_model: Path, patch: Path, tmp_path: Path) -> None:
    both = changed(patch, tmp_path, separable_from=("", "a cat drawn in ink"))
    assert failed(verify([both], model=small_model)) == ["leakage of cat", "leakage of ink"]
    first, _ = read_patch(patch).increments
    other = first_changed(patch, prompts=(*first.prompts, "two drawings in ink"))
    to_the_other = changed(patch, tmp_path, increments=other)
    assert failed(verify([to_the_other], model=small_model)) == ["leakage of ink"]


def test_what_is_not_recorded_is_not_checked(
    small_model: Path, patch: Path, tmp_path: Path
) -> None:
    first, _ = read_patch(patch).increments
    silent = first_changed(patch, measured=replace(first.measured, leakage=None))
    result = verify([changed(patch, tmp_path, increments=silent)], model=small_model)
    assert failed(result) == []
    assert any("leakage of cat" in what for what in result.unchecked)


def test_an_operator_fits_a_fine_tune_and_nothing_with_another_text_encoder(
    small_model: Path, patch: Path, tmp_path: Path
) -> None:
    tensors = load_file(small_model)
    generator = torch.Generator().manual_seed(0)
    for name, value in tensors.items():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            value += 0.1 * value.std() * torch.randn(value.shape, generator=generator)
    save_file(tensors, tuned := tmp_path / "tuned.safetensors")
    result = verify([patch], model=tuned)
    assert failed(result) == []
    assert any("which operators fit" in check.detail for check in result.checks)
    additive = tmp_path / "additive.sepme"
    quick = Settings(steps=2, pictures=2, sampling_steps=2, batch_size=2, insistence=1.0)
    erase(small_model, ["ink"], method="sepme", settings=quick, output=additive)
    assert "model" in failed(verify([additive], model=tuned))

    save_small_model(other := tmp_path / "other.safetensors", seed=1)
    result = verify([patch], model=other)
    assert "model" in failed(result)
    assert {check.name.split(": ")[-1] for check in result.checks} > {"leakage of ink"}


def test_another_text_encoder_fails(small_model: Path, patch: Path, tmp_path: Path) -> None:
    base = read_patch(patch).base
    encoders: Mapping[str, str] = {name: "0" * 64 for name in base.text_encoders}
    other = changed(patch, tmp_path, base=replace(base, text_encoders=encoders))
    assert "model" in failed(verify([other], model=small_model))


def test_a_model_without_its_text_encoder_cannot_tell(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model.safetensors")
    from tests.synthetic import additive, base_of, make_patch

    base = base_of(model)
    part = additive(base, "Monet", seed=1)
    part = replace(part, measured=replace(part.measured, leakage=0.1))
    make_patch(tmp_path / "monet.sepme", base, part)
    with pytest.raises(UnsupportedError):
        verify([tmp_path / "monet.sepme"], model=model)


def test_a_patch_made_without_or_by_another_recipe_fails(
    policy: Path, patch: Path, tmp_path: Path
) -> None:
    for digest in (None, "0" * 64):
        other = changed(patch, tmp_path, recipe=digest)
        assert failed(verify([other], recipe=policy)) == ["recipe"]


def without_cat(patch: Patch) -> tuple[Increment, ...]:
    return tuple(part for part in patch.increments if part.slug != "cat")


def with_dog(patch: Patch) -> tuple[Increment, ...]:
    return (*patch.increments, replace(patch.increments[0], concept="dog", slug="dog"))


def without_an_alias(patch: Patch) -> tuple[Increment, ...]:
    return tuple(
        replace(part, prompts=tuple(p for p in part.prompts if p != "sumi"))
        for part in patch.increments
    )


@pytest.mark.parametrize("change", [without_cat, with_dog, without_an_alias])
def test_a_patch_with_other_concepts_than_its_recipe_fails(
    change: Any, policy: Path, patch: Path, tmp_path: Path
) -> None:
    other = changed(patch, tmp_path, increments=change(read_patch(patch)))
    assert failed(verify([other], recipe=policy)) == ["concepts"]


def test_overridden_settings_are_seen(small_model: Path, policy: Path, tmp_path: Path) -> None:
    recipe = read_recipe(policy, SETTINGS)
    settings = replace(Settings.of(recipe.settings), rank=2)
    output = tmp_path / "o.sepme"
    erase(small_model, recipe=recipe, settings=settings, output=output)
    result = verify([output], recipe=policy)
    assert failed(result) == ["settings"]
    assert any("rank 2, not 3" in check.detail for check in result.checks)


def test_what_makes_no_sense(small_model: Path, policy: Path, patch: Path) -> None:
    with pytest.raises(UsageError):
        verify([small_model], model=small_model)
    with pytest.raises(UsageError):
        verify([small_model], recipe=policy)
    with pytest.raises(MalformedError):
        verify([patch], recipe=patch)


def test_the_leakage_of_a_lora_is_that_of_the_same_additive_increment(small_model: Path) -> None:
    base = base_of(small_model)
    part = additive(base, "Monet", seed=1)
    none = np.zeros((0, base.width), np.float32)
    twin = replace(part, kind="lora", basis=none, down=dict.fromkeys(part.up, part.basis))
    with open_checkpoint(small_model) as checkpoint:
        network = StableDiffusion.of(checkpoint, torch.device("cpu"))
        (found,), (again,) = (leakages(network, [p], ("a cat", "")) for p in (part, twin))
    assert found == pytest.approx(again, rel=1e-4)
    assert found > 0

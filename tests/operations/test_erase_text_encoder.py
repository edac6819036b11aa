"""Increments of the text encoder's first layer, on small models of every family with CLIP alone."""

import io
import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModel

import sepme_cli as sepme
from patch_spec.container import read_patch
from patch_spec.increment import Increment
from sepme_cli.app import run
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.weights import patched_weights
from sepme_cli.errors import RefusedError, UnsupportedError, UsageError
from tests.small_model import small_parts, write_folder, write_single_file
from tests.small_transformers import small_transformer, write_transformer_folder

FAMILIES = ("sd1", "sd2", "sdxl")


def text_patch(model: Path, concept: str = "style:Monet", **options) -> tuple[bytes, Increment]:
    stream = io.BytesIO()
    sepme.erase(model, concept, method="text-encoder", output=stream, **options)
    (increment,) = read_patch(stream.getvalue()).increments
    return stream.getvalue(), increment


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, Increment]:
    folder = tmp_path_factory.mktemp(request.param)
    model = write_single_file(small_parts(request.param), folder / "model.safetensors")
    return model, *text_patch(model)


def test_only_the_first_layer_of_each_text_encoder_changes(
    made: tuple[Path, bytes, Increment],
) -> None:
    model, data, increment = made
    with open_checkpoint(model) as checkpoint:
        names = [spec.name for spec in checkpoint.family.text_encoders]
    assert increment.kind == "lora" and increment.method.name == "text-encoder"
    assert set(increment.exponents) == set(increment.layers)
    assert {name.split(".")[0] for name in increment.layers} == set(names)
    assert all(".encoder.layers.0." in name for name in increment.layers)
    patch = read_patch(data)
    assert patch.separable_from == ()
    assert set(patch.base.layers) == set(increment.layers)
    assert increment.measured.collateral is not None and increment.measured.steps == 100


def test_the_concept_is_read_as_its_anchor_and_other_things_as_before(
    made: tuple[Path, bytes, Increment],
) -> None:
    model, _, increment = made
    with open_checkpoint(model) as checkpoint:
        network = StableDiffusion.of(checkpoint, torch.device("cpu"))
        prompts = ["a picture in the style of Monet", "a picture in the style of art"]
        others = ["a dog in the rain", "an old house", "a portrait of a woman"]
        before = network.text.condition(prompts + others)
        with network.with_weights(patched_weights(checkpoint, [(increment, 1.0)])):
            after = network.text.condition(prompts + others)
        assert torch.equal(network.text.condition(prompts + others).states, before.states)
    way = (before.states[0] - before.states[1]).norm()
    left = (after.states[0] - before.states[1]).norm()
    assert left < 0.6 * way
    moved = (after.states - before.states)[2:].norm(dim=(1, 2)) / before.states[2:].norm(dim=(1, 2))
    share = way / before.states[0].norm()
    assert moved.max() < 0.5 * share
    if before.pooled is not None and after.pooled is not None:
        way = (before.pooled[0] - before.pooled[1]).norm()
        assert (after.pooled[0] - before.pooled[1]).norm() < 0.7 * way


def test_it_goes_back_byte_for_byte_and_beside_another_kind(
    made: tuple[Path, bytes, Increment], tmp_path: Path
) -> None:
    model, data, _ = made
    (tmp_path / "text.sepme").write_bytes(data)
    sepme.erase(model, "object:cat", output=tmp_path / "cat.sepme")
    both = [tmp_path / "text.sepme", tmp_path / "cat.sepme"]
    sepme.apply(model, both, tmp_path / "both.safetensors")
    sepme.apply(model, both[1], tmp_path / "cat.safetensors")
    sepme.revert(
        tmp_path / "both.safetensors",
        patches=both,
        output=tmp_path / "one.safetensors",
        concepts="Monet",
        base=model,
    )
    assert (tmp_path / "one.safetensors").read_bytes() == (
        tmp_path / "cat.safetensors"
    ).read_bytes()
    sepme.revert(
        tmp_path / "both.safetensors",
        patches=both,
        output=tmp_path / "back.safetensors",
        base=model,
    )
    assert (tmp_path / "back.safetensors").read_bytes() == model.read_bytes()
    sepme.apply(model, both[0], in_place=True)
    sepme.revert(model, in_place=True)
    assert model.read_bytes() == (tmp_path / "back.safetensors").read_bytes()


def test_the_same_command_makes_the_same_bytes(tmp_path: Path) -> None:
    model = write_single_file(small_parts("sd1"), tmp_path / "model.safetensors")
    settings = sepme.Settings(rank=2, seed=3)
    data, increment = text_patch(model, settings=settings)
    assert text_patch(model, settings=settings)[0] == data
    assert increment.rank == 2


def test_what_transformers_loads_reads_the_concept_as_sepme_does(tmp_path: Path) -> None:
    """A patched model folder, by its own text encoder and nobody's hooks."""
    folder = write_folder(small_parts("sd1"), tmp_path / "model")
    data, increment = text_patch(folder)
    (tmp_path / "monet.sepme").write_bytes(data)
    sepme.apply(folder, tmp_path / "monet.sepme", tmp_path / "out")
    theirs = CLIPTextModel.from_pretrained(tmp_path / "out" / "text_encoder").eval()
    with open_checkpoint(folder) as checkpoint:
        network = StableDiffusion.of(checkpoint, torch.device("cpu"))
        ids = network.text.tokens(["a picture in the style of Monet"])
        with network.with_weights(patched_weights(checkpoint, [(increment, 1.0)])):
            ours = network.text.condition(["a picture in the style of Monet"]).states
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).last_hidden_state, ours, rtol=1e-4, atol=1e-4)


def test_several_concepts_leave_each_other_alone(tmp_path: Path) -> None:
    model = write_single_file(small_parts("sd1"), tmp_path / "model.safetensors")
    stream = io.BytesIO()
    result = sepme.erase(model, ["style:Monet", "object:cat"], method="text-encoder", output=stream)
    assert [one.kind for one in result.increments] == ["lora", "lora"]
    assert result.collateral is not None
    assert result.collateral.p95 == max(one.collateral.p95 for one in result.increments)
    found = {one.concept: one for one in read_patch(stream.getvalue()).increments}
    with open_checkpoint(model) as checkpoint:
        network = StableDiffusion.of(checkpoint, torch.device("cpu"))
        asked = ["a picture of a cat", "a picture of a thing"]
        before = network.text.condition(asked).states
        with network.with_weights(patched_weights(checkpoint, [(found["Monet"], 1.0)])):
            beside = network.text.condition(asked).states
    assert (beside - before)[0].norm() < 0.3 * (before[0] - before[1]).norm()


def test_a_model_with_t5_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = write_transformer_folder(small_transformer("sd3"), tmp_path / "model")
    with pytest.raises(UnsupportedError, match="T5"):
        sepme.erase(folder, "style:Monet", method="text-encoder", output=tmp_path / "x.sepme")
    assert not (tmp_path / "x.sepme").exists()


def test_its_layers_are_read_by_every_stream_so_none_can_be_chosen(tmp_path: Path) -> None:
    model = write_single_file(small_parts("sdxl"), tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="leave out --streams"):
        text_patch(model, streams="tokens")


def test_a_check_says_whose_figures_it_shows(tmp_path: Path) -> None:
    model = write_single_file(small_parts("sd1"), tmp_path / "model.safetensors")
    plan = sepme.plan_erasure(model, "style:Monet", method="text-encoder")
    assert [warning for warning in plan.warnings if "the closed form's" in warning]
    assert plan.base.targets is None
    plain = sepme.plan_erasure(model, "style:Monet")
    assert not [warning for warning in plain.warnings if "the closed form's" in warning]


def test_collateral_beyond_the_bound_is_refused_once_it_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_single_file(small_parts("sd1"), tmp_path / "model.safetensors")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "version: 1\nconcepts:\n  - {name: Monet, kind: style}\nmethod: text-encoder\n"
        "settings: {collateral: 0.001}\n"
    )
    with pytest.raises(RefusedError, match="change other prompts too much"):
        sepme.erase(model, recipe=recipe, output=tmp_path / "x.sepme")
    assert not (tmp_path / "x.sepme").exists()
    line = ["erase", str(model), "--recipe", str(recipe), "-o", str(tmp_path / "x.sepme")]
    assert run([*line, "--force-collateral", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["increments"][0]["method"] == "text-encoder"
    assert said["collateral"]["p95"] > 0.001

"""Comparing checkpoints and patches."""

from pathlib import Path

import numpy as np
import pytest

from sepme_cli.checkpoints.journals.undo import undo_path
from sepme_cli.errors import MismatchError, UnsupportedError
from sepme_cli.operations.apply import apply
from sepme_cli.operations.diff import diff
from tests.synthetic import (
    Shape,
    additive,
    base_of,
    checkpoint_tensors,
    make_checkpoint,
    make_patch,
    make_patches,
    operator,
    write_safetensors,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model.safetensors")


def test_a_checkpoint_is_the_same_as_its_copy(model: Path, tmp_path: Path) -> None:
    copy = write_safetensors(tmp_path / "copy", checkpoint_tensors(), {"title": "x"}, pad=64)
    result = diff(model, copy)
    assert (result.kind, result.same, result.changed) == ("checkpoints", True, 0)
    assert (result.tensors, result.only_in_a, result.only_in_b) == ((), (), ())
    assert result.metadata == ("title",)


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("dtype", ["F16", "F32", "BF16"])
def test_a_patched_checkpoint_differs_by_the_increments_rank(
    tmp_path: Path, rank: int, dtype: str
) -> None:
    """Rounding makes every difference of full rank; what counts is what stands out of it."""
    shape = Shape(width=64, channels=(16, 48, 64))
    model = make_checkpoint(tmp_path / "m.safetensors", shape, dtype=dtype)
    base = base_of(model)
    part = additive(base, "c", seed=1, rank=rank, size=0.1)
    patch = make_patch(tmp_path / "p.sepme", base, part)
    apply(model, [patch], tmp_path / "out")
    result = diff(model, tmp_path / "out")
    planned = diff(model, patch)
    assert not result.same and result.changed == len(result.tensors) == len(base.targets)
    assert {tensor.rank for tensor in result.tensors} == {rank}
    assert {tensor.rank for tensor in planned.tensors} == {rank}
    for seen, said in zip(
        sorted(result.tensors, key=lambda t: t.name),
        sorted(planned.tensors, key=lambda t: t.name),
        strict=True,
    ):
        assert seen.name == said.name
        assert seen.relative_norm == pytest.approx(said.relative_norm, rel=0.02)
        assert seen.max_abs == pytest.approx(said.max_abs, rel=0.05)


def test_figures_are_right(tmp_path: Path) -> None:
    tensors = checkpoint_tensors(dtype="F32")
    a = write_safetensors(tmp_path / "a", tensors)
    name, vae = "model.diffusion_model.out.2.weight", "first_stage_model.decoder.conv_in.weight"
    changed = dict(tensors)
    values = tensors[name][1].copy()
    values[0, 0, 0, 0] += 0.5
    changed[name] = ("F32", values)
    changed[vae] = ("F32", tensors[vae][1][:2])
    del changed["flags"]
    changed["new"] = ("F16", np.zeros(3, "<f2"))
    result = diff(a, write_safetensors(tmp_path / "b", changed))
    by_name = {tensor.name: tensor for tensor in result.tensors}
    assert by_name.keys() == {name, vae}
    assert by_name[name].max_abs == pytest.approx(0.5)
    assert by_name[name].relative_norm == pytest.approx(0.5 / np.linalg.norm(tensors[name][1]))
    assert by_name[name].rank is None, "only of targets"
    assert by_name[vae].max_abs is None, "another shape"
    assert (result.only_in_a, result.only_in_b) == (("flags",), ("new",))
    assert not result.same


def test_another_dtype_with_the_same_values_differs_by_nothing(tmp_path: Path) -> None:
    half = checkpoint_tensors(dtype="F16")
    single = {n: ("F32", v.astype("<f4")) if d == "F16" else (d, v) for n, (d, v) in half.items()}
    result = diff(
        write_safetensors(tmp_path / "a", half), write_safetensors(tmp_path / "b", single)
    )
    assert not result.same
    assert {(t.max_abs, t.relative_norm) for t in result.tensors if t.name != "empty"} == {(0, 0)}


def test_patches_are_compared_concept_by_concept(model: Path, tmp_path: Path) -> None:
    base = base_of(model)
    monet, gogh = additive(base, "Monet", seed=1), operator(base, "Van Gogh", seed=2)
    other, klimt = additive(base, "Monet", seed=3), additive(base, "Klimt", seed=4)
    a = make_patch(tmp_path / "a.sepme", base, monet, gogh)
    b = make_patch(tmp_path / "b.sepme", base, other, gogh, klimt)
    result = diff(a, b)
    assert (result.kind, result.same, result.changed) == ("patches", False, 1)
    statuses = {part.concept: part.status for part in result.increments}
    assert statuses == {"Monet": "changed", "Van Gogh": "same", "Klimt": "only in b"}
    distances = {part.concept: part.distance for part in result.increments}
    assert distances["Monet"] and distances["Monet"] > 0.5
    assert (distances["Van Gogh"], distances["Klimt"]) == (0, None)
    assert (result.only_in_a, result.only_in_b) == ((), ("Klimt",))
    assert result.interference is not None
    assert result.interference.keys() == {"Monet", "Van Gogh"}
    assert result.interference["Van Gogh"].keys() == {"Monet", "Van Gogh", "Klimt"}
    assert result.interference["Van Gogh"]["Van Gogh"] == pytest.approx(1)
    assert 0 < result.interference["Monet"]["Klimt"] < 1
    same = diff(a, a)
    assert same.same and same.changed == 0


def test_a_patch_and_a_checkpoint_in_either_order(model: Path, tmp_path: Path) -> None:
    patches = make_patches(tmp_path, model)
    apply(model, patches[:1], tmp_path / "out")
    before, after = diff(model, patches[0]), diff(patches[0], tmp_path / "out")
    assert (before.kind, before.same, before.changed) == ("checkpoint and patch", False, 14)
    assert (before.base_match, before.warnings) == ("exact", ())
    assert before.increments[0].status == "not applied"
    assert (after.same, after.changed, after.tensors) == (True, 0, ())
    assert after.increments[0].status == "applied"
    assert (after.base_match, after.warnings) == ("exact", ())
    assert not diff(tmp_path / "out", patches[1]).same


def test_what_cannot_be_compared(model: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", Shape(width=32))
    patches = make_patches(tmp_path, other)
    with pytest.raises(MismatchError):
        diff(model, patches[0])
    apply(other, patches[:1], in_place=True)
    with pytest.raises(UnsupportedError, match="undo journal"):
        diff(other, undo_path(other))

"""What others did to a checkpoint as a patch: from any layout, near enough, and said how near."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from patch_spec.container import read_patch
from patch_spec.increment import Increment
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.errors import MismatchError, RefusedError
from sepme_cli.increments import delta
from sepme_cli.operations.apply import apply
from sepme_cli.operations.extract import extract
from sepme_cli.operations.revert import revert
from sepme_cli.operations.verify import verify
from tests.layouts import cast_to, scaled, write_folder, write_layout
from tests.synthetic import (
    DTYPES,
    Shape,
    additive,
    base_of,
    checkpoint_tensors,
    lora,
    make_checkpoint,
    make_patch,
    operator,
    write_safetensors,
)

WIDE = Shape(width=128, channels=(8, 96, 128))
TO_K = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
Edit = Callable[[np.ndarray, str], np.ndarray]


def is_target(name: str) -> bool:
    return name.startswith("model.") and name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))


def write_edited(path: Path, edit: Edit, shape: Shape = WIDE, dtype: str = "F32") -> Path:
    """The model of `make_checkpoint` with W + edit(W) for keys and values."""
    tensors = checkpoint_tensors(shape, dtype)
    edited = {
        name: (kind, (values.astype(np.float64) + edit(values, name)).astype(DTYPES[kind]))
        if is_target(name)
        else (kind, values)
        for name, (kind, values) in tensors.items()
    }
    return write_safetensors(path, edited)


def weights(path: Path) -> dict[str, np.ndarray]:
    with open_checkpoint(path) as checkpoint:
        return {t.name: t.read().astype(np.float64) for t in checkpoint.targets}


def residuals(base: Path, edited: Path, patch: Path) -> dict[str, float]:
    """|B - A - dW| / |B - A| of each target that changed, by no code of the extraction."""
    (part,) = read_patch(patch).increments
    before, after = weights(base), weights(edited)
    return {
        name: float(
            np.linalg.norm(after[name] - weight - delta(part, name, weight))
            / np.linalg.norm(after[name] - weight)
        )
        for name, weight in before.items()
        if (after[name] != weight).any()
    }


def one(path: Path) -> Increment:
    (increment,) = read_patch(path).increments
    return increment


@pytest.mark.parametrize("make", [additive, operator, lora])
@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_a_patch_that_was_applied_comes_back(
    make: Callable[..., Increment], dtype: str, tmp_path: Path
) -> None:
    model = make_checkpoint(tmp_path / "m.safetensors", WIDE, dtype=dtype)
    made = make(base_of(model), "Monet", seed=1, rank=20, size=0.3)
    clean = tmp_path / "Monet.safetensors"
    apply(model, [make_patch(tmp_path / "p.sepme", base_of(model), made)], clean)
    result = extract(model, clean, tmp_path / "x.sepme")
    found = residuals(model, clean, tmp_path / "x.sepme")
    assert (result.kind, result.rank, result.concept) == (made.kind, 20, "Monet")
    assert max(found.values()) < (1e-3 if dtype == "F32" else 0.01)
    assert {r.name: r.residual for r in result.residuals} == pytest.approx(found, rel=1e-6)
    assert result.residuals[0].residual == max(found.values())
    assert "patched by sepme" in result.warnings[0]
    assert result.left_out == ()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("single file", "folder"),
        ("shards", "UNet in LDM names"),
        ("UNet in diffusers names", "ckpt"),
        ("variants", "with EMA"),
        ("single file", "fp8"),
    ],
)
def test_the_two_may_come_in_any_layout(before: str, after: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    base = write_layout(before, tmp_path / "a", dtype="F32")
    other = write_layout(after, tmp_path / "b", dtype="F16")
    made = additive(base_of(base), "Monet", seed=1, rank=2, size=0.5)
    patch = make_patch(tmp_path / "p.sepme", base_of(base), made)
    edited = tmp_path / ("clean" if other.is_dir() else "clean.safetensors")
    apply(other, [patch], edited)
    result = extract(base, edited, tmp_path / "x.sepme", error=0.2)
    assert (result.kind, result.rank) == ("additive", 2)
    assert result.relative_error < (0.1 if after == "fp8" else 0.01)
    assert not any("other tensors of the unet differ" in warning for warning in result.warnings)


def test_what_it_makes_is_a_patch_like_any_other(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m.safetensors", WIDE, dtype="F32")
    rng = np.random.default_rng(0)
    operation = rng.standard_normal((128, 2)) @ rng.standard_normal((2, 128)) * 0.01
    edited = write_edited(tmp_path / "edited.safetensors", lambda w, _: w @ operation)
    patch, clean, back = (tmp_path / n for n in ("x.sepme", "c.safetensors", "b.safetensors"))
    result = extract(model, edited, patch, concept="Van Gogh", kind="style")
    assert (result.kind, result.rank, result.slug) == ("operator", 2, "van-gogh")
    assert result.bytes < 8000
    apply(model, [patch], clean)
    assert (
        max(
            np.abs(a - b).max()
            for a, b in zip(weights(clean).values(), weights(edited).values(), strict=True)
        )
        < 1e-4
    )
    assert verify([clean, patch], base=model).ok
    revert(clean, base=model, output=back)
    assert back.read_bytes() == model.read_bytes()
    manifest = read_patch(patch)
    assert manifest.separable_from == ()
    assert manifest.increments[0].method.name == "extraction"
    assert manifest.increments[0].prompts[0] == "Van Gogh"
    assert any("not made to be separable" in warning for warning in result.warnings)
    # A fine-tune with the same text encoder takes an operator, too.
    cousin = make_checkpoint(tmp_path / "cousin.safetensors", WIDE, dtype="F32", seed=3)
    apply(cousin, [patch], tmp_path / "other.safetensors")


def test_a_change_of_every_direction_needs_a_rank_or_a_larger_error(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m.safetensors", WIDE, dtype="F32")
    noise = np.random.default_rng(0)
    edited = write_edited(
        tmp_path / "e.safetensors", lambda w, _: noise.standard_normal(w.shape) * 0.01
    )
    patch = tmp_path / "x.sepme"
    with pytest.raises(RefusedError, match="--error") as caught:
        extract(model, edited, patch)
    assert not patch.exists()
    assert float(str(caught.value.found)) > 0.05
    result = extract(model, edited, patch, rank=40)
    found = residuals(model, edited, patch)
    before, after = weights(model), weights(edited)
    for name, weight in before.items():
        values = np.linalg.svd(after[name] - weight, compute_uv=False)
        best = np.linalg.norm(values[40:]) / np.linalg.norm(values)
        assert found[name] == pytest.approx(best, rel=1e-3)
    assert (result.kind, result.rank) == ("lora", 40)


def test_the_least_rank_within_the_error(tmp_path: Path) -> None:
    """Two strong directions and three weak ones in all targets: the error tells which count."""
    model = make_checkpoint(tmp_path / "m.safetensors", WIDE, dtype="F32")
    rng = np.random.default_rng(0)
    rows = np.linalg.qr(rng.standard_normal((128, 5)))[0].T
    sizes = np.array([1, 1, 0.02, 0.02, 0.02]) * 0.1
    edited = write_edited(
        tmp_path / "e.safetensors",
        lambda w, _: np.linalg.qr(rng.standard_normal((len(w), 5)))[0] * sizes @ rows,
    )
    ranks = {
        error: extract(model, edited, tmp_path / "x.sepme", error=error, force=True).rank
        for error in (0.05, 0.005)
    }
    assert ranks == {0.05: 2, 0.005: 5}


def test_rounding_to_bf16_is_no_edit(tmp_path: Path) -> None:
    """The edit is 1% of the weights and rounding some 20% of that, which no rank can follow."""
    model = make_checkpoint(tmp_path / "m.safetensors", WIDE, dtype="BF16")
    rows = np.linalg.qr(np.random.default_rng(0).standard_normal((128, 2)))[0].T
    edited = write_edited(
        tmp_path / "e.safetensors",
        lambda w, _: np.ones((len(w), 2)) * 0.004 @ rows,
        dtype="BF16",
    )
    result = extract(model, edited, tmp_path / "x.sepme")
    assert result.rank <= 2
    assert 0.05 < result.relative_error < 1


def test_only_what_changed_is_in_it(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m.safetensors", WIDE, dtype="F32")
    edited = write_edited(
        tmp_path / "e.safetensors",
        lambda w, name: np.ones_like(w) * 0.1 * ("middle_block" in name and "to_k" in name),
    )
    result = extract(model, edited, tmp_path / "x.sepme")
    assert result.targets == 1
    assert one(tmp_path / "x.sepme").up.keys() == {TO_K}


def test_what_else_differs_is_said(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m.safetensors", WIDE)
    tensors = checkpoint_tensors(WIDE)
    changed = {
        "model.diffusion_model.out.2.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q.weight",
        "first_stage_model.decoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
        *(name for name in tensors if is_target(name)),
    }
    edited = {
        name: (kind, values * DTYPES[kind].type(1.5) if name in changed else values)
        for name, (kind, values) in tensors.items()
    }
    path = write_safetensors(tmp_path / "e.safetensors", edited)
    result = extract(model, path, tmp_path / "x.sepme", rank=3, text_layers_only=True)
    assert {part.what: part.count for part in result.left_out} == {
        "text encoder clip_l": 1,
        "unet, other tensors": 2,
        "vae, other tensors": 1,
    }
    assert len(result.warnings) == 4


def test_what_cannot_be_extracted(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m.safetensors", WIDE)
    base = base_of(model)
    clean = tmp_path / "clean.safetensors"
    apply(model, [make_patch(tmp_path / "p.sepme", base, additive(base, "Monet", seed=1))], clean)
    with pytest.raises(RefusedError, match="nothing to extract"):
        extract(model, model, tmp_path / "x.sepme")
    with pytest.raises(RefusedError, match="patched already"):
        extract(clean, model, tmp_path / "x.sepme")
    for shape in (Shape(family="sd2", width=128, channels=(8, 96, 128)), Shape(width=128)):
        other = make_checkpoint(tmp_path / "o.safetensors", shape)
        with pytest.raises(MismatchError):
            extract(model, other, tmp_path / "x.sepme")
    assert not (tmp_path / "x.sepme").exists()


@pytest.mark.parametrize("swapped", [False, True], ids=["from fp32", "to fp32"])
@pytest.mark.parametrize(
    "cast", ["F16", "BF16", "F64", "F8_E4M3", "F8_E5M2", "scaled", "some", "folder", "UNet"]
)
def test_the_same_model_in_another_dtype_is_no_edit(
    cast: str, swapped: bool, tmp_path: Path
) -> None:
    tensors = checkpoint_tensors(dtype="F32")
    model = write_safetensors(tmp_path / "m.safetensors", tensors)
    other = tmp_path / "other.safetensors"
    if cast == "scaled":
        write_safetensors(other, scaled(tensors))
    elif cast == "some":
        half = cast_to({n: v for n, v in tensors.items() if "middle_block" in n}, "F16")
        write_safetensors(other, tensors | half)
    elif cast in ("folder", "UNet"):
        other = write_folder(tmp_path / "other", tensors, variants={"": "F16"})
        other = other / "unet" if cast == "UNet" else other
    else:
        write_safetensors(other, cast_to(tensors, cast))
    base, edited = (other, model) if swapped else (model, other)
    with pytest.raises(RefusedError, match=r"in another dtype.*nothing to extract") as caught:
        extract(base, edited, tmp_path / "x.sepme", rank=2)
    assert caught.value.expected and "the same in" in str(caught.value.found)
    assert not (tmp_path / "x.sepme").exists()


def test_an_edit_that_was_cast_afterwards_is_one(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m.safetensors", WIDE, dtype="F32")
    rows = np.linalg.qr(np.random.default_rng(0).standard_normal((128, 2)))[0].T
    edited = write_edited(
        tmp_path / "e.safetensors", lambda w, _: np.ones((len(w), 2)) * 0.1 @ rows, dtype="F16"
    )
    assert extract(model, edited, tmp_path / "x.sepme").rank <= 2

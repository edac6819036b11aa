"""Putting concepts back: exactly where that can be, and honestly where it cannot."""

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sepme_cli.checkpoints.journals.undo import undo_path
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.checkpoints.reading.patches import kept_folder
from sepme_cli.errors import MalformedError, MismatchError, RefusedError, UsageError
from sepme_cli.operations.apply import apply
from sepme_cli.operations.revert import revert
from tests.synthetic import (
    DTYPES,
    additive,
    base_of,
    checkpoint_tensors,
    make_checkpoint,
    make_patch,
    make_patches,
    operator,
    raw_tensors,
    write_safetensors,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    metadata = {"title": "m", "modelspec.hash_sha256": "kept when nothing is in it"}
    return make_checkpoint(tmp_path / "model.safetensors", metadata=metadata, ema="F32", pad=1)


@pytest.fixture
def patches(tmp_path: Path, model: Path) -> list[Path]:
    return make_patches(tmp_path, model)


@pytest.fixture
def clean(model: Path, patches: list[Path]) -> Path:
    """Monet, Van Gogh and Klimt taken out."""
    apply(model, patches[:3], output := model.with_name("clean.safetensors"))
    return output


def test_everything_out_is_the_base_byte_for_byte(
    model: Path, patches: list[Path], clean: Path
) -> None:
    back = model.with_name("back")
    result = revert(clean, patches[:3], base=model, output=back)
    assert back.read_bytes() == model.read_bytes()
    assert (result.exact, result.max_abs_error, result.remaining) == (True, 0.0, ())
    assert sorted(result.restored) == ["Klimt", "Monet", "Van Gogh"]
    assert (result.output, result.family, result.warnings) == (str(back), "sd1", ())
    stream = io.BytesIO()
    assert revert(clean, base=model, output=stream).output == "-"
    assert stream.getvalue() == model.read_bytes()


@pytest.mark.parametrize("dtype", ["F16", "F32", "BF16"])
def test_one_out_is_as_if_never_in(tmp_path: Path, dtype: str) -> None:
    model = make_checkpoint(tmp_path / "model.safetensors", dtype=dtype, ema="F32")
    patches = make_patches(tmp_path, model)
    apply(model, patches[:3], clean := tmp_path / "clean")
    for i, patch in enumerate(patches[:3]):
        staying = [other for other in patches[:3] if other != patch]
        apply(model, staying, expected := tmp_path / f"expected{i}")
        concept = ["Monet", "Van Gogh", "Klimt"][i]
        back = tmp_path / f"back{i}"
        result = revert(clean, staying, concepts=[concept], base=model, output=back, exact=True)
        assert back.read_bytes() == expected.read_bytes()
        assert (result.exact, result.restored) == (True, (concept,))


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.data(), st.sampled_from(["F16", "F32", "BF16"]), st.booleans(), st.sampled_from([8, 2**16])
)
def test_any_history_in_place_ends_as_if_made_at_once(
    tmp_path: Path, data: Any, dtype: str, ema: bool, pad: int
) -> None:
    """Whatever was put in and taken out in whatever order, only what is in there counts.

    With a header padded that much the first patch fits in place, too.
    """
    folder = tmp_path / "history"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    model = make_checkpoint(
        folder / "m.safetensors", dtype=dtype, ema="F16" if ema else None, pad=pad
    )
    patches = dict(
        zip("abcd", make_patches(folder, model, ("one", "two", "three", "four")), strict=True)
    )
    shutil.copy(model, work := folder / "work.safetensors")
    inside: set[str] = set()
    for key in data.draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=6)):
        if key in inside:
            assert revert(work, [patches[key]], in_place=True, exact=True).exact
        else:
            assert apply(work, [patches[key]], in_place=True).exact
        inside ^= {key}
        assert undo_path(work).exists() == kept_folder(work).exists() == bool(inside)
    expected = model
    if inside:
        apply(model, [patches[key] for key in inside], expected := folder / "expected")
    assert work.read_bytes() == expected.read_bytes()


def test_concepts_by_name_and_slug_and_part_of_a_patch(model: Path, tmp_path: Path) -> None:
    base = base_of(model)
    parts = [additive(base, c, seed=i) for i, c in enumerate(("Claude Monet", "Van Gogh", "cat"))]
    patch = make_patch(tmp_path / "all.sepme", base, *parts)
    apply(model, [patch], clean := tmp_path / "clean")
    apply(model, [patch], expected := tmp_path / "expected", only=["cat"])
    result = revert(
        clean, [patch], concepts=["claude MONET", "van-gogh"], base=model, output=tmp_path / "back"
    )
    assert (result.remaining, result.exact) == (("cat",), True)
    assert (tmp_path / "back").read_bytes() == expected.read_bytes()
    # Of a patch that is in only partly, what is in comes out.
    result = revert(expected, [patch], base=model, output=tmp_path / "none")
    assert result.restored == ("cat",)
    assert (tmp_path / "none").read_bytes() == model.read_bytes()


def test_scales_are_remembered(model: Path, patches: list[Path], tmp_path: Path) -> None:
    apply(model, patches[:1], half := tmp_path / "half", scale=0.25)
    apply(half, patches[:2], both := tmp_path / "both", base=model, scale=1.0)
    result = revert(both, patches[:2], concepts=["Van Gogh"], base=model, output=tmp_path / "back")
    assert result.exact
    assert (tmp_path / "back").read_bytes() == half.read_bytes()


def test_a_journal_serves_for_a_copy_elsewhere(
    model: Path, patches: list[Path], tmp_path: Path
) -> None:
    original = model.read_bytes()
    apply(model, patches[:2], in_place=True)
    moved = tmp_path / "elsewhere"
    shutil.copy(model, moved)
    journal = undo_path(model)
    result = revert(moved, undo=journal, output=tmp_path / "back")
    assert result.exact and (tmp_path / "back").read_bytes() == original
    with pytest.raises(RefusedError, match="the base or the patches of"):
        revert(moved, output=tmp_path / "again")


def test_a_journal_of_another_file_is_left_alone(
    model: Path, patches: list[Path], clean: Path, tmp_path: Path
) -> None:
    other = make_checkpoint(tmp_path / "other.safetensors", seed=5)
    apply(other, make_patches(tmp_path, other)[:1], in_place=True)
    shutil.copy(undo_path(other), undo_path(clean))
    journal = undo_path(clean).read_bytes()
    result = revert(clean, patches[:3], output=tmp_path / "back")
    assert not result.exact and any("no use" in warning for warning in result.warnings)
    with pytest.raises(MismatchError):
        revert(clean, patches[:3], undo=undo_path(other), output=tmp_path / "x")
    revert(clean, patches[:3], base=model, in_place=True)
    assert clean.read_bytes() == model.read_bytes()
    assert undo_path(clean).read_bytes() == journal


def test_a_broken_journal_is_no_use(model: Path, patches: list[Path], tmp_path: Path) -> None:
    apply(model, patches[:1], in_place=True)
    journal = undo_path(model)
    journal.write_bytes(journal.read_bytes()[:-100])
    with pytest.raises(MalformedError):
        revert(model, undo=journal, output=tmp_path / "back")
    result = revert(model, output=tmp_path / "back")
    assert not result.exact, "the kept patch still allows to subtract"


def test_weights_changed_in_a_journal_are_noticed(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m.safetensors")
    apply(model, make_patches(tmp_path, model)[:1], in_place=True)
    journal = undo_path(model)
    data = bytearray(journal.read_bytes())
    data[-1] ^= 1
    journal.write_bytes(data)
    with pytest.raises(MismatchError, match="not the base"):
        revert(model, undo=journal, output=tmp_path / "back")


@pytest.mark.parametrize("dtype", ["F16", "F32", "BF16"])
def test_without_the_base_it_subtracts_and_says_how_far_off(tmp_path: Path, dtype: str) -> None:
    model = make_checkpoint(tmp_path / "m.safetensors", dtype=dtype)
    base = base_of(model)
    parts = [
        additive(base, "Monet", seed=1, size=0.3),
        operator(base, "Klimt", seed=2),
        additive(base, "Manet", seed=3, size=0.3),
    ]
    paths = [make_patch(tmp_path / f"{p.slug}.sepme", base, p) for p in parts]
    apply(model, paths, clean := tmp_path / "clean")
    back = tmp_path / "back"
    with pytest.raises(RefusedError, match="--base"):
        revert(clean, paths[:2], output=back, exact=True)
    assert not back.exists()
    result = revert(clean, paths, concepts=["Monet", "Klimt"], output=back)
    assert not result.exact and "not exact" in result.warnings[0]
    apply(model, paths[2:], expected := tmp_path / "expected")
    off = largest_difference(back, expected)
    assert result.max_abs_error is not None
    assert 0 < off <= result.max_abs_error < 0.1
    # An additive increment's own error is bounded whatever else is in there.
    alone = revert(clean, paths[:1], output=back, force=True)
    assert alone.max_abs_error is not None and alone.remaining != ()
    # With an unknown increment in there, an operator's share cannot be told.
    assert revert(clean, paths[1:2], output=back, force=True).max_abs_error is None
    with open_checkpoint(back) as checkpoint:
        assert checkpoint.stack is not None
        assert {entry.concept for entry in checkpoint.stack.entries} == {"Monet", "Manet"}


def largest_difference(a: Path, b: Path) -> float:
    first, second = raw_tensors(a), raw_tensors(b)
    assert first.keys() == second.keys()
    largest = 0.0
    for name, (dtype, data) in first.items():
        if data != second[name][1]:
            values = [np.frombuffer(d, DTYPES[dtype]) for d in (data, second[name][1])]
            apart = values[0].astype(np.float64) - values[1].astype(np.float64)
            largest = max(largest, float(np.abs(apart).max()))
    return largest


def test_missing_patches_of_what_stays_are_named(
    model: Path, patches: list[Path], clean: Path, tmp_path: Path
) -> None:
    result = revert(clean, patches[:1], base=model, output=tmp_path / "back")
    assert not result.exact
    assert "Klimt" in result.warnings[0] and "Van Gogh" in result.warnings[0]
    with pytest.raises(RefusedError, match="Van Gogh"):
        revert(clean, patches[:1], base=model, output=tmp_path / "x", exact=True)
    assert not (tmp_path / "x").exists()


def test_a_base_alone_does_not_say_what_stays(
    model: Path, patches: list[Path], clean: Path, tmp_path: Path
) -> None:
    with pytest.raises(RefusedError, match="what stays in are needed") as caught:
        revert(clean, concepts=["Monet"], base=model, output=tmp_path / "out")
    assert (caught.value.expected, caught.value.found) == (
        "the patches of what stays in",
        "no patch",
    )
    with pytest.raises(RefusedError, match="Klimt") as caught:
        given = patches[1:2]
        revert(clean, given, concepts=["Monet"], base=model, output=tmp_path / "out")
    assert caught.value.found == str(patches[1])
    assert not (tmp_path / "out").exists()


def test_no_phantom_reverts(model: Path, patches: list[Path], clean: Path, tmp_path: Path) -> None:
    out = tmp_path / "x"
    before = clean.read_bytes()
    with pytest.raises(RefusedError, match="not patched"):
        revert(model, patches[:1], output=out)
    with pytest.raises(RefusedError, match="Rembrandt") as caught:
        revert(clean, concepts=["Monet", "Rembrandt"], base=model, output=out)
    assert all(name in (caught.value.expected or "") for name in ("Klimt", "Monet", "Van Gogh"))
    with pytest.raises(RefusedError, match="castle"):
        revert(clean, [patches[0], patches[3]], base=model, in_place=True)
    with pytest.raises(UsageError):
        revert(clean, base=model, undo=model, output=out)
    with pytest.raises(UsageError):
        revert(clean, base=model)
    assert not out.exists() and clean.read_bytes() == before


def test_another_base_is_refused(clean: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other.safetensors", seed=5)
    for base in (other, clean):
        with pytest.raises(MismatchError) as caught:
            revert(clean, base=base, output=tmp_path / "x")
        assert caught.value.file == str(base)
    assert not (tmp_path / "x").exists()


def test_a_base_without_ema_cannot_give_the_twins_back(clean: Path, tmp_path: Path) -> None:
    pruned = write_safetensors(
        tmp_path / "pruned.safetensors",
        {n: v for n, v in checkpoint_tensors(ema="F32").items() if not n.startswith("model_ema")},
    )
    with pytest.raises(MismatchError, match="EMA"):
        revert(clean, base=pruned, output=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_else_was_changed_since_stays_changed(
    model: Path, patches: list[Path], tmp_path: Path
) -> None:
    """The VAE of the checkpoint at hand stays, only the targets come from the base."""
    apply(model, patches[:1], clean := tmp_path / "clean")
    tensors = {
        name: (dtype, np.frombuffer(data, "u1"))
        for name, (dtype, data) in raw_tensors(clean).items()
    }
    vae = "first_stage_model.decoder.conv_in.weight"
    data = bytearray(clean.read_bytes())
    at = data.index(tensors[vae][1].tobytes())
    data[at] ^= 1
    clean.write_bytes(data)
    result = revert(clean, base=model, output=tmp_path / "back")
    before, after = raw_tensors(model), raw_tensors(tmp_path / "back")
    assert {name for name in before if before[name] != after[name]} == {vae}
    assert result.exact


def test_a_base_in_another_dtype(tmp_path: Path) -> None:
    half = checkpoint_tensors(dtype="F16")
    single = {n: ("F32", v.astype("<f4")) if d == "F16" else (d, v) for n, (d, v) in half.items()}
    model = write_safetensors(tmp_path / "half", half)
    wide = write_safetensors(tmp_path / "single", single)
    patches = make_patches(tmp_path, model)
    apply(model, patches[:2], clean := tmp_path / "clean")
    # Nothing stays in: the narrower copy is the wider one rounded, as the fingerprints say.
    result = revert(clean, base=wide, output=tmp_path / "back")
    assert result.exact and raw_tensors(tmp_path / "back") == raw_tensors(model)
    # Something does: whether the weights were rounded before cannot be told.
    result = revert(
        clean, patches[:2], concepts=["Monet"], base=wide, output=tmp_path / "back", force=True
    )
    assert not result.exact and "dtype" in result.warnings[0]
    assert result.max_abs_error is not None and result.max_abs_error > 0
    apply(model, patches[1:2], expected := tmp_path / "expected")
    assert largest_difference(tmp_path / "back", expected) <= result.max_abs_error
    # A wider checkpoint than its base may have held more than the base can give.
    apply(wide, patches[:1], clean, force=True)
    assert not revert(clean, base=model, output=tmp_path / "back", force=True).exact

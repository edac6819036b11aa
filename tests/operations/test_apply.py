"""Applying patches: what changes, what does not, and what is refused."""

import io
import os
import resource
import shutil
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from patch_spec.container import read_patch
from sepme_cli.checkpoints.journals.undo import undo_path
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.checkpoints.reading.patches import kept_folder
from sepme_cli.checkpoints.structure.layout import ema_twin
from sepme_cli.checkpoints.writing import writer
from sepme_cli.errors import (
    MalformedError,
    MismatchError,
    RefusedError,
    SepmeError,
    SystemFailure,
    UnsupportedError,
    UsageError,
)
from sepme_cli.increments import compose
from sepme_cli.operations.apply import apply
from tests.synthetic import (
    DTYPES,
    SMALL,
    Shape,
    additive,
    base_of,
    checkpoint_tensors,
    make_checkpoint,
    make_patch,
    make_patches,
    operator,
    raw_tensors,
    read_raw,
    write_safetensors,
)

METADATA = {"title": "é \U0001f600", "modelspec.hash_sha256": "stale", "modelspec.title": "m"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model.safetensors", metadata=METADATA)


@pytest.fixture
def patches(tmp_path: Path, model: Path) -> list[Path]:
    return make_patches(tmp_path, model)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("shape", [SMALL, Shape("sdxl", 32, 3, depth=2), Shape("sd2", 32, 3)])
@pytest.mark.parametrize(("dtype", "ema"), [("F16", "F32"), ("F32", None), ("BF16", "F16")])
def test_untouched_means_untouched(
    tmp_path: Path, shape: Shape, dtype: str, ema: str | None
) -> None:
    """Every byte of every tensor that is no target, in the same order and dtype."""
    model = make_checkpoint(
        tmp_path / "m.safetensors", shape, dtype=dtype, ema=ema, metadata=METADATA
    )
    original = model.read_bytes()
    patches = make_patches(tmp_path, model)
    result = apply(model, patches, tmp_path / "out.safetensors")
    assert model.read_bytes() == original
    before, after = raw_tensors(model), raw_tensors(tmp_path / "out.safetensors")
    assert list(before) == list(after)
    changed = {name for name in before if before[name] != after[name]}
    with open_checkpoint(model) as checkpoint:
        targets = {copy.name for target in checkpoint.targets for copy in target.copies}
    assert changed == targets
    assert all(before[name][0] == after[name][0] for name in before)
    assert result.tensors_changed == len(targets) > 0
    header, _ = read_raw(tmp_path / "out.safetensors")
    expected = {k: v for k, v in METADATA.items() if k != "modelspec.hash_sha256"}
    assert header["__metadata__"].keys() == {*expected, "sepme"}
    assert expected.items() <= header["__metadata__"].items()


def test_each_copy_is_composed_from_its_own_values(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m.safetensors", ema="F32")
    patches = make_patches(tmp_path, model)
    apply(model, patches, tmp_path / "out.safetensors", scale=0.5)
    stack = [(read_patch(path).increments[0], 0.5) for path in patches]
    before, after = checkpoint_tensors(ema="F32"), raw_tensors(tmp_path / "out.safetensors")
    with open_checkpoint(model) as checkpoint:
        for target in checkpoint.targets:
            name = target.copies[0].name
            for copy in (name, ema_twin(name)):
                expected = compose(before[copy][1], stack, target.name)
                assert after[copy][1] == expected.tobytes(), copy


def test_the_result_is_what_safetensors_reads(model: Path, patches: list[Path]) -> None:
    from safetensors.numpy import load_file

    output = model.with_name("out.safetensors")
    apply(model, patches, output)
    before, after = load_file(model), load_file(output)
    with open_checkpoint(model) as checkpoint:
        targets = {target.copies[0].name: target.name for target in checkpoint.targets}
    stack = [(read_patch(path).increments[0], 1.0) for path in patches]
    assert before.keys() == after.keys() > targets.keys()
    for name, original in before.items():
        expected = compose(original, stack, targets[name]) if name in targets else original
        assert after[name].dtype == original.dtype, name
        np.testing.assert_array_equal(after[name], expected, name)


def test_results_say_what_was_done(model: Path, patches: list[Path]) -> None:
    output = model.with_name("out.safetensors")
    result = apply(model, patches[:2], output, scale=0.5)
    assert (result.output, result.family) == (str(output), "sd1")
    assert (result.concepts, result.base_match) == (("Monet", "Van Gogh"), "exact")
    assert result.exact and not result.checked and result.warnings == () and result.seconds > 0
    with open_checkpoint(output) as checkpoint:
        record = checkpoint.stack
        assert record is not None
        assert {entry.concept: entry.scale for entry in record.entries} == {
            "Monet": 0.5,
            "Van Gogh": 0.5,
        }
        assert record.base == base_of(model).digest
        assert len(record.patches) == 2
        assert sorted(result.applied) == ["Monet", "Van Gogh"]


def test_all_orders_give_one_file(model: Path, patches: list[Path]) -> None:
    found = set()
    for i, order in enumerate(permutations(patches)):
        apply(model, order, output := model.with_name(f"{i}.safetensors"))
        found.add(output.read_bytes())
    work = model.with_name("work.safetensors")
    for order in (patches, patches[::-1]):
        shutil.copy(model, work)
        for patch in order:
            assert apply(work, [patch], in_place=True).exact
        found.add(work.read_bytes())
    for order in (patches, patches[::-1]):
        current = model
        for i, _ in enumerate(order):
            step = model.with_name(f"step{i}.safetensors")
            apply(current, order[: i + 1], step, base=model, force=True)
            current = step
        found.add(current.read_bytes())
    assert len(found) == 1


def test_fp32_and_fp16_copies_are_one_model(tmp_path: Path) -> None:
    half = checkpoint_tensors(dtype="F16")
    single = {n: ("F32", v.astype("<f4")) if d == "F16" else (d, v) for n, (d, v) in half.items()}
    a = write_safetensors(tmp_path / "a.safetensors", half)
    b = write_safetensors(tmp_path / "b.safetensors", single)
    patches = make_patches(tmp_path, a)
    assert apply(a, patches, tmp_path / "a.out").base_match == "exact"
    result = apply(b, patches, tmp_path / "b.out")
    assert (result.base_match, result.warnings) == ("same-values", ())
    narrowed = apply(b, patches, tmp_path / "c.out", dtype="fp16")
    assert narrowed.output is not None
    a_out, c_out = raw_tensors(tmp_path / "a.out"), raw_tensors(tmp_path / "c.out")
    assert {n: v for n, v in a_out.items() if "attn2" in n} == {
        n: v for n, v in c_out.items() if "attn2" in n
    }


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_dtypes_change_only_when_asked(tmp_path: Path, dtype: str) -> None:
    tensors = checkpoint_tensors(dtype="F32", ema="F16")
    model = write_safetensors(tmp_path / "m.safetensors", tensors)
    [patch, *_] = make_patches(tmp_path, model)
    apply(model, [patch], tmp_path / "out", dtype=dtype)
    wanted = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}[dtype]
    after = raw_tensors(tmp_path / "out")
    assert list(after) == list(tensors)
    part = read_patch(patch).increments[0]
    with open_checkpoint(model) as checkpoint:
        targets = {c.name: t.name for t in checkpoint.targets for c in t.copies}
    for name, (stored, values) in tensors.items():
        if stored not in ("F32", "F16"):
            assert after[name] == (stored, values.tobytes())
        elif name in targets:
            expected = compose(values, [(part, 1.0)], targets[name], DTYPES[wanted])
            assert after[name] == (wanted, expected.tobytes())
        else:
            assert after[name] == (wanted, values.astype(DTYPES[wanted]).tobytes())


def test_a_value_that_the_dtype_cannot_hold_is_named(tmp_path: Path) -> None:
    tensors = checkpoint_tensors(dtype="F32")
    tensors["first_stage_model.decoder.conv_in.weight"][1][0, 0, 0, 0] = 1e6
    model = write_safetensors(tmp_path / "m.safetensors", tensors)
    [patch, *_] = make_patches(tmp_path, model)
    with pytest.raises(MalformedError, match=r"first_stage_model\.decoder"):
        apply(model, [patch], tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()
    apply(model, [patch], tmp_path / "out", dtype="bf16")


def test_only_takes_concepts_and_slugs(model: Path, tmp_path: Path) -> None:
    base = base_of(model)
    parts = [additive(base, c, seed=i) for i, c in enumerate(("Claude Monet", "Van Gogh", "cat"))]
    patch = make_patch(tmp_path / "all.sepme", base, *parts)
    out = tmp_path / "out"
    assert apply(model, [patch], out, only=["claude monet"]).concepts == ("Claude Monet",)
    only = apply(model, [patch], out, only=["van-gogh", "cat"], force=True)
    assert set(only.concepts) == {"Van Gogh", "cat"}
    with pytest.raises(RefusedError, match="Klimt") as caught:
        apply(model, [patch], out, only=["cat", "Klimt"], force=True)
    assert "Claude Monet" in (caught.value.expected or "")


def test_a_patch_may_come_through_a_pipe_and_the_result_go_through_one(
    model: Path, patches: list[Path]
) -> None:
    apply(model, patches, model.with_name("out.safetensors"))
    stream = io.BytesIO()
    [first, *others] = patches
    result = apply(model, [io.BytesIO(first.read_bytes()), *others], stream)
    assert result.output == "-"
    assert stream.getvalue() == model.with_name("out.safetensors").read_bytes()

    class Reluctant(io.RawIOBase):
        """Takes a few bytes at a time, as a raw pipe may."""

        def __init__(self) -> None:
            self.taken = bytearray()

        def write(self, data: bytes) -> int:  # type: ignore[override]
            self.taken += data[:1000]
            return min(len(data), 1000)

    slow = Reluctant()
    apply(model, patches, slow)  # type: ignore[arg-type]
    assert bytes(slow.taken) == stream.getvalue()
    read, write = os.pipe()
    os.close(read)
    with pytest.raises(SystemFailure, match="ended"), os.fdopen(write, "wb", buffering=0) as pipe:
        apply(model, patches, pipe)


def test_a_check_writes_nothing_and_says_the_same(model: Path, patches: list[Path]) -> None:
    output = model.with_name("out.safetensors")
    before = files(model.parent)
    checked = apply(model, patches, output, check=True)
    nowhere = apply(model, patches, check=True)
    in_place = apply(model, patches, in_place=True, check=True)
    assert files(model.parent) == before
    done = apply(model, patches, output)
    for field in ("family", "concepts", "tensors_changed", "base_match", "exact", "applied"):
        assert (
            getattr(checked, field)
            == getattr(done, field)
            == getattr(nowhere, field)
            == getattr(in_place, field)
        )
    assert checked.checked and not done.checked
    assert (checked.output, nowhere.output, in_place.output) == (str(output), None, str(model))


def test_a_check_finds_what_writing_would(tmp_path: Path, model: Path) -> None:
    base = base_of(model)
    huge = make_patch(tmp_path / "huge.sepme", base, additive(base, "h", seed=1, size=5e4))
    for check in (True, False):
        for in_place in (True, False):
            output = None if in_place else tmp_path / "out"
            before = files(tmp_path)
            with pytest.raises(MalformedError, match="attn2"):
                apply(model, [huge], output, in_place=in_place, scale=100.0, check=check)
            assert files(tmp_path) == before


def test_applying_twice_changes_nothing(model: Path, patches: list[Path]) -> None:
    output = model.with_name("out.safetensors")
    apply(model, patches[:2], output)
    before = files(model.parent)
    for arguments in ({"in_place": True}, {"output": model.with_name("again")}):
        for base in (None, model):
            with pytest.raises(RefusedError, match="Monet") as caught:
                apply(output, [patches[0]], base=base, **arguments)  # type: ignore[arg-type]
            assert caught.value.found == "Monet"
    with pytest.raises(RefusedError, match="Monet"):
        apply(output, [patches[0], patches[2]], in_place=True)
    assert files(model.parent) == before


@pytest.mark.parametrize("dtype", ["F16", "F32", "BF16"])
def test_increments_that_change_no_weight_are_told(tmp_path: Path, dtype: str) -> None:
    model = make_checkpoint(tmp_path / "m.safetensors", dtype=dtype)
    patches = make_patches(tmp_path, model)
    result = apply(model, patches, tmp_path / "out", scale=1e-15)
    assert raw_tensors(tmp_path / "out") == raw_tensors(model)
    assert any("no weight changes" in warning for warning in result.warnings)
    assert apply(model, patches, scale=1e-15, check=True).warnings == result.warnings
    assert apply(model, patches, tmp_path / "out", scale=0.01, force=True).warnings == ()


def test_where_nothing_matches_nothing_is_written(model: Path, tmp_path: Path) -> None:
    """No cross-attention at all; none of the patch's; a concept that is not in the patch."""
    base = base_of(model)
    patch = make_patch(tmp_path / "p.sepme", base, additive(base, "c", seed=1))
    without = {name: v for name, v in checkpoint_tensors().items() if ".attn2.to_" not in name}
    bare = write_safetensors(tmp_path / "bare.safetensors", without)
    elsewhere = make_checkpoint(
        tmp_path / "else.safetensors", Shape(channels=(24,), attention=(False,))
    )
    upper = {name: shape for name, shape in base.shapes.items() if not name.startswith("mid")}
    targets = {name: base.targets[name] for name in upper}
    other = type(base)("sd1", base.width, base.text_encoders, targets, upper)
    disjoint = make_patch(tmp_path / "d.sepme", other, additive(other, "c", seed=1))
    cases: list[tuple[type[SepmeError], Path, Path, list[str]]] = [
        (UnsupportedError, bare, patch, []),
        (MismatchError, elsewhere, disjoint, []),
        (RefusedError, model, patch, ["nobody"]),
    ]
    before = files(tmp_path)
    for error, checkpoint, applied, only in cases:
        for arguments in ({"output": tmp_path / "out"}, {"in_place": True}, {"check": True}):
            with pytest.raises(error):
                apply(checkpoint, [applied], only=only, **arguments)  # type: ignore[arg-type]
    assert files(tmp_path) == before


def test_a_twin_is_never_left_behind(tmp_path: Path) -> None:
    """Of every target, in whatever dtypes; and in place, and back."""
    model = make_checkpoint(tmp_path / "m.safetensors", dtype="F16", ema="F32")
    patches = make_patches(tmp_path, model)
    before = raw_tensors(model)
    targets = [name for name in before if name.endswith((".attn2.to_k.weight", "to_v.weight"))]
    targets = [name for name in targets if ".attn2." in name]
    apply(model, patches, in_place=True)
    after = raw_tensors(model)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {*targets, *map(ema_twin, targets)} and len(changed) == 28


def test_adding_without_the_base_is_said_to_be_inexact(model: Path, patches: list[Path]) -> None:
    first, second = model.with_name("1.safetensors"), model.with_name("2.safetensors")
    apply(model, patches[:1], first)
    result = apply(first, patches[1:2], second)
    assert not result.exact and "--base" in result.warnings[0]
    # With the base but not the patch of what is in there, the warning names it.
    result = apply(first, patches[1:2], second, base=model, force=True)
    assert not result.exact and "Monet" in result.warnings[0]
    with open_checkpoint(second) as checkpoint:
        assert checkpoint.stack is not None and len(checkpoint.stack.entries) == 2
    apply(model, patches[:2], first, force=True)
    ours = np.frombuffer(read_raw(first)[1], "u1")
    other = np.frombuffer(read_raw(second)[1], "u1")
    assert 0 < (ours != other).mean() < 0.2


def test_a_base_that_is_another_is_refused(
    model: Path, patches: list[Path], tmp_path: Path
) -> None:
    output = model.with_name("out.safetensors")
    apply(model, patches[:1], output)
    other = make_checkpoint(tmp_path / "other.safetensors", seed=7)
    for base in (other, output):
        with pytest.raises(MismatchError) as caught:
            apply(output, patches[1:2], tmp_path / "x", base=base)
        assert caught.value.file == str(base)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "shape", [Shape(width=32), Shape("sd2"), Shape(channels=(8, 16, 32)), Shape(span=3)]
)
def test_a_patch_of_another_model_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, shape: Shape
) -> None:
    other = make_checkpoint(tmp_path / "other.safetensors", shape)
    base = base_of(other)
    patch = make_patch(tmp_path / "p.sepme", base, additive(base, "c", seed=1))
    with pytest.raises(MismatchError) as caught:
        apply(model, [patch], tmp_path / "out")
    assert caught.value.expected != caught.value.found
    assert not (tmp_path / "out").exists()


def test_an_operator_serves_any_model_with_that_text_embedding(model: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other.safetensors", Shape(channels=(8, 16, 32)))
    base = base_of(other)
    patch = make_patch(tmp_path / "p.sepme", base, operator(base, "c", seed=1))
    result = apply(model, [patch], tmp_path / "out")
    assert (result.base_match, result.tensors_changed) == ("family", 14)
    bare = make_patch(
        tmp_path / "bare.sepme",
        type(base)("sd1", base.width, base.text_encoders, {}, {}),
        operator(base, "c", seed=1),
    )
    assert any("weights differ" in warning for warning in result.warnings)
    warnings = apply(model, [bare], tmp_path / "out", force=True).warnings
    assert len(warnings) == 1 and "text encoder" in warnings[0], "no weights to compare"


def test_a_fine_tune_is_warned_of(model: Path, patches: list[Path], tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    tensors[name] = ("F16", tensors[name][1] * np.float16(1.5))
    tuned = write_safetensors(tmp_path / "tuned.safetensors", tensors)
    result = apply(tuned, patches[:1], tmp_path / "out")
    assert result.base_match == "family"
    assert len(result.warnings) == 1
    assert "1 of 14" in result.warnings[0] and "mid_block" in result.warnings[0]
    text = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
    tensors[text] = ("F16", tensors[text][1] + np.float16(1))
    retrained = write_safetensors(tmp_path / "retrained.safetensors", tensors)
    result = apply(retrained, patches[:1], tmp_path / "out", force=True)
    assert any("text encoder" in warning for warning in result.warnings)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.stack is not None
        assert checkpoint.stack.base == base_of(retrained).digest


def test_weights_that_the_patch_knows_nothing_of_are_warned_of(tmp_path: Path) -> None:
    less = make_checkpoint(tmp_path / "less.safetensors", Shape(attention=(False, False, True)))
    base = base_of(less)
    patch = make_patch(tmp_path / "p.sepme", base, additive(base, "c", seed=1))
    more = make_checkpoint(tmp_path / "more.safetensors")
    result = apply(more, [patch], tmp_path / "out")
    assert any("may remain there" in warning for warning in result.warnings)


def test_two_increments_of_one_concept_are_warned_of(model: Path, tmp_path: Path) -> None:
    base = base_of(model)
    a = make_patch(tmp_path / "a.sepme", base, additive(base, "Monet", seed=1))
    b = make_patch(tmp_path / "b.sepme", base, additive(base, "Monet", seed=2))
    apply(model, [a], tmp_path / "out")
    result = apply(tmp_path / "out", [a, b], tmp_path / "out2", base=model)
    assert result.exact and any("both act" in warning for warning in result.warnings)


def test_outputs_that_cannot_be(model: Path, patches: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"mine")
    cases: list[tuple[type[SepmeError], dict[str, object]]] = [
        (SystemFailure, {"output": out}),
        (SystemFailure, {"output": tmp_path, "force": True}),
        (SystemFailure, {"output": tmp_path / "no" / "where"}),
        (UsageError, {"output": model}),
        (UsageError, {}),
        (UsageError, {"output": out, "in_place": True}),
        (UsageError, {"output": out, "force": True, "scale": 0.0}),
        (UsageError, {"output": out, "force": True, "scale": float("nan")}),
        (UsageError, {"output": out, "force": True, "dtype": "int8"}),
        (UsageError, {"in_place": True, "dtype": "fp16"}),
    ]
    before = files(tmp_path)
    for error, arguments in cases:
        with pytest.raises(error):
            apply(model, patches, **arguments)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        apply(model, [], out, force=True)
    with pytest.raises(SystemFailure):
        apply(model, [tmp_path / "nowhere.sepme"], tmp_path / "new")
    with pytest.raises(MalformedError):
        apply(model, [model], tmp_path / "new")
    with pytest.raises(SepmeError):
        apply(patches[0], [patches[0]], tmp_path / "new")
    assert files(tmp_path) == before


def test_no_space_leaves_nothing(
    model: Path, patches: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file system that makes room for a header asks nobody how large a file may grow.
    monkeypatch.setattr(writer, "can_resize", lambda path: False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = files(tmp_path)
    # Too little for the journal; enough for the journal and the patches but not for the file.
    for space in (20_000, model.stat().st_size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (space, limits[1]))
        try:
            for arguments in ({"output": tmp_path / "out"}, {"in_place": True}):
                with pytest.raises(SystemFailure, match="of this size"):
                    apply(model, patches, **arguments)  # type: ignore[arg-type]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert files(tmp_path) == before
    with pytest.raises(SystemFailure, match="full"):
        apply(model, patches, Path("/dev/full"))


def test_in_place_keeps_what_is_needed_to_go_back(model: Path, patches: list[Path]) -> None:
    apply(model, patches[:2], expected := model.with_name("out"))
    result = apply(model, patches[:2], in_place=True)
    assert result.output == str(model)
    assert model.read_bytes() == expected.read_bytes()
    assert undo_path(model).exists()
    kept = sorted(read_patch(p).increments[0].concept for p in kept_folder(model).iterdir())
    assert kept == ["Monet", "Van Gogh"]


def test_in_place_writes_only_what_changes(model: Path, patches: list[Path]) -> None:
    """The second time the header has room: the same file, not a new one."""
    apply(model, patches[:1], in_place=True)
    before = model.stat()
    apply(model, patches[1:2], in_place=True)
    assert (model.stat().st_ino, model.stat().st_size) == (before.st_ino, before.st_size)


def test_headers_grow_by_whole_pages_and_leave_room(tmp_path: Path) -> None:
    """So that a file system can share blocks of the data, and the next record fits in place."""
    for filler in range(0, 4096, 512):
        model = make_checkpoint(tmp_path / "m", metadata={"x": "y" * filler})
        [patch, *_] = make_patches(tmp_path, model, ["one"])
        apply(model, [patch], tmp_path / "out", force=True)
        before = int.from_bytes(model.read_bytes()[:8], "little")
        data = (tmp_path / "out").read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + length]
        assert length > before and (length - before) % 4096 == 0
        assert len(header) - len(header.rstrip(b" ")) >= 1024


def test_a_failed_write_in_place_leaves_what_was_beside_it(
    model: Path, patches: list[Path], tmp_path: Path
) -> None:
    apply(model, patches[:1], in_place=True)
    base = base_of(model)
    huge = make_patch(tmp_path / "huge.sepme", base, additive(base, "h", seed=1, size=5e4))
    before = files(tmp_path)
    with pytest.raises(MalformedError):
        apply(model, [huge], in_place=True, scale=100.0)
    assert files(tmp_path) == before

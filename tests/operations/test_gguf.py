"""GGUF files, written and read by their own library: patched where the text is read unquantised."""

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sepme_cli as sepme
from sepme_cli.app import run
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.checkpoints.structure.gguf import BLOCKS, MAGIC, QUANTISED
from sepme_cli.errors import MalformedError, SepmeError, UnsupportedError, UsageError
from tests.gguf_files import ENTRIES, TYPES, in_gguf, write_gguf
from tests.small_model import small_parts, write_single_file
from tests.small_transformers import (
    original_names,
    small_transformer,
    write_transformer_file,
    write_transformer_folder,
)
from tests.synthetic import make_patch, operator

PREFIX = "model.diffusion_model."


@pytest.fixture
def safetensors(tmp_path: Path) -> Path:
    return write_transformer_file(small_transformer("flux"), tmp_path / "flux.safetensors")


@pytest.fixture
def unprefixed() -> dict[str, Tensor]:
    """The transformer of the same model alone, under the names that GGUF files have."""
    return original_names(small_transformer("flux"))


@pytest.fixture
def model(unprefixed: dict[str, Tensor], tmp_path: Path) -> Path:
    return write_gguf(unprefixed, tmp_path / "flux.gguf")


@pytest.fixture
def patch(safetensors: Path, tmp_path: Path) -> Path:
    """Made from the model before it was quantised."""
    with open_checkpoint(safetensors) as checkpoint:
        base = checkpoint.base()
    return make_patch(tmp_path / "p.sepme", base, operator(base, "monet", seed=1))


def test_the_sizes_are_the_librarys() -> None:
    theirs = {int(t): (t.name, *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGML_QUANT_SIZES}
    assert dict(BLOCKS) == theirs
    assert "Q4_K" in QUANTISED and "BF16" not in QUANTISED


@pytest.mark.parametrize("entries", [TYPES.F32, TYPES.F16, TYPES.BF16], ids=str)
@pytest.mark.parametrize("alignment", [32, 256])
def test_what_reads_the_text_is_patched_and_put_back(
    entries: Any,
    alignment: int,
    safetensors: Path,
    unprefixed: dict[str, Tensor],
    patch: Path,
    tmp_path: Path,
) -> None:
    model = write_gguf(unprefixed, tmp_path / "m.gguf", entries, alignment)
    assert in_gguf(model)["double_blocks.0.img_attn.qkv.weight"]
    out, back = tmp_path / "out.gguf", tmp_path / "back.gguf"
    applied = sepme.apply(model, patch, out)
    before, after = in_gguf(model), in_gguf(out)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == set(ENTRIES) and applied.tensors_changed == len(ENTRIES)
    said = sepme.inspect(out)
    assert [one.concept for one in said.applied] == ["monet"]
    assert said.layout == "GGUF transformer (original)"
    other = sepme.apply(safetensors, patch, tmp_path / "out.safetensors")
    assert other.tensors_changed == len(ENTRIES)
    wanted = load_file(tmp_path / "out.safetensors")
    stored = {one.name: one for one in gguf.GGUFReader(out).tensors}
    for name in ENTRIES:
        tensor = stored[name]
        assert tensor.tensor_type == entries
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        expected = wanted[PREFIX + name].float().numpy()
        precision = {TYPES.F32: 1e-6, TYPES.F16: 1e-3, TYPES.BF16: 8e-3}[entries]
        assert np.abs(values - expected).max() < precision * np.abs(expected).max()
    fields = gguf.GGUFReader(out).fields
    assert "sepme" in fields and fields["some.texts"].contents() == ["a", "é"]
    reverted = sepme.revert(out, output=back, base=model)
    assert reverted.exact and back.read_bytes() == model.read_bytes()
    assert sepme.verify([out, patch], base=model).ok


def test_patches_stack_in_any_order_and_come_out(
    model: Path, safetensors: Path, patch: Path, tmp_path: Path
) -> None:
    with open_checkpoint(safetensors) as checkpoint:
        base = checkpoint.base()
    second = make_patch(tmp_path / "q.sepme", base, operator(base, "dali", seed=2))
    paths = [tmp_path / f"{n}.gguf" for n in range(5)]
    sepme.apply(model, [patch, second], paths[0])
    sepme.apply(model, second, paths[1])
    sepme.apply(paths[1], [patch, second], paths[2], base=model)
    assert paths[2].read_bytes() == paths[0].read_bytes()
    sepme.revert(paths[2], [patch, second], output=paths[3], base=model, concepts=["monet"])
    assert paths[3].read_bytes() == paths[1].read_bytes()
    found = sepme.diff(model, paths[0])
    assert {one.name for one in found.tensors} == set(ENTRIES)
    assert found.metadata == ("sepme",)


def test_a_stream_gets_what_a_file_gets(model: Path, patch: Path, tmp_path: Path) -> None:
    sepme.apply(model, patch, tmp_path / "out.gguf")
    with (tmp_path / "piped").open("wb") as stream:
        sepme.apply(model, patch, stream)
    assert (tmp_path / "piped").read_bytes() == (tmp_path / "out.gguf").read_bytes()


def test_a_concept_is_erased_from_it_with_text_encoders_from_elsewhere(
    unprefixed: dict[str, Tensor], safetensors: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    write_transformer_folder(small_transformer("flux"), folder)
    model = write_gguf(unprefixed, tmp_path / "m.gguf", TYPES.F32)
    made = [
        sepme.erase(
            one,
            "object:cat",
            output=tmp_path / f"{one.suffix}.sepme",
            options=sepme.ModelOptions(text_encoders=[folder]),
        )
        for one in (model, safetensors)
    ]
    assert made[0].base == made[1].base
    read = [sepme.inspect(result.patch).manifest["increments"] for result in made]
    assert read[0] == read[1]


def test_a_patched_one_is_held_against_the_model_before_it_was_quantised(
    model: Path, unprefixed: dict[str, Tensor], patch: Path, tmp_path: Path
) -> None:
    original = tmp_path / "bf16.safetensors"
    save_file({n: v.to(torch.bfloat16).contiguous() for n, v in unprefixed.items()}, original)
    sepme.apply(model, patch, tmp_path / "out.gguf")
    found = sepme.verify([tmp_path / "out.gguf", patch], base=original)
    assert found.ok
    assert any("quantised otherwise in the base" in one for one in found.unchecked)
    (rest,) = [check for check in found.checks if check.name == "the rest"]
    assert "the same but for its rounding" in rest.detail
    other = {n: v + 0.5 * (n == "img_in.bias") for n, v in load_file(original).items()}
    save_file(other, original)
    assert not sepme.verify([tmp_path / "out.gguf", patch], base=original).ok


@pytest.mark.parametrize("place", ["transformer/x.gguf", "x.gguf", "old/x.GGUF"])
def test_a_copy_in_a_models_folder_is_not_passed_on_unpatched(
    place: str, model: Path, patch: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "folder", tmp_path / "out"
    write_transformer_folder(small_transformer("flux"), folder)
    (folder / place).parent.mkdir(exist_ok=True)
    shutil.copy(model, folder / place)
    result = sepme.apply(folder, patch, out)
    assert any("x.gguf" in warning.lower() for warning in result.warnings)
    assert not list(out.rglob("*.gguf")) + list(out.rglob("*.GGUF"))
    assert sepme.verify([out, patch], base=folder).ok
    shutil.copy(model, out / "transformer" / "again.gguf")
    assert not sepme.verify([out, patch], base=folder).ok
    (out / "transformer" / "again.gguf").write_bytes(b"GGUF")  # which cannot be looked into
    assert not sepme.verify([out, patch], base=folder).ok


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_what_is_stored_in_rows_of_256_has_its_own_shape(family: str, tmp_path: Path) -> None:
    path = write_single_file(small_parts(family), tmp_path / "model.safetensors")
    unet = {n.removeprefix(PREFIX): v for n, v in load_file(path).items() if n.startswith(PREFIX)}
    save_file(unet, tmp_path / "unet.safetensors")
    model = write_gguf(unet, tmp_path / "unet.gguf", quantised=TYPES.F32, rows_of_256=True)
    plain = sepme.inspect(tmp_path / "unet.safetensors")
    found = sepme.inspect(model)
    for name in ("family", "width", "pooled", "targets"):
        assert getattr(found, name) == getattr(plain, name)
    with open_checkpoint(tmp_path / "unet.safetensors") as one, open_checkpoint(model) as other:
        assert one.base() == other.base()
        base = one.base()
    patch = make_patch(tmp_path / "p.sepme", base, operator(base, "monet", seed=1))
    sepme.apply(model, patch, tmp_path / "out.gguf")
    sepme.apply(tmp_path / "unet.safetensors", patch, tmp_path / "out.safetensors")
    with (
        open_checkpoint(tmp_path / "out.gguf") as one,
        open_checkpoint(tmp_path / "out.safetensors") as other,
    ):
        for target in one.targets:
            assert np.array_equal(target.read(), other.by_name[target.name].read())


def test_a_video_model_with_five_dimensions(tmp_path: Path) -> None:
    tensors = original_names(small_transformer("wan"))
    assert max(value.ndim for value in tensors.values()) == 5
    model = write_gguf(tensors, tmp_path / "wan.gguf", quantised=TYPES.F16)
    with open_checkpoint(model) as checkpoint:
        base = checkpoint.base()
    patch = make_patch(tmp_path / "p.sepme", base, operator(base, "monet", seed=1))
    sepme.apply(model, patch, tmp_path / "out.gguf")
    sepme.revert(tmp_path / "out.gguf", output=tmp_path / "back.gguf", base=model)
    assert (tmp_path / "back.gguf").read_bytes() == model.read_bytes()


def test_an_edit_of_it_is_extracted(model: Path, patch: Path, tmp_path: Path) -> None:
    sepme.apply(model, patch, tmp_path / "edited.gguf")
    result = sepme.extract(model, tmp_path / "edited.gguf", tmp_path / "x.sepme", concept="monet")
    assert result.targets == len(ENTRIES)
    assert result.left_out == ()


def test_other_fields_than_texts_are_compared(
    model: Path, unprefixed: dict[str, Tensor], tmp_path: Path
) -> None:
    data = model.read_bytes()
    at = data.index(b"some.bool") + len(b"some.bool") + 4
    other = tmp_path / "other.gguf"
    other.write_bytes(data[:at] + b"\0" + data[at + 1 :])
    assert sepme.diff(model, other).metadata == ("some.bool",)
    at = data.index(b"some.numbers") + len(b"some.numbers") + 16
    other.write_bytes(data[:at] + b"\7" + data[at + 1 :])
    assert sepme.diff(model, other).metadata == ("some.numbers",)


def test_a_t5_in_gguf_is_refused_with_what_to_do(
    unprefixed: dict[str, Tensor], model: Path, tmp_path: Path
) -> None:
    """llama.cpp has names of its own for it; quantised, it would not help to know them."""
    folder, t5 = tmp_path / "folder", small_transformer("flux").texts[1].state_dict()
    write_transformer_folder(small_transformer("flux"), folder)
    named = {f"enc.{i}.weight": value for i, value in enumerate(t5.values())}
    theirs = write_gguf(named, tmp_path / "t5.gguf")
    ours = write_gguf(dict(t5), tmp_path / "t5-q8.gguf")
    for path, match in (
        (theirs, "t5.gguf.*safetensors file instead"),
        (ours, "t5-q8.gguf: .*q8_0"),
    ):
        with pytest.raises(UnsupportedError, match=match):
            sepme.erase(
                model,
                "object:cat",
                output=tmp_path / "x.sepme",
                options=sepme.ModelOptions(text_encoders=[folder / "text_encoder", path]),
            )
    assert not (tmp_path / "x.sepme").exists()


def test_images_are_not_generated_with_what_is_quantised(
    model: Path, patch: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    write_transformer_folder(small_transformer("flux"), folder)
    with pytest.raises(UnsupportedError, match="quantised in blocks"):
        sepme.sample(
            model,
            "a cat",
            output=tmp_path / "x.png",
            options=sepme.ModelOptions(text_encoders=[folder]),
        )


@pytest.mark.parametrize(
    ("work", "what", "error"),
    [
        (lambda m, p, o: sepme.apply(m, p, in_place=True), "in place", UsageError),
        (lambda m, p, o: sepme.apply(m, p, o / "x.safetensors"), "GGUF", UsageError),
        (
            lambda m, p, o: sepme.apply(m, p, o / "x.gguf", dtype="fp16"),
            "dtype",
            UnsupportedError,
        ),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    work: Callable[[Path, Path, Path], object],
    what: str,
    error: type[SepmeError],
    model: Path,
    patch: Path,
    tmp_path: Path,
) -> None:
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(error, match=what):
        work(model, patch, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_it_is_no_patch(model: Path, tmp_path: Path) -> None:
    with pytest.raises(MalformedError, match="is a GGUF file"):
        sepme.apply(model, model, tmp_path / "x.gguf")


def test_a_safetensors_model_does_not_become_one(
    safetensors: Path, patch: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="quantises nothing"):
        sepme.apply(safetensors, patch, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_text_layers_that_are_quantised_are_refused_by_name(
    unprefixed: dict[str, Tensor], patch: Path, tmp_path: Path
) -> None:
    model = write_gguf(unprefixed, tmp_path / "m.gguf", TYPES.Q8_0)
    with pytest.raises(UnsupportedError, match=r"txt_in.weight.*GGUF \(Q8_0\)"):
        sepme.apply(model, patch, tmp_path / "out.gguf")
    unet = {
        name.removeprefix(PREFIX): value
        for name, value in load_file(
            write_single_file(small_parts("sd1"), tmp_path / "sd1.safetensors")
        ).items()
        if name.startswith(PREFIX)
    }
    with pytest.raises(UnsupportedError, match=r"attn2.to_.*GGUF \(Q8_0\)"):
        sepme.inspect(write_gguf(unet, tmp_path / "unet.gguf"))


def test_the_command_line_says_so(
    model: Path, patch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.gguf"
    assert run(["apply", str(model), str(patch), "-o", str(out)]) == 0
    assert run(["inspect", str(out)]) == 0
    said = capsys.readouterr().out
    assert "monet" in said and "flux" in said.lower()
    assert run(["card", str(out), str(patch)]) == 0
    assert "-o back.gguf" in capsys.readouterr().out
    assert run(["apply", str(model), str(patch), "--in-place"]) == 2
    assert run(["apply", str(model), str(patch), "-o", str(model), "-f"]) == 2
    assert "--in-place, which" not in capsys.readouterr().err


def _dimension(size: int | None) -> tuple[bytes, bytes]:
    """How the file says that txt_in.bias has 32 numbers, and how it would say otherwise."""
    name = b"txt_in.bias"
    good = name + struct.pack("<IQ", 1, 32)
    return good, name + (struct.pack("<I", 99) if size is None else struct.pack("<IQ", 1, size))


def damaged() -> list[tuple[str, Callable[[bytes], bytes]]]:
    def number(at: int, value: int, how: str = "<Q") -> Callable[[bytes], bytes]:
        packed = struct.pack(how, value)
        return lambda data: data[:at] + packed + data[at + len(packed) :]

    return [
        ("empty", lambda data: MAGIC),
        ("cut in the header", lambda data: data[:200]),
        ("cut in the data", lambda data: data[:-1000]),
        ("version 1", number(4, 1, "<I")),
        ("big-endian", number(4, 3, ">I")),
        ("many tensors", number(8, 2**63)),
        ("many fields", number(16, 2**63)),
        ("a long key", number(24, 2**62)),
        ("more tensors", lambda data: number(8, struct.unpack("<Q", data[8:16])[0] + 1)(data)),
        ("a type", lambda data: data.replace(b"some.bool\x07", b"some.bool\x63", 1)),
        ("not UTF-8", lambda data: data.replace(b"txt_in.weight", b"txt_in.w\xff\xffght", 1)),
        ("bytes behind it", lambda data: data + bytes(600)),
        ("a dimension of 0", lambda data: data.replace(*_dimension(0), 1)),
        ("many dimensions", lambda data: data.replace(*_dimension(None), 1)),
        ("two of one name", lambda data: data.replace(b"txt_in.weight", b"img_in.weight", 1)),
    ]


@pytest.mark.parametrize(("what", "damage"), damaged(), ids=[name for name, _ in damaged()])
def test_a_damaged_file_is_told_from_a_sound_one(
    what: str, damage: Callable[[bytes], bytes], model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damage(model.read_bytes()))
    with pytest.raises((MalformedError, UnsupportedError)) as told:
        sepme.inspect(path)
    assert "damaged.gguf" in str(told.value)


def test_a_record_that_is_no_text_is_none(unprefixed: dict[str, Tensor], tmp_path: Path) -> None:
    model = write_gguf(unprefixed, tmp_path / "m.gguf", fields={"sepme": 7})
    with pytest.raises(MalformedError):
        sepme.inspect(model)


@pytest.mark.parametrize(
    ("what", "data"),
    [
        ("tensors", struct.pack("<IQQ", 3, 10**6, 0) + bytes(10**7)),
        ("fields", struct.pack("<IQQ", 3, 1, 10**6) + bytes(10**7)),
        ("texts", struct.pack("<IQQ", 3, 1, 1)
            + struct.pack("<QI", 0, 9) + struct.pack("<IQ", 8, 2 * 10**6) + bytes(16 * 10**6)),
    ],
)  # fmt: skip
def test_what_no_model_has_that_many_of_is_refused_at_once(
    what: str, data: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(MAGIC + data)
    with pytest.raises(MalformedError, match=f"too many {what}"):
        sepme.inspect(path)


def test_no_byte_of_the_header_crashes_it(model: Path, tmp_path: Path) -> None:
    """Every byte changed in three ways: understood, or refused with what is wrong."""
    data = bytearray(model.read_bytes())
    with open_checkpoint(model) as checkpoint:
        end = checkpoint.files[0].header.data_start
    path = tmp_path / "changed.gguf"
    generator = np.random.default_rng(0)
    path.write_bytes(data)
    with path.open("r+b") as file:
        for at in sorted(generator.choice(end, 400, replace=False)):
            for value in {0, 255, data[at] ^ 1 << int(generator.integers(8))} - {data[at]}:
                file.seek(at)
                file.write(bytes([value]))
                file.flush()
                try:
                    with open_checkpoint(path):
                        pass
                except SepmeError:
                    pass
            file.seek(at)
            file.write(bytes([data[at]]))


def test_a_long_list_of_fields_is_cut_in_the_terminal(
    model: Path, unprefixed: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A converter writes one for every matrix that it cuts into rows."""
    many = {f"field.{i:03}": i for i in range(100)}
    other = write_gguf(unprefixed, tmp_path / "other.gguf", fields=many)
    run(["diff", str(model), str(other)])
    short = capsys.readouterr().out
    assert "field.000" in short and "field.099" not in short and "more: -v" in short
    run(["diff", str(model), str(other), "-v"])
    assert "field.099" in capsys.readouterr().out

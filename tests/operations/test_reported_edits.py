"""LoRAs and edits as other programs and methods save them, brought in as patches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patch_spec.container import read_patch
from sepme_cli.checkpoints.structure.layout import Layout, span_of
from sepme_cli.errors import MalformedError, MismatchError, RefusedError, UnsupportedError
from sepme_cli.increments import delta
from sepme_cli.operations.extract import extract
from sepme_cli.operations.import_lora import import_lora
from tests.layouts import UNET, Tensors, parts, to_torch
from tests.lora_files import kohya, more, random_pairs, write
from tests.synthetic import DTYPES, Shape, base_of, checkpoint_tensors, make_checkpoint

WIDE = Shape(width=96)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model.safetensors", WIDE, dtype="F32")


def deltas(patch: Path, model: Path) -> dict[str, np.ndarray]:
    (part,) = read_patch(patch).increments
    return {n: delta(part, n, np.zeros(shape)) for n, shape in base_of(model).shapes.items()}


@pytest.mark.parametrize("dtype", ["I64", "I32", "I16", "I8", "U8", "F16", "BF16", "F64"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_alphas_of_any_number(dtype: str, shape: Any, model: Path, tmp_path: Path) -> None:
    """diffusers writes the rank as it has it, a whole number."""
    kinds = {**DTYPES, "I16": np.dtype("<i2"), "I8": np.dtype("i1")}
    lora = kohya(base_of(model), random_pairs(base_of(model), 4), alpha=2.0)
    import_lora(write(tmp_path / "a.safetensors", lora), model, tmp_path / "a.sepme", concept="X")
    for name in lora:
        if name.endswith(".alpha"):
            lora[name] = (dtype, np.full(shape, 2, kinds[dtype]))
    import_lora(write(tmp_path / "b.safetensors", lora), model, tmp_path / "b.sepme", concept="X")
    one, other = (deltas(tmp_path / f"{each}.sepme", model) for each in "ab")
    assert all((one[name] == other[name]).all() for name in one)


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "adapter_model.safetensors"])
def test_folders_that_a_lora_was_saved_in(name: str, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pond"
    folder.mkdir()
    lora = kohya(base_of(model), random_pairs(base_of(model), 2))
    write(folder / name, lora)
    result = import_lora(folder, model, tmp_path / "x.sepme")
    assert (result.concept, result.rank) == ("pond", 2)


def test_a_folder_without_a_lora(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnsupportedError, match="not a folder that PEFT") as caught:
        import_lora(tmp_path / "empty", model, tmp_path / "x.sepme")
    assert "pytorch_lora_weights.safetensors" in str(caught.value.expected)


@pytest.mark.parametrize("naming", ["kohya", "ComfyUI", "diffusers"])
def test_whole_differences_in_a_lora(naming: str, model: Path, tmp_path: Path) -> None:
    """LyCORIS and ComfyUI write `.diff` for a weight whose change has no low rank."""
    base = base_of(model)
    pairs, ldm = random_pairs(base, 3), Layout("", span_of(base.shapes))
    names = {
        "kohya": lambda target: "lora_unet_" + target.replace(".", "_"),
        "ComfyUI": lambda target: f"diffusion_model.{ldm.stored(target + '.weight')}"[:-7],
        "diffusers": lambda target: f"unet.{target}",
    }
    tensors: Tensors = {}
    for target, (up, down) in pairs.items():
        module = names[naming](target.removesuffix(".weight"))
        tensors[f"{module}.diff"] = ("F32", up @ down)
    tensors["lora_unet_conv_in.diff_b"] = ("F32", np.ones(8, "<f4"))
    path = write(tmp_path / "d.safetensors", tensors)
    result = import_lora(path, model, tmp_path / "d.sepme", concept="X")
    assert result.targets == len(pairs)
    assert [left.what for left in result.left_out] == [
        "convolutions and others (a difference of biases or norms)"
    ]
    found = deltas(tmp_path / "d.sepme", model)
    for target, (up, down) in pairs.items():
        wanted = up.astype(float) @ down
        assert np.linalg.norm(found[target] - wanted) < 0.011 * np.linalg.norm(wanted)


def test_a_difference_beside_a_pair_is_not_guessed_at(model: Path, tmp_path: Path) -> None:
    lora = kohya(base_of(model), random_pairs(base_of(model), 2))
    module = min(lora).rsplit(".", 2)[0]
    lora[f"{module}.diff"] = ("F32", np.ones((16, 96), "<f4"))
    path = write(tmp_path / "d.safetensors", lora | more(["lora_unet_conv_in"]))
    with pytest.raises(MalformedError, match="has both a whole difference and"):
        import_lora(path, model, tmp_path / "d.sepme", concept="X")
    assert not (tmp_path / "d.sepme").exists()


def attention(tensors: Tensors) -> Tensors:
    """The cross-attention of a UNet: what UCE and ESD change."""
    return {name: value for name, value in tensors.items() if ".attn2." in name}


def keys_and_values(tensors: Tensors) -> Tensors:
    leaves = (".to_k.weight", ".to_v.weight")
    return {name: value for name, value in attention(tensors).items() if name.endswith(leaves)}


def behind(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: value for name, value in tensors.items()}


def edit(tensors: Tensors, seed: int = 3) -> Tensors:
    """The same with another matrix of rank one on every key and value."""
    rng = np.random.default_rng(seed)
    edited = dict(tensors)
    for name in keys_and_values(tensors):
        kind, values = tensors[name]
        change = np.outer(rng.standard_normal(values.shape[0]), rng.standard_normal(96)) * 0.05
        edited[name] = (kind, (values + change).astype(values.dtype))
    return edited


SAVED: dict[str, Callable[[Tensors], Tensors]] = {
    "UCE": lambda t: keys_and_values(parts(t)["unet"]),
    "ESD-x": lambda t: attention(parts(t)["unet"]),
    "with a prefix": lambda t: behind("unet.", keys_and_values(parts(t)["unet"])),
    "DataParallel": lambda t: behind("module.", keys_and_values(parts(t)["unet"])),
    "a single file's names": keys_and_values,
    "LDM's names alone": lambda t: {n.removeprefix(UNET): v for n, v in keys_and_values(t).items()},
}
"""What other methods save of an edited model."""


@pytest.mark.parametrize("case", SAVED)
@pytest.mark.parametrize("layout", ["single file", "UNet in diffusers names"])
def test_the_edited_weights_alone_are_as_good_as_the_whole(
    case: str, layout: str, model: Path, tmp_path: Path
) -> None:
    """Byte for byte the patch that the whole edited checkpoint gives."""
    tensors = checkpoint_tensors(WIDE, "F32")
    base, edited = model, edit(tensors)
    if layout != "single file":
        base = write(tmp_path / "unet.safetensors", parts(tensors)["unet"])
    whole = write(tmp_path / "whole.safetensors", edited)
    part = write(tmp_path / "part.safetensors", SAVED[case](edited))
    extract(base, whole, tmp_path / "whole.sepme", concept="X", kind="style")
    result = extract(base, part, tmp_path / "part.sepme", concept="X", kind="style")
    assert (tmp_path / "part.sepme").read_bytes() == (tmp_path / "whole.sepme").read_bytes()
    # What ESD may have trained beside, which a patch cannot hold; here it is the base's own.
    same_names = layout != "single file"
    left = [] if case != "ESD-x" or same_names else ["other tensors"]
    assert [each.what for each in result.left_out] == left


def test_some_of_the_targets_are_enough(model: Path, tmp_path: Path) -> None:
    edited = keys_and_values(parts(edit(checkpoint_tensors(WIDE, "F32")))["unet"])
    chosen = sorted(edited)[:3]
    path = write(tmp_path / "some.safetensors", {name: edited[name] for name in chosen})
    result = extract(model, path, tmp_path / "p.sepme", concept="X")
    assert result.targets == 3
    found = deltas(tmp_path / "p.sepme", model)
    (part,) = read_patch(tmp_path / "p.sepme").increments
    assert part.kind != "operator", "which would change the others too"
    assert sorted(part.up) == chosen and found


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("nested", ["no", "unet", "module"])
def test_pickled_edits(nested: str, archive: bool, model: Path, tmp_path: Path) -> None:
    """As `.pt`: names to tensors, all under one name, or a dictionary for each module."""
    import torch

    edited = edit(checkpoint_tensors(WIDE, "F32"))
    state = {n: to_torch(v) for n, (_, v) in SAVED["UCE"](edited).items()}
    saved: dict[str, Any] = state
    if nested == "unet":
        saved = {"unet": state}
    if nested == "module":
        saved = {n.removesuffix(".weight"): {"weight": v} for n, v in state.items()}
    torch.save(saved, tmp_path / "uce.pt", _use_new_zipfile_serialization=archive)
    extract(model, tmp_path / "uce.pt", tmp_path / "part.sepme", concept="X")
    extract(model, write(tmp_path / "w.safetensors", edited), tmp_path / "whole.sepme", concept="X")
    assert (tmp_path / "part.sepme").read_bytes() == (tmp_path / "whole.sepme").read_bytes()


K = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    ("tensors", "error", "told"),
    [
        ({K: ("F32", np.ones((24, 64), "<f4"))}, MismatchError, "another model"),
        (
            {K.replace("_blocks.0", "_blocks.7"): ("F32", np.ones((24, 96), "<f4"))},
            MismatchError,
            "another model",
        ),
        ({K: ("I8", np.ones((24, 96), "i1"))}, UnsupportedError, "stored as"),
        (
            {f"{p}{K}": ("F32", np.ones((24, 96), "<f4")) for p in ("", "unet.")},
            MismatchError,
            "two tensors",
        ),
        ({"something.weight": ("F32", np.ones(3, "<f4"))}, UnsupportedError, "no Stable Diffusion"),
    ],
    ids=["width", "block", "dtype", "twice", "stranger"],
)
def test_weights_that_are_none_of_the_bases(
    tensors: Tensors, error: type[Exception], told: str, model: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "part.safetensors", tensors)
    with pytest.raises(error, match=told) as caught:
        extract(model, path, tmp_path / "p.sepme", concept="X")
    assert caught.value.expected and caught.value.found  # type: ignore[attr-defined]
    assert not (tmp_path / "p.sepme").exists()


def test_an_edit_that_changed_nothing(model: Path, tmp_path: Path) -> None:
    same = SAVED["UCE"](checkpoint_tensors(WIDE, "F32"))
    with pytest.raises(RefusedError, match="nothing to extract"):
        extract(model, write(tmp_path / "p.safetensors", same), tmp_path / "p.sepme", concept="X")

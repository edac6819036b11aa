"""Files as training programs and tools write them: read where it is clear what is meant."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.checkpoints.structure.layout import EMA
from sepme_cli.errors import UnsupportedError
from sepme_cli.operations.apply import apply
from sepme_cli.operations.inspect import inspect
from sepme_cli.operations.revert import revert
from tests.checkpoints.test_families import REFINER, SD2, XL
from tests.layouts import TEXT, UNET, Tensors, parts, scaled
from tests.synthetic import (
    Shape,
    additive,
    base_of,
    checkpoint_tensors,
    make_checkpoint,
    make_patch,
    write_safetensors,
)

Rename = Callable[[str], str]


def before(prefix: str) -> Rename:
    return lambda name: prefix + name


def inside(old: str, new: str) -> Rename:
    return lambda name: new + name.removeprefix(old) if name.startswith(old) else name


WHOLE: dict[str, Rename] = {
    "DataParallel": before("module."),
    "twice": before("module.module."),
    "torch.compile": before("_orig_mod."),
    "a state_dict in a state_dict": before("state_dict."),
    "a module of Lightning's": before("model."),
    "Lightning and DataParallel": before("module.model."),
    "the UNet compiled": inside(UNET, f"{UNET}_orig_mod."),
}
"""What stands before the names of a whole checkpoint."""
ALONE = ("module.", "_orig_mod.", "model.", "unet.", "diffusion_model.", "pipe.unet.", "model_ema.")
"""Before those of a UNet alone, in either naming."""


@pytest.mark.parametrize("case", WHOLE)
def test_prefixes_of_whole_checkpoints(case: str, tmp_path: Path) -> None:
    """The same model, text encoder and moving average as without, and patched the same."""
    plain = make_checkpoint(tmp_path / "plain.safetensors", ema="F32")
    tensors = {WHOLE[case](n): v for n, v in checkpoint_tensors(ema="F32").items()}
    path = write_safetensors(tmp_path / "m.safetensors", tensors)
    with open_checkpoint(plain) as one, open_checkpoint(path) as other:
        assert one.base(text_encoders=True) == other.base(text_encoders=True)
        assert other.base(text_encoders=True).text_encoders
        assert other.network("vae") is not None
        assert (other.arrangement, other.family) == (one.arrangement, one.family)
        copies = {len(target.copies) for target in other.targets}
        assert copies == ({1} if case == "the UNet compiled" else {2})
    patch = make_patch(
        tmp_path / "p.sepme", base_of(plain), additive(base_of(plain), "Monet", seed=1)
    )
    apply(plain, patch, tmp_path / "a.safetensors")
    apply(path, patch, tmp_path / "b.safetensors")
    patched = (
        open_checkpoint(tmp_path / "a.safetensors"),
        open_checkpoint(tmp_path / "b.safetensors"),
    )
    with patched[0], patched[1]:
        assert patched[0].base() == patched[1].base()
    revert(tmp_path / "b.safetensors", output=tmp_path / "c.safetensors", base=path)
    assert (tmp_path / "c.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("prefix", ALONE)
@pytest.mark.parametrize("naming", ["ldm", "diffusers"])
def test_prefixes_of_a_unet_alone(naming: str, prefix: str, tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    unet = {n.removeprefix(UNET): v for n, v in tensors.items() if n.startswith(UNET)}
    unet = parts(tensors)["unet"] if naming == "diffusers" else unet
    path = write_safetensors(tmp_path / "u.safetensors", {prefix + n: v for n, v in unet.items()})
    plain = make_checkpoint(tmp_path / "plain.safetensors")
    with open_checkpoint(plain) as one, open_checkpoint(path) as checkpoint:
        assert checkpoint.layout.naming == naming
        assert checkpoint.base() == one.base()


@pytest.mark.parametrize("shape", [SD2, XL, REFINER], ids=lambda shape: shape.family)
def test_families_behind_a_prefix(shape: Shape, tmp_path: Path) -> None:
    tensors = checkpoint_tensors(shape)
    path = write_safetensors(
        tmp_path / "m.safetensors", {f"module.{n}": v for n, v in tensors.items()}
    )
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.family.name == shape.family
        assert all(checkpoint.network(spec.name) for spec in checkpoint.family.text_encoders)


def pipeline(tensors: Tensors) -> Tensors:
    return {
        f"{n}.{name}": value for n, own in parts(tensors).items() for name, value in own.items()
    }


@pytest.mark.parametrize("outer", ["", "module."])
def test_a_whole_pipeline_in_one_file(outer: str, tmp_path: Path) -> None:
    tensors = {outer + name: value for name, value in pipeline(checkpoint_tensors()).items()}
    path = write_safetensors(tmp_path / "p.safetensors", tensors)
    plain = make_checkpoint(tmp_path / "m.safetensors")
    with open_checkpoint(plain) as one, open_checkpoint(path) as checkpoint:
        assert checkpoint.base(text_encoders=True) == one.base(text_encoders=True)
        vae = checkpoint.network("vae")
        assert vae is not None and vae.naming == "diffusers"


def test_two_unets_are_not_guessed_at(tmp_path: Path) -> None:
    unet = parts(checkpoint_tensors())["unet"]
    both = {f"{place}.{n}": v for place in ("model", "ema_model") for n, v in unet.items()}
    path = write_safetensors(tmp_path / "m.safetensors", both)
    with pytest.raises(UnsupportedError, match="several UNets") as caught:
        open_checkpoint(path)
    assert caught.value.found == "ema_model., model."


def test_a_moving_average_alone_is_said_to_be_one(tmp_path: Path) -> None:
    ema = {n: v for n, v in checkpoint_tensors(ema="F32").items() if n.startswith(EMA)}
    path = write_safetensors(tmp_path / "m.safetensors", ema)
    with pytest.raises(UnsupportedError, match="moving average"):
        open_checkpoint(path)


def rewritten(path: Path, metadata: object, pad: bytes = b" ") -> Path:
    """The file with other metadata, whatever that is."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = {"__metadata__": metadata, **json.loads(data[8 : 8 + length])}
    text = json.dumps(header).encode()
    text += pad * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return path


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {},
        {"notes": "\n" * 200_000},
        {"ss_tag_frequency": json.dumps({"a": 1}, indent=4) * 999},
    ],
    ids=["null", "empty", "newlines", "tags"],
)
def test_metadata_that_other_programs_write(metadata: object, tmp_path: Path) -> None:
    """Read, patched in a copy and in place, and taken back."""
    path = rewritten(make_checkpoint(tmp_path / "m.safetensors"), metadata)
    original = path.read_bytes()
    patch = make_patch(
        tmp_path / "p.sepme", base_of(path), additive(base_of(path), "Monet", seed=1)
    )
    assert inspect(path).metadata == (metadata or {})
    apply(path, patch, tmp_path / "out.safetensors")
    apply(path, patch, in_place=True)
    assert path.read_bytes() == (tmp_path / "out.safetensors").read_bytes()
    revert(path, in_place=True)
    assert path.read_bytes() == original


COMPANIONS: dict[str, Any] = {
    "scale_weight": np.float32(0.5),
    "scale_input": np.float32(2.0),
    "weight_scale": np.float32(0.5),
    "input_scale": np.float32(2.0),
    "output_scale": np.float32(2.0),
}


@pytest.mark.parametrize("leaf", COMPANIONS)
def test_what_quantising_leaves_beside_a_text_encoder_is_no_part_of_it(
    leaf: str, tmp_path: Path
) -> None:
    plain = checkpoint_tensors()
    quantised = scaled(plain)
    layer = f"{TEXT}encoder.layers.0.self_attn.q_proj"
    kind, values = plain[f"{layer}.weight"]
    more: Tensors = {
        f"{layer}.{leaf}": ("F32", COMPANIONS[leaf]),
        f"{layer}.comfy_quant": ("U8", np.frombuffer(b"{}", np.uint8)),
        f"{TEXT}scaled_fp8": ("F32", np.zeros(0, "<f4")),
    }
    if leaf in ("scale_weight", "weight_scale"):
        # Halves and doubles of these are exact in fp8.
        coarse = values.astype("<f4").round(0)
        more[f"{layer}.weight"] = ("F8_E4M3", (coarse * 2).astype(ml_dtypes.float8_e4m3fn))
        plain[f"{layer}.weight"] = (kind, coarse.astype(values.dtype))
    one = write_safetensors(tmp_path / "plain.safetensors", plain)
    two = write_safetensors(tmp_path / "scaled.safetensors", quantised | more)
    with open_checkpoint(one) as a, open_checkpoint(two) as b:
        assert a.text_encoder_fingerprints() == b.text_encoder_fingerprints()

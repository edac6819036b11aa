"""Values that are not finite, before or after: the tensor is named, and nothing is written."""

from pathlib import Path

import numpy as np
import pytest

from sepme_cli.errors import MalformedError
from sepme_cli.operations.apply import apply
from tests.synthetic import (
    DTYPES,
    checkpoint_tensors,
    make_checkpoint,
    make_patches,
    write_safetensors,
)

TARGET = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
NAME = r"mid_block\.attentions\.0|middle_block\.1"


def refused_everywhere(model: Path, patch: Path, match: str, scale: float = 1.0) -> None:
    """Refused to a file, in place and as a dry run; the folder is as it was."""
    before = {path.name: path.read_bytes() for path in model.parent.iterdir()}
    for where in ({"output": model.with_name("out")}, {"in_place": True}, {"check": True}):
        with pytest.raises(MalformedError, match=match):
            apply(model, [patch], scale=scale, **where)  # type: ignore[arg-type]
        assert {path.name: path.read_bytes() for path in model.parent.iterdir()} == before


@pytest.mark.parametrize("kind", [0, 1], ids=["additive", "operator"])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    # No patch and scale within the format's bounds goes beyond bf16 or fp32.
    [("F16", 1e9), ("F8_E4M3", 1e6)],
)
def test_a_result_that_its_dtype_cannot_hold(
    dtype: str, scale: float, kind: int, tmp_path: Path
) -> None:
    model = make_checkpoint(tmp_path / "m.safetensors", dtype=dtype)
    patch = make_patches(tmp_path, model)[kind]
    refused_everywhere(model, patch, r"attentions\.\d+\.transformer_blocks\.0\.attn2", scale)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F8_E4M3"])
def test_a_weight_that_is_not_finite(dtype: str, value: float, tmp_path: Path) -> None:
    good = make_checkpoint(tmp_path / "good.safetensors", dtype=dtype)
    patch = make_patches(tmp_path, good)[0]
    tensors = checkpoint_tensors(dtype=dtype)
    tensors[TARGET][1][0, 0] = np.array(value).astype(DTYPES[dtype])
    if not np.isnan(tensors[TARGET][1][0, 0].astype(float)) and np.isfinite(
        tensors[TARGET][1][0, 0].astype(float)
    ):
        pytest.skip("this dtype knows no infinity")
    model = write_safetensors(tmp_path / "m.safetensors", tensors)
    refused_everywhere(model, patch, NAME)


def test_a_weight_beyond_fp16_has_no_fingerprint(tmp_path: Path) -> None:
    good = make_checkpoint(tmp_path / "good.safetensors", dtype="F32")
    patch = make_patches(tmp_path, good)[0]
    tensors = checkpoint_tensors(dtype="F32")
    tensors[TARGET][1][0, 0] = 65520
    refused_everywhere(write_safetensors(tmp_path / "m.safetensors", tensors), patch, NAME)

"""The ComfyUI nodes on models that are transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from tests.small_transformers import small_transformer, write_transformer_file
from tests.synthetic import additive, make_patch, operator
from tests.test_comfyui import applied, copied, loaded, nearly, nodes, same, written

__all__ = ["nodes"]


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_transformer_is_patched_as_its_file_would_be(
    nodes: Any, family: Any, tmp_path: Path
) -> None:
    """ComfyUI keeps the names that the authors gave; the text layers alone change."""
    model = write_transformer_file(
        small_transformer(family), tmp_path / "model.safetensors", torch.bfloat16
    )
    with open_checkpoint(model) as checkpoint:
        base = checkpoint.base()
    patch = tmp_path / "models" / "sepme" / "artists.sepme"
    make_patch(patch, base, additive(base, "Monet", seed=0), operator(base, "Klimt", seed=1))
    patcher = loaded(model)
    before = copied(patcher.tensors)
    clean = applied(nodes, patcher, "artists.sepme", 0.75)
    clean.patch_model()
    assert nearly(clean.tensors, written(model, {"patches": patch, "scale": 0.75}))
    changed = {name for name in before if not before[name].equal(clean.tensors[name])}
    assert len(changed) == 2
    clean.unpatch_model()
    assert same(patcher.tensors, before)

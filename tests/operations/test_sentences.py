"""What is printed of what was not computed, or not looked at, is not said."""

from pathlib import Path

import numpy as np
import pytest

from sepme_cli.errors import UnsupportedError
from sepme_cli.operations.import_lora import import_lora
from sepme_cli.render.results import BASE_MATCHES
from tests.lora_files import Tensors, kohya, more, random_pairs, write
from tests.synthetic import Shape, base_of, make_checkpoint

WIDE = Shape(width=96)
FF = "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2"


def unplain(kind: str, name: str = FF) -> Tensors:
    """A module that is no up @ down."""
    values = np.ones((6, 6), "<f4")
    parts = {
        "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        "LoKr": ("lokr_w1", "lokr_w2"),
        "OFT": ("oft_blocks",),
        "a full difference": ("diff",),
    }
    return {f"{name}.{part}": ("F32", values) for part in parts[kind]}


#: What a LoRA does beside keys and values, and what is said of it.
BESIDE: dict[str, tuple[Tensors, str]] = {
    **{
        kind: (unplain(kind), "1 modules of this LoRA are left out, and how much they hold was not")
        for kind in ("LoHa", "LoKr", "OFT")
    },
    "a full difference": (
        unplain("a full difference"),
        "1 modules of this LoRA are left out, which hold ",
    ),
    "plain": (more([FF], 0.5), "left out, which hold "),
    "tiny": (more([FF], 1e-4), "which hold less than 1% of the squares"),
    "zeros": (more([FF], 0.0), "which hold 0% of the squares"),
    "both": (
        more([FF], 0.5) | unplain("LoHa", f"{FF}x"),
        "2 modules of this LoRA are left out, of which 1 hold ",
    ),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_a_lora_does_elsewhere(name: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model.safetensors", WIDE)
    base = base_of(model)
    tensors, said = BESIDE[name]
    lora = write(tmp_path / "l.safetensors", kohya(base, random_pairs(base, 2)) | tensors)
    result = import_lora(lora, model, tmp_path / "x.sepme", text_layers_only=True)
    assert said in result.warnings[0]
    shares = [part.share for part in result.left_out]
    assert (None in shares) == ("not computed" in said or "both" in name or "was not" in said)


def test_a_model_where_a_lora_should_be(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"is a model and not a LoRA.*--edited"):
        import_lora(model, model, tmp_path / "x.sepme")


def test_a_base_match_says_no_more_than_was_compared() -> None:
    """Weights are compared as fp16: of the very file that is all that is known."""
    assert "dtype" not in BASE_MATCHES["same-values"]
    assert "fp16" in BASE_MATCHES["same-values"]

"""LoRA files of other programs as patches: the same effect, and nothing that is not said."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from patch_spec.base import Base
from patch_spec.container import read_patch
from patch_spec.increment import Increment
from sepme_cli.errors import MalformedError, MismatchError, RefusedError, UnsupportedError
from sepme_cli.increments import delta
from sepme_cli.operations.apply import apply
from sepme_cli.operations.diff import diff
from sepme_cli.operations.export import export
from sepme_cli.operations.import_lora import import_lora
from sepme_cli.operations.inspect import inspect
from sepme_cli.operations.revert import revert
from sepme_cli.operations.verify import verify
from tests.lora_files import dotted, kohya, more, random_pairs, write
from tests.operations.test_export import distance, patched_unet, pipeline, predicted
from tests.small_model import small_parts, write_single_file
from tests.synthetic import Shape, additive, base_of, make_checkpoint, make_patch

WIDE = Shape(width=96)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model.safetensors", WIDE)


def imported(tmp_path: Path) -> Increment:
    (increment,) = read_patch(tmp_path / "x.sepme").increments
    return increment


def off(increment: Increment, base: Base, wanted: dict[str, np.ndarray]) -> float:
    """The largest |dW - wanted| / |wanted| of a target."""
    assert increment.exponents.keys() == wanted.keys()
    return max(
        float(np.linalg.norm(delta(increment, name, np.zeros(base.shapes[name])) - change))
        / float(np.linalg.norm(change))
        for name, change in wanted.items()
    )


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
@pytest.mark.parametrize("to", ["kohya", "peft"])
def test_what_was_exported_comes_back(family: str, to: Any, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m.safetensors", Shape(family=family, width=96))
    base = base_of(model)
    parts = (additive(base, "Monet", seed=1), additive(base, "Klimt", seed=2, size=0.1))
    patch = make_patch(tmp_path / "p.sepme", base, *parts)
    export(patch, to, tmp_path / "lora.safetensors")
    result = import_lora(tmp_path / "lora.safetensors", model, tmp_path / "x.sepme")
    increment = imported(tmp_path)
    zeros = {name: np.zeros(shape) for name, shape in base.shapes.items()}
    wanted = {n: sum(delta(part, n, zero) for part in parts) for n, zero in zeros.items()}
    assert (result.source, result.kind, result.rank) == (to, "additive", 6)
    assert result.concept == increment.concept == "Klimt, Monet"
    found = off(increment, base, wanted)
    assert found < 1e-3
    assert result.residuals[0].residual == pytest.approx(found, rel=0.5)
    assert result.left_out == ()


def test_modules_with_nothing_in_common_get_a_basis_each(model: Path, tmp_path: Path) -> None:
    base = base_of(model)
    pairs = random_pairs(base, rank=10)
    lora = write(
        tmp_path / "l.safetensors", kohya(base, pairs, alpha=5.0), {"ss_output_name": "Dali"}
    )
    result = import_lora(lora, model, tmp_path / "x.sepme")
    wanted = {name: up.astype(float) @ down / 2 for name, (up, down) in pairs.items()}
    assert (result.kind, result.rank, result.concept) == ("lora", 10, "Dali")
    assert off(imported(tmp_path), base, wanted) < 1e-3
    assert [r.residual for r in result.residuals] == sorted(r.residual for r in result.residuals)[
        ::-1
    ]


@pytest.mark.parametrize("to", ["kohya", "peft"])
def test_a_lora_that_came_in_goes_out_again(to: Any, model: Path, tmp_path: Path) -> None:
    base = base_of(model)
    pairs = random_pairs(base, rank=10)
    import_lora(write(tmp_path / "l", kohya(base, pairs)), model, tmp_path / "x.sepme")
    result = export(tmp_path / "x.sepme", to, tmp_path / "out.safetensors")
    import_lora(tmp_path / "out.safetensors", model, tmp_path / "x.sepme", force=True)
    wanted = {name: up.astype(float) @ down for name, (up, down) in pairs.items()}
    assert result.rank == 10
    assert off(imported(tmp_path), base, wanted) < 2e-3


def test_a_rank_is_taken_as_it_is_told_and_what_it_leaves_is_said(
    model: Path, tmp_path: Path
) -> None:
    base = base_of(model)
    pairs = random_pairs(base, rank=10)
    lora = write(tmp_path / "l.safetensors", kohya(base, pairs))
    result = import_lora(lora, model, tmp_path / "x.sepme", rank=3)
    wanted = {name: up.astype(float) @ down for name, (up, down) in pairs.items()}
    best = max(
        float(np.linalg.norm(values[3:]) / np.linalg.norm(values))
        for values in (np.linalg.svd(w, compute_uv=False) for w in wanted.values())
    )
    assert result.rank == 3
    assert off(imported(tmp_path), base, wanted) == pytest.approx(best, rel=1e-3)
    assert result.residuals[0].residual == pytest.approx(best, rel=1e-3)


def test_the_patch_is_one_like_any_other(model: Path, tmp_path: Path) -> None:
    base = base_of(model)
    lora = write(tmp_path / "l.safetensors", kohya(base, random_pairs(base, rank=10)))
    patch, clean, back = (tmp_path / n for n in ("x.sepme", "c.safetensors", "b.safetensors"))
    import_lora(lora, model, patch, concept="Monet", kind="style")
    other = make_patch(tmp_path / "o.sepme", base, additive(base, "Klimt", seed=1))
    apply(model, [patch, other], clean)
    assert {d.rank for d in diff(model, patch).tensors} == {10}
    assert diff(patch, other).interference is not None
    assert inspect(patch).manifest["increments"][0]["kind"] == "lora"  # type: ignore[union-attr]
    assert verify([clean, patch, other], base=model).ok
    assert revert(clean, [patch, other], concepts=["Monet"], base=model, output=back).exact
    only = tmp_path / "only.safetensors"
    apply(model, [other], only)
    assert back.read_bytes() == only.read_bytes()
    revert(clean, base=model, output=tmp_path / "all.safetensors")
    assert (tmp_path / "all.safetensors").read_bytes() == model.read_bytes()
    manifest = read_patch(patch)
    assert manifest.separable_from == ()
    assert manifest.increments[0].method.name == "lora-import"
    assert set(vars(manifest.increments[0].measured).values()) == {None}
    assert "a painting by Monet" in manifest.increments[0].prompts


NAMES = {
    "diffusers": (lambda name: f"unet.{name}", ".lora_B.weight", ".lora_A.weight"),
    "peft": (lambda name: f"base_model.model.{name}", ".lora_B.weight", ".lora_A.weight"),
    "bare": (lambda name: name, ".lora.up.weight", ".lora.down.weight"),
    "older diffusers": (
        lambda name: f"unet.{name.replace('.to_', '.processor.to_')}",
        "_lora.up.weight",
        "_lora.down.weight",
    ),
    "lycoris": (
        lambda name: f"lycoris_{name.replace('.', '_')}",
        ".lora_up.weight",
        ".lora_down.weight",
    ),
}


@pytest.mark.parametrize("names", NAMES)
def test_the_names_of_other_programs(names: str, model: Path, tmp_path: Path) -> None:
    base = base_of(model)
    pairs = random_pairs(base, rank=2)
    import_lora(write(tmp_path / "l", dotted(pairs, *NAMES[names])), model, tmp_path / "x.sepme")
    wanted = {name: up.astype(float) @ down for name, (up, down) in pairs.items()}
    assert off(imported(tmp_path), base, wanted) < 1e-3


def test_the_factors_of_peft_count(model: Path, tmp_path: Path) -> None:
    base = base_of(model)
    pairs = random_pairs(base, rank=4)
    first = next(iter(pairs))
    config = {"r": 4, "lora_alpha": 8, "alpha_pattern": {first.removesuffix(".weight"): 2}}
    wanted = {name: up.astype(float) @ down * 2 for name, (up, down) in pairs.items()}
    wanted[first] /= 4
    folder = tmp_path / "adapter"
    folder.mkdir()
    file = folder / "adapter_model.safetensors"
    write(file, dotted(pairs, *NAMES["peft"]))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for lora in (folder, file):
        result = import_lora(lora, model, tmp_path / "x.sepme", force=True)
        assert result.concept == "adapter"
        assert off(imported(tmp_path), base, wanted) < 1e-3
    said = {f"unet.{key}": value for key, value in {**config, "use_rslora": True}.items()}
    bare = {**said, "unet.alpha_pattern": {first.removesuffix(".weight"): 2}}
    lora = write(
        tmp_path / "l",
        dotted(pairs, *NAMES["diffusers"]),
        {"lora_adapter_metadata": json.dumps(bare)},
    )
    import_lora(lora, model, tmp_path / "x.sepme", concept="x", force=True)
    assert off(imported(tmp_path), base, {n: 2 * change for n, change in wanted.items()}) < 1e-3


def test_what_a_patch_cannot_hold_is_counted(model: Path, tmp_path: Path) -> None:
    base = base_of(model)
    pairs = random_pairs(base, rank=2)
    mid = "lora_unet_mid_block_attentions_0"
    others = {
        "text encoder": ["lora_te_text_model_encoder_layers_0_self_attn_k_proj"],
        "self-attention": [f"{mid}_transformer_blocks_0_attn1_to_{c}" for c in "qkv"],
        "query and output of the cross-attention": [f"{mid}_transformer_blocks_0_attn2_to_q"],
        "feed-forward": [f"{mid}_transformer_blocks_0_ff_net_0_proj"],
        "projection around the attention": [f"{mid}_proj_in"],
        "convolutions and others": ["lora_unet_mid_block_resnets_0_conv1"],
    }
    extra = more([name for names in others.values() for name in names])
    loha = {f"{mid}_proj_out.hada_w1_a": ("F32", np.zeros((2, 2), "<f4"))}
    lora = write(tmp_path / "l", kohya(base, pairs) | extra | loha)
    result = import_lora(lora, model, tmp_path / "x.sepme", text_layers_only=True)
    counts = {part.what: part.count for part in result.left_out}
    wanted = {what: len(names) for what, names in others.items()}
    assert counts == wanted | {"projection around the attention (LoHa)": 1}
    kept = sum(float(np.square(up.astype(float) @ down).sum()) for up, down in pairs.values())
    lost = {
        what: sum(
            float(
                np.square(extra[f"{n}.lora_up.weight"][1] @ extra[f"{n}.lora_down.weight"][1]).sum()
            )
            for n in names
        )
        for what, names in others.items()
    }
    whole = kept + sum(lost.values())
    for part in result.left_out:
        if "LoHa" in part.what:
            assert part.share is None
        else:
            assert part.share == pytest.approx(lost[part.what] / whole, rel=1e-4)
    assert f"{1 - kept / whole:.0%}" in result.warnings[0]


def test_what_diffusers_saved_does_what_it_did_there(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    parts = small_parts("sd1")
    model = write_single_file(parts, tmp_path / "model.safetensors")
    unet = copy.deepcopy(parts.unet)
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["attn2.to_k", "attn2.to_v"])
    unet.add_adapter(replace(config, init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "saved", unet_lora_layers=get_peft_model_state_dict(unet)
    )
    pipe = pipeline(parts)
    pipe.load_lora_weights(tmp_path / "saved")
    wanted = predicted(parts, pipe.unet)
    (lora,) = (tmp_path / "saved").iterdir()
    result = import_lora(lora, model, tmp_path / "x.sepme", concept="Monet")
    apply(model, [tmp_path / "x.sepme"], tmp_path / "clean.safetensors")
    found = predicted(parts, patched_unet(parts, tmp_path / "clean.safetensors"))
    moved = distance(predicted(parts, parts.unet), wanted)
    assert result.relative_error < 1e-3
    assert distance(found, wanted) < 1e-2 * moved


def test_what_cannot_be_imported(model: Path, tmp_path: Path) -> None:
    base = base_of(model)
    pairs = random_pairs(base, rank=2)
    good = kohya(base, pairs, alpha=2.0)
    down = next(name for name in good if name.endswith("lora_down.weight"))
    module = down.split(".")[0]
    xl = make_checkpoint(tmp_path / "xl.safetensors", Shape(family="sdxl", width=96, depth=2))
    xl_base = base_of(xl)
    narrow = base_of(make_checkpoint(tmp_path / "n.safetensors"))
    dora = {f"{module}.dora_scale": ("F32", np.ones((8, 1), "<f4"))}
    zeros = {n: (d, np.zeros_like(v)) if "up" in n else (d, v) for n, (d, v) in good.items()}
    huge = {
        n: (d, v * np.float32(1e38)) if n.endswith("lora_down.weight") else (d, v)
        for n, (d, v) in good.items()
    }
    huge = {
        n: (d, v * np.float32(1e30)) if n.endswith("lora_up.weight") else (d, v)
        for n, (d, v) in huge.items()
    }
    nan = {**good, down: ("F32", np.full_like(good[down][1], np.nan))}
    halved = {name: value for name, value in good.items() if name != down}
    short = {**good, down: ("F32", good[down][1][:1])}
    elsewhere = more(["lora_te_text_model_encoder_layers_0_self_attn_k_proj"])
    cases = [
        (RefusedError, elsewhere),
        (RefusedError, zeros),
        (UnsupportedError, good | dora),
        (UnsupportedError, {"weight": ("F32", np.zeros((2, 2), "<f4"))}),
        (MismatchError, kohya(xl_base, random_pairs(xl_base, 2))),
        (MismatchError, kohya(narrow, random_pairs(narrow, 2))),
        (MalformedError, nan),
        (MalformedError, huge),
        (MalformedError, halved),
        (MalformedError, short),
    ]
    peft = dotted(pairs, *NAMES["diffusers"])
    for said in ('{"unet.lora_alpha": "8"}', '{"unet.alpha_pattern": [1]}', "{"):
        lora = write(tmp_path / "bad.safetensors", peft, {"lora_adapter_metadata": said})
        with pytest.raises(MalformedError):
            import_lora(lora, model, tmp_path / "x.sepme", text_layers_only=True)
    for error, tensors in cases:
        lora = write(tmp_path / "bad.safetensors", tensors)
        with pytest.raises(error):
            import_lora(lora, model, tmp_path / "x.sepme", text_layers_only=True)
        assert not (tmp_path / "x.sepme").exists()


def test_a_rank_beyond_what_a_patch_can_have(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m.safetensors", Shape(width=128, channels=(8, 128, 128)))
    base = base_of(model)
    lora = write(tmp_path / "l.safetensors", kohya(base, random_pairs(base, 90)))
    with pytest.raises(RefusedError, match="--error"):
        import_lora(lora, model, tmp_path / "x.sepme")
    result = import_lora(lora, model, tmp_path / "x.sepme", error=0.3)
    assert 0.01 < result.residuals[0].residual <= 0.3
    assert result.kind == "lora"


def test_hostile_titles_are_passed_over(model: Path, tmp_path: Path) -> None:
    base = base_of(model)
    said = {"modelspec.title": "\x1b[2J", "ss_output_name": " " * 9}
    lora = write(tmp_path / "Monet.safetensors", kohya(base, random_pairs(base, 2)), said)
    assert import_lora(lora, model, tmp_path / "x.sepme").concept == "Monet"

"""LoRAs of Stable Diffusion 3, Flux.1 and Wan 2.1: out of patches, and into them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    WanPipeline,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import sepme_cli as sepme
from patch_spec.base import Family
from patch_spec.container import read_patch
from sepme_cli.checkpoints.lora.names import kind_of_module
from sepme_cli.checkpoints.structure.families import FAMILIES as KNOWN
from sepme_cli.errors import MismatchError, RefusedError, UnsupportedError
from sepme_cli.increments import delta
from tests import lora_loaders
from tests.lora_files import Tensors, dotted, kohya, more, random_pairs, write
from tests.operations.test_transformers import ENTRIES, FAMILIES
from tests.small_transformers import (
    SmallTransformer,
    original_names,
    small_transformer,
    write_transformer_file,
    write_transformer_folder,
)
from tests.synthetic import additive, base_of, make_checkpoint, make_patch, operator

ROWS = {
    "sd3": "context_embedder.weight",
    "flux": "context_embedder.weight",
    "wan": "condition_embedder.text_embedder.linear_1.weight",
}
"""The target that reads the rows of the text."""


def pipeline(small: SmallTransformer) -> Any:
    """A pipeline of diffusers, for its way to load a LoRA."""
    some = {"vae": None, "text_encoder": None, "tokenizer": None}
    second = {"text_encoder_2": None, "tokenizer_2": None}
    third = {"text_encoder_3": None, "tokenizer_3": None}
    scheduler = FlowMatchEulerDiscreteScheduler()
    if small.family == "sd3":
        return StableDiffusion3Pipeline(small.transformer, scheduler, **some, **second, **third)
    if small.family == "flux":
        return FluxPipeline(scheduler, transformer=small.transformer, **some, **second)
    return WanPipeline(transformer=small.transformer, scheduler=scheduler, **some)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    name: Family = request.param
    return name


@pytest.fixture
def model(family: Family, tmp_path: Path) -> Path:
    return write_transformer_folder(small_transformer(family), tmp_path / "m") / "transformer"


@pytest.fixture
def patch(model: Path, tmp_path: Path) -> Path:
    """One increment of each kind; what the last does to the pooled text is of another rank."""
    base = base_of(model)
    parts = [
        additive(base, "Monet", seed=1, size=0.2),
        additive(base, "Klimt", seed=2, rank=5, size=0.1),
        operator(base, "Van Gogh", seed=3, size=0.5),
    ]
    if base.pooled is not None:
        other = operator(base, "x", seed=4, rank=1, size=0.5)
        streams = {n: getattr(other, n) for n in vars(other) if n.startswith("pooled_")}
        parts[2] = replace(parts[2], **streams)
    return make_patch(tmp_path / "p.sepme", base, *parts)


def fused(small: SmallTransformer, lora: Path) -> dict[str, Tensor]:
    """The transformer's weights with a LoRA that diffusers loaded and fused."""
    pipe = pipeline(small)
    pipe.load_lora_weights(str(lora))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return dict(small.transformer.state_dict())


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_diffusers_loads_what_apply_writes(
    family: Family, model: Path, patch: Path, dtype: str, tmp_path: Path
) -> None:
    lora = tmp_path / "lora.safetensors"
    result = sepme.export(patch, "peft", lora, base=model, dtype=dtype)
    sepme.apply(model, [patch], tmp_path / "out")
    wanted = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    before = dict(small_transformer(family).transformer.state_dict())
    found = fused(small_transformer(family), lora)
    changed = {name for name, value in before.items() if not torch.equal(found[name], value)}
    assert changed == set(base_of(model).targets)
    for name in changed:
        moved = (wanted[name] - before[name]).norm()
        assert moved > 0.05 * before[name].norm()
        assert (found[name] - wanted[name]).norm() < (2e-3 if dtype == "fp16" else 1e-5) * moved
    assert result.modules == len(changed)


def test_kohyas_scripts_and_comfyui_read_kohyas_format(
    family: Family, model: Path, patch: Path, tmp_path: Path
) -> None:
    """In the authors' names. (kohya's trainer of Wan reads blocks alone.)"""
    lora = tmp_path / "lora.safetensors"
    sepme.export(patch, "kohya", lora, only=["Monet", "Klimt"])
    base, parts = base_of(model), [p for p in read_patch(patch).increments if p.kind == "additive"]
    modules = [name.removesuffix(".weight") for name in ENTRIES[family]]
    for found in (
        lora_loaders.kohya_scripts(lora, modules, f"networks.lora_{family}"),
        lora_loaders.comfyui(lora, modules, 3),
    ):
        assert sorted(found) == sorted(modules)
        for module, target in zip(modules, KNOWN[family].entries["diffusers"], strict=True):
            wanted = sum(delta(part, target, np.zeros(base.shapes[target])) for part in parts)
            np.testing.assert_allclose(found[module], wanted, atol=2e-3 * np.abs(wanted).max())


def test_who_does_not_read_the_file_is_told(
    family: Family, model: Path, patch: Path, tmp_path: Path
) -> None:
    """diffusers leaves out what is in kohya's format, or fails on it."""
    lora = tmp_path / "lora.safetensors"
    result = sepme.export(patch, "kohya", lora, base=model)
    assert "for diffusers export with --to peft" in result.warnings[0]
    small = small_transformer(family)
    if family == "wan":
        with pytest.raises(Exception, match="list index out of range"):
            pipeline(small).load_lora_weights(str(lora))
    else:
        pipeline(small).load_lora_weights(str(lora))
        before = small_transformer(family).transformer.state_dict()
        now = small.transformer.state_dict()
        assert all(torch.equal(now[name], value) for name, value in before.items())
    told = sepme.export(patch, "peft", lora, base=model, force=True).warnings
    assert any("ComfyUI" in warning for warning in told) == (family == "wan")


@pytest.mark.parametrize("to", ["kohya", "peft"])
def test_what_was_exported_comes_back(
    family: Family, model: Path, patch: Path, to: Any, tmp_path: Path
) -> None:
    """What reads the rows; what reads the pooled text is counted."""
    lora, again = tmp_path / "lora.safetensors", tmp_path / "again.sepme"
    sepme.export(patch, to, lora, base=model)
    result = sepme.import_lora(lora, model, again, text_layers_only=True)
    (part,) = read_patch(again).increments
    weight = load_file(model / "diffusion_pytorch_model.safetensors")[ROWS[family]].numpy()
    wanted = sum(delta(p, ROWS[family], weight) for p in read_patch(patch).increments)
    found = delta(part, ROWS[family], weight)
    assert np.linalg.norm(found - wanted) < 1e-2 * np.linalg.norm(wanted)
    left = {one.what: one.count for one in result.left_out}
    assert left == ({} if family == "wan" else {"layer that reads the pooled text": 1})
    assert all("(context_embedder)" in warning for warning in result.warnings[:1]) or not left
    sepme.apply(model, [again], tmp_path / "out")
    sepme.revert(tmp_path / "out", [again], base=model, output=tmp_path / "back")
    assert (tmp_path / "back" / "diffusion_pytorch_model.safetensors").read_bytes() == (
        model / "diffusion_pytorch_model.safetensors"
    ).read_bytes()


def plain(target: str) -> str:
    return target.removesuffix(".weight")


def single(target: str, family: Family) -> str:
    return plain(KNOWN[family].entries["original"][target])


NAMES: dict[str, tuple[Callable[[str, Family], str], str, str]] = {
    "diffusers": (lambda t, f: f"transformer.{plain(t)}", ".lora_B.weight", ".lora_A.weight"),
    "PEFT": (lambda t, f: f"base_model.model.{plain(t)}", ".lora_B.weight", ".lora_A.weight"),
    "ComfyUI": (
        lambda t, f: f"diffusion_model.{single(t, f)}",
        ".lora_B.weight",
        ".lora_A.weight",
    ),
    "kohya": (
        lambda t, f: f"lora_unet_{single(t, f).replace('.', '_')}",
        ".lora_up.weight",
        ".lora_down.weight",
    ),
    "OneTrainer": (
        lambda t, f: f"lora_transformer_{plain(t).replace('.', '_')}",
        ".lora_up.weight",
        ".lora_down.weight",
    ),
    "LyCORIS": (
        lambda t, f: f"lycoris_{plain(t).replace('.', '_')}",
        ".lora_up.weight",
        ".lora_down.weight",
    ),
}


@pytest.mark.parametrize("names", NAMES)
def test_the_names_of_other_programs(
    names: str, family: Family, model: Path, tmp_path: Path
) -> None:
    module, up, down = NAMES[names]
    base = base_of(model)
    tensors = dotted(random_pairs(base, 2), lambda name: module(f"{name}.weight", family), up, down)
    lora = write(tmp_path / "l.safetensors", tensors)
    result = sepme.import_lora(lora, model, tmp_path / "x.sepme", text_layers_only=True)
    assert [one.name for one in result.residuals] == [ROWS[family]]
    assert result.relative_error < 1e-3
    assert [(one.what, one.count) for one in result.left_out] == [
        ("layer that reads the pooled text", 1)
    ] * (family != "wan")


def test_the_factor_in_the_metadata_of_diffusers(model: Path, tmp_path: Path) -> None:
    base = base_of(model)
    tensors = dotted(
        random_pairs(base, 2), lambda n: f"transformer.{n}", ".lora_B.weight", ".lora_A.weight"
    )
    norms = []
    for alpha in (2, 8):
        said = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": alpha})}
        lora = write(tmp_path / "l.safetensors", tensors, said)
        sepme.import_lora(lora, model, tmp_path / "x.sepme", force=True, text_layers_only=True)
        (part,) = read_patch(tmp_path / "x.sepme").increments
        (target,) = part.exponents
        norms.append(np.linalg.norm(delta(part, target, np.zeros(base.shapes[target]))))
    assert norms[1] == pytest.approx(4 * norms[0], rel=1e-3)


#: Modules as programs name them, by family, and which part each is of.
ELSEWHERE: tuple[tuple[Family, str, str], ...] = (
    ("sd3", "transformer.transformer_blocks.0.attn.add_k_proj", "attention"),
    ("sd3", "transformer.transformer_blocks.0.attn2.to_k", "attention"),
    ("sd3", "lora_unet_joint_blocks_0_context_block_attn_qkv", "attention"),
    ("sd3", "lora_unet_joint_blocks_0_x_block_mlp_fc1", "feed-forward"),
    ("sd3", "lora_unet_y_embedder_mlp_0", "layer that reads the pooled text"),
    ("sd3", "lora_unet_y_embedder_mlp_2", "embeddings"),
    ("sd3", "lora_te3_encoder_block_0_layer_0_SelfAttention_k", "text encoder"),
    ("flux", "lora_unet_double_blocks_0_txt_attn_qkv", "attention"),
    ("flux", "lora_transformer_transformer_blocks_0_attn_add_q_proj", "attention"),
    ("flux", "lora_unet_double_blocks_0_img_mlp_0", "feed-forward"),
    ("flux", "lora_unet_double_blocks_0_img_mod_lin", "modulation"),
    ("flux", "lora_unet_single_blocks_0_linear1", "attention and feed-forward in one"),
    (
        "flux",
        "transformer.single_transformer_blocks.0.proj_mlp",
        "attention and feed-forward in one",
    ),
    ("flux", "transformer.single_transformer_blocks.0.attn.to_q", "attention"),
    (
        "flux",
        "transformer.time_text_embed.text_embedder.linear_1",
        "layer that reads the pooled text",
    ),
    ("flux", "lora_unet_vector_in_out_layer", "embeddings"),
    ("flux", "lora_unet_final_layer_linear", "others"),
    ("wan", "diffusion_model.blocks.0.cross_attn.k", "attention"),
    ("wan", "transformer.blocks.0.attn2.to_k", "attention"),
    ("wan", "lora_unet_blocks_0_ffn_0", "feed-forward"),
    ("wan", "diffusion_model.text_embedding.2", "embeddings"),
    ("wan", "diffusion_model.head.head", "others"),
)


@pytest.mark.parametrize(("name", "module", "kind"), ELSEWHERE)
def test_a_lora_on_other_layers_is_refused_by_what_it_is_on(
    name: Family, module: str, kind: str, tmp_path: Path
) -> None:
    model = write_transformer_folder(small_transformer(name), tmp_path / "m") / "transformer"
    lora = write(tmp_path / "l.safetensors", more([module]))
    with pytest.raises(RefusedError, match="load it as a LoRA, or merge it") as caught:
        sepme.import_lora(lora, model, tmp_path / "x.sepme", text_layers_only=True)
    assert str(caught.value.expected).endswith(f"({plain(ROWS[name])})")
    assert caught.value.found == f"{kind}: 1 modules"
    assert not (tmp_path / "x.sepme").exists()


def test_what_a_patch_cannot_hold_is_counted(tmp_path: Path) -> None:
    model = write_transformer_folder(small_transformer("flux"), tmp_path / "m") / "transformer"
    rows = {ROWS["flux"]: random_pairs(base_of(model), 2)[ROWS["flux"]]}
    ours = dotted(rows, lambda n: f"transformer.{n}", ".lora_B.weight", ".lora_A.weight")
    others = [module for name, module, _ in ELSEWHERE if name == "flux"]
    lora = write(tmp_path / "l.safetensors", ours | more(others))
    result = sepme.import_lora(lora, model, tmp_path / "x.sepme", text_layers_only=True)
    counts = {one.what: one.count for one in result.left_out}
    assert counts == {
        kind: sum(one == kind for name, _, one in ELSEWHERE if name == "flux")
        for kind in {kind for name, _, kind in ELSEWHERE if name == "flux"}
    }
    assert sum(one.share or 0 for one in result.left_out) < 1
    assert "only the layer that reads the rows of the text (context_embedder)" in result.warnings[0]


UNETS = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"


def test_a_lora_of_another_denoiser_is_for_another_model(tmp_path: Path) -> None:
    folder = write_transformer_folder(small_transformer("flux"), tmp_path / "m")
    unet = make_checkpoint(tmp_path / "sd1.safetensors")
    base = base_of(folder)
    flux = dotted(
        random_pairs(base, 2), lambda n: f"transformer.{n}", ".lora_B.weight", ".lora_A.weight"
    )
    cases: list[tuple[Path, Tensors]] = [
        (folder, more([UNETS])),
        (folder, kohya(base_of(unet), random_pairs(base_of(unet), 2))),
        (folder, flux | more([UNETS])),
        (unet, flux),
        *((unet, more([module])) for _, module, kind in ELSEWHERE if kind == "attention"),
    ]
    for model, tensors in cases:
        lora = write(tmp_path / "l.safetensors", tensors)
        with pytest.raises(MismatchError, match="is for another model than"):
            sepme.import_lora(lora, model, tmp_path / "x.sepme")


def test_a_transformer_where_a_lora_should_be(model: Path, tmp_path: Path) -> None:
    file = model / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UnsupportedError, match=r"is a model and not a LoRA.*--edited"):
        sepme.import_lora(file, model, tmp_path / "x.sepme")


def edited(small: SmallTransformer, names: tuple[str, ...]) -> SmallTransformer:
    """The model with something of rank 2 added to these weights."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name in names:
            weight = small.transformer.get_parameter(name)
            up = torch.randn(weight.shape[0], 2, generator=generator)
            weight += 0.1 * up @ torch.randn(2, weight.shape[1], generator=generator)
    return small


ATTENTION = {
    "sd3": ("transformer_blocks.0.attn.to_k.weight", "transformer_blocks.1.attn.to_v.weight"),
    "flux": ("transformer_blocks.0.attn.to_k.weight", "transformer_blocks.1.attn.to_v.weight"),
    "wan": ("blocks.0.attn2.to_k.weight", "blocks.1.attn2.to_v.weight"),
}
AUTHORS = {"sd3": "joint_blocks.0.", "flux": "double_blocks.0.", "wan": "blocks.0.cross_attn."}
"""Parts of names that their authors give to what is in the first block."""


@pytest.mark.parametrize("single_file", [False, True])
def test_an_edited_transformer(family: Family, single_file: bool, tmp_path: Path) -> None:
    """Its layer for the rows becomes a patch; the rest that differs is counted."""

    def written(small: SmallTransformer, name: str) -> Path:
        if single_file:
            return write_transformer_file(small, tmp_path / f"{name}.safetensors")
        return write_transformer_folder(small, tmp_path / name)

    base = written(small_transformer(family), "base")
    after = edited(small_transformer(family), (ROWS[family], *ATTENTION[family]))
    result = sepme.extract(
        base, written(after, "edited"), tmp_path / "x.sepme", concept="Monet", text_layers_only=True
    )
    assert [one.name for one in result.residuals] == [ROWS[family]]
    assert [(one.what, one.count) for one in result.left_out] == [("transformer, other tensors", 2)]
    assert any(f"({plain(ROWS[family])})" in warning for warning in result.warnings)
    (part,) = read_patch(tmp_path / "x.sepme").increments
    weight = small_transformer(family).transformer.get_parameter(ROWS[family]).detach()
    wanted = after.transformer.get_parameter(ROWS[family]).detach() - weight
    found = torch.from_numpy(delta(part, ROWS[family], weight.numpy()))
    assert (found - wanted).norm() < 1e-2 * wanted.norm()


def test_a_transformer_that_was_edited_elsewhere_is_refused(family: Family, tmp_path: Path) -> None:
    base = write_transformer_folder(small_transformer(family), tmp_path / "base")
    other = edited(small_transformer(family), ATTENTION[family])
    after = write_transformer_folder(other, tmp_path / "edited")
    with pytest.raises(RefusedError, match="keep the edited model") as caught:
        sepme.extract(base, after, tmp_path / "x.sepme", text_layers_only=True)
    assert f"({plain(ROWS[family])})" in str(caught.value)
    assert caught.value.found == "transformer, other tensors: 2"
    with pytest.raises(RefusedError, match=r"nothing to extract$"):
        sepme.extract(base, base / "transformer", tmp_path / "x.sepme")
    assert not (tmp_path / "x.sepme").exists()


@pytest.mark.parametrize("original", [False, True])
def test_the_edited_weights_alone(family: Family, original: bool, tmp_path: Path) -> None:
    """In the names of diffusers or of the authors; also where the layer is not among them."""
    small = small_transformer(family)
    base = write_transformer_folder(small, tmp_path / "base")
    after = edited(small_transformer(family), (ROWS[family], *ATTENTION[family]))
    name = KNOWN[family].entries["original"][ROWS[family]] if original else ROWS[family]
    rows = (original_names(after) if original else after.transformer.state_dict())[name]
    rest = {n: after.transformer.get_parameter(n).detach() for n in ATTENTION[family]}
    save_file({f"model.diffusion_model.{name}": rows, **rest}, tmp_path / "e.safetensors")
    result = sepme.extract(
        base, tmp_path / "e.safetensors", tmp_path / "x.sepme", text_layers_only=True
    )
    assert [one.name for one in result.residuals] == [ROWS[family]]
    assert [(one.what, one.count) for one in result.left_out] == [("other tensors", 2)]
    authors = {n: v for n, v in original_names(after).items() if AUTHORS[family] in n}
    for others, prefix in ((rest, ""), (rest, "transformer."), (authors, "diffusion_model.")):
        save_file({prefix + n: v for n, v in others.items()}, tmp_path / "e.safetensors")
        with pytest.raises(RefusedError, match="keep the edited model") as caught:
            sepme.extract(
                base, tmp_path / "e.safetensors", tmp_path / "y.sepme", text_layers_only=True
            )
        assert caught.value.found == f"other tensors: {len(others)}"


def test_modules_that_no_family_shares_are_told_apart() -> None:
    """What XL's UNet reads the pooled text with, in both namings."""
    for name in ("lora_unet_label_emb_0_0", "unet.add_embedding.linear_1"):
        assert kind_of_module(name, KNOWN["sdxl"]) == "layer that reads the pooled text"

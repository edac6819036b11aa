"""Pruned and distilled models: fewer attentions, fewer heads in some, whole blocks less.

They are cut as APTP and BK-SDM cut theirs: in memory, where they still run, so that a patch can be
held against what it should do to their predictions.
"""

import io
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from patch_spec.compose import compose
from patch_spec.container import patch_bytes
from patch_spec.increment import Increment
from patch_spec.manifest import Patch
from sepme_cli.errors import MismatchError, UnsupportedError
from sepme_cli.evaluation.protocol import SamplingOptions
from sepme_cli.operations.apply import apply
from sepme_cli.operations.diff import diff
from sepme_cli.operations.erase import erase
from sepme_cli.operations.evaluate import evaluate
from sepme_cli.operations.inspect import CheckpointInfo, inspect
from sepme_cli.operations.patched import patched
from sepme_cli.operations.revert import revert
from sepme_cli.operations.sample import sample
from sepme_cli.operations.verify import VerifyResult, verify
from tests.diffusion.test_law import moved
from tests.keys import by_hand, line, make_key
from tests.small_model import Parts, small_parts, write_folder, write_single_file
from tests.synthetic import additive, base_of, layered, lora, make_patch, operator, raw_tensors

Cut = Callable[[UNet2DConditionModel], None]


class Nothing(nn.Module):
    """What stands where a block was: it has no weights, and hands on what it is given."""

    def __init__(self, *, attention: bool) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden: Tensor, *_: object, **__: object) -> Tensor | tuple[Tensor]:
        return (hidden,) if self.attention else hidden


def shorter(linear: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> Any:
    """Some rows, or some columns, of a layer."""
    weight, bias = linear.weight.detach(), linear.bias
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias.detach()[rows]
    if columns is not None:
        weight = weight[:, columns]
    found = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    found.weight = nn.Parameter(weight.clone())
    if bias is not None:
        found.bias = nn.Parameter(bias.detach().clone())
    return found


def transformer_blocks(unet: UNet2DConditionModel) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in unet.named_modules() if n.endswith("transformer_blocks.0")]


def fewer_heads(unet: UNet2DConditionModel) -> None:
    """As APTP: every attention keeps its own number of heads, and every feed-forward of units."""
    for i, (_, block) in enumerate(transformer_blocks(unet)):
        for attention in (block.attn1, block.attn2):
            kept, width = max(1, attention.heads - i), len(attention.to_q.weight) // attention.heads
            inner = torch.arange(kept * width) + (attention.heads - kept) * width
            for name in ("to_q", "to_k", "to_v"):
                setattr(attention, name, shorter(getattr(attention, name), rows=inner))
            attention.to_out[0] = shorter(attention.to_out[0], columns=inner)
            attention.heads = kept
        whole = block.ff.net[2].in_features
        kept_units = torch.arange(whole - 8 * (i + 1))
        both_halves = torch.cat([kept_units, kept_units + whole])
        block.ff.net[0].proj = shorter(block.ff.net[0].proj, rows=both_halves)
        block.ff.net[2] = shorter(block.ff.net[2], columns=kept_units)


def fewer_attentions(unet: UNet2DConditionModel) -> None:
    """A cross-attention less in the middle, and one on the way up."""
    for name, block in transformer_blocks(unet):
        if name.startswith(("mid_block.", "up_blocks.0.attentions.1.")):
            block.attn2 = block.norm2 = None


def fewer_blocks(unet: UNet2DConditionModel) -> None:
    """As BK-SDM and APTP: residual layers and attentions that are gone whole."""
    unet.down_blocks[0].resnets[0] = Nothing(attention=False)
    unet.mid_block.resnets[1] = Nothing(attention=False)
    unet.mid_block.attentions[0] = Nothing(attention=True)
    unet.up_blocks[0].attentions[1] = Nothing(attention=True)


def all_of_it(unet: UNet2DConditionModel) -> None:
    fewer_heads(unet)
    fewer_blocks(unet)
    unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2 = None
    unet.down_blocks[1].attentions[0].transformer_blocks[0].norm2 = None


CUTS: Mapping[str, Cut] = {
    "attentions": fewer_attentions,
    "heads": fewer_heads,
    "blocks": fewer_blocks,
    "all": all_of_it,
}
FAMILIES = ("sd1", "sd2")
MODELS = tuple(zip(FAMILIES, ("single file", "folder"), strict=True))
LEFT = {"attentions": 4, "heads": 8, "blocks": 4, "all": 2}
"""How many keys and values each leaves of the eight."""


def written(parts: Parts, layout: str, path: Path) -> Path:
    path.mkdir()
    if layout == "single file":
        return write_single_file(parts, path / "model.safetensors")
    folder = write_folder(parts, path / "model")
    config = folder / "unet" / "config.json"
    said = json.loads(config.read_text()) | {"_class_name": "UNet2DConditionModelPruned"}
    config.write_text(json.dumps(said))
    return folder


def cut(family: str, how: str) -> Parts:
    parts = small_parts(family)
    CUTS[how](parts.unet)
    return parts


@pytest.fixture(scope="module", params=MODELS, ids=" ".join)
def kind(request: pytest.FixtureRequest) -> tuple[str, str]:
    family, layout = request.param
    return family, layout


@pytest.fixture(scope="module")
def full(kind: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, layout = kind
    return written(small_parts(family), layout, tmp_path_factory.mktemp("full") / "m")


@pytest.fixture(scope="module", params=CUTS)
def how(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pruned(kind: tuple[str, str], how: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, cut. Do not write to it."""
    family, layout = kind
    return written(cut(family, how), layout, tmp_path_factory.mktemp("pruned") / "m")


def weights(model: Path) -> Path:
    inner = model / "unet" / "diffusion_pytorch_model.safetensors"
    return inner if model.is_dir() else model


def all_bytes(model: Path) -> dict[str, bytes]:
    if model.is_file():
        return {"": model.read_bytes()}
    return {str(p.relative_to(model)): p.read_bytes() for p in model.rglob("*") if p.is_file()}


def failed(result: VerifyResult) -> list[str]:
    assert result.ok == all(check.ok for check in result.checks)
    return [check.name for check in result.checks if not check.ok]


def operator_for(base: Path, path: Path) -> tuple[Increment, Path]:
    known = base_of(base)
    part = operator(known, "Monet", seed=1)
    return part, make_patch(path, known, part)


# Patches of the full model


def test_an_operator_of_the_full_model(full: Path, pruned: Path, how: str, tmp_path: Path) -> None:
    """Applied to all keys and values that are left, verified, and put back."""
    part, patch = operator_for(full, tmp_path / "o.sepme")
    out, statement = tmp_path / f"out{pruned.suffix}", tmp_path / "out.json"
    result = apply(pruned, patch, out, statement=statement)
    assert (result.base_match, result.exact) == ("family", True)
    assert result.tensors_changed == LEFT[how]
    before, after = raw_tensors(weights(pruned)), raw_tensors(weights(out))
    values = load_file(weights(pruned))
    targets = {name for name in before if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    assert len(targets) == LEFT[how]
    assert before.keys() == after.keys()
    for name, stored in before.items():
        if name not in targets:
            assert after[name] == stored
            continue
        weight = values[name].numpy()
        # Whatever the target is called, an operator's dW is of the weight alone (section 8).
        expected = compose(weight, [(part, 1.0)], "mid_block.attn2.to_k.weight")
        assert after[name] == ("F32", expected.tobytes())
        assert part.shift is not None
        way = np.ldexp(part.shift.astype(float), part.shift_exponent) @ part.basis.astype(float)
        law = weight.astype(float) @ (np.eye(len(way)) + way)
        moved_by = np.abs(law - weight).max()
        assert np.abs(expected - law).max() < 1e-3 * moved_by
    key = make_key(tmp_path / "key")
    for file in (patch, statement):
        by_hand(file, key)
    signers = tmp_path / "signers"
    signers.write_text(line("me@example.org", key, 'namespaces="sepme"') + "\n")
    found = verify([out, patch], base=pruned, statement=statement, allowed_signers=signers)
    assert failed(found) == []
    assert found.unchecked == ()
    assert failed(verify([out, patch])) == []
    revert(out, base=pruned, output=tmp_path / f"back{pruned.suffix}")
    assert all_bytes(tmp_path / f"back{pruned.suffix}") == all_bytes(pruned)


def test_what_was_cut_after_it_was_patched_is_not_what_was_written(
    full: Path, tmp_path: Path
) -> None:
    """Of fewer attentions the base says whether they were ever there."""
    _, patch = operator_for(full, tmp_path / "o.sepme")
    out = tmp_path / f"out{full.suffix}"
    apply(full, patch, out)
    tensors, record = load_file(weights(out)), safe_open(weights(out), "pt").metadata()
    left = {n: v for n, v in tensors.items() if not re.search(r"mid(dle)?_block\..*attn2", n)}
    assert len(left) < len(tensors)
    save_file(left, weights(out), metadata=record)
    assert failed(verify([out, patch], base=full)) == ["weights"]


@pytest.mark.parametrize("how", ["all"], indirect=True)
def test_in_place(full: Path, pruned: Path, tmp_path: Path) -> None:
    before, own = all_bytes(pruned), tmp_path / pruned.name
    (shutil.copytree if pruned.is_dir() else shutil.copy)(pruned, own)
    _, patch = operator_for(full, tmp_path / "o.sepme")
    apply(own, patch, in_place=True)
    assert all_bytes(own) != before
    found = verify([own, patch])
    assert failed(found) == [] and "weights" in {check.name for check in found.checks}
    revert(own, in_place=True)
    after = all_bytes(own)
    assert {name: after[name] for name in before} == before


def test_what_is_missing_is_told(full: Path, pruned: Path, how: str, tmp_path: Path) -> None:
    _, patch = operator_for(full, tmp_path / "o.sepme")
    result = diff(pruned, patch)
    assert (result.base_match, result.same, result.changed) == ("family", False, LEFT[how])
    warned = [warning for warning in result.warnings if "of the 8 keys and values" in warning]
    assert len(warned) == 1 and "pruned or distilled" in warned[0]
    assert any("sepme evaluate" in warning for warning in result.warnings)
    info = inspect(pruned)
    assert isinstance(info, CheckpointInfo)
    assert info.targets == LEFT[how]
    apart = diff(full, pruned)
    assert bool(apart.only_in_a) == (how != "heads") and not apart.only_in_b
    lost = [
        name
        for name in apart.only_in_a
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    ]
    assert len(lost) == 8 - LEFT[how]
    # A tensor of two shapes is named, and has no numbers.
    assert {t.max_abs for t in apart.tensors} == ({None} if how in ("heads", "all") else set())


@pytest.mark.parametrize("make", [additive, lora])
def test_what_is_made_for_each_weight_is_refused(
    make: Callable[..., Increment], full: Path, pruned: Path, how: str, tmp_path: Path
) -> None:
    """Its rows are the full model's heads: there is no saying which of them are left."""
    known = base_of(full)
    patch = make_patch(tmp_path / "a.sepme", known, make(known, "Monet", seed=1))
    before, out = all_bytes(pruned), tmp_path / f"out{pruned.suffix}"
    with pytest.raises(MismatchError, match="does not have in that shape") as caught:
        apply(pruned, patch, out)
    assert caught.value.expected == f"[128, {known.width}]"
    rows = {"sd1": 80, "sd2": 64}[known.family]
    expected = f"[{rows}, {known.width}]" if how == "heads" else "no such tensor"
    assert caught.value.found == expected
    assert "operator" in caught.value.message
    with pytest.raises(MismatchError):
        apply(pruned, patch, in_place=True)
    with pytest.raises(MismatchError):
        diff(pruned, patch)
    assert failed(verify([pruned, patch])) == [f"{patch}: fits", f"{patch}: applied"]
    assert all_bytes(pruned) == before
    assert not out.exists()


@torch.no_grad()
def test_predictions_follow_the_law(full: Path, kind: tuple[str, str], how: str) -> None:
    """A network in memory with an operator predicts from e what it did from e (I + T)^T."""
    family, _ = kind
    unet = cut(family, how).unet
    known = base_of(full)
    part = operator(known, "Monet", seed=1)
    patch = io.BytesIO(
        patch_bytes(Patch(base=known, increments=(part,), separable_from=("",), tool="test 1"))
    )
    rows = torch.randn(2, 5, known.width, generator=torch.Generator().manual_seed(1))
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))

    def predicted(states: Tensor) -> Tensor:
        found: Tensor = unet(noisy, 500, states).sample
        return found

    before, expected = predicted(rows), predicted(moved(part, {"tokens": rows})["tokens"])
    with patched(unet, patch):
        found = predicted(rows)
    change = (expected - before).norm()
    assert change > 1e-3 * before.norm()
    assert (found - expected).norm() < 2e-3 * change
    assert predicted(rows).equal(before)


@pytest.mark.parametrize("how", ["all"], indirect=True)
def test_one_that_changes_the_text_encoder_alone(full: Path, pruned: Path, tmp_path: Path) -> None:
    """Cut or whole, every UNet reads its text through it: nothing stays behind."""
    encoder = {"sd1": "clip_l", "sd2": "clip_h"}
    for made_of, used_on in ((full, pruned), (pruned, full)):
        family = base_of(made_of, text_encoders=False).family
        layer = f"{encoder[family]}.encoder.layers.0.mlp.fc1.weight"
        known = base_of(made_of, layers=[layer])
        patch = make_patch(tmp_path / "t.sepme", known, layered(known, "Monet", seed=1))
        out = tmp_path / f"{made_of.parent.parent.name}{used_on.suffix}"
        assert apply(used_on, patch, out).tensors_changed == 1
        assert failed(verify([out, patch], base=used_on)) == []


# Patches of the pruned model itself


def test_a_patch_of_its_own(pruned: Path, how: str, tmp_path: Path) -> None:
    """The closed form needs the text encoder, and never runs the UNet."""
    patch, out = tmp_path / "p.sepme", tmp_path / f"out{pruned.suffix}"
    erase(pruned, ["style:Monet"], output=patch)
    assert failed(verify([patch], model=pruned)) == []
    result = apply(pruned, patch, out)
    assert (result.base_match, result.tensors_changed) == ("same-values", LEFT[how])
    assert result.warnings == ()
    assert failed(verify([out, patch], base=pruned)) == []
    revert(out, base=pruned, output=tmp_path / f"back{pruned.suffix}")
    assert all_bytes(tmp_path / f"back{pruned.suffix}") == all_bytes(pruned)


@pytest.mark.parametrize("make", [additive, lora])
def test_one_for_each_of_its_weights(
    make: Callable[..., Increment], full: Path, pruned: Path, how: str, tmp_path: Path
) -> None:
    """Exact on itself; on the full one refused by its shapes, or said to leave some as they are."""
    known = base_of(pruned)
    patch = make_patch(tmp_path / "a.sepme", known, make(known, "Monet", seed=1))
    out, whole = tmp_path / f"out{pruned.suffix}", tmp_path / f"whole{pruned.suffix}"
    assert apply(pruned, patch, out).base_match == "same-values"
    assert failed(verify([out, patch], base=pruned)) == []
    if how in ("heads", "all"):
        with pytest.raises(MismatchError, match="does not have in that shape"):
            apply(full, patch, whole)
        assert not whole.exists()
    else:
        assert any("may remain" in warning for warning in apply(full, patch, whole).warnings)
        assert failed(verify([whole, patch], base=full)) == [f"{patch}: fits"]


@pytest.mark.parametrize("how", ["all"], indirect=True)
def test_a_patch_of_it_carries_over_to_the_full_model(
    full: Path, pruned: Path, tmp_path: Path
) -> None:
    _, patch = operator_for(pruned, tmp_path / "o.sepme")
    out = tmp_path / f"out{full.suffix}"
    assert apply(full, patch, out).tensors_changed == 8
    assert failed(verify([out, patch], base=full)) == []


# What runs the UNet

SAMPLING = SamplingOptions(images=2, steps=1, restore=0)


@pytest.mark.parametrize("how", ["heads", "blocks"], indirect=True)
def test_what_must_run_a_network_that_diffusers_cannot_is_refused(
    pruned: Path, tmp_path: Path
) -> None:
    _, patch = operator_for(pruned, tmp_path / "o.sepme")

    def drawn() -> object:
        return sample(pruned, ["ink"], output=tmp_path / "s.png", sampling=SAMPLING)

    def evaluated() -> object:
        return evaluate(
            pruned, patch, judge="tests.small_judge:judge", report=tmp_path / "r", sampling=SAMPLING
        )

    def learnt() -> object:
        return erase(pruned, ["style:Monet"], output=tmp_path / "p.sepme", method="sepme")

    before = sorted(tmp_path.iterdir())
    for run in (drawn, evaluated, learnt):
        with pytest.raises(UnsupportedError, match="closed form") as caught:
            run()
        assert caught.value.expected and caught.value.found
        assert caught.value.file == str(pruned)
        assert sorted(tmp_path.iterdir()) == before


DISTILLED: dict[str, dict[str, Any]] = {
    "BK-SDM-Base": {},
    "BK-SDM-Small": {"mid_block_type": None},
    "tiny-SD": {
        "block_out_channels": (64, 128, 128),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        "mid_block_type": None,
    },
    "SDXS": {
        "block_out_channels": (64, 128, 128),
        "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
        "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
        "mid_block_type": None,
    },
    "no attention in the middle": {"mid_block_type": "UNetMidBlock2D"},
    "one attention": {"down_block_types": ("DownBlock2D",) * 2, "mid_block_type": None},
}
"""How distilled models differ from the full one, scaled down: that has two layers in each block."""


def of_the_full(family: str, path: Path) -> Path:
    """A patch of the model that was distilled, which has more of everything."""
    config = {**small_parts(family).unet.config, "layers_per_block": 2}
    UNet2DConditionModel.from_config(config).save_pretrained(path)
    return operator_for(path, path.with_suffix(".sepme"))[1]


def distilled(case: str, family: str) -> Parts:
    parts = small_parts(family)
    config = {**parts.unet.config, **DISTILLED[case]}
    if family == "sd2":
        config["attention_head_dim"] = [wide // 64 for wide in config["block_out_channels"]]
    return replace(parts, unet=UNet2DConditionModel.from_config(config).eval())


@pytest.mark.parametrize(("case", "family"), list(zip(DISTILLED, FAMILIES * 3, strict=True)))
def test_distilled_models_generate(case: str, family: str, tmp_path: Path) -> None:
    """In one file, which says nothing of what its UNet is like."""
    patch = of_the_full(family, tmp_path / "full")
    model = written(distilled(case, family), "single file", tmp_path / "m")
    result = sample(model, ["ink"], output=tmp_path / "s.png", sampling=SAMPLING, patches=[patch])
    assert result.images == 2 * SAMPLING.images


@pytest.mark.parametrize(("family", "layout"), MODELS)
def test_distilled_models_are_evaluated(family: str, layout: str, tmp_path: Path) -> None:
    patch = of_the_full(family, tmp_path / "full")
    model = written(distilled("SDXS", family), layout, tmp_path / "m")
    found = evaluate(
        model, patch, judge="tests.small_judge:judge", report=tmp_path / "r", sampling=SAMPLING
    )
    assert found.concepts["Monet"].n == SAMPLING.images
    assert any("pruned or distilled" in warning for warning in found.warnings)

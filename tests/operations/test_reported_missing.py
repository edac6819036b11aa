"""Keys and values that a patch does not reach: named, wherever they are, and never called out."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.errors import MismatchError, RefusedError, UnsupportedError
from sepme_cli.operations.apply import apply
from sepme_cli.operations.deltas import deltas
from sepme_cli.operations.patched import patched
from sepme_cli.operations.verify import verify
from tests.layouts import (
    UNET,
    Tensors,
    cast_to,
    parts,
    scaled,
    to_torch,
    write_folder,
    write_shards,
)
from tests.small_model import SMALL, small_unet
from tests.synthetic import (
    additive,
    base_of,
    checkpoint_tensors,
    make_patch,
    make_patches,
    operator,
    write_safetensors,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"

# Copies in a model's folder

Copy = Callable[[Path], Path]


def copied(place: str) -> Copy:
    """The UNet's file once more, there."""

    def make(model: Path) -> Path:
        path = model / place
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(model / "unet" / WEIGHTS, path)
        return path

    return make


def written(place: str, change: Callable[[Tensors], Tensors]) -> Copy:
    def make(model: Path) -> Path:
        path = model / place
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_safetensors(path, change(checkpoint_tensors()))

    return make


def pickled(place: str, *, archive: bool = True) -> Copy:
    def make(model: Path) -> Path:
        path = model / place
        path.parent.mkdir(parents=True, exist_ok=True)
        unet = parts(checkpoint_tensors())["unet"]
        state = {name: to_torch(value) for name, (_, value) in unet.items()}
        torch.save(state, path, _use_new_zipfile_serialization=archive)
        return path

    return make


def unreadable(place: str) -> Copy:
    def make(model: Path) -> Path:
        path = model / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"weights")
        return path

    return make


def shard(model: Path) -> Path:
    (model / "unet_ema").mkdir()
    write_shards(model / "unet_ema", parts(checkpoint_tensors())["unet"], 2)
    (model / "unet_ema" / "diffusion_pytorch_model-00001-of-00002.safetensors").unlink()
    return model / "unet_ema" / "diffusion_pytorch_model-00002-of-00002.safetensors"


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + n: v for n, v in parts(tensors)["unet"].items()}


COPIES: dict[str, Copy] = {
    "train_text_to_image --use_ema": copied(f"unet_ema/{WEIGHTS}"),
    "a backup": copied(f"unet.bak/{WEIGHTS}"),
    "a backup beside it": copied(f"unet/{WEIGHTS}.old"),
    "another name beside it": copied("unet/non_ema.safetensors"),
    "a checkpoint of training": copied(f"checkpoint-500/unet/{WEIGHTS}"),
    "accelerate's state": copied("checkpoint-500/model.safetensors"),
    "a name that says nothing": copied("old/a.safetensors"),
    "a single file": written("other.safetensors", lambda tensors: tensors),
    "names without dots": written(
        "ema/a.safetensors",
        lambda _: {n: v for n, v in checkpoint_tensors(ema="F32").items() if "model_ema" in n},
    ),
    "unknown prefix": written("avg/a.safetensors", prefixed("averaged.of.")),
    "quantised": written("q/a.safetensors", lambda t: cast_to(prefixed("")(t), "F8_E4M3")),
    "a shard": shard,
    "a pickle": pickled("unet_ema/diffusion_pytorch_model.bin"),
    "a pickle anywhere": pickled("checkpoint-500/pytorch_model.bin"),
    "an old pickle": pickled("checkpoint-500/pytorch_model.bin", archive=False),
    "Flax": unreadable("unet_ema/diffusion_flax_model.msgpack"),
    "a damaged copy": unreadable(f"unet_ema/{WEIGHTS}"),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", checkpoint_tensors())


@pytest.fixture
def patches(model: Path, tmp_path: Path) -> list[Path]:
    (tmp_path / "patches").mkdir()
    return make_patches(tmp_path / "patches", model, ["Monet", "Klimt"])


def failing(*named: Path, base: Path | None = None) -> set[str]:
    return {check.name for check in verify(named, base=base).checks if not check.ok}


@pytest.mark.parametrize("case", COPIES)
def test_copies_of_a_unet_in_its_models_folder(
    case: str, model: Path, patches: list[Path], tmp_path: Path
) -> None:
    copy = COPIES[case](model)
    bytes_before = copy.read_bytes()
    out = tmp_path / "out"
    warnings = apply(model, patches, out).warnings
    assert [str(copy) in warning for warning in warnings].count(True) == 1
    assert not (out / copy.relative_to(model)).exists()
    assert failing(out, *patches, base=model) == set()
    warnings = apply(model, patches, in_place=True).warnings
    assert [str(copy) in warning for warning in warnings].count(True) == 1
    assert copy.read_bytes() == bytes_before
    assert failing(model, *patches) == {"other copies"}


def test_a_copy_that_is_patched_as_well(model: Path, patches: list[Path]) -> None:
    copied(f"unet_ema/{WEIGHTS}")(model)
    apply(model, patches, in_place=True)
    apply(model / "unet_ema", patches[:1], in_place=True)
    assert failing(model) == {"other copies"}
    apply(model / "unet_ema", patches[1:], in_place=True)
    assert failing(model) == set()


OTHERS: dict[str, Callable[[Tensors], Tensors]] = {
    "a ControlNet": lambda t: {
        **{n: v for n, v in parts(t)["unet"].items() if "up_blocks" not in n},
        "controlnet_cond_embedding.conv_in.weight": ("F16", np.zeros((8, 3, 3, 3), "<f2")),
    },
    "a VAE": lambda t: parts(t)["vae"],
    "a LoRA": lambda t: {
        f"unet.{n.removesuffix('.weight')}.lora_A.weight": v
        for n, v in parts(t)["unet"].items()
        if "attn2.to_k" in n
    },
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_no_copy_stays(case: str, model: Path, patches: list[Path], tmp_path: Path) -> None:
    path = written(f"other/{WEIGHTS}", OTHERS[case])(model)
    (model / "p.sepme").write_bytes(patches[0].read_bytes())
    assert apply(model, patches, tmp_path / "out").warnings == ()
    assert (tmp_path / "out" / path.relative_to(model)).read_bytes() == path.read_bytes()
    assert (tmp_path / "out" / "p.sepme").exists()
    assert failing(tmp_path / "out", *patches, base=model) == set()


SECOND: dict[str, Callable[[Tensors], Tensors]] = {
    "an average with dots": prefixed("ema_model."),
    "a pipeline's": prefixed("unet."),
    "an average by another name": lambda t: {
        f"model_ema.module{n.replace('.', '')}": v for n, v in parts(t)["unet"].items()
    },
}


@pytest.mark.parametrize("case", SECOND)
def test_a_second_unet_in_one_file(case: str, tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    plain = write_safetensors(tmp_path / "plain.safetensors", tensors)
    path = write_safetensors(tmp_path / "m.safetensors", tensors | SECOND[case](tensors))
    for patch in make_patches(tmp_path, plain, ["Monet", "Klimt"]):
        out = tmp_path / f"{patch.stem}.safetensors"
        assert any("another UNet too" in w for w in apply(path, patch, out).warnings)
        assert failing(out, patch, base=path) == {f"{patch}: fits", "other copies"}


# A UNet that is not whole, or not where it should be

Rename = Callable[[str], str | None]


def without(part: str) -> Rename:
    return lambda name: None if part in name else name


def renamed(old: str, new: str) -> Rename:
    return lambda name: re.sub(old, new, name)


NOT_WHOLE: dict[str, Rename] = {
    "no values in one layer": without("middle_block.1.transformer_blocks.0.attn2.to_v"),
    "no keys in one layer": without("input_blocks.3.1.transformer_blocks.0.attn2.to_k"),
    "neither": lambda n: without("to_k")(n) and without("to_v")(n) if "middle_block" in n else n,
    "packed": renamed(r"(middle_block.*attn2\.to_k)\.weight", r"\1.weight_packed"),
    "qweight": renamed(r"(middle_block.*attn2\.to_k)\.weight", r"\1.qweight"),
    "PEFT": renamed(r"(middle_block.*attn2\.to_v)\.weight", r"\1.base_layer.weight"),
    "a block compiled": renamed(r"middle_block\.1\.", "middle_block.1._orig_mod."),
    "a layer compiled": renamed(r"(middle_block.*attn2\.to_v)", r"\1._orig_mod"),
    "an attention compiled": renamed(r"(middle_block.*attn2)", r"\1._orig_mod"),
}


@pytest.mark.parametrize("naming", ["ldm", "diffusers"])
@pytest.mark.parametrize("case", NOT_WHOLE)
def test_a_unet_that_lacks_keys_or_values(case: str, naming: str, tmp_path: Path) -> None:
    plain = checkpoint_tensors()
    base = write_safetensors(tmp_path / "base.safetensors", plain)
    patches = make_patches(tmp_path, base, ["Monet", "Klimt"])
    tensors = {n: v for name, v in plain.items() if (n := NOT_WHOLE[case](name)) is not None}
    if naming == "diffusers":
        change = NOT_WHOLE[case]
        unet = {n: v for n, v in parts(plain)["unet"].items()}
        as_ldm = {n: f"{UNET}{n}" for n in unet}
        tensors = {}
        for name, value in unet.items():
            # The same place under diffusers' names.
            told = change(
                as_ldm[name]
                .replace("mid_block.attentions.0", "middle_block.1")
                .replace("down_blocks.1.attentions.0", "input_blocks.3.1")
            )
            if told is not None:
                back = told.replace("middle_block.1", "mid_block.attentions.0").replace(
                    "input_blocks.3.1", "down_blocks.1.attentions.0"
                )
                tensors[back.removeprefix(UNET)] = value
    path = write_safetensors(tmp_path / "m.safetensors", tensors)
    for patch in patches:
        with pytest.raises(UnsupportedError, match="not where a Stable Diffusion has them") as e:
            apply(path, patch, tmp_path / "out.safetensors")
        assert e.value.expected and e.value.found and e.value.file == str(path)
        with pytest.raises(UnsupportedError):
            verify([path, patch])
    assert not (tmp_path / "out.safetensors").exists()


def test_a_model_with_fewer_attentions_is_not_the_base(tmp_path: Path) -> None:
    """As distilled ones are: an operator fits, and what is made for each layer does not."""
    plain = checkpoint_tensors()
    base = write_safetensors(tmp_path / "base.safetensors", plain)
    fewer = {n: v for n, v in plain.items() if f"{UNET}middle_block.1." not in n}
    path = write_safetensors(tmp_path / "m.safetensors", fewer)
    known = base_of(base)
    layered = make_patch(tmp_path / "a.sepme", known, additive(known, "Monet", seed=1))
    anywhere = make_patch(tmp_path / "o.sepme", known, operator(known, "Klimt", seed=1))
    out = tmp_path / "out.safetensors"
    with pytest.raises(MismatchError, match="does not have"):
        apply(path, layered, out)
    result = apply(path, anywhere, out)
    assert result.base_match == "family"
    assert any("12 of the 14 keys and values" in warning for warning in result.warnings)
    assert failing(out, anywhere, base=path) == set()
    more = make_patch(
        tmp_path / "more.sepme", base_of(path), additive(base_of(path), "Monet", seed=1)
    )
    result = apply(base, more, tmp_path / "more.safetensors")
    assert result.base_match == "family"
    assert failing(tmp_path / "more.safetensors", more, base=base) == {f"{more}: fits"}


# Scales of fp8

SPELLINGS = (
    *(".scale_weights", ".weight_scale_inv", ".scale", ".w_scale", ".weight.scale", "_scale"),
    *(".weight_scale_2", ".weight_quantizer._scale", ".quant_state", ".absmax", ".zero_point"),
)


@pytest.mark.parametrize("every", [True, False], ids=["all layers", "one layer"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_scales_of_another_spelling_are_not_overlooked(
    spelling: str, every: bool, tmp_path: Path
) -> None:
    base = write_safetensors(tmp_path / "base.safetensors", checkpoint_tensors())
    (patch,) = make_patches(tmp_path, base, ["Monet"])
    known = scaled(checkpoint_tensors())
    ours = "middle_block.1.transformer_blocks.0.attn2.to_k"
    tensors = {
        n.replace(".scale_weight", spelling) if every or ours in n else n: v
        for n, v in known.items()
    }
    path = write_safetensors(tmp_path / "m.safetensors", tensors)
    with pytest.raises(UnsupportedError, match="may scale") as caught:
        apply(path, patch, tmp_path / "out.safetensors")
    assert spelling in (caught.value.found or "")
    assert not (tmp_path / "out.safetensors").exists()


def test_two_scales_of_one_weight(tmp_path: Path) -> None:
    tensors = scaled(checkpoint_tensors())
    more = {n.replace(".scale_weight", ".weight_scale"): v for n, v in tensors.items()}
    path = write_safetensors(tmp_path / "m.safetensors", tensors | more)
    with pytest.raises(UnsupportedError, match="may scale"):
        open_checkpoint(path)


def test_what_is_no_scale_beside_fp8(tmp_path: Path) -> None:
    tensors = scaled(checkpoint_tensors())
    layer = f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k"
    half = np.zeros((2, 24), ml_dtypes.bfloat16)
    more: Tensors = {
        f"{layer}.bias": ("BF16", half[0]),
        f"{layer}.lora_A.weight": ("BF16", half),
        f"{layer}_ip.weight": ("BF16", half),
    }
    with open_checkpoint(write_safetensors(tmp_path / "m.safetensors", tensors | more)) as found:
        assert found.dtype == "fp8_e4m3 (scaled)"


# In memory

ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn2"


class Around(nn.Module):
    """What some program puts around a layer that it wants to compute otherwise."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x)
        return found


class Packed(nn.Module):
    """A quantised layer, whose numbers are no parameters."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("qweight", inner.weight.detach().to(torch.int8))


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return small_unet(SMALL["sd1"])


@pytest.fixture
def live(unet: UNet2DConditionModel, tmp_path: Path) -> list[Path]:
    unet.save_pretrained(tmp_path / "unet")
    return make_patches(tmp_path, tmp_path / "unet", ["Monet", "Klimt"])


def keys(unet: nn.Module) -> dict[str, Tensor]:
    return {
        plain.removeprefix("module."): value.detach().clone()
        for name, value in unet.named_parameters()
        if ".attn2.to_k." in (plain := name.replace("._orig_mod", "")) or ".attn2.to_v." in plain
    }


def compiled(*places: str) -> Callable[[nn.Module], nn.Module]:
    def change(unet: nn.Module) -> nn.Module:
        for place in places:
            unet.set_submodule(place, torch.compile(unet.get_submodule(place), backend="eager"))
        return unet

    return change


REACHED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "one block": compiled("mid_block"),
    "blocks of a list": compiled("up_blocks.0", "up_blocks.1", "down_blocks.1"),
    "an attention": compiled(ATTENTION),
    "a layer": compiled(f"{ATTENTION}.to_k"),
    "a block within a block": compiled("mid_block.attentions.0", "mid_block"),
    "DataParallel": nn.DataParallel,
}


@pytest.mark.parametrize("case", REACHED)
def test_parts_that_are_compiled_are_patched_as_the_rest(
    case: str, unet: UNet2DConditionModel, live: list[Path]
) -> None:
    with patched(unet, live):
        expected = keys(unet)
    before = keys(unet)
    changed = REACHED[case](unet)
    with patched(changed, live[0]), patched(unet, live[1]):
        inside = keys(changed)
        assert inside.keys() == expected.keys()
        assert all(inside[name].equal(expected[name]) for name in expected)
        assert not any(inside[name].equal(before[name]) for name in before)
    after = keys(changed)
    assert all(after[name].equal(before[name]) for name in before)


def replaced(place: str, make: Callable[[Any], nn.Module]) -> Callable[[nn.Module], object]:
    return lambda unet: unet.set_submodule(place, make(unet.get_submodule(place)))


def all_packed(unet: nn.Module) -> None:
    for name, module in list(unet.get_submodule(ATTENTION).named_modules()):
        if isinstance(module, nn.Linear):
            unet.set_submodule(f"{ATTENTION}.{name}", Packed(module))


def reparametrised(unet: nn.Module) -> None:
    parametrize.register_parametrization(
        unet.get_submodule(f"{ATTENTION}.to_v"), "weight", nn.Identity()
    )


def own_keys(unet: nn.Module) -> None:
    attention = unet.get_submodule(ATTENTION)
    attention.processor = nn.Module()
    attention.processor.to_k_custom_diffusion = nn.Linear(64, 64)


NOT_REACHED: dict[str, Callable[[nn.Module], object]] = {
    "a layer in a wrapper": replaced(f"{ATTENTION}.to_k", Around),
    "an attention in a wrapper": replaced(ATTENTION, Around),
    "a block in a wrapper": replaced("mid_block.attentions.0", Around),
    "a packed layer": replaced(f"{ATTENTION}.to_v", Packed),
    "a packed attention": all_packed,
    "a parametrised layer": reparametrised,
    "a layer that is gone": lambda unet: delattr(unet.get_submodule(ATTENTION), "to_v"),
    "keys of a processor's own": own_keys,
}


@pytest.mark.parametrize("case", NOT_REACHED)
def test_layers_that_cannot_be_reached_are_refused(
    case: str, unet: UNet2DConditionModel, live: list[Path]
) -> None:
    NOT_REACHED[case](unet)
    before = keys(unet)
    for patch in live:
        with pytest.raises(UnsupportedError) as caught:
            patched(unet, patch)
        assert caught.value.expected and caught.value.found
    assert all(value.equal(before[name]) for name, value in keys(unet).items())


def test_deltas_are_of_all_keys_and_values_or_none(
    unet: UNet2DConditionModel, live: list[Path]
) -> None:
    weights = dict(unet.state_dict())
    assert len(deltas(weights, live)) == len(keys(unet))
    weights[f"{ATTENTION}.to_k.inner.weight"] = weights.pop(f"{ATTENTION}.to_k.weight")
    with pytest.raises(UnsupportedError, match="not where"):
        deltas(weights, live)


def test_a_layer_that_is_replaced_meanwhile(unet: UNet2DConditionModel, live: list[Path]) -> None:
    patch = patched(unet, live)
    layer = unet.get_submodule(f"{ATTENTION}.to_k")
    unet.set_submodule(f"{ATTENTION}.to_k", nn.Linear(64, layer.weight.shape[0], bias=False))
    inside = keys(unet)
    for change in (lambda: patch.set_scale(0.5), patch.restore):
        with pytest.raises(RefusedError, match="another layer"):
            change()
    assert all(value.equal(inside[name]) for name, value in keys(unet).items())
    unet.set_submodule(f"{ATTENTION}.to_k", layer)
    patch.restore()


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offloading(
    kind: str, unet: UNet2DConditionModel, live: list[Path], tmp_path: Path
) -> None:
    """To memory it does no harm; to the disk, what is in memory is not the weights."""
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    before = keys(unet)
    patch = patched(unet, live)
    inside = keys(unet)
    patch.restore()
    unet.enable_group_offload(torch.device("cpu"), offload_type=kind, **blocks)
    with patched(unet, live):
        assert all(value.equal(inside[name]) for name, value in keys(unet).items())
    assert all(value.equal(before[name]) for name, value in keys(unet).items())

    torch.manual_seed(0)
    other = small_unet(SMALL["sd1"])
    patch = patched(other, live)
    folder = tmp_path / "offloaded"
    other.enable_group_offload(
        torch.device("cpu"), offload_type=kind, offload_to_disk_path=str(folder), **blocks
    )
    for change in (lambda: patch.set_scale(0.5), patch.restore, lambda: patched(other, live)):
        with pytest.raises((UnsupportedError, RefusedError)) as caught:
            change()
        assert caught.value.expected and caught.value.found
    torch.manual_seed(0)
    third = small_unet(SMALL["sd1"])
    third.enable_group_offload(
        torch.device("cpu"), offload_type=kind, offload_to_disk_path=str(folder / "b"), **blocks
    )
    with pytest.raises(UnsupportedError, match="in groups"):
        patched(third, live)


def test_what_python_is_warned_of(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    """Also where nobody listens."""
    unet.save_pretrained(tmp_path / "unet")
    base = base_of(tmp_path / "unet", text_encoders=False)
    gone = f"{ATTENTION}.to_k.weight"
    fewer = type(base)(
        base.family,
        base.width,
        {},
        {n: f for n, f in base.targets.items() if n != gone},
        {n: s for n, s in base.shapes.items() if n != gone},
    )
    with patched(unet, make_patch(tmp_path / "a.sepme", fewer, additive(fewer, "a", seed=1))) as p:
        assert any(gone in warning for warning in p.warnings)

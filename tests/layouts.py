"""One small model in every shape that models come in."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sepme_cli.checkpoints.structure.layout import Layout
from tests.synthetic import DTYPES, SMALL, Shape, checkpoint_tensors, write_safetensors

if TYPE_CHECKING:
    import torch

Tensors = dict[str, tuple[str, np.ndarray]]

UNET = "model.diffusion_model."
TEXT = "cond_stage_model.transformer.text_model."
VAE = "first_stage_model."


def diffusers_name(name: str, span: int) -> str:
    """A UNet tensor's name in diffusers, of those that `synthetic` makes."""
    names = {
        "input_blocks.0.0.": "conv_in.",
        "out.2.": "conv_out.",
        "label_emb.0.0.": "add_embedding.linear_1.",
    }
    for theirs, ours in names.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    found = re.fullmatch(r"(?:(input|output)_blocks\.(\d+)|middle_block)\.([01])\.(.+)", name)
    assert found is not None, name
    place = Layout("", span).block(found[1], found[2] or "0", "attentions")
    if found[3] == "1":
        return f"{place}.{found[4]}"
    if found[4].startswith("op."):
        level = (int(found[2]) - 1) // span
        return f"down_blocks.{level}.downsamplers.0.conv.{found[4].removeprefix('op.')}"
    return f"{place.replace('attentions', 'resnets')}.conv2.weight"


def parts(tensors: Tensors, shape: Shape = SMALL) -> dict[str, Tensors]:
    """A single file's tensors as the networks of a folder."""
    return {
        "unet": {
            diffusers_name(name.removeprefix(UNET), shape.span): value
            for name, value in tensors.items()
            if name.startswith(UNET)
        },
        "text_encoder": {
            f"text_model.{name.removeprefix(TEXT)}": value
            for name, value in tensors.items()
            if name.startswith(TEXT)
        },
        "vae": {
            name.removeprefix(VAE): value for name, value in tensors.items() if name.startswith(VAE)
        },
    }


def write_folder(
    path: Path,
    tensors: Tensors,
    *,
    shards: int = 1,
    variants: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A model folder. variants: word to dtype of copies; "" for the plain one, as it is."""
    found = parts(tensors)
    for name, file in (("text_encoder", "model"), ("vae", "diffusion_pytorch_model")):
        (path / name).mkdir(parents=True)
        write_safetensors(path / name / f"{file}.safetensors", found[name], {"format": "pt"})
        (path / name / "config.json").write_text("{}")
    (path / "unet").mkdir()
    (path / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    (path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (path / "README.md").write_text("A model.\n")
    for word, dtype in (variants or {"": ""}).items():
        copy = cast_to(found["unet"], dtype) if dtype else found["unet"]
        write_shards(path / "unet", copy, shards, word, metadata)
    return path


def cast_to(tensors: Tensors, dtype: str) -> Tensors:
    return {
        name: (dtype, values.astype(DTYPES[dtype]))
        if kind.startswith(("F", "BF"))
        else (kind, values)
        for name, (kind, values) in tensors.items()
    }


def write_shards(
    folder: Path,
    tensors: Tensors,
    count: int = 1,
    variant: str = "",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """The weights of a network as diffusers saves them."""
    word = f".{variant}" if variant else ""
    if count == 1:
        write_safetensors(folder / f"diffusion_pytorch_model{word}.safetensors", tensors, metadata)
        return
    weight_map = {}
    for i, names in enumerate(split(sorted(tensors), count), 1):
        name = f"diffusion_pytorch_model-{i:05}-of-{count:05}{word}.safetensors"
        write_safetensors(folder / name, {n: tensors[n] for n in names}, metadata)
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"diffusion_pytorch_model.safetensors.index{word}.json").write_text(json.dumps(index))


def split(names: Sequence[str], count: int) -> list[Sequence[str]]:
    size = -(-len(names) // count)
    return [names[at : at + size] for at in range(0, len(names), size)]


def scaled(tensors: Tensors, kind: str = "F8_E4M3") -> Tensors:
    """As programs that store scaled fp8 do: matrices divided by a scale that is kept beside."""
    found: Tensors = {}
    for name, (dtype, values) in tensors.items():
        if values.ndim == 2 and name.startswith(UNET):
            wide = values.astype(np.float32)
            scale = np.float32(np.abs(wide).max() / 448)
            found[name] = (kind, (wide / scale).astype(DTYPES[kind]))
            found[name.replace(".weight", ".scale_weight")] = ("F32", np.array(scale))
        else:
            found[name] = (dtype, values)
    return found


def to_torch(values: np.ndarray) -> "torch.Tensor":
    import torch

    kinds = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}
    if (kind := kinds.get(values.dtype.name)) is None:
        return torch.from_numpy(np.ascontiguousarray(values))
    raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8).copy()
    return torch.from_numpy(raw).view(kind).reshape(values.shape)


def write_ckpt(path: Path, tensors: Tensors, **more: object) -> Path:
    """As PyTorch Lightning saved the first Stable Diffusion checkpoints."""
    import torch

    state = {name: to_torch(values) for name, (_, values) in tensors.items()}
    torch.save({"state_dict": state, "global_step": 470000, **more}, path)
    return path


def write_layout(layout: str, folder: Path, *, dtype: str = "F16", seed: int = 0) -> Path:
    """The small model in one of LAYOUTS, with a name of its own."""
    tensors = checkpoint_tensors(dtype=dtype, seed=seed)
    unet = {name: value for name, value in tensors.items() if name.startswith(UNET)}
    match layout:
        case "single file":
            return write_safetensors(folder / "m.safetensors", tensors, {"format": "pt"})
        case "with EMA":
            ema = checkpoint_tensors(dtype=dtype, ema="F32", seed=seed)
            return write_safetensors(folder / "m.safetensors", ema, {"format": "pt"})
        case "UNet in LDM names":
            bare = {name.removeprefix(UNET): value for name, value in unet.items()}
            return write_safetensors(folder / "u.safetensors", bare)
        case "UNet in diffusers names":
            return write_safetensors(folder / "u.safetensors", parts(tensors)["unet"])
        case "folder":
            return write_folder(folder / "model", tensors, metadata={"format": "pt"})
        case "shards":
            return write_folder(folder / "model", tensors, shards=3, metadata={"format": "pt"})
        case "variants":
            return write_folder(folder / "model", tensors, variants={"": "", "fp16": "F16"})
        case "sharded variant":
            return write_folder(folder / "model", tensors, shards=2, variants={"fp16": "F16"})
        case "UNet folder":
            return write_folder(folder / "model", tensors) / "unet"
        case "ckpt":
            return write_ckpt(folder / "m.ckpt", tensors)
        case "bin folder":
            import torch

            path = write_folder(folder / "model", tensors)
            (path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
            state = {name: to_torch(value) for name, (_, value) in parts(tensors)["unet"].items()}
            torch.save(state, path / "unet" / "diffusion_pytorch_model.bin")
            return path
        case "fp8":
            fp8 = {
                n: ("F8_E4M3", v.astype(DTYPES["F8_E4M3"])) if v.ndim == 2 else (d, v)
                for n, (d, v) in unet.items()
            }
            return write_safetensors(folder / "m.safetensors", tensors | fp8)
        case "scaled fp8":
            return write_safetensors(folder / "m.safetensors", scaled(tensors))
    raise AssertionError(layout)


SAFE = (
    "single file",
    "with EMA",
    "UNet in LDM names",
    "UNet in diffusers names",
    "folder",
    "shards",
    "variants",
    "sharded variant",
    "UNet folder",
    "fp8",
    "scaled fp8",
)
"""Those that are safetensors, so that there are bytes to compare."""
LAYOUTS = (*SAFE, "ckpt", "bin folder")

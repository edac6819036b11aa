"""Small checkpoints with the true names of real ones, and patches for them, of random values."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from patch_spec.base import Base
from patch_spec.container import patch_bytes
from patch_spec.grid import split_shift, split_up, to_grid
from patch_spec.increment import Increment
from patch_spec.manifest import Patch
from patch_spec.mask import Masked, to_gaps
from patch_spec.provenance import Measurements, Method
from patch_spec.text import slugify
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Shape:
    """What kind of UNet: L blocks a level, channels by level, which levels have attention."""

    family: str = "sd1"
    width: int = 24
    span: int = 2
    channels: tuple[int, ...] = (8, 16, 24)
    attention: tuple[bool, ...] = (False, True, True)
    depth: int = 1


SMALL = Shape()


def unet_shapes(shape: Shape = SMALL) -> Shapes:
    """The UNet's tensors in CompVis naming, without the prefix."""
    first = shape.channels[0]
    shapes: Shapes = {
        "input_blocks.0.0.weight": (first, 4, 3, 3),
        "input_blocks.0.0.bias": (first,),
        "out.2.weight": (4, first, 3, 3),
    }
    if shape.family.startswith("sdxl"):
        shapes["label_emb.0.0.weight"] = (8, 8)
    block = 0
    for level, channels in enumerate(shape.channels):
        for _ in range(shape.span - 1):
            block += 1
            shapes |= _block(f"input_blocks.{block}", channels, shape, shape.attention[level])
        if level < len(shape.channels) - 1:
            block += 1
            shapes[f"input_blocks.{block}.0.op.weight"] = (channels, channels, 3, 3)
    shapes |= _block("middle_block", shape.channels[-1], shape, True)
    for level in reversed(range(len(shape.channels))):
        for i in range(shape.span):
            number = (len(shape.channels) - 1 - level) * shape.span + i
            channels, attends = shape.channels[level], shape.attention[level]
            shapes |= _block(f"output_blocks.{number}", channels, shape, attends)
    return shapes


def _block(name: str, channels: int, shape: Shape, attends: bool) -> Shapes:
    shapes: Shapes = {f"{name}.0.out_layers.3.weight": (channels, channels, 3, 3)}
    if attends:
        linear = shape.family != "sd1"
        shapes[f"{name}.1.norm.weight"] = (channels,)
        shapes[f"{name}.1.proj_in.weight"] = (channels, channels) + (() if linear else (1, 1))
        for depth in range(shape.depth):
            layer = f"{name}.1.transformer_blocks.{depth}"
            shapes[f"{layer}.attn1.to_k.weight"] = (channels, channels)
            shapes[f"{layer}.attn2.to_q.weight"] = (channels, channels)
            shapes[f"{layer}.attn2.to_k.weight"] = (channels, shape.width)
            shapes[f"{layer}.attn2.to_v.weight"] = (channels, shape.width)
            shapes[f"{layer}.attn2.to_out.0.weight"] = (channels, channels)
    return shapes


def clip_shapes(width: int) -> Shapes:
    """A one-layer text encoder as transformers names it."""
    layer = "encoder.layers.0"
    return {
        "embeddings.token_embedding.weight": (40, width),
        "embeddings.position_embedding.weight": (7, width),
        f"{layer}.self_attn.q_proj.weight": (width, width),
        f"{layer}.self_attn.k_proj.weight": (width, width),
        f"{layer}.layer_norm1.bias": (width,),
        "final_layer_norm.weight": (width,),
    }


TEXT: Mapping[str, tuple[str, ...]] = {
    "sd1": ("cond_stage_model.transformer.text_model.",),
    "sd2": ("cond_stage_model.model.",),
    "sdxl": ("conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."),
    "sdxl-refiner": ("conditioner.embedders.0.model.",),
}


def checkpoint_tensors(
    shape: Shape = SMALL, dtype: str = "F16", ema: str | None = None, seed: int = 0
) -> dict[str, tuple[str, np.ndarray]]:
    """Name to dtype and values. ema: the dtype of the twins, None for a file without."""
    rng = np.random.default_rng(seed)

    def values(size: tuple[int, ...], kind: str) -> np.ndarray:
        return (rng.standard_normal(size) * 0.05).astype(DTYPES[kind])

    unet = unet_shapes(shape)
    tensors = {f"model.diffusion_model.{n}": (dtype, values(s, dtype)) for n, s in unet.items()}
    for prefix in TEXT[shape.family]:
        for name, size in clip_shapes(shape.width).items():
            tensors[prefix + name] = (dtype, values(size, dtype))
    tensors["first_stage_model.decoder.conv_in.weight"] = ("F32", values((4, 4, 3, 3), "F32"))
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = (
        "I64",
        np.arange(7, dtype="<i8")[None],
    )
    if shape.family != "sd1":
        del tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"]
    if ema is not None:
        for name, size in unet.items():
            twin = "model_ema.diffusion_model" + name.replace(".", "")
            tensors[twin] = (ema, values(size, ema))
        tensors["model_ema.decay"] = ("F32", np.float32(0.9999))
        tensors["model_ema.num_updates"] = ("I32", np.int32(7))
    # What real files have been seen with.
    tensors["empty"] = ("F16", np.zeros((0, 3), "<f2"))
    tensors["flags"] = ("BOOL", np.array([True, False, True]))
    tensors["not a number"] = ("F32", np.array([np.nan, np.inf], "<f4"))
    return tensors


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[str, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
    pad: int = 8,
) -> Path:
    """Write as other programs do: keys as they come, some padding, no canonical JSON."""
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(metadata)
    position, data = 0, []
    for name, (dtype, values) in tensors.items():
        raw = np.ascontiguousarray(values).tobytes()
        offsets = [position, position + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": offsets}
        position += len(raw)
        data.append(raw)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ": ")).encode()
    text += b" " * (-len(text) % pad)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data))
    return path


def make_checkpoint(
    path: Path,
    shape: Shape = SMALL,
    *,
    dtype: str = "F16",
    ema: str | None = None,
    seed: int = 0,
    metadata: Mapping[str, str] | None = None,
    pad: int = 8,
) -> Path:
    """A checkpoint file; the same arguments give the same bytes."""
    return write_safetensors(path, checkpoint_tensors(shape, dtype, ema, seed), metadata, pad)


def read_raw(path: Path) -> tuple[dict[str, Any], bytes]:
    """A file's header as plain JSON, and its data section."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def raw_tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    """Every tensor's dtype and bytes, in the order of the data section; by no code of ours."""
    header, data = read_raw(path)
    header.pop("__metadata__", None)
    ordered = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return {
        name: (fields["dtype"], data[slice(*fields["data_offsets"])]) for name, fields in ordered
    }


def base_of(path: Path, *, text_encoders: bool = True, layers: Sequence[str] = ()) -> Base:
    with open_checkpoint(path) as checkpoint:
        return checkpoint.base(text_encoders=text_encoders, layers=layers)


def additive(
    base: Base, concept: str, *, seed: int, rank: int = 3, size: float = 0.02
) -> Increment:
    """A random additive increment on every target of the base."""
    rng = np.random.default_rng(seed)
    factors = {
        name: split_up(rng.standard_normal((out, rank)) * size)
        for name, (out, _) in base.shapes.items()
    }
    increment = Increment(
        **described(concept, "additive", rank),
        exponents={name: exponent for name, (_, exponent) in factors.items()},
        basis=random_basis(rng, rank, base.width),
        up={name: up for name, (up, _) in factors.items()},
    )
    if base.pooled is None:
        return increment
    pooled = random_basis(rng, rank, base.pooled)
    return replace(increment, pooled_rank=rank, pooled_basis=pooled)


def lora(base: Base, concept: str, *, seed: int, rank: int = 3, size: float = 0.02) -> Increment:
    """A random increment with a basis for each target of the base."""
    rng = np.random.default_rng(seed)
    return replace(
        additive(base, concept, seed=seed, rank=rank, size=size),
        kind="lora",
        basis=np.zeros((0, base.width), np.float32),
        down={name: random_basis(rng, rank, width) for name, (_, width) in base.shapes.items()},
        pooled_rank=0,
        pooled_basis=None,
    )


def layered(base: Base, concept: str, *, seed: int, rank: int = 3) -> Increment:
    """A random increment of the layers that the base tells of, and of no target."""
    rng = np.random.default_rng(seed)
    found = {
        name: split_up(rng.standard_normal((out, rank)) * 0.02)
        for name, (out, _) in base.layer_shapes.items()
    }
    return Increment(
        **described(concept, "lora", rank),
        exponents={name: exponent for name, (_, exponent) in found.items()},
        basis=np.zeros((0, base.width), np.float32),
        up={name: up for name, (up, _) in found.items()},
        down={
            name: random_basis(rng, rank, width) for name, (_, width) in base.layer_shapes.items()
        },
    )


def operator(base: Base, concept: str, *, seed: int, rank: int = 3, size: float = 0.3) -> Increment:
    """A random operator on every stream of the base."""
    rng = np.random.default_rng(seed)
    shift, exponent = split_shift(rng.standard_normal((base.width, rank)) * size)
    increment = Increment(
        **described(concept, "operator", rank),
        exponents={},
        basis=random_basis(rng, rank, base.width),
        up={},
        shift=shift,
        shift_exponent=exponent,
    )
    if base.pooled is None:
        return increment
    shift, exponent = split_shift(rng.standard_normal((base.pooled, rank)) * size)
    return replace(
        increment,
        pooled_rank=rank,
        pooled_exponent=exponent,
        pooled_basis=random_basis(rng, rank, base.pooled),
        pooled_shift=shift,
    )


def mask(base: Base, concept: str, *, seed: int, share: float = 0.1) -> Increment:
    """Random weights of every layer of the base that become zero."""
    rng = np.random.default_rng(seed)
    flags = {name: rng.random(shape) < share for name, shape in base.layer_shapes.items()}
    return Increment(
        **described(concept, "mask", 0),
        exponents={},
        basis=np.zeros((0, base.width), np.float32),
        up={},
        masks={name: Masked(int(own.sum()), own.shape) for name, own in flags.items()},
        gaps={name: to_gaps(own) for name, own in flags.items()},
    )


def random_basis(rng: np.random.Generator, rank: int, width: int) -> np.ndarray:
    return to_grid(np.linalg.qr(rng.standard_normal((width, rank)))[0].T)


def described(concept: str, kind: str, rank: int) -> dict[str, Any]:
    return {
        "concept": concept,
        "slug": slugify(concept),
        "kind": kind,
        "rank": rank,
        "prompts": (concept,),
        "method": Method("random", {"seed": 0}),
        "measured": Measurements(),
    }


def make_patch(path: Path, base: Base, *increments: Increment) -> Path:
    patch = Patch(
        base=base, increments=increments, separable_from=() if base.layers else ("",), tool="test 1"
    )
    path.write_bytes(patch_bytes(patch))
    return path


def make_patches(
    folder: Path, model: Path, concepts: Sequence[str] = ("Monet", "Van Gogh", "Klimt", "castle")
) -> list[Path]:
    """One patch a concept for a model; every other one is an operator."""
    base = base_of(model)
    return list(_patches(folder, base, concepts))


def _patches(folder: Path, base: Base, concepts: Sequence[str]) -> Iterator[Path]:
    for i, concept in enumerate(concepts):
        make = operator if i % 2 else additive
        increment = make(base, concept, seed=100 + i)
        yield make_patch(folder / f"{increment.slug}.sepme", base, increment)

"""Small patches, weights and records from which the test vectors are made; no random numbers.

Everything is a function of this file alone, so that the vectors are the same bytes everywhere.
"""

from collections.abc import Mapping
from dataclasses import replace
from hashlib import shake_128
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from patch_spec.base import Base
from patch_spec.container import patch_digest
from patch_spec.digest import tensor_fingerprint
from patch_spec.grid import Float64, split_shift, split_up, to_grid
from patch_spec.header import TensorEntry, encode_header
from patch_spec.increment import Increment
from patch_spec.manifest import Patch
from patch_spec.mask import Flags, Masked, to_gaps
from patch_spec.provenance import Collateral, Measurements, Method
from patch_spec.stack import StackEntry, StackRecord
from patch_spec.undo import HEADER_TENSOR, METADATA_KEY, UndoRecord

WIDTH = 8
POOLED_WIDTH = 6
WIDE = 4096
"""The widest stream that there may be."""
KEY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
VALUE = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
POOLED = "add_embedding.linear_1.weight"
CONTEXT = "context_embedder.weight"
QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
TEXT_LAYER = "clip_l.encoder.layers.0.mlp.fc1.weight"
TOOL = "sepme 0.1.0"
DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U8": np.dtype("u1"),
}


def numbers(label: str, *shape: int) -> Float64:
    """Multiples of 2**-15 in [-1, 1), told by the label alone."""
    raw = np.frombuffer(shake_128(label.encode()).digest(2 * prod(shape)), "<i2")
    return raw.reshape(shape).astype(np.float64) / 2**15


def weights() -> dict[str, npt.NDArray[Any]]:
    """Base tensors of the composition examples: one model in several dtypes."""
    key = np.ldexp(numbers("key", 4, WIDTH), -2).astype(np.float16)
    value = np.ldexp(numbers("value", 6, WIDTH), -1).astype(np.float16)
    single = key.astype(np.float32)
    # A step of float32 that fp16 rounds away: another tensor with the same fingerprint.
    single[0, 0] = np.nextafter(single[0, 0], np.float32(1))
    return {
        "key.F16": key,
        "key.F32": single,
        # Shows the order of summation, which no narrower dtype does.
        "key.F64": single.astype(np.float64),
        "key.BF16": key.astype(DTYPES["BF16"]),
        "value.F16": value,
        "pooled.F16": np.ldexp(numbers("pooled", 5, POOLED_WIDTH), -3).astype(np.float16),
        "context.F16": np.ldexp(numbers("context", 1, WIDE), -1).astype(np.float16),
    }


def base(*names: str) -> Base:
    """The base of the examples; names: of its targets, both if left out."""
    arrays = {KEY: weights()["key.F16"], VALUE: weights()["value.F16"]}
    arrays = {name: array for name, array in arrays.items() if name in (names or arrays)}
    return Base(
        family="sd1",
        width=WIDTH,
        text_encoders={"clip_l": tensor_fingerprint(numbers("clip", 4, WIDTH))},
        targets={name: tensor_fingerprint(array) for name, array in arrays.items()},
        shapes={name: (len(array), WIDTH) for name, array in arrays.items()},
    )


def two_streams() -> Base:
    """A base whose denoiser reads a vector beside the rows."""
    vector = weights()["pooled.F16"]
    return replace(
        base(KEY),
        family="sdxl",
        targets={**base(KEY).targets, POOLED: tensor_fingerprint(vector)},
        shapes={**base(KEY).shapes, POOLED: (len(vector), POOLED_WIDTH)},
        pooled=POOLED_WIDTH,
    )


def layered() -> Base:
    """The usual base, with a layer of the denoiser and one of the text encoder."""
    layers = {QUERY: weights()["value.F16"], TEXT_LAYER: weights()["pooled.F16"]}
    return replace(
        base(),
        layers={name: tensor_fingerprint(array) for name, array in layers.items()},
        layer_shapes={QUERY: (6, WIDTH), TEXT_LAYER: (5, POOLED_WIDTH)},
    )


def longer() -> Base:
    """The usual base, with a layer that is wide enough for `sparse`."""
    query = numbers("longer", 3, 400).astype(np.float16)
    return replace(
        base(), layers={QUERY: tensor_fingerprint(query)}, layer_shapes={QUERY: (3, 400)}
    )


def wide() -> Base:
    """A base of the greatest width."""
    rows = weights()["context.F16"]
    return Base(
        family="sd3",
        width=WIDE,
        text_encoders={},
        targets={CONTEXT: tensor_fingerprint(rows)},
        shapes={CONTEXT: (len(rows), WIDE)},
    )


def additive() -> Increment:
    """An increment for two targets, rank 2."""
    key, key_exponent = split_up(numbers("up key", 4, 2) * 3)
    value, value_exponent = split_up(numbers("up value", 6, 2) / 10)
    return Increment(
        concept="Monet",
        slug="monet",
        kind="additive",
        rank=2,
        prompts=("Monet", "a painting by Monet"),
        method=Method("sepme", {"lr": 0.02, "seed": 0, "neutral": None, "joint": False}),
        measured=Measurements(
            correlation_start=1.0,
            correlation_end=-0.0025,
            leakage=1e-7,
            steps=21,
            stopped="threshold",
        ),
        basis=to_grid(numbers("basis", 2, WIDTH)),
        up={KEY: key, VALUE: value},
        exponents={KEY: key_exponent, VALUE: value_exponent},
    )


def small() -> Increment:
    """An increment that is quickly told, for one target, rank 2: what invalid files start from."""
    return replace(
        additive(),
        prompts=("Monet",),
        method=Method("sepme", {"lr": 0.02, "seed": 0}),
        measured=Measurements(),
        up={KEY: additive().up[KEY]},
        exponents={KEY: additive().exponents[KEY]},
    )


def operator() -> Increment:
    """An increment that mentions no layer, rank 3, with names beyond ASCII."""
    shift, exponent = split_shift(numbers("shift", WIDTH, 3) / 5)
    return Increment(
        concept="葛飾北斎",
        slug="ukiyo-e",
        kind="operator",
        rank=3,
        prompts=("葛飾北斎", "a print by Hokusaï 🌊"),
        method=Method("closed-form", {"mu": 10, "ridge": 1e-3, "to": "a print"}),
        measured=Measurements(separability=0.75),
        exponents={},
        shift_exponent=exponent,
        basis=to_grid(numbers("operator basis", 3, WIDTH)),
        shift=shift,
        up={},
    )


def on_both() -> Increment:
    """An operator on both streams, rank 3 and 2."""
    shift, exponent = split_shift(numbers("pooled shift", POOLED_WIDTH, 2))
    return replace(
        operator(),
        concept="Hokusai",
        slug="hokusai",
        prompts=("Hokusai",),
        pooled_rank=2,
        pooled_exponent=exponent,
        pooled_basis=to_grid(numbers("pooled basis", 2, POOLED_WIDTH)),
        pooled_shift=shift,
    )


def on_pooled() -> Increment:
    """An increment for the vector alone, rank 2."""
    up, exponent = split_up(numbers("up pooled", 5, 2))
    return replace(
        small(),
        rank=0,
        basis=np.zeros((0, WIDTH), np.float32),
        up={POOLED: up},
        exponents={POOLED: exponent},
        pooled_rank=2,
        pooled_basis=on_both().pooled_basis,
    )


def widest() -> Increment:
    """An operator of the greatest width, rank 1."""
    shift, exponent = split_shift(numbers("wide shift", WIDE, 1))
    basis = to_grid(numbers("wide basis", 1, WIDE))
    return replace(operator(), rank=1, shift=shift, shift_exponent=exponent, basis=basis)


def lora() -> Increment:
    """An increment whose targets have a basis each, rank 2, as a LoRA gives it."""
    return replace(
        additive(),
        concept="Degas",
        slug="degas",
        kind="lora",
        prompts=("Degas",),
        method=Method("lora", {"alpha": 4, "rank": 2}),
        measured=Measurements(),
        basis=np.zeros((0, WIDTH), np.float32),
        down={KEY: to_grid(numbers("down key", 2, WIDTH)), VALUE: additive().basis},
    )


def on_layers() -> Increment:
    """A LoRA whole: a target and two layers, of different widths."""
    query, query_exponent = split_up(numbers("up query", 6, 2))
    text, text_exponent = split_up(numbers("up text", 5, 2) / 100)
    return replace(
        lora(),
        up={KEY: lora().up[KEY], QUERY: query, TEXT_LAYER: text},
        exponents={
            KEY: lora().exponents[KEY],
            QUERY: query_exponent,
            TEXT_LAYER: text_exponent,
        },
        down={
            KEY: lora().down[KEY],
            QUERY: to_grid(numbers("down query", 2, WIDTH)),
            TEXT_LAYER: to_grid(numbers("down text", 2, POOLED_WIDTH)),
        },
    )


def on_layers_alone() -> Increment:
    """The same without the target."""
    whole = on_layers()
    return replace(
        whole,
        up={name: whole.up[name] for name in whole.layers},
        exponents={name: whole.exponents[name] for name in whole.layers},
        down={name: whole.down[name] for name in whole.layers},
    )


def mask() -> Increment:
    """Weights of two layers that become zero, the first and the last of one among them."""
    query, text = np.zeros((6, WIDTH), np.bool_), np.zeros((5, POOLED_WIDTH), np.bool_)
    query[[0, 2, 2, 5], [0, 1, 2, 7]] = True
    text[3, 4] = True
    return masking({QUERY: query, TEXT_LAYER: text})


def overlapping() -> Increment:
    """Another mask of one of them, which shares some of its positions."""
    query = np.zeros((6, WIDTH), np.bool_)
    query[2, :4] = True
    return replace(masking({QUERY: query}), concept="Klimt", slug="klimt", prompts=("Klimt",))


def sparse() -> Increment:
    """A mask with more between its positions than a byte can tell."""
    flags = np.zeros((3, 400), np.bool_)
    flags.reshape(-1)[[254, 510, 511, 1199]] = True
    return masking({QUERY: flags})


def masking(flags: Mapping[str, Flags]) -> Increment:
    """An increment that makes these weights zero, by layer."""
    return replace(
        small(),
        concept="Schiele",
        slug="schiele",
        kind="mask",
        rank=0,
        prompts=("Schiele",),
        method=Method("concept-prune", {"seed": 0}),
        basis=np.zeros((0, WIDTH), np.float32),
        up={},
        exponents={},
        masks={name: Masked(int(own.sum()), own.shape) for name, own in flags.items()},
        gaps={name: to_gaps(own) for name, own in flags.items()},
    )


def measured() -> Increment:
    """An increment of which it is known what else it changes."""
    collateral = Collateral(300, 0.0625, 0.125, {"Manet": 0.25, "a café": 0.5})
    return replace(small(), measured=Measurements(separability=0.75, collateral=collateral))


def extremes() -> Increment:
    """Factors at the ends of their ranges: 1, -1, the least steps, zeros, the least exponent."""
    ends = np.array([1, -1, 2.0**-22, -(2.0**-22), 0, 0.5, 1 - 2.0**-22, -(2.0**-21)])
    up = np.array([[1], [-1], [2.0**-24], [0]], dtype=np.float16)
    return replace(
        additive(),
        concept="extremes",
        slug="0" * 64,
        rank=1,
        basis=to_grid(ends[None]),
        up={KEY: up},
        exponents={KEY: -64},
    )


def patch(*increments: Increment, of: Base | None = None) -> Patch:
    """A patch with these increments, and prompts that they keep; of: what base.

    None are kept where an increment has layers."""
    return Patch(
        base=of or base(),
        increments=increments,
        separable_from=() if any(part.layers for part in increments) else ("", "Van Gogh"),
        protected=("a painting",),
        tool=TOOL,
    )


def small_patch(*increments: Increment) -> Patch:
    """A patch with these increments, or `small`, whose base has one target."""
    return Patch(
        base=base(KEY), increments=increments or (small(),), separable_from=("",), tool=TOOL
    )


def stack() -> StackRecord:
    """The record of a checkpoint that both increments are in."""
    both = patch(additive(), operator())
    entries = tuple(
        StackEntry(increment.digest, increment.concept, increment.slug, scale)
        for increment, scale in zip(both.increments, (1.0, 0.5), strict=True)
    )
    return StackRecord(base().digest, "sd1", entries, TOOL, (patch_digest(both),))


def stack_of_layers() -> StackRecord:
    """The record of a checkpoint in which layers are changed, too."""
    both = patch(on_layers(), operator(), of=layered())
    entries = tuple(
        StackEntry(part.digest, part.concept, part.slug, 1.0) for part in both.increments
    )
    of = layered()
    return StackRecord(of.digest, "sd1", entries, TOOL, (patch_digest(both),), of.layers)


def tensor_file(metadata: Mapping[str, str], arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """A safetensors file of these arrays, in this order."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries, position = [], 0
    for name, array in arrays.items():
        end = position + array.nbytes
        entries.append(TensorEntry(name, names[array.dtype], array.shape, position, end))
        position = end
    data = b"".join(array.tobytes() for array in arrays.values())
    return encode_header(metadata, entries) + data


def original() -> bytes:
    """A checkpoint of one tensor, before it was patched."""
    return tensor_file({"title": "tiny"}, {KEY: weights()["key.F16"]})


def journal(
    arrays: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The undo journal of `original`, with `arrays` put in, or other metadata."""
    header_bytes = original()[: -weights()["key.F16"].nbytes]
    record = UndoRecord(base().digest, "5" * 64)
    tensors: dict[str, npt.NDArray[Any]] = {
        HEADER_TENSOR: np.frombuffer(header_bytes, np.uint8),
        KEY: weights()["key.F16"],
    }
    return tensor_file(
        {METADATA_KEY: record.to_metadata()} if metadata is None else metadata,
        tensors | dict(arrays),
    )

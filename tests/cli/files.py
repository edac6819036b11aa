"""The files that the tests of the command line work on, good and bad."""

import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sepme_cli.operations.apply import apply
from sepme_cli.operations.export import export
from sepme_cli.recipe import TEMPLATE
from tests.keys import OPENSSH, by_hand, line, make_key
from tests.lora_files import kohya, more, random_pairs
from tests.synthetic import (
    Shape,
    additive,
    base_of,
    checkpoint_tensors,
    make_checkpoint,
    make_patch,
    operator,
    write_safetensors,
)

TARGET = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"


def make_files(folder: Path) -> None:
    """Checkpoints, patches for them, and what only looks like either."""
    _good(folder)
    (folder / "policy.yaml").write_text(TEMPLATE)
    for name, make in BAD.items():
        make(folder / name)
    (folder / "folder").mkdir()


def _good(folder: Path) -> None:
    model = make_checkpoint(folder / "model.safetensors", metadata={"modelspec.title": "small"})
    base = base_of(model)
    monet, klimt = additive(base, "Monet", seed=1), operator(base, "Klimt", seed=2)
    make_patch(folder / "monet.sepme", base, monet)
    make_patch(folder / "klimt.sepme", base, klimt)
    make_patch(folder / "both.sepme", base, monet, klimt)
    make_patch(folder / "monet2.sepme", base, additive(base, "Monet", seed=3))
    make_checkpoint(folder / "cousin.safetensors", seed=9)
    other = make_checkpoint(folder / "sd2.safetensors", Shape(family="sd2"))
    make_patch(folder / "sd2.sepme", base_of(other), additive(base_of(other), "Monet", seed=4))
    apply(
        model,
        [folder / "monet.sepme"],
        folder / "clean.safetensors",
        statement=folder / "clean.json",
    )
    if OPENSSH:
        (folder / "signers").write_text(line("alice", make_key(folder / "key")))
        by_hand(folder / "klimt.sepme", folder / "key")
    export(folder / "monet.sepme", "kohya", folder / "lora.safetensors")
    wide = base_of(make_checkpoint(folder / "wide.safetensors", Shape(width=32)))
    write_safetensors(folder / "wide-lora.safetensors", kohya(wide, random_pairs(wide, 2)))
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    half = {f"{module}.lora_up.weight": ("F32", np.ones((24, 2), "<f4"))}
    write_safetensors(folder / "half-lora.safetensors", half)
    dora = {f"{module}.dora_scale": ("F32", np.ones((24, 1), "<f4"))}
    write_safetensors(folder / "dora.safetensors", half | dora)
    elsewhere = more(["lora_te_text_model_encoder_layers_0_mlp_fc1"])
    write_safetensors(folder / "text-lora.safetensors", elsewhere)


def _cut(path: Path) -> None:
    path.write_bytes((path.parent / "model.safetensors").read_bytes()[:-100])


def _cut_patch(path: Path) -> None:
    path.write_bytes((path.parent / "monet.sepme").read_bytes()[:-1])


def _cut_header(path: Path) -> None:
    path.write_bytes((path.parent / "monet.sepme").read_bytes()[:100])


def _not_finite(path: Path) -> None:
    tensors = checkpoint_tensors()
    dtype, values = tensors[TARGET]
    tensors[TARGET] = (dtype, np.full_like(values, np.nan))
    write_safetensors(path, tensors)


def _stranger(path: Path) -> None:
    name = "double_blocks.0.img_attn.qkv.weight"
    write_safetensors(path, {name: ("F16", np.zeros((3, 3), "<f2"))})


def _twice(path: Path) -> None:
    text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],'
    text += b'"data_offsets":[0,1]}}'
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0")


def _index_with_a_key_twice(path: Path) -> None:
    (path / "unet").mkdir(parents=True)
    shard = '"diffusion_pytorch_model-00001-of-00001.safetensors"'
    text = f'{{"weight_map": {{"a": {shard}, "a": {shard}}}}}'
    (path / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(text)


def _journal_of_another_file(path: Path) -> None:
    """A checkpoint, and beside it a journal that says another file was being written."""
    path.write_bytes((path.parent / "model.safetensors").read_bytes())
    tensors = {f"0.{side}.header": ("U8", np.zeros(8, "u1")) for side in ("old", "new")}
    names = {"sepme_pending": '["model.safetensors"]'}
    write_safetensors(path.with_name(f"{path.name}.sepme-pending"), tensors, names)


BAD: dict[str, Callable[[Path], object]] = {
    "empty.safetensors": lambda path: path.write_bytes(b""),
    "text.safetensors": lambda path: path.write_text("not a checkpoint, whatever its name says"),
    "pickle.safetensors": lambda path: path.write_bytes(pickle.dumps({"a": 1})),
    "huge.safetensors": lambda path: path.write_bytes(b"\xff" * 8 + b"{}"),
    "twice.safetensors": _twice,
    "cut.safetensors": _cut,
    "nan.safetensors": _not_finite,
    "flux.safetensors": _stranger,
    "bad.yaml": lambda path: path.write_text("version: 1\nconcepts: Monet\n"),
    "bad.json": lambda path: path.write_text('{"_type":"https://in-toto.io/Statement/v1"}'),
    "tagged.yaml": lambda path: path.write_text("version: !!int ''\nconcepts: [Monet]\n"),
    "escaped.yaml": lambda path: path.write_text('version: 1\nconcepts: ["\\UFFFFFFFF"]\n'),
    "twice": _index_with_a_key_twice,
    "journalled.safetensors": _journal_of_another_file,
    "cut.sepme": _cut_patch,
    "headless.sepme": _cut_header,
    "text.sepme": lambda path: path.write_text("not a patch"),
}

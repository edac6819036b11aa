"""Valid files to begin with, and a few that attack what other tools fall for."""

import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patch_spec.make_vectors import VECTORS
from sepme_cli.checkpoints.journals import in_place
from sepme_cli.checkpoints.journals.pending import pending_path
from sepme_cli.operations.apply import apply
from tests.gguf_files import write_gguf
from tests.layouts import parts, scaled, to_torch, write_folder
from tests.small_transformers import original_names, small_transformer
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

TINY = Shape(width=6, span=1, channels=(2,), attention=(False,))
SPAN = "cond_stage_model.model.transformer.resblocks."


class Command:
    """Unpickles to a command that leaves a trace, for a loader that lets it."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def valid_vectors(pattern: str) -> list[bytes]:
    """Files of `patch_spec/vectors/valid`."""
    return [path.read_bytes() for path in sorted((VECTORS / "valid").glob(pattern))]


def checkpoints(folder: Path) -> list[bytes]:
    """Small checkpoints of every family, patched and not."""
    for family in ("sd1", "sd2", "sdxl", "sdxl-refiner"):
        shape = Shape(family=family, width=6, span=1, channels=(2,), attention=(True,), depth=2)
        make_checkpoint(folder / f"{family}.safetensors", shape, metadata={"a": "{}"})
    tensors = checkpoint_tensors(TINY)
    write_safetensors(folder / "fp8.safetensors", scaled(tensors))
    write_safetensors(folder / "unet.safetensors", parts(tensors, TINY)["unet"])
    fused = {
        f"{SPAN}0.attn.in_proj_weight": ("F16", np.zeros((18, 6), "<f2")),
        f"{SPAN}1.attn.in_proj_bias": ("F16", np.zeros(18, "<f2")),
    }
    two = Shape(family="sd2", width=6, span=1, channels=(2,), attention=(True,))
    write_safetensors(folder / "fused.safetensors", checkpoint_tensors(two) | fused)
    model = make_checkpoint(folder / "ema.safetensors", TINY, ema="F32")
    base = base_of(model)
    make_patch(folder / "monet.sepme", base, additive(base, "Monet", seed=1, rank=1))
    apply(model, [folder / "monet.sepme"], folder / "clean.safetensors")
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


def loras(folder: Path) -> list[bytes]:
    """Files that change a model as ours do, of other programs."""
    down, up = np.zeros((2, 6), "<f2"), np.zeros((4, 2), "<f2")
    kohya = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    peft = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    for name, tensors in {
        "kohya": {f"{kohya}.lora_down.weight": down, f"{kohya}.lora_up.weight": up},
        "peft": {f"{peft}.lora_A.weight": down, f"{peft}.lora_B.weight": up},
        "diffusers": {f"{peft}.lora.down.weight": down, f"{peft}.lora.up.weight": up},
    }.items():
        alpha = {f"{name}.alpha": np.float32(1)} if name == "kohya" else {}
        both = {key: ("F16" if v.ndim else "F32", v) for key, v in (tensors | alpha).items()}
        write_safetensors(
            folder / f"{name}.safetensors", both, {"ss_tag_frequency": '{"a":{"b":1}}'}
        )
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


def polyglots() -> list[bytes]:
    """Pickles, archives, and files that are two kinds at once."""
    code = pickle.dumps({"state_dict": Command()}, protocol=2)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", code)
    patch = valid_vectors("additive.sepme")[0]
    return [code, archive.getvalue(), patch + archive.getvalue(), archive.getvalue() + patch]


def pickles() -> list[bytes]:
    """What torch saves, old and new, and what it saves that runs code."""
    state = {name: to_torch(value) for name, (_, value) in checkpoint_tensors(TINY).items()}
    wide = {**state, "wide": torch.zeros(1).expand(2**40)}
    found = []
    for saved in ({"state_dict": state, "global_step": 1}, state, {"x": Command(), **state}, wide):
        for archive in (True, False):
            file = io.BytesIO()
            torch.save(saved, file, _use_new_zipfile_serialization=archive)
            found.append(file.getvalue())
    return [*found, *polyglots()]


def ggufs(path: Path) -> list[bytes]:
    """A transformer whose matrices are quantised, in two alignments."""
    tensors = original_names(small_transformer("flux", num_layers=1, num_single_layers=1))
    return [write_gguf(tensors, path, alignment=a).read_bytes() for a in (32, 64)]


def model_folder(folder: Path) -> Path:
    """A diffusers folder in shards."""
    shape = Shape(width=6, channels=(2, 2), attention=(True, False))
    return write_folder(folder / "model", checkpoint_tensors(shape), shards=2)


def patched(folder: Path) -> tuple[Path, Path]:
    """A checkpoint with a patch in it, written in place, and its undo journal."""
    model = make_checkpoint(folder / "m.safetensors", TINY, pad=2**14)
    shutil.copy(model, folder / "base.safetensors")
    base = base_of(model)
    patch = make_patch(folder / "monet.sepme", base, operator(base, "Monet", seed=2, rank=1))
    apply(model, [patch], in_place=True)
    return model, folder / "m.safetensors.sepme-undo"


def interrupted(folder: Path) -> tuple[Path, Path]:
    """A checkpoint whose writing in place was cut short, and the journal that tells of it."""
    model = make_checkpoint(folder / "m.safetensors", TINY, pad=2**14)
    base = base_of(model)
    patch = make_patch(folder / "monet.sepme", base, additive(base, "Monet", seed=2, rank=1))
    remove = in_place.remove
    in_place.remove = lambda path: None  # type: ignore[assignment]
    try:
        apply(model, [patch], in_place=True)
    finally:
        in_place.remove = remove  # type: ignore[assignment]
    return model, pending_path(model)


def renamed(journal: bytes, names: str) -> bytes:
    """A pending journal that tells of other files, in a JSON text."""
    start = 8 + int.from_bytes(journal[:8], "little")
    header = json.loads(journal[8:start])
    header["__metadata__"]["sepme_pending"] = names
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + journal[start:]


def tokenizer_files() -> dict[str, bytes]:
    """A tokenizer of a few words, with CLIP's ids for the ends."""
    words = ["a", "b", "a</w>", "b</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    vocabulary |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    return {
        "vocab.json": json.dumps(vocabulary).encode(),
        "merges.txt": b"#version: 0.2\na b</w>\n",
        "tokenizer_config.json": b'{"model_max_length": 77, "pad_token": "<|endoftext|>"}',
        "special_tokens_map.json": b'{"bos_token": "<|startoftext|>"}',
    }

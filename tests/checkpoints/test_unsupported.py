"""Whatever lies where a model or a patch should be: it is said what it is and what to do."""

import gzip
import io
import json
import lzma
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.checkpoints.reading.patches import read_patch_file
from sepme_cli.errors import MalformedError, UnsupportedError
from sepme_cli.operations.inspect import inspect
from tests.layouts import UNET
from tests.synthetic import (
    additive,
    base_of,
    checkpoint_tensors,
    make_checkpoint,
    make_patch,
    write_safetensors,
)

LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 3438167536\n"
)


def zipped(name: str, data: bytes = b"some bytes", compression: int = zipfile.ZIP_STORED) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", compression) as archive:
        archive.writestr(name, data)
    return memory.getvalue()


def tarred() -> bytes:
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.safetensors"))
    return memory.getvalue()


def saved(array: np.ndarray) -> bytes:
    memory = io.BytesIO()
    np.save(memory, array)
    return memory.getvalue()


#: What is in the file, what it is, and what to do.
STRANGERS: dict[str, tuple[bytes, str, str]] = {
    "LFS": (LFS, "a Git LFS pointer", "git lfs pull"),
    "LFS, old": (LFS.replace(b"git-lfs.", b"hawser."), "a Git LFS pointer", "3438167536 bytes"),
    "annex": (b"/annex/objects/SHA256E-s3--1.safetensors\n", "a git-annex pointer", "annex get"),
    "annex link": (b"../.git/annex/objects/a/b/c\n", "a git-annex pointer", "annex get"),
    "page": (
        b"<!DOCTYPE html>\n<html><head><title>\n Sign in | Hub </title></head>",
        "a web page",
        "'Sign in | Hub'",
    ),
    "page, bare": (b"\n\n  <HTML lang=en>" + b" " * 9000, "a web page", "download it again"),
    "page, comment": (b"<!-- x --><html>", "a web page", "log in"),
    "page, BOM": (b"\xef\xbb\xbf<!doctype html>", "a web page", "log in"),
    "S3": (
        b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>',
        "an error that a server sent instead of the file",
        "'AccessDenied'",
    ),
    "JSON error": (
        b'{"error":"Invalid username or password."}',
        "an error that a server sent instead of the file",
        "Invalid username or password.",
    ),
    "JSON message": (
        b'{\n "message": "Unauthorized", "code": 401}',
        "an error that a server sent instead of the file",
        "log in",
    ),
    "JSON detail": (
        b'{"detail": [{"msg": "Not found"}]}',
        "an error that a server sent instead of the file",
        "Not found",
    ),
    "index": (
        json.dumps({"weight_map": dict.fromkeys(map(str, range(999)), "x")}).encode(),
        "a file that describes a model",
        "folder",
    ),
    "configuration": (b'{"_class_name": "X"}', "a file that describes a model", "folder"),
    "workflow": (b'{"nodes": [], "links": []}', "a JSON document", "download it again"),
    "text error": (b"Entry not found", "a text file", "'Entry not found'"),
    "umlauts": ("Zugriff verweigert für Sie".encode(), "a text file", "für"),
    "empty": (b"", "an empty file", "download it again"),
    "zeros": (bytes(100), "zeros only", "not finished"),
    "allocated": (bytes(9000), "zeros at its beginning", "not finished"),
    "zip": (zipped("model.safetensors"), "a zip archive", "unpack"),
    "zip, compressed": (
        zipped("m.ckpt", bytes(99), zipfile.ZIP_DEFLATED),
        "a zip archive",
        "unpack",
    ),
    "zip of nothing": (b"PK\x05\x06" + bytes(18), "a zip archive", "unpack"),
    "npz": (zipped("a.npy", saved(np.ones(3))), "a numpy archive", "convert it"),
    "npy": (saved(np.ones(3)), "a numpy array", "convert it"),
    "tar": (tarred(), "a tar archive", "unpack"),
    "gzip": (gzip.compress(b"x"), "a gzip archive", "unpack"),
    "xz": (lzma.compress(b"x"), "an xz archive", "unpack"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4" + bytes(range(99)), "a 7z archive", "unpack"),
    "RAR": (b"Rar!\x1a\x07\x01\0" + bytes(range(99)), "a RAR archive", "unpack"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(range(99)), "a zstd archive", "unpack"),
    "GGML": (b"lmgg\3\0\0\0" + bytes(range(99)), "a GGML file", "convert it"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(range(99)), "an HDF5 file", "convert it"),
    "ONNX": (
        b"\x08\x07\x12\x07pytorch\x1a\x051.13" + bytes(range(99)),
        "an ONNX model",
        "compiled from",
    ),
    "TensorRT": (b"ftrt\0\0\0\0" + bytes(range(99)), "a TensorRT engine", "compiled from"),
    "TFLite": (b"\x1c\0\0\0TFL3" + bytes(range(99)), "a TensorFlow Lite model", "compiled from"),
    "OpenVINO": (b'<?xml version="1.0"?>\n<net name="x">', "an OpenVINO model", "compiled from"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(range(99)), "an image", "preview"),
    "JPEG": (b"\xff\xd8\xff\xe0" + bytes(range(99)), "an image", "preview"),
    "WebP": (b"RIFF\x10\0\0\0WEBPVP8 " + bytes(range(99)), "an image", "preview"),
    "pickle": (pickle.dumps({"a": 1}, protocol=5), "a pickle", "convert it"),
}


@pytest.mark.parametrize("name", STRANGERS)
@pytest.mark.parametrize("ending", ["safetensors", "sepme", "ckpt"])
def test_a_file_is_told_by_what_it_is(name: str, ending: str, tmp_path: Path) -> None:
    content, what, todo = STRANGERS[name]
    path = tmp_path / f"m.{ending}"
    path.write_bytes(content)
    read: Callable[[Path], object] = read_patch_file if ending == "sepme" else open_checkpoint
    for act in (read, inspect):
        with pytest.raises(MalformedError) as caught:
            act(path)
        error = caught.value
        assert error.found == what
        assert f"{path} is {what}" in error.message
        assert todo in error.message
        assert "rule" not in error.message
        assert error.file == str(path)
        assert error.expected and len(error.message) < 500


@pytest.mark.parametrize("content", [pickle.dumps({"a": 1}, 2), pickle.dumps([1], 4), b"\x80\x02."])
def test_a_pickle_that_torch_has_not_saved(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    path.write_bytes(content)
    with pytest.raises(MalformedError, match="not a file saved by torch") as caught:
        open_checkpoint(path)
    assert caught.value.found == "a pickle"


@pytest.mark.parametrize("kept", [9, 100, 0.5, -1])
def test_a_file_that_is_cut_off(kept: float, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m.safetensors")
    base = base_of(model)
    patch = make_patch(tmp_path / "p.sepme", base, additive(base, "Monet", seed=1))
    for path, read in ((model, open_checkpoint), (patch, read_patch_file)):
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * kept) if kept == 0.5 else int(kept)])
        with pytest.raises(MalformedError, match=r"is cut off.*download it again") as caught:
            read(path)
        assert caught.value.expected and caught.value.found


@pytest.mark.parametrize("length", [0x120708, 0x4280])
def test_a_length_that_looks_like_a_magic_number_is_one(length: int, tmp_path: Path) -> None:
    """An ONNX model begins with 08 07 12, a pickle with 80: so may the length of a header."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b'{"a":{"dtype"')
    with pytest.raises(MalformedError, match="is cut off"):
        open_checkpoint(path)


def test_an_archive_of_torch_that_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    path.write_bytes(zipped("archive/data.pkl", pickle.dumps({}))[:60])
    with pytest.raises(MalformedError, match="is cut off"):
        open_checkpoint(path)


def test_bytes_that_are_nothing_known(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(bytes([201, 7, 99, 250, 31, 5, 180, 66, 14, 200]) * 1000)
    with pytest.raises(
        MalformedError, match="nor any other kind of file that sepme knows"
    ) as caught:
        open_checkpoint(path)
    assert "begins with" in str(caught.value.found)


def test_a_shard_that_was_not_fetched(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(LFS)
    with pytest.raises(MalformedError, match="git lfs pull") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.file == str(weights)


def test_a_model_and_a_patch_in_each_others_place(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m.safetensors")
    base = base_of(model)
    patch = make_patch(tmp_path / "p.sepme", base, additive(base, "Monet", seed=1))
    with pytest.raises(MalformedError, match="name the model first"):
        read_patch_file(model)
    with pytest.raises(UnsupportedError, match=r"a patch.*name the model first"):
        open_checkpoint(patch)


#: A name of a tensor, what holds it, and what to do.
OTHERS: dict[str, tuple[str, str]] = {
    "text_model.embeddings.token_embedding.weight": ("a text encoder", "--text-encoder"),
    "cond_stage_model.model.token_embedding.weight": ("a text encoder", "--text-encoder"),
    "encoder.block.0.layer.0.SelfAttention.q.weight": ("a text encoder", "--text-encoder"),
    "first_stage_model.decoder.conv_in.weight": ("a VAE", "name the model"),
    "encoder.down.0.block.0.conv1.weight": ("a VAE", "name the model"),
    "decoder.up_blocks.0.resnets.0.conv1.weight": ("a VAE", "name the model"),
    "vision_model.post_layernorm.weight": ("an image encoder", "used with"),
    "ip_adapter.1.to_k_ip.weight": ("an IP-Adapter", "used with"),
    "emb_params": ("a textual inversion", "used with"),
    "clip_g": ("a textual inversion", "used with"),
    "body.0.rdb1.conv1.weight": ("an upscaler", "Stable Diffusion checkpoint"),
    "blocks.0.attn1.to_q.weight": ("a transformer", "Stable Diffusion checkpoint"),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (
        "a part of a UNet's weights",
        "sepme import --edited",
    ),
    "lora_te_text_model_encoder_layers_0.lora_up.weight": ("a LoRA", "sepme import"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_another_network(name: str, tmp_path: Path) -> None:
    what, todo = OTHERS[name]
    path = write_safetensors(tmp_path / "m.safetensors", {name: ("F16", np.ones((2, 2), "<f2"))})
    with pytest.raises(UnsupportedError) as caught:
        open_checkpoint(path)
    assert what in str(caught.value.found)
    assert todo in caught.value.message and name in caught.value.message


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "model.module."])
def test_names_in_a_wrapper_are_read(wrapper: str, tmp_path: Path) -> None:
    """As DataParallel, Accelerate and torch.compile leave them."""
    tensors = {
        wrapper + name.removeprefix(UNET): value
        for name, value in checkpoint_tensors().items()
        if name.startswith(UNET)
    }
    with open_checkpoint(write_safetensors(tmp_path / "m.safetensors", tensors)) as checkpoint:
        assert checkpoint.layout.prefix == wrapper


#: What is in a folder, and what is said of it.
FOLDERS: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": ((), "name a .safetensors file"),
    "single files": (("a.safetensors", "b.ckpt"), r"the model in it: a\.safetensors, b\.ckpt"),
    "ONNX": (("unet/model.onnx", "unet/weights.pb"), "an ONNX export"),
    "TensorRT": (("unetxl.plan",), "TensorRT engines"),
    "GGUF": (("unet/x.gguf",), r"the model in it: unet/x\.gguf"),
    "GGUF alone": (("X.GGUF", "y.gguf"), r"the model in it: X\.GGUF, y\.gguf"),
    "Core ML": (("unet/Unet.mlpackage/x",), "a Core ML export"),
    "OpenVINO": (("unet/openvino_model.xml", "unet/openvino_model.bin"), "an OpenVINO export"),
    "Flax": (("unet/diffusion_flax_model.msgpack",), "Flax weights"),
    "half a download": (("unet/config.json", "model_index.json"), "not whole, get it again"),
    "LoRA": (("pytorch_lora_weights.safetensors",), "a LoRA"),
    "PEFT": (("adapter_config.json", "adapter_model.safetensors"), "a LoRA"),
    "hub's cache": (("refs/main", "snapshots/abc/unet/x"), "snapshots/abc"),
    "a folder around it": (("sd15/unet/diffusion_pytorch_model.safetensors",), "in it: sd15"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_told_by_what_is_in_it(name: str, tmp_path: Path) -> None:
    files, told = FOLDERS[name]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    with pytest.raises(
        UnsupportedError, match=f"without the weights of a UNet or a transformer.*{told}"
    ) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.expected and caught.value.found

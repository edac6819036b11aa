"""Opening files that are no checkpoints, and reading from those that are."""

import io
import json
import pickle
import resource
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from patch_spec.digest import tensor_fingerprint
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.errors import MalformedError, SystemFailure, UnsupportedError
from tests.synthetic import checkpoint_tensors, make_checkpoint, read_raw, write_safetensors


def with_header(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".sft", ""])
@pytest.mark.parametrize("protocol", range(2, 6))
def test_pickles_are_refused_under_any_other_name(
    tmp_path: Path, suffix: str, protocol: int
) -> None:
    path = tmp_path / f"m{suffix}"
    path.write_bytes(pickle.dumps({"state_dict": list(range(1000))}, protocol=protocol))
    with pytest.raises(MalformedError) as caught:
        open_checkpoint(path)
    assert caught.value.found == "a pickle"
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({}))
    path.write_bytes(archive.getvalue())
    with pytest.raises(MalformedError, match="pickle in a zip archive"):
        open_checkpoint(path)


def test_a_short_header_that_begins_like_a_pickle_is_read(tmp_path: Path) -> None:
    """0x80 0x02 is also how the length of a header of 640 bytes begins."""
    tensors = {
        "model.diffusion_model.input_blocks.0.0.weight": ("F16", np.zeros(1, "<f2")),
        **{
            f"model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_{which}.weight": (
                "F16",
                np.ones((2, 3), "<f2"),
            )
            for which in "kv"
        },
    }
    path = write_safetensors(tmp_path / "m.safetensors", tensors, pad=640)
    assert path.read_bytes()[:2] == b"\x80\x02"
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.width == 3


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x07",
        b"hello, this is text and no checkpoint",
        (2**63).to_bytes(8, "little") + b"{}",
        (99_999_999).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"\xff\xfe",
    ],
)
def test_what_is_no_safetensors_file_is_malformed(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(MalformedError) as caught:
        open_checkpoint(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20, "memory was taken for a length that lies"
    tracemalloc.stop()
    assert caught.value.file == str(path)


def test_hostile_headers_are_malformed(tmp_path: Path) -> None:
    entry = '{"dtype":"F16","shape":[1],"data_offsets":[0,2]}'
    path = tmp_path / "m.safetensors"
    for header in (
        f'{{"a":{entry},"a":{entry}}}',
        '{"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2],"x":1}}',
        '{"a":{"dtype":"F16","shape":[4611686018427387904,4],"data_offsets":[0,2]}}',
        '{"a":{"dtype":"F16","shape":[-1],"data_offsets":[0,2]}}',
        '{"../a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}}',
        '{"__metadata__":{"a":1}}',
        "[" * 50_000,
    ):
        with pytest.raises(MalformedError):
            open_checkpoint(with_header(path, header.encode(), b"\0\0"))


@pytest.mark.parametrize("cut", [1, 100, -1])
def test_a_truncated_file_is_malformed(tmp_path: Path, cut: int) -> None:
    path = make_checkpoint(tmp_path / "m.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[:-cut] if cut > 0 else data + b"\0")
    with pytest.raises(MalformedError, match="size"):
        open_checkpoint(path)


def test_a_stack_record_that_is_none_is_malformed(tmp_path: Path) -> None:
    for record in ("{}", "hello", '{"format":"sepme-stack","version":2}'):
        path = make_checkpoint(tmp_path / "m.safetensors", metadata={"sepme": record})
        with pytest.raises(MalformedError, match=r"m\.safetensors"):
            open_checkpoint(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(SystemFailure, match="not found"):
        open_checkpoint(tmp_path / "nowhere.safetensors")
    with pytest.raises(UnsupportedError, match="folder without the weights"):
        open_checkpoint(tmp_path)
    with pytest.raises(UnsupportedError, match="regular"):
        open_checkpoint(Path("/dev/null"))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
def test_values_come_as_they_are_stored(tmp_path: Path, dtype: str) -> None:
    path = make_checkpoint(tmp_path / "m.safetensors", dtype=dtype)
    tensors = checkpoint_tensors(dtype=dtype)
    with open_checkpoint(path) as checkpoint:
        for target in checkpoint.targets:
            stored = tensors[target.copies[0].name][1]
            found = target.read()
            assert found.dtype == stored.dtype
            assert found.tobytes() == stored.tobytes()
            assert checkpoint.base().targets[target.name] == tensor_fingerprint(stored)


def test_a_target_that_is_not_finite_is_named(tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    tensors[name][1][0, 0] = np.nan
    with (
        open_checkpoint(write_safetensors(tmp_path / "m.safetensors", tensors)) as checkpoint,
        pytest.raises(MalformedError, match="middle_block"),
    ):
        checkpoint.base()


def test_a_file_that_shrinks_meanwhile_is_noticed(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "m.safetensors")
    with open_checkpoint(path) as checkpoint:
        with path.open("r+b") as file:
            file.truncate(checkpoint.files[0].header.data_start + 10)
        with pytest.raises(MalformedError, match="ends inside"):
            checkpoint.targets[-1].read()


def test_failing_leaves_no_file_open(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"nothing")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        for _ in range(200):
            with pytest.raises(MalformedError):
                open_checkpoint(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_helper_writes_what_others_read(tmp_path: Path) -> None:
    """The synthetic files are real ones: safetensors opens them."""
    from safetensors import safe_open

    path = make_checkpoint(tmp_path / "m.safetensors", ema="F32", metadata={"a": "b"})
    header, _ = read_raw(path)
    with safe_open(path, "np") as file:
        assert set(file.keys()) == header.keys() - {"__metadata__"}
        assert file.metadata() == {"a": "b"}
    assert json.dumps(header)

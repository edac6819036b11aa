"""Files that torch has pickled: their weights come out, and nothing of theirs runs."""

import errno
import mmap
import os
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.checkpoints.reading.pickled import PickledFile
from sepme_cli.errors import MalformedError, UnsupportedError
from sepme_cli.render.console import Reporter
from tests.layouts import to_torch, write_ckpt
from tests.synthetic import checkpoint_tensors


def state(dtype: str = "F16") -> dict[str, torch.Tensor]:
    return {name: to_torch(value) for name, (_, value) in checkpoint_tensors(dtype=dtype).items()}


@pytest.mark.parametrize(
    ("dtype", "archive"),
    [("F16", True), ("F32", True), ("BF16", True), ("F8_E4M3", True), ("F16", False)],
)
def test_every_tensor_is_what_was_saved(dtype: str, archive: bool, tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    saved = state(dtype)
    torch.save({"state_dict": saved}, path, _use_new_zipfile_serialization=archive)
    with open_checkpoint(path) as checkpoint:
        file = checkpoint.files[0]
        assert [entry.name for entry in file.header.tensors] == list(saved)
        for entry in file.header.tensors:
            expected = saved[entry.name].contiguous().flatten().view(torch.uint8).numpy().tobytes()
            assert file.read_range(entry.begin, entry.end, entry.name) == expected
        whole = file.read_range(0, file.header.data_length, "all")
        assert len(whole) == file.header.data_length
        assert file.read_range(5, 1005, "some") == whole[5:1005]


@pytest.mark.parametrize("number", [errno.ENODEV, errno.EACCES, errno.ENOSYS, errno.EINVAL])
def test_what_cannot_be_mapped_is_read(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that it takes memory is said, once."""
    path, saved, reporter = tmp_path / "m.ckpt", state(), Reporter()
    torch.save({"state_dict": saved}, path)

    def fail(*_: object, **more: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(mmap, "mmap", fail)
    monkeypatch.setattr(torch.UntypedStorage, "from_file", fail)
    with open_checkpoint(path, reporter) as checkpoint:
        file = checkpoint.files[0]
        for entry in file.header.tensors:
            expected = saved[entry.name].contiguous().flatten().view(torch.uint8).numpy().tobytes()
            assert file.read_range(entry.begin, entry.end, entry.name) == expected
    assert [text for text in reporter.warnings if "memory" in text] == reporter.warnings
    assert len(reporter.warnings) == 1


def test_views_are_read_as_they_look(tmp_path: Path) -> None:
    """Tensors that share memory, are transposed or are part of a larger one."""
    saved = state()
    name = next(
        n for n in saved if n.endswith("middle_block.1.transformer_blocks.0.attn2.to_k.weight")
    )
    expected = saved[name].clone()
    saved[name] = torch.cat([expected.T, expected.T])[: expected.shape[1]].T
    saved["shared"] = saved[name]
    torch.save(saved, tmp_path / "m.pt")
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        target = next(t for t in checkpoint.targets if t.copies[0].name == name)
        assert (target.read() == expected.numpy()).all()


def test_what_lightning_left_in_the_first_files_is_no_obstacle(tmp_path: Path) -> None:
    """Those hold the name of a class of PyTorch Lightning as a key; only the name is read."""

    path = write_ckpt(tmp_path / "m.ckpt", checkpoint_tensors(), callbacks={"KEY": {"best": 1.0}})
    swap_pickle(
        path,
        b"X\x03\x00\x00\x00KEY",
        b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n",
    )
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.family.name == "sd1"
        file = checkpoint.files[0]
        assert isinstance(file, PickledFile)
        assert file.left_out == ("global_step", "callbacks")
    swap_pickle(
        path, b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n", b"cos\nsystem\n"
    )
    with pytest.raises(MalformedError, match="run code") as caught:
        open_checkpoint(path)
    assert str(caught.value.found).endswith(".system")


def swap_pickle(path: Path, old: bytes, new: bytes) -> None:
    """Put other bytes into an archive's pickle."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    assert old in members[name]
    members[name] = members[name].replace(old, new)
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)


class Bomb:
    """Writes a file when it is unpickled by a loader that trusts it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
def test_code_in_a_pickle_never_runs(archive: bool, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    path = tmp_path / "m.ckpt"
    torch.save(
        {"state_dict": state(), "x": Bomb(trace)}, path, _use_new_zipfile_serialization=archive
    )
    with pytest.raises(MalformedError, match="code of its own") as caught:
        open_checkpoint(path)
    assert "open" in str(caught.value.found)
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps([1, 2], protocol=2),
        pickle.dumps({"state_dict": {}}, protocol=2),
        pickle.dumps({"state_dict": [1]}, protocol=4),
        b"\x80\x02.",
        b"PK\x03\x04 and no archive",
        b"\x80\x02" + b"(" * 5000,
    ],
)
def test_what_holds_no_weights_is_malformed(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    path.write_bytes(content)
    with pytest.raises(MalformedError) as caught:
        open_checkpoint(path)
    assert caught.value.file == str(path)


def test_other_things_than_a_dictionary_of_tensors(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    for saved in ([torch.ones(1)], {"state_dict": {"a": 1}}, {}, {"../a": torch.ones(1)}):
        torch.save(saved, path)
        with pytest.raises(MalformedError):
            open_checkpoint(path)
    torch.save({"a.weight": torch.ones(1)}, path)
    with pytest.raises(UnsupportedError, match="no Stable Diffusion"):
        open_checkpoint(path)


def test_an_archive_that_unpacks_to_more_is_malformed(tmp_path: Path) -> None:
    path = write_ckpt(tmp_path / "m.ckpt", checkpoint_tensors())
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression=zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr("archive/data/bomb", np.zeros(2**24, "u1").tobytes())
    with pytest.raises(MalformedError, match="compressed"):
        open_checkpoint(path)


def test_an_archive_within_the_end_of_another_is_not_what_is_checked(tmp_path: Path) -> None:
    """Torch looks for the list of members in another way than Python does: a signature behind the
    end hides it from Python alone, and with it what it says of compressed members."""
    path = write_ckpt(tmp_path / "m.ckpt", checkpoint_tensors())
    with path.open("ab") as file:
        file.write(b"PK\x05\x06")
    assert not zipfile.is_zipfile(path)
    with pytest.raises(MalformedError, match="damaged, or hostile"):
        open_checkpoint(path)


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
def test_a_view_that_claims_more_than_the_file_holds_is_malformed(
    archive: bool, tmp_path: Path
) -> None:
    path = tmp_path / "m.ckpt"
    wide = {**state(), "wide": torch.zeros(1).expand(2**40)}
    torch.save(wide, path, _use_new_zipfile_serialization=archive)
    with pytest.raises(MalformedError, match="claims more than") as caught:
        open_checkpoint(path)
    assert caught.value.found == f"{2**42} bytes"


def test_memory_that_nobody_filled_is_not_taken_for_weights(tmp_path: Path) -> None:
    """The oldest format lists what follows; of what the list leaves out, torch reads nothing."""
    path = tmp_path / "m.ckpt"
    torch.save({"a.weight": torch.ones(10**6)}, path, _use_new_zipfile_serialization=False)
    with path.open("rb") as file:
        for _ in range(4):  # a magic number, a version, a system, and what was saved
            list(pickletools.genops(file))
        position = file.tell()
    path.write_bytes(path.read_bytes()[:position] + pickle.dumps([], protocol=2))
    with pytest.raises(MalformedError, match="claims more than"):
        open_checkpoint(path)


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
def test_tuples_that_unfold_without_end_are_malformed(archive: bool, tmp_path: Path) -> None:
    """Sixty opcodes; to hash what they say would take longer than anyone has."""
    unfolding: Any = ()
    for _ in range(60):
        unfolding = (unfolding, unfolding)
    path = tmp_path / "m.ckpt"
    torch.save(state() | {"x": [unfolding]}, path, _use_new_zipfile_serialization=archive)
    with pytest.raises(MalformedError, match="more time or memory"):
        open_checkpoint(path)


def test_an_archive_whose_checksums_torch_left_out_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state(), path)
    finally:
        torch.serialization.set_crc32_options(True)
    with open_checkpoint(path) as checkpoint:
        assert len(checkpoint.targets) == 14


@pytest.mark.parametrize("cut", [10, 1000, 20000])
def test_a_truncated_archive_is_malformed(cut: int, tmp_path: Path) -> None:
    path = write_ckpt(tmp_path / "m.ckpt", checkpoint_tensors())
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(MalformedError):
        open_checkpoint(path)


def test_a_file_that_becomes_shorter_is_malformed(tmp_path: Path) -> None:
    """It is mapped into memory: reading on would end the process."""
    path = write_ckpt(tmp_path / "m.ckpt", checkpoint_tensors())
    with open_checkpoint(path) as checkpoint:
        file = checkpoint.files[0]
        os.truncate(path, 10_000)
        with pytest.raises(MalformedError, match="shorter"):
            file.read_range(0, file.header.data_length, "all")
        with (tmp_path / "out").open("wb") as out, pytest.raises(MalformedError, match="shorter"):
            file.copy_range(0, file.header.data_length, out.fileno(), 0)

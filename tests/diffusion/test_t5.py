"""T5's weights stay in their file, and how long reading takes is told once, of all of it."""

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.full_size import make_sparse, t5
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.checkpoints.reading.networks import Network
from sepme_cli.checkpoints.reading.opening import open_weights
from sepme_cli.checkpoints.reading.tensors import stored_in
from sepme_cli.diffusion import t5 as module
from sepme_cli.diffusion.devices import Machine
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.t5 import T5Encoder
from sepme_cli.erasure.background import captions
from sepme_cli.planning.background import background_of
from sepme_cli.planning.vocabulary import caption_words, everything
from sepme_cli.progress import Progress
from tests.small_transformers import (
    T5_POSITIONS,
    small_t5,
    small_transformer,
    write_tokenizer,
    write_transformer_folder,
)

CPU = torch.device("cpu")
PROMPTS = ["a cat", "a painting by Van Gogh", "red car in the art of Monet"]


class Heard(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def states(path: Path, tokenizer: Path) -> Tensor:
    file = open_weights(path)
    try:
        network = Network("t5xxl", "t5", stored_in(file))
        return T5Encoder(network, Machine(CPU), T5_POSITIONS, tokenizer).encode(PROMPTS)
    finally:
        file.close()


@pytest.fixture(scope="module")
def small() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: value.clone() for name, value in small_t5().state_dict().items()}


def test_mapped_weights_are_those_that_are_read(small: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(small, path := tmp_path / "t5.safetensors")
    before = path.read_bytes()
    file = open_weights(path)
    for entry in file.header.tensors:
        mapped, read = file.mapped(entry), file.read(entry)
        assert isinstance(mapped, np.memmap)
        assert mapped.dtype == read.dtype and np.array_equal(mapped, read)
        mapped[...] = 0
    file.close()
    assert path.read_bytes() == before


def _askew(small: dict[str, Tensor], path: Path) -> None:
    """Its header is of an odd length, as the format allows."""
    save_file(small, path)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    path.write_bytes(
        (length + 1).to_bytes(8, "little") + whole[8:][:length] + b" " + whole[8:][length:]
    )


def _pickled(small: dict[str, Tensor], path: Path) -> None:
    torch.save(small, path)


@pytest.mark.parametrize(("write", "name"), [(_askew, "t5.safetensors"), (_pickled, "t5.bin")])
def test_what_cannot_be_mapped_is_read(
    write: Callable[[dict[str, Tensor], Path], None],
    name: str,
    small: dict[str, Tensor],
    tokenizer: Path,
    tmp_path: Path,
) -> None:
    save_file(small, tmp_path / "plain.safetensors")
    write(small, tmp_path / name)
    file = open_weights(tmp_path / name)
    assert not any(isinstance(file.mapped(entry), np.memmap) for entry in file.header.tensors)
    file.close()
    expected = states(tmp_path / "plain.safetensors", tokenizer)
    assert torch.equal(states(tmp_path / name, tokenizer), expected)


def test_a_file_system_that_maps_nothing(
    small: dict[str, Tensor], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(small, path := tmp_path / "t5.safetensors")
    expected = states(path, tokenizer)

    def refused(*_: object) -> None:
        raise OSError("no such device")

    monkeypatch.setattr(np, "memmap", refused)
    assert torch.equal(states(path, tokenizer), expected)


def test_what_lies_there_now_is_another_file(small: dict[str, Tensor], tmp_path: Path) -> None:
    """What is open is what is read, though its name is another file's by now."""
    save_file(small, path := tmp_path / "t5.safetensors")
    file = open_weights(path)
    entry = file.header.tensors[0]
    save_file({n: v + 1 for n, v in small.items()}, tmp_path / "other.safetensors")
    if os.name != "nt":
        (tmp_path / "other.safetensors").replace(path)
        assert np.array_equal(file.mapped(entry), file.read(entry))
    file.close()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells memory as Linux does")
def test_a_large_one_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    """1 GB in bf16, of which nothing is copied."""
    make_sparse(t5(layers=2), path := tmp_path / "t5.safetensors")
    program = """
import sys
from pathlib import Path
import torch
from sepme_cli.checkpoints.reading.networks import Network
from sepme_cli.checkpoints.reading.opening import open_weights
from sepme_cli.checkpoints.reading.tensors import stored_in
from sepme_cli.diffusion.devices import Machine
from sepme_cli.diffusion.t5 import T5Encoder

def own():
    told = Path("/proc/self/status").read_text().split("RssAnon:")[1]
    return int(told.split()[0]) * 1024 // 10**6

network = Network("t5xxl", "t5", stored_in(open_weights(Path(sys.argv[1]))))
before = own()
model = T5Encoder(network, Machine(torch.device("cpu")), 256, None).model
assert model.shared.weight.dtype == torch.bfloat16
print(own() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 150


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which every batch takes ten seconds."""
    ticks = count(0, 10)
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(ticks)))


@pytest.mark.usefixtures("slow")
def test_how_long_all_captions_take_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No part of them takes a minute by itself to tell of; together they take hours."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_transformer_folder(small_transformer("flux"), tmp_path / "model")
    heard = Heard()
    with open_checkpoint(folder) as checkpoint:
        network = StableDiffusion.of(checkpoint, CPU, progress=heard)
        base = checkpoint.base(text_encoders=True)
        background_of(network.text, base, progress=heard)
    sample, words = captions(caption_words()), everything()
    prompts = (*sample.protected, *sample.held_out, *words)
    told = [said for said in heard.said if "with T5" in said]
    assert len(told) == 1 and f"{len(prompts):,} prompts" in told[0]


@pytest.mark.usefixtures("slow")
def test_how_long_one_call_takes_is_told_of_that_call(
    small: dict[str, Tensor], tokenizer: Path, tmp_path: Path
) -> None:
    """Ten seconds for 64 prompts: eighty for the 512 others. A few take less than a minute."""
    save_file(small, tmp_path / "t5.safetensors")
    file, heard = open_weights(tmp_path / "t5.safetensors"), Heard()
    network = Network("t5xxl", "t5", stored_in(file))
    encoder = T5Encoder(network, Machine(CPU), T5_POSITIONS, tokenizer, heard)
    encoder.encode(PROMPTS, paddings=0)
    assert not heard.said
    for _ in range(2):
        encoder.encode(["a cat"] * 64 * 9, paddings=0)
    file.close()
    assert heard.said == ["reading 576 prompts with T5 takes about 1 more minute"] * 2

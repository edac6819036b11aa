"""Prompts that a text encoder does not read as meant are pointed out; and what a UNet predicts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.tokenizer import tokenize, unread
from sepme_cli.erasure.words import Item
from sepme_cli.planning.misread import misread, misread_prompts
from sepme_cli.progress import Progress

CPU = torch.device("cpu")
LONG = " ".join(f"word{i}" for i in range(60))


class Heard(Progress):
    """Keeps what is said and warned of."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def warn(self, message: str) -> None:
        self.warned.append(message)


@pytest.mark.parametrize("positions", [16, 77])
@pytest.mark.parametrize("prompt", [LONG, "cat " * 80, "モネ" * 60, "qzx" * 200, "  a\n\tb " * 50])
def test_what_is_unread_is_what_the_tokens_lack(prompt: str, positions: int) -> None:
    lost = unread(prompt, positions)
    assert lost and prompt.endswith(lost)
    kept = prompt.removesuffix(lost)
    assert not unread(kept, positions)
    # The first of the words that are lost is the one that does not fit.
    begun = kept + lost.split()[0]
    assert unread(begun, positions) or torch.equal(
        tokenize([begun], positions), tokenize([prompt], positions)
    )


def test_what_fits_is_read_to_its_end() -> None:
    for prompt in ("", "a cat", "cat " * 75):
        assert unread(prompt, 77) == ""
    assert unread("cat " * 76, 77).split() == ["cat"]


def test_names_and_prompts_that_are_cut(small_model: Path) -> None:
    with open_checkpoint(small_model) as checkpoint:
        text = StableDiffusion.of(checkpoint, CPU).text
        assert text.room == 14
        assert list(misread(text, [Item("Monet", "style", prompts=("a lake by Monet",))])) == []
        (cut,) = misread(text, [Item("cat", prompts=("a cat " + "red " * 14,))])
        assert "is cut in" in cut and "the part that is not read" not in cut
        (lost,) = misread(text, [Item("cat", prompts=("red " * 14 + "cat",))])
        assert "'cat' is in the part that is not read" in lost
        long = "one two three four five six seven eight nine ten"
        (phrases,) = misread(text, [Item(long, "style")])
        assert "phrases for" in phrases and "14 tokens" in phrases
        found = list(misread(text, [Item("Monet", "style", aliases=(f"{long} {long}",))]))
        assert "is cut in" in found[0] and "phrases for" in found[1]
        assert "web UIs" in next(misread(text, [Item("(monet:1.2)", "object")]))
        assert len(list(misread_prompts(text, ["a cat", LONG, LONG, "x BREAK y"]))) == 2


def test_what_says_the_prediction_is_said(small_model: Path, tmp_path: Path) -> None:
    tensors = load_file(small_model)
    said = {
        "v": (["taken to predict velocity (modelspec.prediction_type in its metadata)"], 0),
        "epsilon": (["taken to predict epsilon (modelspec.prediction_type in its metadata)"], 0),
        "flow": ([], 1),
    }
    for word, (expected, warned) in said.items():
        path = tmp_path / f"{word}.safetensors"
        save_file(tensors, path, {"modelspec.prediction_type": word})
        heard = Heard()
        with open_checkpoint(path) as checkpoint:
            StableDiffusion.of(checkpoint, CPU, progress=heard)
        assert [line.partition(";")[0] for line in heard.said] == expected
        assert len(heard.warned) == warned

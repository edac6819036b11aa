"""Text to CLIP's token ids, without a network connection."""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch

from sepme_cli.checkpoints.structure.families import CLIP_END
from sepme_cli.errors import UnsupportedError

START = 49406
END = CLIP_END
_MANY = 2**20
"""Tokens that no text encoder of CLIP's kind has, whatever was added to it."""


def tokenize(
    prompts: Sequence[str], positions: int, *, padding: int = END, folder: Path | None = None
) -> torch.Tensor:
    """CLIP's ids of prompts: start, text, end, padding; what does not fit is cut before the end.

    positions: the text encoder's number of token positions (77 in Stable Diffusion).
    padding: END for CLIP-L, 0 for OpenCLIP. folder: with a tokenizer's files, where a model has
    its own. Returns int64 [len(prompts), positions].
    """
    encode = _vocabulary() if folder is None else _of_folder(folder)
    rows = []
    for prompt in prompts:
        text = encode(prompt)[: positions - 2]
        rows.append([START, *text, END] + [padding] * (positions - 2 - len(text)))
    return torch.tensor(rows, dtype=torch.long).reshape(len(prompts), positions)


def unread(prompt: str, positions: int, folder: Path | None = None) -> str:
    """The words at a prompt's end that `tokenize` cuts off, the first of them perhaps in part."""
    return cut_off(prompt, positions - 2, _vocabulary() if folder is None else _of_folder(folder))


def cut_off(prompt: str, room: int, encode: Callable[[str], list[int]]) -> str:
    """The words at a prompt's end that there is no room for, the first of them perhaps in part.

    room: for how many tokens there is. encode: the tokens of a text.
    """
    if len(encode(prompt)) <= room:
        return ""
    starts = [found.start() for found in re.finditer(r"\S+", prompt)]
    # A word's tokens do not depend on those beside it.
    whole = bisect_right(starts[1:], room, key=lambda at: len(encode(prompt[:at])))
    return prompt[starts[whole] :]


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the files of a tokenizer."""
    whole = (folder / "tokenizer.json").is_file()
    return whole or all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))


@lru_cache(maxsize=1)
def _vocabulary() -> Callable[[str], list[int]]:
    from instant_clip_tokenizer import Tokenizer

    tokenizer = Tokenizer()
    return lambda text: list(tokenizer.encode(text))


@lru_cache(maxsize=4)
def _of_folder(folder: Path) -> Callable[[str], list[int]]:
    """The tokenizer of a folder; it must give CLIP's ids, which the rest relies on."""
    from transformers import CLIPTokenizer

    if not has_tokenizer(folder):
        raise UnsupportedError(
            f"{folder} holds no tokenizer", file=folder, expected="vocab.json and merges.txt"
        )
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        known = tokenizer.get_vocab().values()
        least, most = min(known), max(known)
        tokenizer("a", add_special_tokens=False)
    # On files that make no sense its reader raises whatever they lead it to.
    except Exception as error:
        raise UnsupportedError(f"{folder} holds no tokenizer: {error}", file=folder) from error
    # Words that textual inversion added have ids above the end's.
    if special != (START, END) or least < 0 or most >= _MANY:
        raise UnsupportedError(
            f"{folder} holds the tokenizer of another text encoder",
            file=folder,
            expected=f"start {START}, end {END}, none above {_MANY}",
            found=f"start {special[0]}, end {special[1]}, {least} to {most}",
        )
    return lambda text: list(tokenizer(text, add_special_tokens=False).input_ids)


def words_of(ids: torch.Tensor) -> str:
    """What token ids [positions] of CLIP's own tokenizer say, up to the end."""
    from instant_clip_tokenizer import Tokenizer

    end = int((ids == END).int().argmax())
    return str(Tokenizer().decode(ids[1:end].tolist())).strip()

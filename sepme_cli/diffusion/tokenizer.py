"""Text to CLIP's token ids, without a network."""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from instant_clip_tokenizer import Tokenizer

START = 49406
END = 49407


@lru_cache(maxsize=1)
def _vocabulary() -> "Tokenizer":
    from instant_clip_tokenizer import Tokenizer

    return Tokenizer()


def tokenize(prompts: Sequence[str], positions: int, *, padding: int = END) -> torch.Tensor:
    """CLIP's ids of prompts: start, text, end, padding; what does not fit is cut before the end.

    positions: the text encoder's number of token positions (77 in Stable Diffusion).
    padding: END for SD 1.x, 0 for SD 2.x.
    Returns int64 [len(prompts), positions].
    """
    rows = []
    for prompt in prompts:
        text = _vocabulary().encode(prompt)[: positions - 2]
        rows.append([START, *text, END] + [padding] * (positions - 2 - len(text)))
    return torch.tensor(rows, dtype=torch.long).reshape(len(prompts), positions)

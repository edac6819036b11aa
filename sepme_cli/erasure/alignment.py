"""Which token of one prompt answers which token of another."""

import torch
from torch import Tensor


def align(ids: Tensor, others: Tensor) -> Tensor:
    """For every position of a prompt, the position of another prompt that plays its part.

    ids, others: token ids [positions] of two padded prompts that differ in one place ("a cat in
    Monet style" and "a cat"). The common beginning answers itself, the common end (padding
    included) answers from its start on, and what is in between is spread over the other's
    in-between, or over the token that follows when the other has none.
    Returns int64 [positions].
    """
    length = len(ids)
    same = int((ids != others).int().argmax()) if not torch.equal(ids, others) else length
    if same == length:
        return torch.arange(length)
    end, other_end = _text_end(ids), _text_end(others)
    tail = 0
    while tail < min(end, other_end) - same and ids[end - 1 - tail] == others[other_end - 1 - tail]:
        tail += 1
    middle, other_middle = end - tail - same, other_end - tail - same
    answers = torch.arange(length)
    spread = torch.arange(middle) * max(other_middle, 1) // max(middle, 1)
    answers[same : same + middle] = same + spread
    answers[same + middle :] = torch.arange(length - same - middle) + same + other_middle
    return answers.clamp(max=length - 1)


def _text_end(ids: Tensor) -> int:
    """One past the end-of-text token, which has CLIP's highest id; what follows is padding."""
    return int(ids.argmax()) + 1

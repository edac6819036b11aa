"""What a concept's increment drags along: words that nobody protected."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sepme_cli.erasure.increment import Admissible


def drag(spaces: Sequence[Admissible], ends: Tensor, layers: Iterable[Tensor]) -> Tensor:
    """How much each concept's closed form changes the keys and values of some words.

    ends: e [n, d], the embedding of each word's end. layers: W [out, d] of each, looked at one at
    a time. Returns |W T e| / |W e|, over all layers together: [concepts, n].
    """
    operators = [(space.basis.float(), space.shift.float()) for space in spaces]
    states = torch.cat([ends, *(ends @ basis.T @ shift.T for basis, shift in operators)])
    sizes = torch.zeros(len(states), dtype=torch.float64)
    for weight in layers:
        sizes += (states @ weight.float().cpu().T).double().pow(2).sum(1)
    sizes = sizes.reshape(len(spaces) + 1, len(ends))
    return (sizes[1:] / sizes[0]).sqrt()

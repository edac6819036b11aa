"""What only a recipe can say, end to end, on a whole Stable Diffusion with random weights."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from patch_spec.container import read_patch
from patch_spec.increment import Increment
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.erasure.concept import Lexicon
from sepme_cli.erasure.words import Item
from sepme_cli.errors import UsageError
from sepme_cli.operations.erase import erase
from sepme_cli.recipe import Recipe

#: In a random text encoder, 64 wide, a concept's prompts fill the space: insist less.
ROOMY = {"insistence": 1.0, "protection": 1.0, "rank": 32}


def patch_of(model: Path, recipe: Recipe) -> bytes:
    stream = io.BytesIO()
    erase(model, recipe=recipe, output=stream)
    return stream.getvalue()


def shift_of(part: Increment) -> np.ndarray:  # type: ignore[type-arg]
    assert part.shift is not None
    return np.ldexp(part.shift.astype(float), part.shift_exponent)


def moved(model: Path, recipe: Recipe, prompt: str) -> float:
    """How far the embeddings of a prompt move, as a share of what they are."""
    (part,) = read_patch(patch_of(model, recipe)).increments
    with open_checkpoint(model) as checkpoint:
        network = StableDiffusion.of(checkpoint, torch.device("cpu"))
        rows = Lexicon(network.text.readers, [prompt]).rows([prompt]).numpy()
    change = rows @ part.basis.T @ shift_of(part).T
    return float(np.linalg.norm(change) / np.linalg.norm(rows))


def test_a_less_certain_alias_moves_less(small_model: Path) -> None:
    def alias_moves(weights: Mapping[str, float]) -> float:
        item = Item("cat", "object", ("violin",), weights=weights)
        return moved(small_model, Recipe((item,), settings=ROOMY), "a photo of a violin")

    sure, less, hardly = (
        alias_moves({}),
        alias_moves({"violin": 0.2}),
        alias_moves({"violin": 1e-3}),
    )
    assert sure > 1.05 * less > 1.1 * hardly


def test_a_neighbour_that_matters_less_moves_more(small_model: Path) -> None:
    def neighbour_moves(weight: float) -> float:
        settings = {**ROOMY, "protection": 30.0, "background": 0.1, "neighbours": 0}
        kept = ("object:dog", "object:owl")
        recipe = Recipe((Item("cat", "object"),), kept, None, settings, {"dog": weight})
        return moved(small_model, recipe, "a photo of a dog")

    found = [neighbour_moves(weight) for weight in (1e-3, 0.2, 1.0)]
    assert found[0] > 1.05 * found[1] > 1.05**2 * found[2], found


@pytest.mark.parametrize(
    ("item", "weights"),
    [
        (Item("cat", aliases=("kitten",), weights={"kitten": 0.0}), {}),
        (Item("cat", aliases=("kitten",), weights={"kitten": 1.5}), {}),
        (Item("cat", aliases=("kitten",), weights={"kitten": float("nan")}), {}),
        (Item("cat", weights={"cat": 0.5}), {}),
        (Item("cat"), {"dog": 2.0}),
        (Item("cat"), {"owl": 0.5}),
    ],
)
def test_weights_from_python_are_held_to_the_same(
    small_model: Path, item: Item, weights: Mapping[str, float]
) -> None:
    with pytest.raises(UsageError, match="the weight of"):
        patch_of(small_model, Recipe((item,), ("object:dog",), weights=weights))

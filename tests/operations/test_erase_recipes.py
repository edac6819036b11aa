"""What only a recipe can say, end to end, on a whole Stable Diffusion with random weights."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from sepme_cli.operations.erase import EraseResult, erase
from sepme_cli.operations.plan import plan_erasure
from sepme_cli.recipe import Recipe
from tests.small_model import small_parts, write_single_file

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


def test_an_attribute_goes_from_one_thing_and_stays_on_others(small_model: Path) -> None:
    item = Item("ink", "style", erase_from="cat")
    recipe = Recipe((item,), settings={**ROOMY, "protection": 30.0})
    (part,) = read_patch(patch_of(small_model, recipe)).increments
    assert (part.concept, part.slug) == ("ink from cat", "ink-from-cat")
    assert {"cat in ink style", "ink cat"} < set(part.prompts)
    with open_checkpoint(small_model) as checkpoint:
        others = ["dog in ink style", "cat in noto style", "cat", "in ink style"]
        text = StableDiffusion.of(checkpoint, torch.device("cpu")).text
        ends = text.ends(["cat in ink style", *others]).numpy()
    moves = np.linalg.norm(ends @ part.basis.T @ shift_of(part).T, axis=1)
    assert moves[0] > 1.25 * moves[1:].max(), moves


def test_an_attribute_may_go_from_two_things_in_one_patch(small_model: Path) -> None:
    items = (Item("ink", "style", erase_from="cat"), Item("ink", "style", erase_from="owl"))
    patch = read_patch(patch_of(small_model, Recipe(items)))
    assert sorted(part.concept for part in patch.increments) == ["ink from cat", "ink from owl"]
    assert "dog in ink style" in patch.protected
    assert not {"cat in ink style", "owl in ink style"} & set(patch.protected)


def test_what_is_erased_is_not_kept_for_an_attribute(small_model: Path) -> None:
    """Other things keep it, but those that are erased themselves."""
    items = (Item("ink", "style", erase_from="cat"), Item("dog", "object"))
    patch = read_patch(patch_of(small_model, Recipe(items)))
    assert not [text for text in patch.protected if "dog" in text.split()]
    assert "house in ink style" in patch.protected


@pytest.mark.parametrize(
    ("concepts", "options"),
    [
        (["ink"], {"erase_from": "Ink"}),
        (["ink", "cat"], {"erase_from": "cat"}),
        (["ink"], {"erase_from": "cat", "to": "INK"}),
        (["ink"], {"erase_from": "\n"}),
        ([], {"erase_from": "cat", "recipe": Recipe((Item("ink"),))}),
        ([], {"recipe": Recipe((Item("ink"), Item("ink", erase_from="cat")))}),
        ([], {"recipe": Recipe((Item("cat"), Item("ink", erase_from="cat")))}),
    ],
)
def test_what_makes_no_sense_of_an_attribute(
    small_model: Path,
    concepts: list[str],
    options: Any,
) -> None:
    stream = io.BytesIO()
    with pytest.raises(UsageError):
        erase(small_model, concepts, output=stream, **options)
    assert not stream.getvalue()


def test_a_patch_against_attacks_says_so_and_others_have_the_bytes_they_had(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")

    def made(**settings: Any) -> tuple[EraseResult, Increment]:
        stream = io.BytesIO()
        result = erase(
            small_model, ["ink"], kind="style", output=stream, settings={**ROOMY, **settings}
        )
        (part,) = read_patch(stream.getvalue()).increments
        return result, part

    plain, part = made()
    assert plain.increments[0].reachability is None
    assert not {"robust", "robust_rounds"} & set(part.method.settings)
    assert made(robust="none", robust_rounds=2)[1].digest == part.digest
    reached = []
    for robust in ("phrasings", "embeddings", "both"):
        result, other = made(robust=robust, robust_rounds=2)
        assert other.digest != part.digest
        assert other.prompts == part.prompts
        assert (other.method.settings["robust"], other.method.settings["robust_rounds"]) == (
            robust,
            2,
        )
        assert result.increments[0].reachability is not None
        reached.append(result.increments[0].reachability)
    assert len(set(reached)) == 3 and 0 < min(reached) <= max(reached) < 1


def test_robust_is_for_every_stream(tmp_path: Path) -> None:
    model = write_single_file(small_parts("sdxl"), tmp_path / "xl.safetensors")
    plan = plan_erasure(model, ["ink"], settings={"robust": "both", "neighbours": 2})
    (concept,) = plan.concepts
    assert concept.reachability is not None
    assert 0 <= concept.reachability < 2

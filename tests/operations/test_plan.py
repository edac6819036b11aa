"""What a check foretells is what the run does; and what lies beside the concepts is seen."""

import io
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from patch_spec.container import read_patch
from patch_spec.manifest import Patch
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.diffusion import eraser
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.moments import sampled_moments
from sepme_cli.diffusion.unet import UNet
from sepme_cli.erasure.prompts import Phrase
from sepme_cli.erasure.settings import Settings
from sepme_cli.erasure.words import Item
from sepme_cli.errors import RefusedError, UsageError
from sepme_cli.increments import interference
from sepme_cli.operations.erase import EraseResult, erase
from sepme_cli.operations.plan import plan_erasure
from sepme_cli.planning.background import background_of
from sepme_cli.planning.neighbourhood import look_around
from sepme_cli.planning.vocabulary import vocabulary
from sepme_cli.recipe import Recipe

# In a random text encoder, 64 wide, a concept's prompts fill the space: insist less.
ROOMY = Settings(rank=4, insistence=1.0, protection=1.0)
NEIGHBOURLY = replace(ROOMY, neighbours=3)


def erased(model: Path, *concepts: str, **options) -> tuple[EraseResult, Patch]:  # type: ignore[no-untyped-def]
    stream = io.BytesIO()
    result = erase(model, concepts, output=stream, **options)
    return result, read_patch(stream.getvalue())


def test_a_check_foretells_the_run(small_model: Path) -> None:
    options = {"settings": NEIGHBOURLY, "protect": ["style:noto"], "kind": "style"}
    plan = plan_erasure(small_model, ["ink", "gloss"], **options)  # type: ignore[arg-type]
    result, patch = erased(small_model, "ink", "gloss", **options)
    assert (plan.method, plan.base, plan.warnings) == ("closed-form", result.base, result.warnings)
    for planned, made in zip(plan.concepts, result.increments, strict=True):
        assert (planned.slug, planned.rank) == (made.slug, made.rank)
        assert (planned.separability, planned.leakage) == (made.separability, made.leakage)
    gloss, ink = patch.increments
    assert plan.interference["ink"]["gloss"] == interference(ink, gloss)
    assert plan.crowded[0].concepts == ("ink", "gloss")
    for planned in plan.concepts:
        assert len(planned.neighbours) == 3
        assert set(planned.neighbours) <= set(patch.protected)


def test_the_dimensions_taken_are_those_of_what_must_not_change(small_model: Path) -> None:
    alone = plan_erasure(small_model, ["ink"], settings=ROOMY)
    both = plan_erasure(small_model, ["ink", "cat"], settings=ROOMY)
    assert alone.width == 64
    # The blank alone takes 16.
    assert 16 < alone.concepts[0].taken <= both.concepts[0].taken <= 64


def test_what_is_protected_is_not_among_what_is_dragged_along(small_model: Path) -> None:
    plan = plan_erasure(small_model, ["ink"], kind="style")
    first, *_ = plan.concepts[0].drags
    protect = [f"{first.kind}:{first.word}"]
    after = plan_erasure(small_model, ["ink"], kind="style", protect=protect, settings=ROOMY)
    assert first.change > 0
    assert first.word not in {dragged.word for dragged in after.concepts[0].drags}


def test_the_optimisation_is_foretold_to_take_longer(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the passes it takes through the UNet, of a second each."""
    seconds = count()
    monkeypatch.setattr(eraser.time, "monotonic", lambda: next(seconds))
    settings = replace(ROOMY, pictures=5, sampling_steps=7, batch_size=4, steps=20)
    quick, slow = (
        plan_erasure(small_model, ["ink", "cat"], method=method, settings=settings)
        for method in ("closed-form", "sepme")
    )
    assert slow.method == "sepme"
    drawing, optimising = 3 * 5 * 7, 3 * 4 * 20 / 10
    assert slow.expected_seconds - quick.expected_seconds == 2 * (drawing + optimising)


def test_drawing_takes_as_many_passes_as_are_foretold(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, predict = [], UNet.predict

    def counted(unet: UNet, noisy: torch.Tensor, *rest: Any) -> torch.Tensor:
        passes.append(len(noisy))
        return predict(unet, noisy, *rest)

    monkeypatch.setattr(UNet, "predict", counted)
    with open_checkpoint(small_model) as checkpoint:
        network = StableDiffusion.of(checkpoint, torch.device("cpu"))
        settings = replace(ROOMY, pictures=5, sampling_steps=7)
        sampled_moments(network, [Phrase("ink", "")], settings)
    assert sum(passes) == 3 * 5 * 7


def test_neighbours_are_of_the_concepts_kind_and_no_names_of_what_is_erased(
    small_model: Path,
) -> None:
    recipe = Recipe((Item("cat", "object"), Item("Claude Monet", "style", ("sketch",))))
    with open_checkpoint(small_model) as checkpoint:
        network = StableDiffusion.of(checkpoint, torch.device("cpu"))
        background = background_of(network.text, checkpoint.base(text_encoders=True))
        found = look_around(network.text, recipe, (), background, 150).neighbours
    assert set(found["cat"]) <= set(vocabulary("object")) - {"cat"}
    styles = set(vocabulary("style")) - {"Claude Monet", "pencil sketch"}
    assert set(found["Claude Monet"]) <= styles
    assert all(len(words) == 150 for words in found.values())


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        (Recipe((Item("Monet", "style"), Item("Claude Monet", "style"))), ("Monet", "Claude")),
        (Recipe((Item("cats", "object"),), protect=("object:cat",)), ("'cats'", "'cat'")),
        (Recipe((Item("Monet", "style", like="Claude Monet"),)), ("the anchor of",)),
        (Recipe((Item("ink", aliases=("owls",)), Item("an owl"))), ("'owls'", "'an owl'")),
    ],
)
def test_names_that_are_nearly_the_same_are_pointed_out(
    small_model: Path, recipe: Recipe, names: tuple[str, ...]
) -> None:
    plan = plan_erasure(small_model, recipe=recipe, settings=ROOMY)
    (warning,) = [w for w in plan.warnings if "nearly" in w]
    assert all(name in warning for name in names)


def test_so_is_what_a_known_patch_erases(small_model: Path, tmp_path: Path) -> None:
    known = tmp_path / "known.sepme"
    erase(small_model, ["Claude Monet"], kind="style", output=known, settings=ROOMY)
    plan = plan_erasure(small_model, ["Monet"], kind="style", known=[known], settings=ROOMY)
    assert any("a known patch erases" in warning for warning in plan.warnings)


def test_distinct_names_are_not_pointed_out(small_model: Path) -> None:
    plan = plan_erasure(small_model, ["Monet", "cat"], protect=["Dali", "dog"], settings=ROOMY)
    assert not [warning for warning in plan.warnings if "nearly" in warning]


def test_a_check_refuses_what_the_run_refuses(small_model: Path) -> None:
    with pytest.raises(RefusedError):
        plan_erasure(small_model, ["ink"], kind="style", protect=["ink"])
    with pytest.raises(UsageError):
        plan_erasure(small_model, ["ink", "Ink"])


def test_the_vocabulary_has_every_word_once() -> None:
    for kind in ("style", "object"):
        words = vocabulary(kind)  # type: ignore[arg-type]
        assert len({word.casefold() for word in words}) == len(words) > 150
        assert all(word == word.strip() != "" for word in words)

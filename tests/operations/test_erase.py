"""Erasing end to end, on a whole Stable Diffusion with random weights."""

import io
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patch_spec.container import read_patch
from patch_spec.manifest import Patch
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.options import ModelOptions
from sepme_cli.erasure.concept import Lexicon, Protected, describe
from sepme_cli.erasure.settings import Settings
from sepme_cli.erasure.words import Item
from sepme_cli.errors import (
    MalformedError,
    MismatchError,
    RefusedError,
    SepmeError,
    SystemFailure,
    UnsupportedError,
    UsageError,
)
from sepme_cli.evaluation.protocol import SamplingOptions
from sepme_cli.exit_status import ExitStatus
from sepme_cli.operations.apply import apply
from sepme_cli.operations.erase import EraseResult, erase
from sepme_cli.operations.sample import sample
from sepme_cli.progress import Progress
from sepme_cli.recipe import Recipe
from tests.small_model import save_small_model
from tests.synthetic import make_checkpoint

QUICK = Settings(steps=4, pictures=4, sampling_steps=3, batch_size=4, rank=4, threshold=0.0)


# In a random text encoder, 64 wide, a concept's prompts fill the space: insist less.
ROOMY = replace(QUICK, insistence=1.0, protection=1.0)


def erased(model: Path, *concepts: str, settings: Settings = QUICK, **options) -> Patch:  # type: ignore[no-untyped-def]
    stream = io.BytesIO()
    erase(model, concepts, output=stream, settings=settings, **{"method": "sepme", **options})
    return read_patch(stream.getvalue())


def test_a_patch_says_what_was_done(small_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "ink.sepme"
    result = erase(
        small_model, ["ink"], output=output, kind="style", method="sepme", settings=QUICK
    )
    assert isinstance(result, EraseResult)
    assert (result.patch, result.bytes) == (str(output), output.stat().st_size)
    (summary,), patch = result.increments, read_patch(output)
    (increment,) = patch.increments
    assert (summary.concept, summary.slug, summary.kind, summary.method) == (
        ("ink", "ink", "additive", "sepme")
    )
    assert increment.rank == summary.rank <= 4
    assert "ink" in increment.prompts
    assert patch.separable_from == ("",)
    assert "a picture" in patch.protected
    assert increment.method.settings["seed"] == 0
    assert summary.correlation.start is not None
    assert summary.steps == 4
    assert set(increment.up) == set(patch.base.targets)


@pytest.mark.parametrize("method", ["sepme", "closed-form"])
def test_the_blank_prompt_is_left_alone(small_model: Path, method: str) -> None:
    (increment,) = erased(small_model, "ink", method=method).increments
    assert increment.measured.leakage is not None
    assert increment.measured.leakage < 1e-5


@pytest.mark.parametrize("method", ["sepme", "closed-form"])
def test_the_same_seed_gives_the_same_bytes(small_model: Path, method: str) -> None:
    streams = [io.BytesIO() for _ in range(2)]
    for stream in streams:
        erase(small_model, ["ink"], output=stream, method=method, settings=QUICK)  # type: ignore[arg-type]
    first, second = (sha256(s.getvalue()).hexdigest() for s in streams)
    assert first == second


def test_another_seed_gives_another_patch(small_model: Path) -> None:
    first, second = (erased(small_model, "ink", settings=replace(QUICK, seed=s)) for s in (0, 1))
    assert first.increments != second.increments


def test_an_increment_lowers_the_correlation(small_model: Path) -> None:
    settings = replace(QUICK, steps=40, start=0.0)
    (increment,) = erased(small_model, "ink", settings=settings).increments
    assert increment.measured.correlation_start == pytest.approx(1.0, abs=1e-3)
    assert increment.measured.correlation_end is not None
    assert increment.measured.correlation_end < 0.7


def test_concepts_of_one_patch_leave_each_other_alone(small_model: Path) -> None:
    """The more, the more is insisted on it."""

    def leakages(insistence: float) -> list[float]:
        settings = replace(ROOMY, insistence=insistence)
        parts = erased(small_model, "ink", "cat", method="closed-form", settings=settings)
        return [part.measured.leakage or 0.0 for part in parts.increments]

    loose, strict = leakages(1.0), leakages(30.0)
    assert all(0 < 2 * b < a for a, b in zip(loose, strict, strict=True))


def test_several_concepts_are_optimised_one_by_one_or_together(small_model: Path) -> None:
    settings = replace(ROOMY, steps=25, start=0.0)
    apart, joint = (
        erased(small_model, "ink", "cat", method="sepme", joint=joint, settings=settings).increments
        for joint in (False, True)
    )
    for parts in (apart, joint):
        assert [part.concept for part in parts] == ["cat", "ink"]
        for part in parts:
            assert part.measured.correlation_start == pytest.approx(1.0, abs=1e-3)
            assert part.measured.correlation_end is not None
            assert part.measured.correlation_end < 0.8
    # Together, each is learned with the other's increment in the weights.
    for a, b in zip(apart, joint, strict=True):
        assert not all(np.array_equal(a.up[name], b.up[name]) for name in a.up)


def change(model: Path, patch: Patch, prompts: Sequence[str]) -> float:
    """The largest |dW e^T| / |W e^T| of the prompts under a patch of one operator, all layers
    together."""
    (increment,) = patch.increments
    assert increment.shift is not None
    shift = np.ldexp(increment.shift.astype(float), increment.shift_exponent)
    operator = torch.from_numpy(shift @ increment.basis)
    with open_checkpoint(model) as checkpoint:
        network = StableDiffusion.of(checkpoint, torch.device("cpu"))
        words = Lexicon(network.text.readers, [*prompts, *increment.prompts, *patch.protected])
        weights = torch.cat([weight.double() for _, weight in network.denoiser.stored_weights()])
    states = words.states(prompts).double()
    moved, whole = (states @ w.T for w in (weights @ operator, weights))
    return float((moved.norm(dim=(1, 2)) / whole.norm(dim=(1, 2))).max())


def test_a_known_patch_is_left_alone(small_model: Path, tmp_path: Path) -> None:
    before = tmp_path / "ink.sepme"
    erase(small_model, ["ink"], output=before, method="closed-form")
    (ink,) = read_patch(before).increments
    settings = replace(ROOMY, insistence=30.0)
    mindful, heedless = (
        erased(small_model, "cat", known=known, method="closed-form", settings=settings)
        for known in ([before], [])
    )
    assert mindful.separable_from == tuple(dict.fromkeys(["", *ink.prompts]))
    leaks = [change(small_model, patch, ink.prompts) for patch in (mindful, heedless)]
    assert 0 < 2 * leaks[0] < leaks[1]
    assert mindful.increments[0].measured.leakage == pytest.approx(leaks[0], rel=1e-2)


def test_a_closed_form_patch_is_an_operator_without_layers(small_model: Path) -> None:
    (increment,) = erased(small_model, "ink", method="closed-form").increments
    assert increment.kind == "operator"
    assert not increment.up


def test_the_closed_form_is_the_default_unless_pictures_are_asked_for(small_model: Path) -> None:
    (plain,) = erased(small_model, "ink", method=None).increments
    (joint,) = erased(small_model, "ink", method=None, joint=True).increments
    assert (plain.method.name, joint.method.name) == ("closed-form", "sepme")


def test_pictures_can_be_given(small_model: Path, tmp_path: Path) -> None:
    """What is learned is learned from them, whatever their format; see test_sampler for how."""

    def learned(seed: int, ending: str) -> dict[str, bytes]:
        folder = tmp_path / f"{seed}{ending}"
        folder.mkdir()
        for i in range(2):
            rng = np.random.default_rng((seed, i))
            pixels = rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}{ending}")
        (increment,) = erased(small_model, "ink", images=folder).increments
        return {name: up.tobytes() for name, up in increment.up.items()}

    first = learned(0, ".png")
    assert learned(0, ".bmp") == first
    assert learned(1, ".png") != first


def test_erase_can_apply_at_once(small_model: Path, tmp_path: Path) -> None:
    patch, clean, again = (
        tmp_path / n for n in ("p.sepme", "clean.safetensors", "again.safetensors")
    )
    result = erase(
        small_model, ["ink"], output=patch, apply_to=clean, method="closed-form", settings=QUICK
    )
    assert result.applied == str(clean)
    apply(small_model, [patch], again)
    assert clean.read_bytes() == again.read_bytes()


def test_words_are_kept_in_one_unicode_form(small_model: Path) -> None:
    (increment,) = erased(small_model, "Ce\u0301zanne", method="closed-form").increments
    assert increment.concept == "C\u00e9zanne"


def test_a_clock_is_kept_only_when_the_maker_fixed_it(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    assert erased(small_model, "ink", method="closed-form").created is None
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert erased(small_model, "ink", method="closed-form").created == "1970-01-02T00:00:00Z"


def test_a_patched_model_draws_otherwise_and_an_unknown_prompt_hardly(
    small_model: Path, tmp_path: Path
) -> None:
    patch, sheet = tmp_path / "ink.sepme", tmp_path / "sheet.png"
    erase(small_model, ["ink"], output=patch, method="closed-form", kind="style")
    result = sample(
        small_model,
        ["ink", ""],
        patches=[patch],
        output=sheet,
        sampling=SamplingOptions(2, steps=3),
    )
    assert result.images == 8
    rows = np.asarray(Image.open(sheet))[:, -34:].astype(int)
    ink, ink_patched, blank, blank_patched = np.array_split(rows[: len(rows) // 4 * 4], 4)
    assert np.abs(ink - ink_patched).max() > 0
    assert np.array_equal(blank, blank_patched)


class Heard(Progress):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def test_samples_say_what_applying_would(small_model: Path, tmp_path: Path) -> None:
    """Nothing is taken out twice, and a patch of another model is said to be one."""
    ink, cat, other = (tmp_path / f"{name}.sepme" for name in ("ink", "cat", "other"))
    erase(small_model, ["ink"], output=ink)
    erase(small_model, ["cat"], output=cat)
    clean, cousin = tmp_path / "clean.safetensors", tmp_path / "cousin.safetensors"
    apply(small_model, [ink], clean)
    save_small_model(cousin, seed=7)
    erase(cousin, ["ink"], output=other)

    def sampled(model: Path, patch: Path) -> tuple[str, ...]:
        """The warnings, which are heard as well."""
        heard, sheet = Heard(), tmp_path / "sheet.png"
        sampling = SamplingOptions(1, steps=1)
        result = sample(
            model, "ink", patches=patch, output=sheet, sampling=sampling, force=True, progress=heard
        )
        assert result.warnings == tuple(heard.warnings)
        return result.warnings

    def applied(model: Path, patch: Path) -> tuple[str, ...]:
        return apply(model, patch, check=True).warnings

    for act in (sampled, applied):
        with pytest.raises(RefusedError, match="ink already erased in"):
            act(clean, ink)
        assert act(small_model, ink) == ()
        assert "rounds twice" in act(clean, cat)[0]
    assert any("ink is already erased by another" in w for w in sampled(clean, other))
    assert sampled(small_model, other) == applied(small_model, other) != ()


POLICY = Recipe(
    concepts=(
        Item("ink", "style", aliases=("India ink",), prompts=("a letter in ink",)),
        Item("cat", "object", like="dog"),
    ),
    protect=("style:noto", "object:owl"),
    settings={"insistence": 1.0, "protection": 1.0, "rank": 3},
)


def by_recipe(model: Path, recipe: Recipe, **options) -> Patch:  # type: ignore[no-untyped-def]
    stream = io.BytesIO()
    erase(model, recipe=recipe, output=stream, **options)
    return read_patch(stream.getvalue())


def test_a_recipe_is_followed_and_stands_in_the_patch(small_model: Path) -> None:
    patch = by_recipe(small_model, POLICY)
    assert patch.recipe == POLICY.digest
    cat, ink = patch.increments
    assert {"in ink style", "in India ink style", "a letter in ink"} < set(ink.prompts)
    assert patch.separable_from == ("",)
    assert {"noto", "owl", "owl in noto style", "dog"} < set(patch.protected)
    assert set(patch.protected).isdisjoint((*cat.prompts, *ink.prompts))
    assert ink.rank <= 3
    assert (ink.method.name, ink.method.settings["protection"]) == ("closed-form", 1.0)


def test_without_a_recipe_no_digest_stands_in_the_patch(small_model: Path) -> None:
    assert erased(small_model, "ink", method="closed-form").recipe is None


def test_the_command_line_overrides_how_a_recipe_erases(small_model: Path) -> None:
    recipe = replace(POLICY, method="sepme", settings={**POLICY.settings, "rank": 2})
    patch = by_recipe(small_model, recipe, method="closed-form", settings=replace(ROOMY, rank=1))
    assert {(i.method.name, i.rank) for i in patch.increments} == {("closed-form", 1)}
    assert patch.recipe == recipe.digest


FREE = replace(QUICK, rank=64, ridge=1e-9, protection=0.0, collateral=1e9, erase_scale=1.0)


@pytest.mark.parametrize("other", ["noto", "a very long oil painting"])
def test_the_closed_form_maps_a_concept_to_what_it_should_act_like(
    small_model: Path, other: str
) -> None:
    (increment,) = erased(
        small_model, "ink", kind="style", to=other, method="closed-form", settings=FREE
    ).increments
    # The blank alone takes 16 of the 64 dimensions.
    assert increment.measured.separability is not None
    assert increment.measured.separability > 0.9
    assert increment.shift is not None
    shift = np.ldexp(increment.shift.astype(float), increment.shift_exponent)
    with open_checkpoint(small_model) as checkpoint:
        network = StableDiffusion.of(checkpoint, torch.device("cpu"))
        item = Item("ink", "style", like=other)
        concept = describe(item, Protected())
        words = Lexicon(network.text.readers, [*concept.prompts, *concept.answers])
        wanted = words.embedding_pairs(concept)
        rows, instead = wanted.concept, wanted.anchor
    moved = rows.numpy() + rows.numpy() @ increment.basis.T @ shift.T
    left = np.square(moved - instead.numpy()).sum() / np.square((rows - instead).numpy()).sum()
    assert left == pytest.approx(1 - increment.measured.separability, rel=0.01)


def test_among_others_a_concept_that_cannot_go_is_warned_of(
    small_model: Path, tmp_path: Path
) -> None:
    phrasings = [
        f"{word}ink{more}" for word in ("", "in ", "the ") for more in ("", " style", " cat")
    ]
    result = erase(
        small_model,
        ["ink", "dog"],
        protect=[word for word in phrasings if word != "ink"],
        method="closed-form",
        settings=replace(QUICK, protection=1e9),
        output=tmp_path / "both.sepme",
    )
    assert any("'ink'" in told and "most of it may remain" in told for told in result.warnings)
    assert {part.concept for part in result.increments} == {"dog", "ink"}


def protected_itself(model: Path, folder: Path) -> None:
    erase(
        model,
        ["ink"],
        kind="style",
        protect=["ink"],
        method="closed-form",
        output=folder / "o.sepme",
    )


def in_the_protected_span(model: Path, folder: Path) -> None:
    settings = replace(QUICK, protection=1e9)
    phrasings = [
        f"{word}ink{more}" for word in ("", "in ", "the ") for more in ("", " style", " cat")
    ]
    others = [word for word in phrasings if word != "ink"]
    erase(
        model,
        ["ink"],
        protect=others,
        method="closed-form",
        settings=settings,
        output=folder / "o.sepme",
    )


def already_there(model: Path, folder: Path) -> None:
    (folder / "o.sepme").write_bytes(b"mine")
    try:
        erase(model, ["ink"], output=folder / "o.sepme", settings=QUICK)
    finally:
        assert (folder / "o.sepme").read_bytes() == b"mine"
        (folder / "o.sepme").unlink()


def twice(model: Path, folder: Path) -> None:
    erase(model, ["Ink", "ink"], output=folder / "o.sepme")


def a_recipe_and_concepts(model: Path, folder: Path) -> None:
    erase(model, ["Dali"], recipe=POLICY, output=folder / "o.sepme")


def like_itself(model: Path, folder: Path) -> None:
    erase(model, ["ink"], to="Ink", output=folder / "o.sepme")


def like_what_is_erased(model: Path, folder: Path) -> None:
    concepts = (Item("ink", aliases=("sumi",)), Item("cat", like="sumi"))
    erase(model, recipe=Recipe(concepts), output=folder / "o.sepme")


def an_alias_is_protected(model: Path, folder: Path) -> None:
    recipe = Recipe((Item("Monet", aliases=("Claude Monet",)),), protect=("Claude Monet",))
    erase(model, recipe=recipe, output=folder / "o.sepme")


def images_of_two(model: Path, folder: Path) -> None:
    erase(model, ["ink", "cat"], images=folder, output=folder / "o.sepme")


def images_for_the_closed_form(model: Path, folder: Path) -> None:
    erase(model, ["ink"], images=folder, method="closed-form", output=folder / "o.sepme")


def no_images(model: Path, folder: Path) -> None:
    (folder / "none").mkdir()
    erase(model, ["ink"], images=folder / "none", output=folder / "o.sepme")


def broken_image(model: Path, folder: Path) -> None:
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.png").write_bytes(b"no picture")
    erase(model, ["ink"], images=folder / "pictures", output=folder / "o.sepme")


def no_such_device(model: Path, folder: Path) -> None:
    erase(
        model,
        ["ink"],
        settings=QUICK,
        options=ModelOptions(device="tpu"),
        output=folder / "o.sepme",
    )


def not_safetensors(_: Path, folder: Path) -> None:
    (folder / "m.safetensors").write_bytes(b"hello")
    erase(folder / "m.safetensors", ["ink"], output=folder / "o.sepme")


def no_text_encoder(_: Path, folder: Path) -> None:
    make_checkpoint(folder / "m.safetensors")
    erase(folder / "m.safetensors", ["ink"], output=folder / "o.sepme")


def patched_already(model: Path, folder: Path) -> None:
    erase(
        model,
        ["cat"],
        method="closed-form",
        output=folder / "c.sepme",
        apply_to=folder / "m.safetensors",
    )
    erase(folder / "m.safetensors", ["ink"], output=folder / "o.sepme")


def known_of_another_model(model: Path, folder: Path) -> None:
    from patch_spec.container import patch_bytes

    patch = erased(model, "cat", method="closed-form")
    other = replace(patch, base=replace(patch.base, family="sd2"))
    (folder / "k.sepme").write_bytes(patch_bytes(other))
    erase(model, ["ink"], known=[folder / "k.sepme"], output=folder / "o.sepme")


@pytest.mark.parametrize(
    ("action", "error", "status"),
    [
        (protected_itself, RefusedError, ExitStatus.NO),
        (an_alias_is_protected, RefusedError, ExitStatus.NO),
        (in_the_protected_span, RefusedError, ExitStatus.NO),
        (patched_already, RefusedError, ExitStatus.NO),
        (already_there, SystemFailure, ExitStatus.SYSTEM),
        (twice, UsageError, ExitStatus.USAGE),
        (a_recipe_and_concepts, UsageError, ExitStatus.USAGE),
        (like_itself, UsageError, ExitStatus.USAGE),
        (like_what_is_erased, UsageError, ExitStatus.USAGE),
        (images_of_two, UsageError, ExitStatus.USAGE),
        (images_for_the_closed_form, UsageError, ExitStatus.USAGE),
        (no_images, UsageError, ExitStatus.USAGE),
        (no_such_device, UsageError, ExitStatus.USAGE),
        (broken_image, MalformedError, ExitStatus.MALFORMED),
        (not_safetensors, MalformedError, ExitStatus.MALFORMED),
        (no_text_encoder, UnsupportedError, ExitStatus.MALFORMED),
        (known_of_another_model, MismatchError, ExitStatus.MISMATCH),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(
    small_model: Path, tmp_path: Path, action, error: type[SepmeError], status: ExitStatus
) -> None:  # type: ignore[no-untyped-def]
    digest = sha256(small_model.read_bytes()).hexdigest()
    with pytest.raises(error) as caught:
        action(small_model, tmp_path)
    assert caught.value.status is status
    assert not (tmp_path / "o.sepme").exists()
    assert sha256(small_model.read_bytes()).hexdigest() == digest


def test_a_model_of_another_seed_is_another_base(small_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_small_model(other, seed=1)
    first, second = (erased(m, "ink", method="closed-form") for m in (small_model, other))
    assert first.base.digest != second.base.digest

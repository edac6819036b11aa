"""What an erasure does to others is measured, bounded, told, and refused where it is too much."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from patch_spec.container import read_patch
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.erasure.background import VERSION
from sepme_cli.erasure.settings import Settings
from sepme_cli.errors import RefusedError
from sepme_cli.operations.card import card
from sepme_cli.operations.erase import erase
from sepme_cli.operations.plan import plan_erasure
from sepme_cli.planning.background import background_of

# In a random text encoder, 64 wide, everything is in the way of everything.
EASY = Settings(protection=0.1, collateral=1e9, neighbours=0)
STRICT = replace(EASY, collateral=1e-3)


def test_what_is_too_much_is_refused_and_nothing_is_written(
    small_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "ink.sepme"
    with pytest.raises(RefusedError, match="--force-collateral") as caught:
        erase(small_model, ["ink"], output=output, settings=STRICT)
    assert "at most 0%" in str(caught.value.expected)
    assert "separability" in str(caught.value.found)
    assert list(tmp_path.iterdir()) == []
    result = erase(small_model, ["ink"], output=output, settings=STRICT, force_collateral=True)
    assert output.is_file()
    assert any("--force-collateral" in warning for warning in result.warnings)
    assert plan_erasure(small_model, ["ink"], settings=STRICT).refused


def test_protection_grows_until_the_bound_holds(small_model: Path) -> None:
    free = plan_erasure(small_model, ["ink"], settings=EASY)
    assert free.protection == EASY.protection
    far = [one.collateral.p95 for one in free.strengths if one.collateral is not None]
    assert far == sorted(far, reverse=True)
    assert [one.protection for one in free.strengths] == pytest.approx([0.1, 0.3, 1, 3, 10])
    kept = [one.separability for one in free.strengths]
    assert kept == sorted(kept, reverse=True)
    # Bounds that the second and the fourth strength hold to, and no weaker one: no more is paid.
    for place in (1, 3):
        bound = replace(EASY, collateral=(far[place - 1] + far[place]) / 2)
        held = plan_erasure(small_model, ["ink"], settings=bound)
        weaker, enough = (free.strengths[i].protection for i in (place - 1, place))
        assert weaker < held.protection <= enough
        assert not held.refused
        assert held.collateral is not None and held.collateral.p95 <= bound.collateral
        # Something between the two was looked at, and taken if it holds.
        between = [one for one in held.strengths if weaker < one.protection < enough]
        assert between
        assert any(one.protection == held.protection for one in between) or all(
            one.collateral is not None and one.collateral.p95 > bound.collateral for one in between
        )


def test_it_stands_in_the_result_the_manifest_and_the_card(
    small_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "ink.sepme"
    result = erase(small_model, ["ink"], output=output, settings=EASY)
    (summary,) = result.increments
    (increment,) = read_patch(output.read_bytes()).increments
    told, recorded = summary.collateral, increment.measured.collateral
    assert told is not None and recorded is not None
    assert (recorded.captions, recorded.median, recorded.p95) == (
        told.captions,
        told.median,
        told.p95,
    )
    assert recorded.worst == dict(told.worst)
    assert increment.method.settings["captions"] == VERSION
    assert increment.method.settings["protection"] == EASY.protection
    text = card([output]).card
    assert "## Collateral" in text
    assert f"{told.p95:.0%} | {told.captions}" in text


def test_it_is_what_the_increment_does_to_keys_and_values(small_model: Path) -> None:
    stream = io.BytesIO()
    erase(small_model, ["ink"], output=stream, settings=EASY)
    (increment,) = read_patch(stream.getvalue()).increments
    assert increment.shift is not None and increment.measured.collateral is not None
    shift = np.ldexp(increment.shift.astype(np.float64), increment.shift_exponent)
    operator = torch.from_numpy(shift @ increment.basis)
    with open_checkpoint(small_model) as checkpoint:
        network = StableDiffusion.of(checkpoint, torch.device("cpu"))
        background = background_of(network.text, checkpoint.base(text_encoders=True))
        ends = background.ends.double()
        layers = [weight.double() for _, weight in network.denoiser.stored_weights()]
    moved = torch.cat([(ends @ operator.T) @ w.T for w in layers], 1).norm(dim=1)
    whole = torch.cat([ends @ w.T for w in layers], 1).norm(dim=1)
    others = torch.tensor(["ink" not in text.split() for text in background.captions])
    found = (moved / whole)[others]
    collateral = increment.measured.collateral
    assert collateral.captions == int(others.sum())
    assert collateral.p95 == pytest.approx(float(found.quantile(0.95)), rel=1e-3)


def test_more_captions_protected_change_the_others_less(small_model: Path) -> None:
    """Without the background an increment does what it likes to the language."""
    found = [
        plan_erasure(small_model, ["ink"], settings=replace(EASY, protection=3.0, background=b))
        for b in (0.0, 1.0)
    ]
    without, with_it = (plan.collateral for plan in found)
    assert without is not None and with_it is not None
    assert without.median > 2 * with_it.median

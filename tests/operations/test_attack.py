"""Attacking on a small model with random weights: what is tried, kept, gone on with and refused."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import sepme_cli as sepme
from patch_spec.container import patch_bytes, read_patch
from sepme_cli.app import run
from sepme_cli.attacks.attack import BUDGETS, Aim, Budget, Victim
from sepme_cli.attacks.registry import ATTACKS
from sepme_cli.attacks.results import AttackResult
from sepme_cli.checkpoints.disk.files import only_writer
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.options import ModelOptions
from sepme_cli.diffusion.weights import patched_weights
from sepme_cli.errors import RefusedError, SystemFailure, UsageError
from sepme_cli.evaluation.protocol import SamplingOptions
from sepme_cli.operations.attack import attack
from sepme_cli.operations.erase import erase
from tests.small_model import save_small_model
from tests.small_transformers import small_transformer, write_transformer_folder

SAMPLING = SamplingOptions(steps=2, guidance=3.0)
TINY = Budget(2, 4, 4, 1, 2, 2, 2, (1, 2))


@pytest.fixture(autouse=True)
def tiny_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUDGETS, "quick", TINY)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_small_model(path)
    return path


@pytest.fixture(scope="module")
def patch(model: Path) -> Path:
    path = model.with_name("monet.sepme")
    erase(model, "style:Monet", output=path)
    return path


@pytest.fixture(scope="module")
def nothing(patch: Path) -> Path:
    """A patch of the same increment that does nothing."""
    whole = read_patch(patch.read_bytes())
    (one,) = whole.increments
    assert one.shift is not None
    path = patch.with_name("nothing.sepme")
    path.write_bytes(
        patch_bytes(replace(whole, increments=(replace(one, shift=np.zeros_like(one.shift)),)))
    )
    return path


def attacked(model: Path, patch: Path, report: Path, **ways) -> AttackResult:
    return attack(
        model,
        patch,
        judge="tests.small_judge:balance",
        report=report,
        sampling=SAMPLING,
        options=ModelOptions(device="cpu"),
        budget="quick",
        **ways,
    )


def test_on_a_patch_that_does_nothing_every_attack_reaches_what_it_reaches_on_the_original(
    model: Path, nothing: Path, tmp_path: Path
) -> None:
    result = attacked(model, nothing, tmp_path / "report", descriptions="a pond with lilies")
    tried = {name: one for name, one in result.attacks.items() if one.unfit is None}
    # A style has no kinds, and this small encoder knows no other word for it.
    assert set(result.attacks) - set(tried) <= {"synonyms"}
    assert len(tried) >= len(ATTACKS) - 1
    for name, one in tried.items():
        assert one.patched is not None and one.original is not None, name
        assert (one.patched.share, one.patched.n) == (one.original.share, one.original.n), name
        assert one.patched.images == one.original.images
        assert one.floor is None
        low, high = one.patched.interval
        assert low <= one.patched.share <= high
    written = json.loads((tmp_path / "report" / "attack.json").read_text())
    assert written["attacks"]["prompts"]["patched"]["share"] == tried["prompts"].patched.share
    lines = (tmp_path / "report" / "attacks.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * len(tried)
    page = (tmp_path / "report" / "attack.html").read_text()
    assert all(name in page for name in result.attacks)
    assert "http" not in page.replace("http-equiv", "")


def test_a_run_goes_on_where_it_was_cut_short(model: Path, patch: Path, tmp_path: Path) -> None:
    report = tmp_path / "report"
    first = attacked(model, patch, report, attacks=["seeds", "relearning"])
    trials = sorted((report / "trials").glob("*.json"))
    assert len(trials) == 2 * (1 + 2 + 4 * 2)
    trials[0].unlink()
    trials[1].write_text("{")
    before = {path: path.stat().st_mtime_ns for path in trials[2:]}
    with pytest.raises(SystemFailure, match="a report already"):
        attacked(model, patch, report, attacks=["seeds", "relearning"])
    again = attacked(model, patch, report, attacks=["seeds", "relearning"], force=True)
    assert {path: path.stat().st_mtime_ns for path in trials[2:]} == before
    assert sorted((report / "trials").glob("*.json")) == trials
    for name, one in first.attacks.items():
        other = again.attacks[name]
        assert (one.patched.share, one.patched.n) == (other.patched.share, other.patched.n)
        assert (one.original.share, one.original.n) == (other.original.share, other.original.n)


def test_a_second_run_into_the_same_report_is_told_busy_before_it_draws(
    model: Path, patch: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report"
    attacked(model, patch, report, attacks="relearning")
    pictures = report / "pictures"
    for image in pictures.rglob("*.png"):
        image.unlink()
    with only_writer(pictures), pytest.raises(SystemFailure, match="busy"):
        attacked(model, patch, report, attacks="relearning", force=True)
    assert not list(pictures.rglob("*.png"))


def test_other_images_are_other_trials(model: Path, patch: Path, tmp_path: Path) -> None:
    attacked(model, patch, tmp_path / "report", attacks="inpainting")
    kept = len(list((tmp_path / "report" / "trials").glob("*.json")))
    images = tmp_path / "images"
    images.mkdir()
    from PIL import Image

    for shade in (40, 90):
        Image.new("RGB", (20, 16), (shade, 30, 60)).save(images / f"{shade}.png")
    attacked(model, patch, tmp_path / "report", attacks="inpainting", images=images, force=True)
    assert len(list((tmp_path / "report" / "trials").glob("*.json"))) == 2 * kept


def test_a_model_that_never_knew_is_attacked_beside(
    model: Path, patch: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    save_small_model(other, seed=7)
    result = attacked(model, patch, tmp_path / "report", attacks="relearn-lora", floor=other)
    found = result.attacks["relearn-lora"]
    assert found.floor is not None and found.floor.n == found.patched.n == 8
    assert found.teaches


def test_what_cannot_be_tried_is_named_with_its_reason(tmp_path: Path) -> None:
    folder = write_transformer_folder(small_transformer("sd3"), tmp_path / "model")
    erase(folder, "style:Monet", output=tmp_path / "monet.sepme")
    names = ["seeds", "noise", "p4d", "relearn-full", "free-embedding", "image-to-image"]
    result = attacked(folder, tmp_path / "monet.sepme", tmp_path / "report", attacks=names)
    why = {name: one.unfit for name, one in result.attacks.items()}
    assert why["noise"] is not None and "rectified flow" in why["noise"]
    assert why["p4d"] is not None and "T5" in why["p4d"]
    for name in ("prompts", "seeds", "relearn-full", "free-embedding", "image-to-image"):
        assert result.attacks[name].patched is not None, name


def test_what_is_attacked_must_be_told_and_known(model: Path, patch: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="no patch erases 'Klimt'"):
        attacked(model, patch, tmp_path / "report", concept="Klimt")
    pond = tmp_path / "pond.sepme"
    erase(model, "object:pond", output=pond)
    with pytest.raises(UsageError, match="name the one to attack"):
        attack(model, [patch, pond], judge="tests.small_judge:balance", report=tmp_path / "report")
    violin = tmp_path / "violin.sepme"
    erase(model, "object:violin", output=violin)
    with pytest.raises(UsageError, match="does not know 'violin'"):
        attacked(model, violin, tmp_path / "report")
    with pytest.raises(UsageError, match="no budget"):
        attack(
            model,
            patch,
            judge="tests.small_judge:balance",
            report=tmp_path / "report",
            budget="huge",  # type: ignore[arg-type]
        )
    assert not (tmp_path / "report").exists()


def test_the_command_says_what_the_operation_found(
    model: Path, patch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [
        "attack", str(model), str(patch), "--judge", "tests.small_judge:balance",
        "--report", str(tmp_path / "report"), "--budget", "quick", "--attack", "seeds",
        "--steps", "2", "--guidance", "3", "--device", "cpu", "--json",
    ]  # fmt: skip
    assert run(line) == 0
    said = json.loads(capsys.readouterr().out)
    kept = json.loads((tmp_path / "report" / "attack.json").read_text())
    assert {**said, "seconds": 0} == {**kept, "seconds": 0} or said["attacks"] == kept["attacks"]
    assert said["concept"] == "Monet" and list(said["attacks"]) == ["prompts", "seeds"]
    assert run([*line[:-1], "--force"]) == 0
    shown = capsys.readouterr().out
    assert "seeds" in shown and "strongest" in shown


def test_a_patch_of_the_text_encoder_is_attacked_through_it(model: Path, tmp_path: Path) -> None:
    erase(model, "style:Monet", method="text-encoder", output=tmp_path / "monet.sepme")
    with open_checkpoint(model) as checkpoint:
        network = StableDiffusion.of(checkpoint, torch.device("cpu"))
        (part,) = read_patch((tmp_path / "monet.sepme").read_bytes()).increments
        weights = patched_weights(checkpoint, [(part, 1.0)])
        before = network.text.condition(["a pond by Monet", "a pond"])
        aim = Aim("Monet", "style", (), ())
        victim = Victim("patched", network, weights, aim, SAMPLING, "digest")
        after = victim.condition(["a pond by Monet", "a pond"])
        moved = (after.states - before.states).norm(dim=(1, 2))
        assert moved[0] > 2 * moved[1] > 0
        assert torch.equal(network.text.condition(["a pond"]).states[0], before.states[1])
    ways = ["text", "completion", "p4d", "textual-inversion-1", "relearn-lora"]
    result = attacked(model, tmp_path / "monet.sepme", tmp_path / "report", attacks=ways)
    assert all(one.patched for one in result.attacks.values() if one.unfit is None)


def test_a_mask_is_attacked_with_its_weights_at_zero(model: Path, tmp_path: Path) -> None:
    settings = {"pictures": 4, "sampling_steps": 5, "pruned_share": 0.5}
    patch = tmp_path / "monet.sepme"
    erase(model, "style:Monet", method="concept-prune", output=patch, settings=settings)
    ways = ["text", "seeds", "completion", "relearn-full"]
    result = attacked(model, patch, tmp_path / "report", attacks=ways)
    assert all(one.patched for one in result.attacks.values() if one.unfit is None)
    assert result.attacks["seeds"].patched and result.attacks["relearn-full"].patched


def test_shards_side_by_side_come_to_the_same_figures(
    model: Path, patch: Path, tmp_path: Path
) -> None:
    names = ["seeds", "misspellings", "relearn-lora"]
    whole = attacked(model, patch, tmp_path / "whole", attacks=names)
    report = tmp_path / "parts"
    code = (
        "import sys; from tests.operations.test_attack import TINY, SAMPLING; "
        "from sepme_cli.attacks.attack import BUDGETS; BUDGETS['quick'] = TINY; "
        "import sepme_cli as sepme; "
        f"sepme.attack_shard({str(model)!r}, {str(patch)!r}, shard=sys.argv[1], "
        f"judge='tests.small_judge:balance', report={str(report)!r}, sampling=SAMPLING, "
        f"options=sepme.ModelOptions(device='cpu'), budget='quick', attacks={names!r})"
    )
    parts = [subprocess.Popen([sys.executable, "-c", code, f"{k}/3"]) for k in (1, 2, 3)]
    assert [part.wait() for part in parts] == [0, 0, 0]
    kept = {path.name: path.read_bytes() for path in (report / "trials").iterdir()}
    assert kept.keys() == {path.name for path in (tmp_path / "whole" / "trials").iterdir()}
    told = attacked(model, patch, report, attacks=names)
    assert {path.name: path.read_bytes() for path in (report / "trials").iterdir()} == kept
    for name, one in whole.attacks.items():
        other = told.attacks[name]
        for column in ("patched", "original"):
            first, second = getattr(one, column), getattr(other, column)
            assert (first.share, first.n, first.images) == (second.share, second.n, second.images)
    with pytest.raises(UsageError, match="no such part"):
        sepme.attack_shard(
            model, patch, shard="4/3", judge="tests.small_judge:balance", report=report
        )

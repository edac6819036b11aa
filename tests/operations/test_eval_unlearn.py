"""sepme as a technique of eval-unlearn: what it draws, and what its runner makes of it."""

import json
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sepme_cli.errors import MalformedError, RefusedError
from sepme_cli.operations.apply import apply
from sepme_cli.operations.erase import erase
from sepme_cli.operations.eval_unlearn import TECHNIQUE, Technique, as_report
from tests.small_model import save_small_model

ROOT = Path(__file__).parents[2]
ASKED = ["a pond by Monet", "a blue door"]
CONFIG = {"device": "cpu", "num_inference_steps": 2, "guidance_scale": 3.0}
#: What evaluate wrote, as far as it is read.
REPORT = {
    "concepts": {"Monet": {"role": "erased"}, "pond": {"role": "retained"}},
    "erased": {"after": 0.25, "n": 8},
    "retained_same_domain": {"after": 0.9, "n": 10},
    "ua": 0.75,
    "ira": 0.9,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_small_model(path)
    erase(path, ["style:Monet"], output=path.with_name("monet.sepme"))
    apply(path, path.with_name("monet.sepme"), path.with_name("clean.safetensors"))
    return path


def drawn(technique: Technique, **options: Any) -> np.ndarray:
    images = technique.generate(ASKED, seed=5, **options)
    technique.close()
    return np.stack([np.asarray(image) for image in images])


def test_it_draws_what_the_patched_checkpoint_draws(model: Path) -> None:
    patch, clean = (str(model.with_name(name)) for name in ("monet.sepme", "clean.safetensors"))
    patched = drawn(Technique(model=str(model), patches=patch, erase_concept="Monet", **CONFIG))
    assert patched.shape == (2, 16, 16, 3)
    assert (patched == drawn(Technique(model=clean, **CONFIG))).all()
    assert (patched != drawn(Technique(model=str(model), **CONFIG))).any()
    other = drawn(Technique(model=clean, **CONFIG), num_inference_steps=1)
    assert (patched != other).any()
    with pytest.raises(RefusedError):
        Technique(model=clean, patches=patch, **CONFIG)


def test_the_entry_point_leads_to_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    group = "eval_unlearn.techniques"
    ((name, where),) = project["entry-points"][group].items()
    assert name == TECHNIQUE
    assert EntryPoint(name, where, group).load() is Technique


def test_figures_by_its_names(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    told = as_report(tmp_path)
    assert told["metric_result"]["value"] == pytest.approx((0.75 + 0.9) / 2)
    assert told["metric_result"]["details"] == {
        "ua_score": 0.75,
        "ira_score": 0.9,
        "target_correct": 6,
        "target_total": 8,
        "retain_correct": 9,
        "retain_total": 10,
    }
    assert told["erase_concept"] == "monet"
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(MalformedError, match="not a report"):
        as_report(tmp_path)


def test_its_runner_runs_it(model: Path, tmp_path: Path) -> None:
    """The package's own runner, registry and report, with a metric that needs no download."""
    pytest.importorskip("eval_unlearn", reason="pip install eval-unlearn to run its runner")
    from eval_unlearn.registry import register_metric, register_technique
    from eval_unlearn.runners.single_benchmark_runner import SingleBenchmarkRunner
    from eval_unlearn.types import Dataset, MetricResult

    @register_metric("brightness")
    class Brightness:
        def load_dataset(self) -> list[Any]:
            self.found: list[float] = []
            return [Dataset(ASKED, {"source": "two prompts"})]

        def update(self, images: list[Any], prompts: list[str], metadata: Any) -> None:
            self.found += [float(np.asarray(image).mean()) for image in images]

        def compute(self) -> Any:
            return MetricResult("Brightness", float(np.mean(self.found)), {})

    register_technique(TECHNIQUE)(Technique)
    config = {
        "model": str(model),
        "patches": str(model.with_name("monet.sepme")),
        "erase_concept": "Monet",
        **CONFIG,
    }
    runner = SingleBenchmarkRunner(
        TECHNIQUE, "brightness", config, {}, output_dir=str(tmp_path), seed=5
    )
    told = runner.run()
    own = drawn(Technique(**config))
    assert told["metric_result"]["value"] == pytest.approx(own.mean(), rel=1e-6)
    assert told["erase_concept"] == "monet"
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    mine = as_report(tmp_path / "report.json")
    assert mine.keys() == told.keys()
    assert mine["metric_result"].keys() == told["metric_result"].keys()

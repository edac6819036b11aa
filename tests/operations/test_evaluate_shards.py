"""Several processes generate one evaluation's images: the report is that of a single one."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from examples.many_machines import with_ray
from sepme_cli.checkpoints.disk.files import only_writer
from sepme_cli.diffusion.options import ModelOptions
from sepme_cli.errors import MalformedError, RefusedError, SystemFailure
from sepme_cli.evaluation.parts import record_path
from sepme_cli.evaluation.protocol import SamplingOptions
from sepme_cli.evaluation.results import EvaluateResult, ShardResult
from sepme_cli.operations.erase import erase
from sepme_cli.operations.evaluate import evaluate, evaluate_shard
from sepme_cli.shards import Shard
from tests.small_model import save_small_model

ROOT = Path(__file__).parents[2]
SAMPLING = SamplingOptions(images=10, steps=1, guidance=3.0, restore=1)
#: Klimt is asked for beside tree and pond, tree beside Klimt and Dali: some images are both's.
RETAIN = ["style:Klimt", "style:Dali", "object:tree", "object:pond"]
COUNT = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_small_model(path)
    erase(path, ["style:Monet"], output=path.with_name("monet.sepme"))
    return path


def told(model: Path, report: Path, **others: Any) -> dict[str, Any]:
    return {
        "model": model,
        "patches": [model.with_name("monet.sepme")],
        "judge": "tests.small_judge:judge",
        "report": report,
        "retain": RETAIN,
        "sampling": SAMPLING,
        "options": ModelOptions(device="cpu"),
        **others,
    }


def shard(model: Path, folder: Path, number: int, **others: Any) -> ShardResult:
    return evaluate_shard(shard=f"{number}/{COUNT}", **told(model, folder, **others))


@pytest.fixture(scope="module")
def whole(model: Path) -> EvaluateResult:
    return evaluate(**told(model, model.with_name("whole")))


@pytest.fixture(scope="module")
def parts(model: Path) -> list[Path]:
    """A folder for each shard, as on machines that share no disk."""
    folders = [model.with_name(f"part-{number}") for number in range(1, COUNT + 1)]
    for number, folder in enumerate(folders, 1):
        shard(model, folder, number)
    return folders


def figures(result: EvaluateResult) -> dict[str, Any]:
    """All but where it is and how it came about."""
    own = {"report", "page", "command", "drawn", "seconds"}
    return {name: value for name, value in asdict(result).items() if name not in own}


def pictures(report: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (report / "pictures").iterdir()}


def test_four_processes_in_one_folder_make_the_report_of_one(
    model: Path, whole: EvaluateResult, tmp_path: Path
) -> None:
    report = tmp_path / "report"
    line = [
        *(sys.executable, "-m", "sepme_cli", "evaluate", model, model.with_name("monet.sepme")),
        *("--judge", "tests.small_judge:judge", "--report", report, "--pictures", SAMPLING.images),
        *("--steps", 1, "--guidance", 3, "--restore", 1, "--device", "cpu", "--json"),
        *(word for name in RETAIN for word in ("--retain", name)),
    ]
    running = [
        subprocess.Popen(
            [*map(str, line), "--shard", f"{number}/{COUNT}"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(1, COUNT + 1)
    ]
    said = [json.loads(process.communicate()[0]) for process in running]
    assert [process.returncode for process in running] == [0] * COUNT
    # Each image was one process's to keep, and each process had some.
    assert sum(one["images"] for one in said) == len(pictures(report))
    assert min(one["images"] for one in said) > 0
    assert pictures(report) == pictures(Path(whole.report))
    merged = evaluate(**told(model, report))
    assert merged.drawn == 0
    assert figures(merged) == figures(whole)
    assert not [path for path in report.rglob(".*")], "locks or temporaries were left behind"


def test_folders_of_several_machines_are_brought_together(
    model: Path, whole: EvaluateResult, parts: list[Path], tmp_path: Path
) -> None:
    report = tmp_path / "report"
    merged = evaluate(**told(model, report, images_from=parts))
    assert (merged.drawn, figures(merged)) == (0, figures(whole))
    assert pictures(report) == pictures(Path(whole.report))


def test_what_a_shard_has_not_done_is_said_and_done(
    model: Path, whole: EvaluateResult, parts: list[Path], tmp_path: Path
) -> None:
    merged = evaluate(**told(model, tmp_path / "report", images_from=[parts[0], parts[2]]))
    assert 0 < merged.drawn < whole.drawn
    (warning,) = [one for one in merged.warnings if one not in whole.warnings]
    assert "shards 2, 4 of 4" in warning
    assert merged.concepts == whole.concepts


def test_a_shard_goes_on_where_it_stopped(model: Path, parts: list[Path]) -> None:
    again = shard(model, parts[1], 2)
    assert (again.drawn, again.images) == (0, len(pictures(parts[1])))
    next(iter((parts[1] / "pictures").iterdir())).unlink()
    assert 0 < shard(model, parts[1], 2).drawn < again.images


def test_a_shard_of_another_evaluation_is_not_passed_over(
    model: Path, parts: list[Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shard(model, other, 1, sampling=replace(SAMPLING, seed=100))
    report = tmp_path / "report"
    with pytest.raises(RefusedError, match="shard 1/4 is of another evaluation") as error:
        evaluate(**told(model, report, images_from=[*parts, other]))
    assert "seeds 0 to 9" in str(error.value.expected)
    assert "seeds 100 to 109" in str(error.value.found)
    assert evaluate(**told(model, report, images_from=[*parts, other], force=True)).drawn == 0
    # The same settings and other concepts.
    shard(model, other, 1, retain=["style:Klimt"])
    with pytest.raises(RefusedError, match="another evaluation"):
        evaluate(**told(model, tmp_path / "third", images_from=[other]))


def test_no_shard_is_generated_by_two(model: Path, tmp_path: Path) -> None:
    report = tmp_path / "report"
    report.mkdir()
    with only_writer(record_path(report, Shard(1, COUNT))):
        with pytest.raises(SystemFailure, match="busy"):
            shard(model, report, 1)
        shard(model, report, 2)  # another one may


def test_damaged_records_and_folders_that_are_none(
    model: Path, parts: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(SystemFailure, match="no folder that evaluate --shard has made"):
        evaluate(**told(model, tmp_path / "report", images_from=[tmp_path]))
    assert not (tmp_path / "report").exists()
    record = parts[3] / "shards" / "4-of-4.json"
    good = record.read_bytes()
    for bad in (b"", b"[]", good.replace(b'"4/4"', b'"5/4"'), good[:-20]):
        record.write_bytes(bad)
        with pytest.raises(MalformedError, match="not the record of a shard"):
            evaluate(**told(model, tmp_path / "report", images_from=parts))
    record.write_bytes(good)


def test_what_the_example_for_ray_calls(model: Path, tmp_path: Path) -> None:
    patch, folder = str(model.with_name("monet.sepme")), str(tmp_path / "report")
    line = (str(model), patch, "tests.small_judge:judge", folder)
    less = {"sampling": replace(SAMPLING, images=2), "options": ModelOptions(device="cpu")}
    assert min(with_ray.shard(f"{number}/2", *line, **less) for number in (1, 2)) > 0
    page = Path(with_ray.report(*line, **less))
    assert json.loads((page.parent / "report.json").read_text())["drawn"] == 0


def test_a_launcher_tells_each_process_its_part(model: Path, tmp_path: Path) -> None:
    """torchrun, which accelerate launch starts its processes by, too."""
    line = [
        "evaluate", str(model), str(model.with_name("monet.sepme")), "--judge",
        "tests.small_judge:judge", "--report", str(tmp_path / "report"), "--pictures", "4",
        "--steps", "1", "--restore", "0", "--device", "cpu", "--retain", "style:Klimt",
    ]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    module = ["-m", "sepme_cli", *line, "--shard", "auto"]
    done = subprocess.run([*launcher, *module], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "report" / "shards").iterdir()} >= {
        "1-of-2.json",
        "2-of-2.json",
    }
    alone = subprocess.run(
        [sys.executable, *module], cwd=ROOT, capture_output=True, text=True, env=os.environ
    )
    assert alone.returncode == 2 and "accelerate launch" in alone.stderr

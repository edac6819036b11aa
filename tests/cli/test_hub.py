"""Models and patches on the hub: the real client in its own processes, against a small hub."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.cli.conftest import Finished, Run
from tests.hub_server import TOKEN, Hub, Repository, serve
from tests.keys import by_hand, line, make_key
from tests.lora_files import dotted, random_pairs, write
from tests.small_model import small_parts, write_folder
from tests.synthetic import additive, base_of, make_checkpoint, make_patch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder as repositories hold them: with further copies, and what nobody reads."""
    path = write_folder(small_parts("sd1"), tmp_path_factory.mktemp("hub") / "small")
    weights = path / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    (path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickled")
    (path / "safety_checker").mkdir()
    (path / "safety_checker" / "model.safetensors").write_bytes(b"checker")
    (path / "v1.safetensors").write_bytes(b"all of it once more")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "safety_checker": ["stable_diffusion", "Checker"],
        "feature_extractor": [None, None],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path


@pytest.fixture(scope="module")
def patch(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = base_of(folder)
    return make_patch(
        tmp_path_factory.mktemp("patch") / "monet.sepme", base, additive(base, "Monet", seed=1)
    )


@pytest.fixture
def hub(folder: Path, patch: Path, tmp_path: Path) -> Iterator[Hub]:
    single = make_checkpoint(tmp_path / "single.safetensors").read_bytes()
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    fp16 = {n: data for n, data in files.items() if n != WEIGHTS and not n.endswith(".bin")}
    repositories = {
        "someone/small": Repository([files, {**files, "README.md": b"new"}]),
        "someone/half": Repository([fp16]),
        "someone/single": Repository([{"model.safetensors": single, "README.md": b""}]),
        "someone/several": Repository([{"a.safetensors": single, "b.safetensors": single}]),
        "someone/patches": Repository([{"monet.sepme": patch.read_bytes()}]),
        "someone/lora": Repository([adapter(folder)]),
        "someone/gated": Repository([files], gated=True),
    }
    with serve(repositories) as served:
        yield served


def adapter(model: Path) -> dict[str, bytes]:
    """What PEFT saves of a LoRA, its settings beside its weights."""
    with TemporaryDirectory() as folder:
        base = base_of(model)
        lora = dotted(
            random_pairs(base, rank=2),
            "base_model.model.{}".format,
            ".lora_B.weight",
            ".lora_A.weight",
        )
        weights = write(Path(folder, "adapter_model.safetensors"), lora).read_bytes()
    settings = json.dumps({"r": 2, "lora_alpha": 16}).encode()
    return {"adapter_model.safetensors": weights, "adapter_config.json": settings}


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: Run, hub: Hub) -> Iterator[Run]:
    """Runs `sepme` in an empty folder, with an empty cache, beside that hub."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    return process


def error_of(done: Finished) -> dict[str, str]:
    error: dict[str, str] = json.loads(done.out)["error"]
    return error


def dead_endpoint() -> str:
    """Where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_a_model_by_its_id_is_fetched_once_and_no_more_of_it_than_is_read(
    at: Run, hub: Hub, folder: Path
) -> None:
    local = at("inspect", folder, "--json").json
    done = at("inspect", "someone/small", "--json").json

    assert done["family"] == "sd1"
    assert {**done, "file": ""} == {
        **local,
        "file": "",
        "files": [name for name in local["files"] if ".fp16." not in name],
        "bytes": done["bytes"],
        "tensors": done["tensors"],
    }
    fetched = set(hub.fetched)
    assert {WEIGHTS, "text_encoder/model.safetensors", "model_index.json"} <= fetched
    assert not {name for name in fetched if "fp16" in name or name.endswith(".bin")}
    assert not fetched & {"safety_checker/model.safetensors", "v1.safetensors", "README.md"}

    count = len(hub.fetched)
    assert at("inspect", "hf://someone/small", "--json").json == done
    assert len(hub.fetched) == count


def test_a_variant_is_fetched_where_there_is_nothing_else(at: Run, hub: Hub) -> None:
    assert at("inspect", "someone/half", "--json").status == 0
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in hub.fetched


def test_patches_from_the_hub_make_what_local_ones_make(
    at: Run, folder: Path, patch: Path, hub: Hub
) -> None:
    there, here = Path("there"), Path("here")
    done = at("apply", "someone/small", "hf://someone/patches/monet.sepme", "-o", there, "--json")
    assert done.json["concepts"] == ["Monet"]
    at("apply", folder, patch, "-o", here)
    assert (there / WEIGHTS).read_bytes() == (here / WEIGHTS).read_bytes()
    # The copy is a model again: everything that its index names is there.
    assert (there / "safety_checker" / "model.safetensors").read_bytes() == b"checker"
    assert not (there / "v1.safetensors").exists()

    back = at("revert", there, "--base", "someone/small", "-o", "back", "--json")
    assert back.json["exact"]
    assert (Path("back") / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert at("diff", "back", "someone/small").status == 0
    assert at("verify", there, "hf://someone/patches/monet.sepme", "--base", folder).status == 0
    assert at("diff", patch, "hf://someone/patches/monet.sepme").status == 0


def test_a_patch_becomes_a_lora_and_an_edit_a_patch(
    at: Run, folder: Path, patch: Path, hub: Hub
) -> None:
    place = "hf://someone/patches/monet.sepme"
    made = {}
    for given, base in ((place, "someone/small"), (patch, folder)):
        at("export", given, "--to", "peft", "--base", base, "-o", "lora.safetensors", "-f")
        made[given] = Path("lora.safetensors").read_bytes()
    assert made[place] == made[patch]
    at("apply", folder, patch, "-o", "edited")
    done = at("import", "--base", "someone/small", "--edited", "edited", "-o", "x.sepme", "--json")
    assert done.json["concept"] == "edited"
    same = at("import", "--base", folder, "--edited", "someone/small", "--json")
    assert (same.status, error_of(same)["kind"]) == (1, "refused")


def test_a_lora_is_fetched_with_the_settings_that_it_needs(at: Run, hub: Hub, folder: Path) -> None:
    lora = Path("lora")
    lora.mkdir()
    for name, data in hub.repositories["someone/lora"].history[0].items():
        (lora / name).write_bytes(data)
    for place in ("someone/lora", "hf://someone/lora/adapter_model.safetensors"):
        hub.fetched.clear()
        done = at("import", place, "--base", folder, "-o", "there.sepme", "-f", "--json").json
        assert done["concept"] == ("lora" if place == "someone/lora" else "adapter_model")
        at("import", lora, "--base", folder, "-c", done["concept"], "-o", "here.sepme", "-f")
        assert Path("there.sepme").read_bytes() == Path("here.sepme").read_bytes()


def test_a_signature_is_fetched_with_what_it_signs(
    at: Run, hub: Hub, patch: Path, tmp_path: Path
) -> None:
    key = make_key(tmp_path / "alice")
    signers = tmp_path / "signers"
    signers.write_text(line("alice", key))
    place = "hf://someone/patches/monet.sepme"
    demanded = ("verify", place, "--allowed-signers", signers)
    unsigned = at(*demanded, "--json")
    assert unsigned.status == 1
    assert "not signed" in unsigned.out.decode()
    patches = hub.repositories["someone/patches"]
    signed = tmp_path / "monet.sepme"
    shutil.copy(patch, signed)
    data = by_hand(signed, key).read_bytes()
    patches.history.append({**patches.history[-1], "monet.sepme.sig": data})
    assert at(*demanded).status == 0
    assert at(*demanded, "--signed-by", "bob").status == 1


API = """
import sepme_cli as sepme
from sepme_cli.places import HubPlace
patch = HubPlace("someone/patches", None, "monet.sepme")
assert sepme.apply("someone/small", patch, "clean").concepts == ("Monet",)
assert sepme.verify(["clean", str(patch)], base="someone/small").ok
assert "Monet" in sepme.card(patch).card
assert sepme.revert("clean", patch, base="someone/small", output="back").exact
assert sepme.inspect("someone/small").family == "sd1"
"""


@pytest.mark.usefixtures("at")
def test_the_api_takes_what_the_command_line_takes() -> None:
    subprocess.run([sys.executable, "-c", API], check=True)


def test_a_file_in_a_repository_and_a_repository_that_is_one_file(at: Run, hub: Hub) -> None:
    for place in ("someone/single", "hf://someone/single/model.safetensors"):
        assert at("inspect", place, "--json").json["layout"] == "single-file"
    assert hub.fetched == ["model.safetensors"]


def test_a_revision_is_what_it_was(at: Run, hub: Hub) -> None:
    first = hub.repositories["someone/small"].commit(0)
    assert f"at commit {first}" in at("inspect", f"someone/small@{first}").err


def test_a_path_wins_over_an_id_of_the_same_form(at: Run, hub: Hub, folder: Path) -> None:
    shutil.copytree(folder, "someone/small")
    assert at("inspect", "someone/small", "--json").json["file"] == "someone/small"
    # Nor is what lies beside it, or is called like a file, looked for on the hub.
    for missing in ("someone/other", "some/model.safetensors"):
        assert error_of(at("inspect", missing, "--json"))["file"] == missing
    assert hub.asked == []


def test_what_was_fetched_is_enough_without_the_hub(
    at: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = at("inspect", "someone/small", "--json").json
    at("inspect", "hf://someone/patches/monet.sepme")
    asked = len(hub.asked)

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert at("inspect", "someone/small", "--json").json == online
    assert at("inspect", "hf://someone/patches/monet.sepme").status == 0
    missing = at("inspect", "someone/single", "--json")
    assert (missing.status, error_of(missing)["kind"]) == (5, "system")
    assert len(hub.asked) == asked

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", dead_endpoint())
    assert at("inspect", "someone/small", "--json").json == online


def test_a_cache_that_another_program_filled_is_enough(
    at: Run, hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    commit = "a" * 40
    cached = tmp_path / "cache" / "hub" / "models--other--small"
    shutil.copytree(folder, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    assert at("inspect", "other/small", "--json").json["family"] == "sd1"
    assert hub.asked == []


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("someone/missing", "private"),
        ("hf://someone/patches/dali.sepme", "dali.sepme"),
        ("someone/small@nowhere", "revision nowhere"),
        ("someone/gated", "ask for access on"),
    ],
)
def test_what_the_hub_has_not_is_said_to_be_missing(at: Run, place: str, says: str) -> None:
    done = at("inspect", place, "--json")
    assert (done.status, error_of(done)["kind"]) == (5, "system")
    assert says in error_of(done)["message"]
    assert done.err == ""


def test_a_repository_of_several_checkpoints_asks_which(at: Run) -> None:
    done = at("inspect", "someone/several", "--json")
    assert (done.status, error_of(done)["kind"]) == (3, "unsupported")
    assert error_of(done)["found"] == "a.safetensors, b.safetensors"


@pytest.mark.parametrize("answers", [False, True], ids=["refuses", "stays silent"])
def test_a_hub_that_cannot_be_reached_is_given_up_soon(
    answers: bool, at: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as listening:
        if answers:
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
        else:
            monkeypatch.setenv("HF_ENDPOINT", dead_endpoint())
        started = time.monotonic()
        done = at("inspect", "someone/small", "--json")
    assert (done.status, error_of(done)["kind"]) == (5, "system")
    assert "cannot be reached" in error_of(done)["message"]
    assert done.err == ""
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    "line",
    [
        "apply someone/small hf://someone/patches/monet.sepme --in-place",
        "apply someone/small hf://someone/patches -o out",
        "apply someone/small hf://someone/patches/monet.sepme -o hf://someone/clean",
        "inspect hf://datasets/someone/patches/monet.sepme",
        "inspect hf://nonsense",
    ],
)
def test_what_makes_no_sense_on_the_hub_asks_it_nothing(line: str, at: Run, hub: Hub) -> None:
    done = at(*line.split(), "--json")
    assert (done.status, error_of(done)["kind"]) == (2, "usage")
    assert not hub.fetched
    assert list(Path().iterdir()) == []


def test_an_erasure_is_published_and_fetched_again(
    at: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    first = hub.repositories["someone/small"].commit(0)
    place, known = "hf://someone/patches/styles/dali.sepme", "hf://someone/patches/monet.sepme"
    line = f"erase someone/small@{first} -c Dali --known {known} -o {place} --json"
    done = at(*line.split()).json
    assert done["patch"] == place
    assert done["model"] == f"hf://someone/small@{first}"
    repository = hub.repositories["someone/patches"]
    assert repository.messages == ["Take out Dali"]
    data = repository.history[-1]["styles/dali.sepme"]
    assert len(data) == done["bytes"]
    Path("same.sepme").write_bytes(data)
    assert at("diff", place, "same.sepme").status == 0


PUBLISH = """
import sys
from sepme_cli.checkpoints.hub.cache import check_publishable, publish
from sepme_cli.places import parse_output
from sepme_cli.errors import SystemFailure
place, force = parse_output(sys.argv[1]), sys.argv[2] == "force"
try:
    check_publishable(place, force=force)
    publish(place, sys.argv[3].encode(), "Take out Dali", force=force)
except SystemFailure as error:
    sys.exit(error.message)
"""


def published(place: str, force: str, text: str) -> str:
    """What is said against it; nothing where it is done."""
    command = [sys.executable, "-c", PUBLISH, place, force, text]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def test_what_is_published_is_not_overwritten_unasked(
    at: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, patches = "hf://someone/patches/dali.sepme", hub.repositories["someone/patches"]
    assert "token" in published(place, "", "one")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert published(place, "", "one") == ""
    assert "--force" in published(place, "", "two")
    assert patches.history[-1]["dali.sepme"] == b"one"
    assert published(place, "force", "two") == ""
    assert patches.history[-1]["dali.sepme"] == b"two"
    assert len(patches.messages) == 2
    assert "no such repository" in published("hf://someone/missing/dali.sepme", "", "one")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "cannot be reached" in published(place, "force", "three")


def test_publishing_that_will_fail_fails_before_the_work(at: Run, hub: Hub) -> None:
    done = at("erase", "someone/small", "-c", "Dali", "-o", "hf://someone/patches/d", "--json")
    assert (done.status, error_of(done)["kind"]) == (5, "system")
    assert hub.fetched == []


def test_local_files_need_no_client(folder: Path, patch: Path) -> None:
    code = (
        "import sys\nfrom sepme_cli.app import run\n"
        f"run(['apply', {str(folder)!r}, {str(patch)!r}, '--check', '-q'])\n"
        "assert 'huggingface_hub' not in sys.modules, 'huggingface_hub'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

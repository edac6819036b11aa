"""Pipes, terminals, closed and full streams, Ctrl-C: what is written where."""

import os
import pty
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

from tests.cli.conftest import SEPME, Run, parse_object


@pytest.fixture
def here(scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("model.safetensors", "monet.sepme", "clean.safetensors", "both.sepme"):
        shutil.copy(scene / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shell(line: str) -> subprocess.CompletedProcess[bytes]:
    """A bash command line, in which `sepme` is the installed one."""
    path = f"{SEPME.parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        env={**os.environ, "PATH": path},
        timeout=60,
        check=False,
    )


def test_a_patch_and_a_checkpoint_go_through_pipes(here: Path, process: Run) -> None:
    done = process("apply", "model.safetensors", "-", "-o", "-", stdin=read("monet.sepme"))
    assert done.status == 0
    assert done.out == read("clean.safetensors")
    assert "Monet" in done.err


def test_with_json_the_object_moves_aside_for_the_file(here: Path, process: Run) -> None:
    done = process("apply", "model.safetensors", "monet.sepme", "-o", "-", "--json", "-v")
    assert done.out == read("clean.safetensors")
    assert parse_object(done.err)["output"] == "-"


@pytest.mark.parametrize("output", ["-o -", "-o-", "--output -", "--output=-"])
def test_so_does_the_error(output: str, here: Path, sepme: Run) -> None:
    done = sepme("apply", "missing", "monet.sepme", *output.split(), "--json")
    assert done.status == 5
    assert done.out == b""
    assert parse_object(done.err)["error"]["kind"] == "system"


STANDARD_OUTPUT = ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "/proc/thread-self/fd/1", "link"]


@pytest.mark.parametrize("name", STANDARD_OUTPUT)
def test_other_names_of_standard_output_mean_it_too(name: str, here: Path, process: Run) -> None:
    """Nothing may follow the file, neither the result nor, as JSON, the error."""
    (here / "link").symlink_to("/dev/stdout")
    line = ("apply", "model.safetensors", "monet.sepme", "-o", name)
    done = process(*line)
    assert (done.status, done.out) == (0, read("clean.safetensors")), done.err
    assert "Monet" in done.err
    failed = process(*line, "--only", "Nobody", "--json")
    assert (failed.status, failed.out) == (1, b"")
    assert parse_object(failed.err)["error"]["kind"] == "refused"


@pytest.mark.parametrize("name", STANDARD_OUTPUT[:-1])
def test_so_they_do_where_it_is_a_file(name: str, here: Path) -> None:
    done = shell(f"sepme apply model.safetensors monet.sepme -o {name} > out")
    assert done.returncode == 0, done.stderr
    assert read("out") == read("clean.safetensors")
    assert b"Monet" in done.stderr


def test_a_file_that_standard_output_goes_to_is_still_that_file(here: Path) -> None:
    done = shell("sepme apply model.safetensors monet.sepme -o out --force > out")
    assert done.returncode == 0, done.stderr
    assert read("out") == read("clean.safetensors")


@pytest.mark.parametrize(
    "line",
    [
        "export monet.sepme --to kohya -o",
        "import lora.safetensors --base model.safetensors -o",
        "recipe init",
    ],
)
def test_whatever_writes_a_file_knows_them(line: str, here: Path, process: Run) -> None:
    process("export", "monet.sepme", "--to", "kohya", "-o", "lora.safetensors")
    dash, named = (process(*line.split(), name, "-q") for name in ("-", "/dev/stdout"))
    assert dash.status == named.status == 0
    assert dash.out == named.out


def test_a_name_that_the_stream_has_no_letters_for_is_escaped(here: Path) -> None:
    line = "sepme apply model.safetensors monet.sepme -o 絵.safetensors"
    done = shell(f"PYTHONIOENCODING=cp1252 {line}")
    assert done.returncode == 0, done.stderr
    assert b"\\u7d75.safetensors" in done.stdout
    assert read("絵.safetensors") == read("clean.safetensors")


def test_a_lora_goes_through_pipes_both_ways(here: Path, sepme: Run) -> None:
    sepme("export", "monet.sepme", "--to", "kohya")
    piped = sepme("export", "-", "--to", "kohya", "-o", "-", "-q", stdin=read("monet.sepme"))
    assert piped.out == read("monet.safetensors")
    line = ("import", "monet.safetensors", "--base", "model.safetensors")
    sepme(*line, "-o", "back.sepme")
    assert sepme(*line, "-o", "-", "-q").out == read("back.sepme")


def test_a_picture_does_not_go_through_a_pipe(here: Path, sepme: Run) -> None:
    done = sepme("sample", "model.safetensors", "--prompt", "x", "-o", "-")
    assert (done.status, done.out) == (2, b"")


def test_what_follows_two_dashes_is_no_option(here: Path, sepme: Run) -> None:
    done = sepme("inspect", "--", "--json")
    assert done.status == 5
    assert done.err.startswith("error: --json: ")


def test_inspect_reads_a_patch_from_a_pipe(here: Path, sepme: Run) -> None:
    piped = sepme("inspect", "-", "--json", stdin=read("both.sepme")).json
    named = sepme("inspect", "both.sepme", "--json").json
    assert piped["manifest"] == named["manifest"]


def test_inspect_lists_what_a_patch_keeps_once_and_only_when_asked(here: Path, sepme: Run) -> None:
    brief, whole = (sepme("inspect", "both.sepme", *more).out for more in ([], ["-v"]))
    assert (brief.count(b"the empty prompt"), whole.count(b"the empty prompt")) == (0, 1)
    assert b"separable from" in whole and b"protected" not in whole


def test_warnings_are_in_the_json(here: Path, scene: Path, sepme: Run) -> None:
    cousin = scene / "cousin.safetensors"
    done = sepme("apply", cousin, "monet.sepme", "-o", "out", "--json").json
    assert done["base_match"] == "family"
    assert any("another model" in warning for warning in done["warnings"])


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("sepme diff model.safetensors clean.safetensors | true", 5),
        ("sepme inspect both.sepme --json | true", 5),
        ("sepme apply model.safetensors monet.sepme -o - | true", 5),
        ("sepme apply model.safetensors monet.sepme -o out 2>&1 | true", 5),
        ("sepme nonsense 2>&1 | true", 2),
    ],
)
def test_a_reader_that_has_gone_is_no_answer(line: str, status: int, here: Path) -> None:
    # The reader ends before the writer begins to write: sepme starts 50 ms after it.
    done = shell(
        line.replace("sepme", "sleep 0.05; sepme", 1).join(("{ ", "; exit ${PIPESTATUS[0]}; }"))
    )
    assert done.returncode == status
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("sepme --help >/dev/full", 5),
        ("sepme inspect monet.sepme >/dev/full", 5),
        ("sepme inspect monet.sepme --json >/dev/full", 5),
        ("sepme apply model.safetensors monet.sepme -o - >/dev/full", 5),
        ("sepme inspect missing --json >/dev/full", 5),
        ("sepme nonsense 2>/dev/full", 2),
        ("sepme --help >&-", 0),
        ("sepme nonsense 2>&-", 2),
        ("sepme nonsense >&- 2>&-", 2),
    ],
)
def test_a_full_or_closed_stream(line: str, status: int, here: Path) -> None:
    done = shell(line)
    assert done.returncode == status
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c(as_json: bool, here: Path) -> None:
    command = [SEPME, "apply", "model.safetensors", "-", "-o", "out", *["--json"] * as_json]
    pipe = subprocess.PIPE
    # A shell lets what it runs in the background ignore Ctrl-C, and that is inherited.
    listening = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, preexec_fn=listening
    ) as running:
        wait_until_it_reads(running)
        running.send_signal(signal.SIGINT)
        # Not communicate(), which would end its input first.
        status = running.wait(timeout=30)
        out, err = running.stdout.read(), running.stderr.read()
    assert status == 130
    if as_json:
        assert parse_object(out.decode())["error"]["kind"] == "interrupted"
    else:
        assert err == b"error: interrupted\n"
    assert not Path("out").exists()


def wait_until_it_reads(process: subprocess.Popen[bytes]) -> None:
    """Until the process sleeps in a read of its standard input."""
    for _ in range(500):
        if Path(f"/proc/{process.pid}/syscall").read_text().startswith("0 0x0 "):
            return
        time.sleep(0.02)
    pytest.fail("sepme never came to read its standard input")


def on_a_terminal(*arguments: str) -> tuple[int, str]:
    """Exit status of `sepme` on a terminal, and what it showed there."""
    ours, its = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [SEPME, *arguments], stdin=its, stdout=its, stderr=its, env=environment
    )
    os.close(its)
    shown = b""
    while chunk := _read(ours):
        shown += chunk
    os.close(ours)
    return process.wait(timeout=30), shown.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux says EIO where the other end has closed
        return b""


def test_colour_on_a_terminal_only(here: Path, process: Run) -> None:
    status, shown = on_a_terminal("inspect", "monet.sepme")
    assert status == 0
    assert "\x1b[1m" in shown
    assert b"\x1b" not in process("inspect", "monet.sepme").out
    status, shown = on_a_terminal("inspect", "missing")
    assert status == 5
    assert "\x1b[1;31merror: \x1b[0m" in shown


def test_json_has_no_colour_on_a_terminal(here: Path) -> None:
    status, shown = on_a_terminal("inspect", "monet.sepme", "--json")
    assert status == 0
    assert parse_object(shown)["kind"] == "patch"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("apply model.safetensors monet.sepme -o -", "binary"),
        ("apply model.safetensors - -o out", "terminal"),
        ("inspect -", "terminal"),
    ],
)
def test_no_binary_to_and_from_a_terminal(line: str, says: str, here: Path) -> None:
    status, shown = on_a_terminal(*line.split())
    assert status == 2
    assert says in shown


def read(name: str) -> bytes:
    return Path(name).read_bytes()

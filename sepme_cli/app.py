"""The command `sepme`, and the one place that turns an error into a message and an exit status."""

import contextlib
import io
import itertools
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterable, Sequence
from importlib import import_module
from keyword import iskeyword
from pathlib import Path
from types import FrameType
from typing import Annotated, ClassVar, NoReturn

import typer
import typer.main
from rich.text import Text

from sepme_cli.commands.options import is_output_stream
from sepme_cli.errors import MalformedError, SepmeError, SystemFailure, UsageError
from sepme_cli.exit_status import ExitStatus
from sepme_cli.render.console import console_for
from sepme_cli.render.wording import error_json, error_text
from sepme_cli.version import __version__

#: As the help lists them; see `program`.
COMMANDS = (
    "erase", "apply", "revert", "diff", "inspect", "verify", "sign", "sample", "evaluate", "attack",
    "card", "export", "import", "example", "recipe",
)  # fmt: skip
#: What the completion script of a shell sets when it asks; Typer makes the name from the program's.
COMPLETING = "_SEPME_COMPLETE"

_TORCH_OUT_OF_MEMORY = "out of memory|can't allocate memory"
"""What it says of GPUs, of Apple's, and of the CPU."""
_SOURCE = Path(__file__).parent


class InternalError(SepmeError):
    """A bug of ours. Its status is not Python's own 1, which would say that the answer is no."""

    kind, status = "internal", ExitStatus.SYSTEM


class Interrupted(SepmeError):
    """The user pressed Ctrl-C."""

    kind: ClassVar[str] = "interrupted"
    status: ClassVar[ExitStatus] = ExitStatus.INTERRUPTED


class Terminated(Interrupted):
    """The system, or another program, asked us to end."""

    status = ExitStatus.TERMINATED


class _Terminate(KeyboardInterrupt):
    """SIGTERM, which what is under way takes as it takes Ctrl-C."""


def program(commands: Iterable[str] = COMMANDS) -> typer.Typer:
    """The program with these commands. The file of each holds a function or a group of its name."""
    app = typer.Typer(
        name="sepme",
        rich_markup_mode=None,
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback(invoke_without_command=True)(sepme)
    for name in commands:
        python_name = f"{name}_" if iskeyword(name) else name
        command = getattr(import_module(f"sepme_cli.commands.{python_name}"), python_name)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def sepme(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Take concepts out of Stable Diffusion and Flux checkpoints with small patch files, and put
    them back.

    Example:

    \b
      sepme erase sd15.safetensors --concept "Monet" -o monet.sepme
      sepme apply sd15.safetensors monet.sepme -o clean.safetensors
      sepme revert clean.safetensors monet.sepme --base sd15.safetensors -o back.safetensors

    Exit statuses:

    \b
      0    done; the same; verified
      1    the answer is no: differs, does not verify, would not apply, nothing to do
      2    the command line is wrong
      3    a file is malformed, hostile or unsupported
      4    a patch and a checkpoint do not belong together
      5    the system failed: disk full, no permission, file not found
      130  interrupted
      143  terminated

    The documentation explains the words in its glossary (docs/glossary.md).
    """
    if version:
        print(f"sepme {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(ExitStatus.USAGE)


def main() -> NoReturn:
    """The entry point of `sepme`."""
    # Weights are composed side by side, which threads inside numpy's products would only disturb.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # A stream that the caller closed is None: what would be said there is not heard.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Windows has pipes without letters for every name, which must not cost the result.
        sys.stdout.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run(sys.argv[1:]))


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminate


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns its exit status."""
    try:
        status = _invoke(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read our output has gone and knows why; flushing at exit must not fail again.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return ExitStatus.SYSTEM
    except (Exception, KeyboardInterrupt) as error:
        known = _typed(error)
        with contextlib.suppress(OSError):
            _report(known, arguments)
        return known.status


def _invoke(arguments: Sequence[str]) -> int:
    # Not Typer's own main: it gives a broken pipe the status that means "the answer is no".
    # A command need not wait for the options of the others.
    named = [name for name in arguments[:1] if name in COMMANDS]
    command = typer.main.get_command(program(named or COMMANDS))
    if COMPLETING in os.environ:
        # A shell asks what could come next; Typer's main answers, and ends the process.
        command.main(prog_name="sepme")
    try:
        with command.make_context("sepme", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    return ExitStatus.DONE


def _typed(error: BaseException) -> SepmeError:
    from patch_spec.errors import FormatError

    match error:
        case SepmeError():
            return error
        case FormatError():
            return MalformedError(str(error), expected=error.expected, found=error.found)
        case typer.TyperException():
            return UsageError(_usage(error))
        case _Terminate():
            return Terminated("terminated")
        case KeyboardInterrupt() | typer.Abort():
            return Interrupted("interrupted")
        case MemoryError():
            return SystemFailure("not enough memory")
        case RuntimeError() if re.search(_TORCH_OUT_OF_MEMORY, str(error)):
            return SystemFailure(
                "not enough memory on the device: --low-memory spares it, and a smaller "
                "--batch-size or --size needs less",
                found=str(error).partition("\n")[0],
            )
        case OSError():
            return SystemFailure(error.strerror or str(error), file=error.filename)
        case _:
            bug = InternalError(
                f"a bug in sepme {__version__}; please report it, with what -v shows: "
                f"{error!r}, at {_place(error)}"
            )
            bug.__cause__ = error
            return bug


def _place(error: BaseException) -> str:
    """The line of ours that an error came out of: "apply.py:120"."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(_SOURCE)]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"


def _usage(error: typer.TyperException) -> str:
    context: typer.Context | None = getattr(error, "ctx", None)
    path = context.command_path if context else "sepme"
    return f"{error.format_message()}\nTry '{path} --help' for help."


def _report(error: SepmeError, arguments: Sequence[str]) -> None:
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if isinstance(error, InternalError) and {"-v", "--verbose"} & set(options):
        traceback.print_exception(error.__cause__)
    if "--json" in options:
        stream = sys.stderr if _pipes_out(options) else sys.stdout
        print(error_json(error), file=stream, flush=True)
    else:
        message = Text.assemble(("error: ", "bold red"), error_text(error))
        console_for(sys.stderr).print(message)


def _pipes_out(options: Sequence[str]) -> bool:
    """Whether standard output carries the file; told before parsing, which may have failed."""
    said = [value for option, value in itertools.pairwise(options) if option in ("-o", "--output")]
    for short in ("-o", "--output="):
        said += [option.removeprefix(short) for option in options if option.startswith(short)]
    return any(is_output_stream(Path(value)) for value in said)

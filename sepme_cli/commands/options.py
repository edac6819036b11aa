"""The options that several commands share, and how `-` is understood."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, Literal, TypeVar

import typer

from sepme_cli.checkpoints.disk.system import is_standard_output
from sepme_cli.commands.completing import names_of_concepts
from sepme_cli.errors import UsageError
from sepme_cli.places import HubPlace, Place, parse_output, parse_place
from sepme_cli.render.console import Output

if TYPE_CHECKING:
    PlaceOption = Place
else:
    PlaceOption = Path  # Typer knows no unions; the parsers give Places

_Output = TypeVar("_Output", bound=Place)

#: The file name that stands for standard input, and for standard output after -o.
STREAM = "-"

Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print the result as one JSON object: on standard output, or on standard error if"
        " standard output is the file.",
    ),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print only the result and errors."),
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Print the time of each stage, and complete lists."),
]
Force = Annotated[bool, typer.Option("--force", "-f", help="Overwrite an existing output.")]
#: Places on the hub are as good as paths wherever something is read.
Patches = Annotated[
    list[PlaceOption], typer.Argument(metavar="PATCH", hidden=True, parser=parse_place)
]


def parse_model(text: str) -> Place:
    """A model as the command line names it; raises UsageError for standard input."""
    if text == STREAM:
        raise UsageError(
            "- stands for standard input, through which only patches come: a model is read in "
            "several places at once; write it to a file, and name that",
            expected="a file, a folder or a place on the hub",
            found=STREAM,
        )
    return parse_place(text)


#: Arguments are explained in the text above the options, where the usage line is still in sight.
Model = Annotated[PlaceOption, typer.Argument(metavar="MODEL", hidden=True, parser=parse_model)]
OptionalOutput = Annotated[
    PlaceOption | None,
    typer.Option(
        "--output",
        "-o",
        parser=parse_output,
        metavar="CLEAN",
        help="The checkpoint to write; - is standard output.",
        show_default=False,
    ),
]
InPlace = Annotated[
    bool,
    typer.Option("--in-place", help="Change MODEL itself, and write an undo journal beside it."),
]
Base = Annotated[
    PlaceOption | None,
    typer.Option(
        parser=parse_model,
        metavar="MODEL",
        help="The original of MODEL, from before any patch.",
        show_default=False,
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CONCEPT",
        help="Use only this concept's increment. Repeatable.",
        show_default=False,
        autocompletion=names_of_concepts,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="TYPE", help="Compute in fp32, fp16 or bf16; auto chooses what suits the device."
    ),
]
LowMemory = Annotated[
    bool,
    typer.Option(
        "--low-memory",
        help="Use less memory and more time; automatic if a GPU has too little memory.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="cpu, cuda or mps; by default the fastest available.",
        show_default=False,
    ),
]

TextEncoders = Annotated[
    list[PlaceOption] | None,
    typer.Option(
        "--text-encoder",
        parser=parse_model,
        metavar="PATH",
        help="Text encoder for a MODEL that has none: a checkpoint, a model's folder, or an "
        "encoder's own file or folder. Repeat it for a second one.",
        show_default=False,
    ),
]
Tokenizer = Annotated[
    Path | None,
    typer.Option(
        readable=False,
        metavar="DIR",
        help="Folder with a tokenizer's files, CLIP's or T5's; by default the model's own, else "
        "CLIP's.",
        show_default=False,
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Scale of the guidance; by default what MODEL is used with: 7.5, Stable Diffusion 3 "
        "with 7, Flux.1 with 3.5.",
        show_default=False,
    ),
]
Seed = Annotated[
    int, typer.Option(metavar="N", help="Random seed; the same seed gives the same images.")
]
Steps = Annotated[int, typer.Option(min=1, metavar="N", help="Number of sampling steps.")]
Size = Annotated[
    int | None,
    typer.Option(
        min=8,
        metavar="N",
        help="Width and height in pixels; by default what MODEL was made for.",
        show_default=False,
    ),
]
T5Option = Annotated[
    bool,
    typer.Option(
        "--t5/--no-t5",
        help="Read prompts with T5 too, or not: for a Stable Diffusion 3 that is used without it.",
    ),
]
PredictionOption = Annotated[
    Literal["epsilon", "velocity"] | None,
    typer.Option(
        "--prediction",
        help="What the UNet was trained to predict. By default it is detected, from the first "
        "of these that says: the folder's scheduler, the metadata, a .yaml beside the "
        "file, the tensor v_pred, a bias of SD 2.x; else epsilon.",
        show_default=False,
    ),
]


def output_for(*, as_json: bool, quiet: bool, verbose: bool, output: Place | None = None) -> Output:
    """The output of a command that writes its file to `output`."""
    return Output(as_json=as_json, quiet=quiet, verbose=verbose, piped=is_output_stream(output))


def is_stream(place: Place | None) -> bool:
    """Whether a place on the command line means a standard stream."""
    return place is not None and str(place) == STREAM


def is_output_stream(place: Place | None) -> bool:
    """Whether what is written there goes to standard output, by whatever name."""
    return is_stream(place) or (isinstance(place, Path) and is_standard_output(place))


def destination(output: _Output, *, text: bool = False) -> _Output | BinaryIO:
    """What an operation writes to; raises UsageError where that would fill a terminal, unless it
    is text."""
    if not is_output_stream(output):
        return output
    if sys.stdout.isatty() and not text:
        raise UsageError("-o - writes a binary file: send standard output to a file or a pipe")
    return sys.stdout.buffer


def target(output: Place | None, *, in_place: bool, needed: bool = True) -> Path | BinaryIO | None:
    """What apply and revert write to: one of -o and --in-place, which is None.

    Raises UsageError for both, for neither where the output is needed, and for the hub.
    """
    if output is not None and in_place:
        raise UsageError("-o and --in-place exclude each other: give one of them")
    if output is None and needed and not in_place:
        raise UsageError("give -o FILE for the new checkpoint, or --in-place to change MODEL")
    if isinstance(output, HubPlace):
        raise UsageError(
            f"{output}: a checkpoint is too large to be sent off unseen: write a file, and publish "
            "that with `hf upload`; or publish the patch, with sepme erase -o",
            expected="a file",
            found=output,
        )
    return None if output is None else destination(output)


def command_line(context: typer.Context) -> str:
    """The command line that says the same: what was given, without how it was to be shown."""
    words = context.command_path.split()
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        values = value if isinstance(value, list | tuple) else [value]
        given = value is not None and value is not False and value != parameter.default
        if not given or parameter.name in ("as_json", "quiet", "verbose", "force"):
            continue
        for each in values:
            named = [] if parameter.param_type_name == "argument" else [parameter.opts[0]]
            words += [*named, *([] if each is True else [str(each)])]
    return shlex.join(words)


def source(patch: Place) -> Place | BinaryIO:
    """What an operation reads a patch from; raises UsageError for a terminal."""
    if not is_stream(patch):
        return patch
    if sys.stdin.isatty():
        raise UsageError("- reads a patch from standard input, which is a terminal: pipe one in")
    return sys.stdin.buffer


def sources(patches: list[Place]) -> list[Place | BinaryIO]:
    """As `source`, for several; raises UsageError if standard input is named twice."""
    if sum(map(is_stream, patches)) > 1:
        raise UsageError("standard input can be read only once: name - once")
    return [source(patch) for patch in patches]

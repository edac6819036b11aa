"""The example model, as a file to try things on."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from sepme_cli.arguments import FilePath, as_path
from sepme_cli.checkpoints.disk.failures import reading
from sepme_cli.checkpoints.disk.files import copy_all, new_file, only_writer
from sepme_cli.errors import SystemFailure
from sepme_cli.progress import SILENT, Progress

#: What `pip install 'sepme[example]'` brings.
PACKAGE = "sepme_example"


@dataclass(frozen=True)
class ExampleResult:
    """Result of `example`.

    Attributes:
        model: Where it was written.
        bytes: Its size.
        judge: Classifier of its images, as `evaluate` takes it.
    """

    model: str
    bytes: int
    judge: str


def example(output: FilePath, *, force: bool = False, progress: Progress = SILENT) -> ExampleResult:
    """Write the example model: a Stable Diffusion 1.x of 66 MB that knows English.

    Args:
        output: File to write.
        force: Overwrite it if it exists.
        progress: Receives progress and warnings.

    Returns:
        Where the model is, and its judge.

    Raises:
        SystemFailure: The package with the example is not installed, or the file cannot be written.
    """
    output = as_path(output)
    package = find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise SystemFailure(
            "the example model is a package of its own: pip install 'sepme[example]'",
            expected=PACKAGE,
            found="not installed",
        )
    source = Path(package.origin).with_name("english-sd.safetensors")
    with reading(source), source.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        with (
            only_writer(output, progress),
            new_file(output, size, force=force, progress=progress) as descriptor,
        ):
            copy_all(file.fileno(), 0, descriptor, 0, size, source)
    return ExampleResult(str(output), size, f"{PACKAGE}:judge")

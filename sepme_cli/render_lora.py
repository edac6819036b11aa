"""What was exported and imported, as a person reads it."""

from typing import TYPE_CHECKING

from rich.console import RenderableType

from sepme_cli.render import BASE_MATCHES
from sepme_cli.tables import cell_text, counted, fields
from sepme_cli.wording import duration, size

if TYPE_CHECKING:
    from sepme_cli.operations.export import ExportResult

_READERS = {
    "kohya": "kohya's format, for A1111, Forge, ComfyUI, kohya's scripts and diffusers",
    "peft": "PEFT's format, for PEFT and diffusers",
}


def export(result: "ExportResult") -> RenderableType:
    """Where the LoRA is, and how near to the patch."""
    match = result.base_match
    error = f"{cell_text(result.relative_error)} of the patch's increments, relative; "
    return fields(
        ("output", f"{result.output}, {size(result.bytes)}"),
        ("kind", f"LoRA for {result.family}, {_READERS[result.format]}"),
        ("takes out", ", ".join(result.concepts)),
        ("modules", f"{counted(result.modules, 'module')} of rank {result.rank}, {result.dtype}"),
        ("computed on", None if match is None else BASE_MATCHES[match]),
        ("off by", f"{error}at most {cell_text(result.max_abs_error)} a weight"),
        ("time", duration(result.seconds)),
    )

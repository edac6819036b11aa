"""What was exported and imported, as a person reads it."""

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from sepme_cli.render.results import BASE_MATCHES, LISTED
from sepme_cli.render.tables import add_row, cell_text, counted, fields, new_table
from sepme_cli.render.wording import duration, size

if TYPE_CHECKING:
    from sepme_cli.composing.importing import ImportResult
    from sepme_cli.operations.export import ExportResult

_READERS = {
    "kohya": "kohya's format, for A1111, Forge, ComfyUI, kohya's scripts and diffusers",
    "peft": "PEFT's format, for PEFT and diffusers",
}
_KINDS = {
    "additive": "additive, one basis for all weights",
    "operator": "operator, one for all weights and for every fine-tune",
    "lora": "lora, a basis for each weight",
}


def export(result: "ExportResult") -> RenderableType:
    """Where the LoRA is, and its error."""
    match = result.base_match
    error = f"{cell_text(result.relative_error)} relative, "
    return fields(
        ("output", f"{result.output}, {size(result.bytes)}"),
        ("kind", f"LoRA for {result.family}, {_READERS[result.format]}"),
        ("erases", ", ".join(result.concepts)),
        ("modules", f"{counted(result.modules, 'module')} of rank {result.rank}, {result.dtype}"),
        ("computed with", None if match is None else BASE_MATCHES[match]),
        ("error", f"{error}at most {cell_text(result.max_abs_error)} per weight"),
        ("time", duration(result.seconds)),
    )


def imported(result: "ImportResult", *, whole: bool) -> RenderableType:
    """Where the patch is, its error, and what is left out; whole: every weight."""
    changed = f"{counted(result.targets, 'weight')} changed"
    if result.layers:
        changed += f", {result.layers} of which read more than the text"
    parts: list[RenderableType] = [
        fields(
            ("patch", f"{result.patch}, {size(result.bytes)}"),
            ("concept", result.concept),
            ("for", f"{result.family}, {changed}"),
            ("kind", f"{_KINDS[result.kind]}, rank {result.rank}"),
            ("error", f"{cell_text(result.relative_error)} relative"),
            ("time", duration(result.seconds)),
        )
    ]
    shown = result.residuals if whole else result.residuals[:LISTED]
    table = new_table("weight", "relative error")
    for one in shown:
        add_row(table, one.name, one.residual)
    parts += ["", table]
    if more := len(result.residuals) - len(shown):
        parts.append(f"  and {more} more with smaller errors: -v lists them all")
    if result.left_out:
        table = new_table("left out", "count", "share")
        for part in result.left_out:
            add_row(table, part.what, part.count, part.share)
        parts += ["", table]
    return Group(*parts)

"""Results as a person reads them: names and values below each other, and tables."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table

from sepme_cli.wording import duration, printable, size

if TYPE_CHECKING:
    from sepme_cli.operations.apply import ApplyResult
    from sepme_cli.operations.diff import DiffResult
    from sepme_cli.operations.erase import EraseResult
    from sepme_cli.operations.evaluate import EvaluateResult
    from sepme_cli.operations.inspect import CheckpointInfo, InspectResult, PatchInfo
    from sepme_cli.operations.revert import RevertResult
    from sepme_cli.operations.sample import SampleResult
    from sepme_cli.operations.verify import VerifyResult

BASE_MATCHES = {
    "exact": "the very weights that the patch was made from",
    "same-values": "the weights that the patch was made from, in another dtype",
    "family": "another model of the family",
}
_ROLES = {True: "erased", False: "NOT erased", None: "not judged"}
#: A list longer than this is cut, unless the user asked for the whole.
LISTED = 12


def erase(result: "EraseResult") -> RenderableType:
    """The increments, one a row, and where the patch is."""
    table = _table("concept", "rank", "steps", "stopped", "correlation", "leakage", "time")
    for increment in result.increments:
        correlation = increment.correlation
        _row(
            table,
            increment.concept,
            increment.rank,
            increment.steps,
            increment.stopped,
            None
            if correlation.end is None
            else f"{_cell(correlation.start)} to {_cell(correlation.end)}",
            increment.leakage,
            duration(increment.seconds),
        )
    written = _fields(
        ("patch", f"{result.patch}, {size(result.bytes)}"),
        ("for", f"{result.base.family}, {_count(result.base.targets, 'weight')}"),
        ("applied", result.applied),
        ("time", duration(result.seconds)),
    )
    return Group(table, "", written)


def apply(result: "ApplyResult") -> RenderableType:
    """What was done, or would be."""
    others = [concept for concept in result.applied if concept not in result.concepts]
    return _fields(
        ("output", "nothing is written: this is a check" if result.checked else result.output),
        ("model", result.model),
        ("would take out" if result.checked else "taken out", ", ".join(result.concepts)),
        ("out before", ", ".join(others) or None),
        ("changed", _count(result.tensors_changed, "tensor")),
        ("base", BASE_MATCHES[result.base_match]),
        ("revert", "exact, given the base" if result.exact else "not exact"),
        ("time", duration(result.seconds)),
    )


def revert(result: "RevertResult") -> RenderableType:
    """What is back, what is still out, and how exactly."""
    bound = result.max_abs_error
    error = "by an unknown amount" if bound is None else f"by at most {_cell(bound)} a weight"
    return _fields(
        ("output", result.output),
        ("model", result.model),
        ("put back", ", ".join(result.restored)),
        ("still out", ", ".join(result.remaining) or "nothing"),
        ("exact", "yes" if result.exact else f"no, off {error}"),
        ("time", duration(result.seconds)),
    )


def diff(result: "DiffResult", *, whole: bool) -> RenderableType:
    """What differs; whole: every tensor, not only those that changed most."""
    parts: list[RenderableType] = [printable(_verdict(result))]
    if result.increments:
        parts += ["", _increment_differences(result)]
    if result.interference:
        parts += ["", "interference: how much of a row's increment acts on a column's concept"]
        parts.append(_matrix(result.interference))
    if result.tensors:
        parts += ["", *_tensor_differences(result, whole)]
    for side, names in (("a", result.only_in_a), ("b", result.only_in_b)):
        if names and not result.increments:
            shown = names if whole else names[:LISTED]
            parts += ["", f"only in {side}:", printable("\n".join(f"  {n}" for n in shown))]
            parts += _cut(len(names) - len(shown))
    if result.metadata:
        parts += ["", printable(f"metadata that differs: {', '.join(result.metadata)}")]
    return Group(*parts)


def inspect(result: "InspectResult", *, whole: bool) -> RenderableType:
    """What the file is, and the concepts in it; whole: the prompts and the metadata too."""
    if result.kind == "checkpoint":
        return _checkpoint(result, whole)
    if result.kind == "patch":
        return _patch(result, whole)
    return _fields(
        ("file", f"{result.file}, {size(result.bytes)}"),
        ("kind", "undo journal"),
        ("tensors", str(result.tensors)),
        ("base", result.base),
    )


def sample(result: "SampleResult") -> RenderableType:
    """Where the pictures are."""
    return _fields(
        ("output", result.output),
        ("pictures", _cell(result.images)),
        ("time", duration(result.seconds)),
    )


def evaluate(result: "EvaluateResult") -> RenderableType:
    """The concepts, one a row, the figures of all of them, and where the report is."""
    table = _table("concept", "", "before", "after", "95%", "n", "pixels", "put back")
    for name, concept in result.concepts.items():
        _row(
            table,
            f"{name} ({concept.kind})",
            _ROLES[concept.erased] if concept.role == "erased" else "retained",
            _percent(concept.before),
            _percent(concept.after),
            _range(concept.interval),
            concept.n,
            f"{concept.pixel_distance:.1f}",
            _percent(concept.restored.after) if concept.restored else None,
        )
    figures = _fields(
        ("UA", _percent(result.ua) + "  of what was asked for and erased is gone"),
        ("IRA", _percent(result.ira) + "  of what stays is recognised, of the same kind"),
        ("CRA", _percent(result.cra) + "  of the other kind"),
        ("H", _percent(result.harmonic_mean) + "  harmonic mean of the three"),
        ("beside", _percent(result.drawn_with_erased.after) + "  of what it was drawn with"),
        ("FID, KID", None if result.reference is None else str(result.reference)),
        ("restored", "identical to the original" if result.restored_identical else "NOT identical"),
        ("report", result.page),
        ("time", duration(result.seconds)),
    )
    return Group(table, "", figures)


def verify(result: "VerifyResult") -> RenderableType:
    """The checks one below the other, and what was not looked at."""
    table = _table("", "check", "found")
    for check in result.checks:
        _row(table, "ok" if check.ok else "NO", check.name, check.detail)
    parts: list[RenderableType] = [table]
    parts += [printable(f"not checked: {what}") for what in result.unchecked]
    return Group(*parts)


def _verdict(result: "DiffResult") -> str:
    what = {
        "checkpoints": ("the same tensors", _count(result.changed, "tensor") + " changed"),
        "patches": ("the same increments", _count(result.changed, "increment") + " changed"),
        "checkpoint and patch": (
            "applied",
            f"not applied; would change {_count(result.changed, 'tensor')}",
        ),
    }
    return what[result.kind][not result.same]


def _increment_differences(result: "DiffResult") -> Table:
    table = _table("concept", "status", "distance", "digest")
    for part in result.increments:
        _row(table, part.concept, part.status, part.distance, part.digest[:12])
    return table


def _matrix(rows: Mapping[str, Mapping[str, float]]) -> Table:
    table = _table("", *next(iter(rows.values())))
    for name, cells in rows.items():
        _row(table, name, *cells.values())
    return table


def _tensor_differences(result: "DiffResult", whole: bool) -> list[RenderableType]:
    table = _table("tensor", "relative norm", "max abs", "rank")
    most = sorted(result.tensors, key=lambda t: -(t.relative_norm or math.inf))
    shown = most if whole else most[:LISTED]
    for tensor in shown:
        _row(table, tensor.name, tensor.relative_norm, tensor.max_abs, tensor.rank)
    return [table, *_cut(len(most) - len(shown))]


def _cut(count: int) -> list[RenderableType]:
    return [f"  and {count} more: -v lists them all"] if count else []


def _checkpoint(result: "CheckpointInfo", whole: bool) -> RenderableType:
    # What the entry of our own says stands below, under its concepts.
    others = {key: value for key, value in result.metadata.items() if key != "sepme"}
    metadata = (("", f"{key}: {value}") for key, value in others.items())
    twins = ", each with an EMA twin" if result.ema else ""
    parts: list[RenderableType] = [
        _fields(
            ("file", f"{result.file}, {size(result.bytes)}"),
            ("kind", f"checkpoint, {result.title}, {result.layout}"),
            ("dtype", result.dtype),
            ("targets", f"{result.targets} of {result.tensors} tensors{twins}"),
            ("text", f"{result.width} wide, {', '.join(result.text_encoders) or 'no encoder'}"),
            ("base", result.base),
            ("undo", result.undo),
            *((("metadata", ""), *metadata) if whole and others else ()),
        )
    ]
    if result.applied:
        table = _table("taken out", "scale", "digest")
        for entry in result.applied:
            _row(table, entry.concept, entry.scale, entry.digest[:12])
        parts += ["", table]
    return Group(*parts)


def _patch(result: "PatchInfo", whole: bool) -> RenderableType:
    manifest = result.manifest
    base = manifest["base"]
    amount = "" if result.bytes is None else f", {size(result.bytes)}"
    table = _table("concept", "kind", "rank", "method", "leakage", "separability", "digest")
    for part in manifest["increments"]:
        measured = part["measured"]
        _row(
            table,
            part["concept"],
            part["kind"],
            part["rank"],
            part["method"]["name"],
            measured["leakage"],
            measured["separability"],
            part["digest"][:12],
        )
    prompts = (("", prompt) for part in manifest["increments"] for prompt in part["prompts"])
    return Group(
        _fields(
            ("file", f"{result.file}{amount}"),
            ("kind", f"patch, by {manifest['tool']}"),
            ("for", f"{base['family']}, {_count(len(base['targets']), 'weight')}"),
            *((("prompts", ""), *prompts) if whole else ()),
        ),
        "",
        table,
    )


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(printable(name), overflow="fold")
    return table


def _row(table: Table, *cells: str | float | None) -> None:
    table.add_row(*(printable(_cell(cell)) for cell in cells))


def _fields(*fields: tuple[str, str | None]) -> Table:
    """Names and values below each other; a value of None is left out."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for name, value in fields:
        if value is not None:
            grid.add_row(name, printable(value))
    return grid


def _cell(value: str | float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _range(interval: tuple[float, float] | None) -> str | None:
    return None if interval is None else f"{interval[0]:.0%} to {interval[1]:.0%}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"

"""Results as a person reads them: names and values below each other, and tables."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from patch_spec.streams import network_of
from sepme_cli.evaluation.intervals import percent
from sepme_cli.render.tables import add_row, cell_text, counted, fields, made_for, new_table
from sepme_cli.render.wording import duration, printable, size

if TYPE_CHECKING:
    from sepme_cli.attacks.results import AttackResult, Success
    from sepme_cli.evaluation.results import EvaluateResult, Replication, ShardResult
    from sepme_cli.operations.apply import ApplyResult
    from sepme_cli.operations.card import CardResult
    from sepme_cli.operations.diff import DiffResult
    from sepme_cli.operations.erase import EraseResult
    from sepme_cli.operations.example import ExampleResult
    from sepme_cli.operations.inspect import CheckpointInfo, InspectResult, PatchInfo
    from sepme_cli.operations.recipe import InitResult, RecipeInfo
    from sepme_cli.operations.revert import RevertResult
    from sepme_cli.operations.sample import SampleResult

BASE_MATCHES = {
    "exact": "the weights that the patch was made from",
    "same-values": "the weights that the patch was made from, equal in fp16",
    "family": "another model of the same family",
}
_EVALUATE_LEGEND = (
    "before, after, restored: share of images in which the judge recognises the concept; "
    "pixels: mean difference, of 255"
)
_ATTACK_LEGEND = (
    "how often each attack had the concept drawn: by the patched model, by the original, and what "
    "the judge says by mistake (chance); * can teach any model, see --floor"
)
_ROLES = {True: "erased", False: "NOT erased", None: "not judged"}
#: A list longer than this is cut, unless the user asked for the whole.
LISTED = 12


def erase(result: "EraseResult") -> RenderableType:
    """The increments, one a row, and where the patch is."""
    table = new_table(
        "concept", "kind", "anchor", "separability", "leakage",
        "rank", "steps", "stopped", "correlation", "time",
    )  # fmt: skip
    for increment in result.increments:
        correlation = increment.correlation
        add_row(
            table,
            increment.concept,
            increment.taken_for,
            increment.like,
            increment.separability,
            increment.leakage,
            _rank({"rank": increment.rank}, increment.zeros),
            increment.steps,
            increment.stopped,
            None
            if correlation.end is None
            else f"{cell_text(correlation.start)} to {cell_text(correlation.end)}",
            duration(increment.seconds),
        )
    collateral = result.collateral
    written = fields(
        (
            "collateral",
            None
            if collateral is None
            else f"captions of other things change by {collateral.median:.0%} (median), "
            f"{collateral.p95:.0%} (95th percentile)",
        ),
        ("patch", f"{result.patch}, {size(result.bytes)}"),
        ("for", made_for(result.base)),
        ("recipe", result.recipe),
        ("applied", result.applied),
        ("time", duration(result.seconds)),
    )
    return Group(table, "", written)


def apply(result: "ApplyResult") -> RenderableType:
    """What was done, or would be."""
    others = [concept for concept in result.applied if concept not in result.concepts]
    return fields(
        ("output", "none: --check writes nothing" if result.checked else result.output),
        ("model", result.model),
        ("would erase" if result.checked else "erased", ", ".join(result.concepts)),
        ("erased before", ", ".join(others) or None),
        ("changed", counted(result.tensors_changed, "tensor")),
        ("base", BASE_MATCHES[result.base_match]),
        ("revert", "exact, given the base" if result.exact else "not exact"),
        ("statement", result.statement),
        ("time", duration(result.seconds)),
    )


def revert(result: "RevertResult") -> RenderableType:
    """What is restored, what is still erased, and how exactly."""
    bound = result.max_abs_error
    error = "by an unknown amount" if bound is None else f"by at most {cell_text(bound)} per weight"
    return fields(
        ("output", result.output),
        ("model", result.model),
        ("restored", ", ".join(result.restored)),
        ("still erased", ", ".join(result.remaining) or "nothing"),
        ("exact", "yes" if result.exact else f"no, off {error}"),
        ("time", duration(result.seconds)),
    )


def diff(result: "DiffResult", *, whole: bool) -> RenderableType:
    """What differs; whole: every tensor, not only those that changed most."""
    parts: list[RenderableType] = [printable(_verdict(result))]
    if result.increments:
        parts += ["", _increment_differences(result)]
    if result.interference:
        parts += ["", "interference: share of a row's increment that acts on a column's concept"]
        parts.append(_matrix(result.interference))
    if result.tensors:
        parts += ["", *_tensor_differences(result, whole)]
    for side, names in (("a", result.only_in_a), ("b", result.only_in_b)):
        if names and not result.increments:
            shown = names if whole else names[:LISTED]
            parts += ["", f"only in {side}:", printable("\n".join(f"  {n}" for n in shown))]
            parts += _cut(len(names) - len(shown))
    if result.metadata:
        shown = result.metadata if whole else result.metadata[:LISTED]
        parts += ["", printable(f"metadata that differs: {', '.join(shown)}")]
        parts += _cut(len(result.metadata) - len(shown))
    return Group(*parts)


def inspect(result: "InspectResult", *, whole: bool) -> RenderableType:
    """What the file is, and the concepts in it; whole: the prompts and the metadata too."""
    if result.kind == "checkpoint":
        return _checkpoint(result, whole)
    if result.kind == "patch":
        return _patch(result, whole)
    return fields(
        ("file", f"{result.file}, {size(result.bytes)}"),
        ("kind", "undo journal"),
        ("tensors", str(result.tensors)),
        ("base", result.base),
    )


def sample(result: "SampleResult") -> RenderableType:
    """Where the images are."""
    return fields(
        ("output", result.output),
        ("images", cell_text(result.images)),
        ("time", duration(result.seconds)),
    )


def attack(result: "AttackResult") -> RenderableType:
    """The attacks, one a row, with what each reached, and where the report is."""
    floor = any(one.floor for one in result.attacks.values())
    table = new_table(
        "attack", "patched", "95% interval", "of", "original", *(["floor"] if floor else []),
        "chance", "time",
    )  # fmt: skip
    for name, one in result.attacks.items():
        if one.unfit is not None or one.patched is None:
            continue
        counted_as = "cases" if one.best else "images"
        add_row(
            table,
            f"{name} *" if one.teaches else name,
            percent(one.patched.share),
            _range(one.patched.interval),
            f"{one.patched.n} {counted_as}",
            _share(one.original),
            *([_share(one.floor)] if floor else []),
            percent(one.chance),
            duration(one.patched.seconds),
        )
    untried = {name: one.unfit for name, one in result.attacks.items() if one.unfit is not None}
    figures = fields(
        ("strongest", _strongest(result, result.strongest) or "none brought it back"),
        ("learning from images", _strongest(result, result.strongest_teaching)),
        ("not tried", "; ".join(f"{name}: {why}" for name, why in untried.items()) or None),
        ("report", result.page),
        ("time", duration(result.seconds)),
    )
    return Group(table, "", _ATTACK_LEGEND, "", figures)


def _strongest(result: "AttackResult", name: str | None) -> str | None:
    return None if name is None else f"{name}: {_share(result.attacks[name].patched)}"


def _share(found: "Success | None") -> str:
    return percent(None if found is None else found.share)


def evaluate(result: "EvaluateResult") -> RenderableType:
    """The concepts, one a row, the figures of all of them, and where the report is."""
    table = new_table(
        "concept", "role", "before", "after", "95% interval", "images", "pixels", "restored"
    )
    for name, concept in result.concepts.items():
        add_row(
            table,
            f"{name} ({concept.kind})",
            _ROLES[concept.erased] if concept.role == "erased" else "retained",
            percent(concept.before),
            percent(concept.after),
            _range(concept.interval),
            concept.n,
            f"{concept.pixel_distance:.1f}",
            percent(concept.restored.after) if concept.restored else None,
        )
    figures = fields(
        (
            "UA",
            percent(result.ua) + "  unlearning accuracy: erased concepts that are not recognised",
        ),
        (
            "IRA",
            percent(result.ira)
            + "  in-domain retention: others of the same kind that are recognised",
        ),
        ("CRA", percent(result.cra) + "  cross-domain retention: others of the other kind"),
        ("H", percent(result.harmonic_mean) + "  harmonic mean of UA, IRA and CRA"),
        (
            "beside",
            percent(result.drawn_with_erased.after) + "  others in prompts with an erased concept",
        ),
        ("FID, KID", None if result.reference is None else str(result.reference)),
        *(_replication(result.replication) if result.replication else ()),
        ("restored", "identical to the original" if result.restored_identical else "NOT identical"),
        ("report", result.page),
        ("time", duration(result.seconds)),
    )
    return Group(table, "", _EVALUATE_LEGEND, "", figures)


def _replication(found: "Replication") -> list[tuple[str, str]]:
    """A line for all training images, and one for each."""
    whole, gaps = found.replicated, found.memorised
    lines = [
        (
            "replicas",
            f"{percent(whole.before)} before, {percent(whole.after)} after "
            f"({_range(whole.interval)}): similarity of {found.threshold:g} or more to the "
            f"training image, {whole.n} images",
        ),
        (
            "memorised",
            f"{percent(gaps.before)} before, {percent(gaps.after)} after "
            f"({_range(gaps.interval)}): noise gap larger than that of 95% of ordinary captions, "
            f"{gaps.n} captions",
        ),
    ]
    for name, one in found.images.items():
        alike, gap = one.similarity, one.larger_than
        restored = "" if alike.restored is None else f", {alike.restored:.2f} restored"
        lines.append(
            (
                f"  {name}",
                f"similarity {alike.before:.2f} before, {alike.after:.2f} after{restored}; "
                f"gap larger than {percent(gap.before)}, then {percent(gap.after)}",
            )
        )
    return lines


def shard(result: "ShardResult") -> RenderableType:
    """What a part of an evaluation has generated."""
    return fields(
        ("shard", result.shard),
        ("images", f"{result.images}, of which {result.drawn} were generated now"),
        ("folder", result.report),
        ("time", duration(result.seconds)),
    )


def example(result: "ExampleResult") -> RenderableType:
    """Where the model is."""
    return fields(("model", f"{result.model}, {size(result.bytes)}"), ("judge", result.judge))


def card(result: "CardResult") -> RenderableType:
    """The card as it is."""
    return Text(result.card)


def recipe_init(result: "InitResult") -> RenderableType:
    """Where the recipe is."""
    return fields(("recipe", f"{result.recipe}, {size(result.bytes)}"))


def recipe_check(result: "RecipeInfo") -> RenderableType:
    """The content of the recipe, one concept per row."""
    table = new_table("concept", "kind", "aliases", "prompts", "anchor")
    for item in result.concepts:
        aliases = _weighted(item.aliases, item.weights)
        add_row(table, item.label, item.kind, aliases, len(item.prompts), item.like)
    rest = fields(
        ("recipe", result.file),
        ("protect", _weighted(result.protect, result.weights)),
        ("method", result.method),
        ("settings", ", ".join(f"{k} {v}" for k, v in result.settings.items()) or None),
        ("digest", result.digest),
    )
    return Group(table, "", rest)


def _weighted(words: Sequence[str], weights: Mapping[str, float]) -> str | None:
    """Words in a row, each with its weight where that is not 1."""
    names = ((word, word.removeprefix("style:").removeprefix("object:")) for word in words)
    told = (f"{word} ({weights[name]:g})" if name in weights else word for word, name in names)
    return ", ".join(told) or None


def _verdict(result: "DiffResult") -> str:
    what = {
        "checkpoints": ("the same tensors", counted(result.changed, "tensor") + " changed"),
        "patches": ("the same increments", counted(result.changed, "increment") + " changed"),
        "checkpoint and patch": (
            "applied",
            f"not applied; would change {counted(result.changed, 'tensor')}",
        ),
    }
    return what[result.kind][not result.same]


def _increment_differences(result: "DiffResult") -> Table:
    table = new_table("concept", "status", "distance", "digest")
    for part in result.increments:
        add_row(table, part.concept, part.status, part.distance, part.digest[:12])
    return table


def _matrix(rows: Mapping[str, Mapping[str, float]]) -> Table:
    table = new_table("", *next(iter(rows.values())))
    for name, cells in rows.items():
        add_row(table, name, *cells.values())
    return table


def _tensor_differences(result: "DiffResult", whole: bool) -> list[RenderableType]:
    # Where there is more than one stream, each is to be seen.
    several = any(tensor.stream == "pooled" for tensor in result.tensors)
    table = new_table("tensor", *["stream"] * several, "relative norm", "max abs", "rank")
    most = sorted(result.tensors, key=lambda t: -(t.relative_norm or math.inf))
    shown = most if whole else most[:LISTED]
    if several:
        pooled = [tensor for tensor in most if tensor.stream == "pooled"]
        shown = [*pooled, *(tensor for tensor in shown if tensor not in pooled)][: len(shown)]
    for tensor in shown:
        told = [tensor.stream] * several
        add_row(table, tensor.name, *told, tensor.relative_norm, tensor.max_abs, tensor.rank)
    return [table, *_cut(len(most) - len(shown))]


def _cut(count: int) -> list[RenderableType]:
    return [f"  and {count} more: -v lists them all"] if count else []


def _checkpoint(result: "CheckpointInfo", whole: bool) -> RenderableType:
    # What the entry of our own says stands below, under its concepts.
    others = {key: value for key, value in result.metadata.items() if key != "sepme"}
    metadata = (("", f"{key}: {value}") for key, value in others.items())
    pooled = "" if result.pooled is None else f", pooled {result.pooled}"
    twins = ", each with an EMA copy" if result.ema else ""
    parts: list[RenderableType] = [
        fields(
            ("file", f"{result.file}, {size(result.bytes)}"),
            ("kind", f"checkpoint, {result.title}, {result.layout}"),
            ("dtype", result.dtype),
            ("targets", f"{result.targets} of {result.tensors} tensors{twins}"),
            ("further layers", f"{result.layers} changed" if result.layers else None),
            (
                "text",
                f"width {result.width}{pooled}, "
                f"{', '.join(result.text_encoders) or 'no text encoder'}",
            ),
            ("base", result.base),
            ("undo", result.undo),
            *((("metadata", ""), *metadata) if whole and others else ()),
        )
    ]
    if result.applied:
        table = new_table("erased", "scale", "digest")
        for entry in result.applied:
            add_row(table, entry.concept, entry.scale, entry.digest[:12])
        parts += ["", table]
    return Group(*parts)


def _patch(result: "PatchInfo", whole: bool) -> RenderableType:
    manifest = result.manifest
    base = manifest["base"]
    amount = "" if result.bytes is None else f", {size(result.bytes)}"
    table = new_table("concept", "kind", "rank", "method", "leakage", "separability", "digest")
    for part in manifest["increments"]:
        measured = part["measured"]
        add_row(
            table,
            part["concept"],
            part["kind"],
            _rank(part, sum(mask["count"] for mask in part.get("masks", {}).values())),
            part["method"]["name"],
            measured["leakage"],
            measured["separability"],
            part["digest"][:12],
        )
    prompts = [prompt for part in manifest["increments"] for prompt in part["prompts"]]
    return Group(
        fields(
            ("file", f"{result.file}{amount}"),
            ("kind", f"patch, by {manifest['tool']}"),
            ("for", f"{base['family']}, {counted(len(base['targets']), 'weight')}"),
            ("further layers", _layers(base.get("layers", {}))),
            ("recipe", manifest["recipe"]),
            ("prompts", _below_each_other(prompts) if whole else None),
            ("separable from", _below_each_other(manifest["separable_from"]) if whole else None),
            ("protected", _below_each_other(manifest["protected"]) if whole else None),
        ),
        "",
        table,
    )


def _layers(layers: Mapping[str, Any]) -> str | None:
    """How many of each network: they read more than the text, and nothing is promised of them."""
    if not layers:
        return None
    counts = Counter(network_of(name) for name in layers)
    told = ", ".join(f"{count} of {network}" for network, count in sorted(counts.items(), key=str))
    return f"{told}: no prompt is promised to stay as it is"


def _rank(part: Mapping[str, Any], zeros: int) -> str:
    """Of an increment, on each stream that it acts on."""
    if zeros:
        return f"{zeros} zeros"
    pooled = part.get("pooled", {}).get("rank", 0)
    if not pooled:
        return str(part["rank"])
    return f"{part['rank']} + {pooled} pooled" if part["rank"] else f"{pooled} pooled"


def _below_each_other(prompts: Sequence[str]) -> str | None:
    return "\n".join(prompt or "the empty prompt" for prompt in prompts) or None


def _range(interval: tuple[float, float] | None) -> str | None:
    return None if interval is None else f"{interval[0]:.0%} to {interval[1]:.0%}"

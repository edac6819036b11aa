"""A model card: which concepts were erased from a model, for people who find it on the hub."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from patch_spec.base import Family as FamilyName
from patch_spec.increment import Increment
from sepme_cli.arguments import FilePath, Places, as_path, as_places
from sepme_cli.attacks.results import AttackReport, read_attack_report
from sepme_cli.checkpoints.hub.cache import local
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.checkpoints.reading.gguf import SUFFIX
from sepme_cli.checkpoints.reading.kinds import kind_of
from sepme_cli.checkpoints.reading.patches import PatchFile, read_patch_file
from sepme_cli.checkpoints.structure.families import FAMILIES
from sepme_cli.composing.matching import check_patched
from sepme_cli.errors import UsageError
from sepme_cli.evaluation.intervals import percent
from sepme_cli.evaluation.results import ReportFigures, read_report
from sepme_cli.progress import SILENT, Progress

_LIMITS = """\
## Limits

- Erasure changes the weights and hides nothing. Whoever has the original and the patched model
  can subtract one from the other. Whoever has the patch can undo it.
- Light fine-tuning or a learned embedding can bring a concept back.
- The measurements hold for the prompts, the seeds and the judge that they were made with. Other
  words may still generate a concept, and neighbours that were not measured may have suffered.
"""


@dataclass(frozen=True)
class CardResult:
    """Result of `card`.

    Attributes:
        card: Markdown, with the front matter that the hub reads.
        concepts: Erased concepts that it lists.
    """

    card: str
    concepts: tuple[str, ...]


@dataclass(frozen=True)
class _Row:
    """A concept and what is known of its increment. scale: of one that is in a checkpoint."""

    concept: str
    digest: str
    scale: float | None
    part: Increment | None


def card(
    files: Places,
    *,
    base_model: str | None = None,
    report: FilePath | None = None,
    attacks: Places = (),
    progress: Progress = SILENT,
) -> CardResult:
    """Make the model card of patches, or of a patched checkpoint.

    Args:
        files: Patches; or a patched checkpoint, and the patches in it, which say how they were
            made.
        base_model: Id of the base on the hub.
        report: Report of `evaluate`: its folder, or the report.json in it.
        attacks: Reports of `attack`: their folders, or the attack.json in each.
        progress: Receives progress and warnings.

    Returns:
        The card.

    Raises:
        UsageError: There is more than one checkpoint, or no file.
        RefusedError: The checkpoint is not patched.
        MalformedError: A file is damaged or hostile.
        UnsupportedError: A file is of a kind that is not supported.
        SystemFailure: A file cannot be read.
    """
    paths = [local(place, progress) for place in as_places(files)]
    kinds = [kind_of(path) for path in paths]
    patches = [read_patch_file(p) for p, kind in zip(paths, kinds, strict=True) if kind == "patch"]
    models = [path for path, kind in zip(paths, kinds, strict=True) if kind != "patch"]
    if len(models) > 1 or not paths:
        raise UsageError("name patches, or one checkpoint and its patches", found=len(models))
    parts = {part.digest: part for file in patches for part in file.patch.increments}
    if models:
        with open_checkpoint(models[0], progress) as checkpoint:
            record = check_patched(checkpoint)
        rows = [_Row(e.concept, e.digest, e.scale, parts.get(e.digest)) for e in record.entries]
        family, base = record.family, record.base
    else:
        rows = [_Row(part.concept, part.digest, None, part) for part in parts.values()]
        family, base = patches[0].patch.base.family, patches[0].patch.base.digest
    text = "\n".join(
        [
            _front(base_model, patched=bool(models)),
            *_erased(rows, patches),
            *_base_model(family, base, base_model),
            *_collateral(rows),
            *(_measured(read_report(as_path(report))) if report is not None else _not_measured()),
            *_attacked([read_attack_report(local(one, progress)) for one in as_places(attacks)]),
            *_commands(models, base_model),
            _LIMITS,
            *_layers(rows),
        ]
    )
    return CardResult(text, tuple(row.concept for row in rows))


def _attacked(reports: Sequence[AttackReport]) -> Iterator[str]:
    """How often attacks brought concepts back."""
    for report in reports:
        yield f"\n## Attacks on {_plain(report.concept)}\n"
        yield (
            "How often each attack of `sepme attack` had the patched model generate the concept "
            f"({_plain(report.budget)} budget; beside it the same attack on the original):\n"
        )
        yield "| attack | patched | 95% interval | of | original |"
        yield "|---|---|---|---|---|"
        for name, (patched, original) in report.attacks.items():
            low, high = map(percent, patched.interval)
            beside = percent(None if original is None else original.share)
            shares = f"{percent(patched.share)} | {low} to {high} | {patched.n} | {beside}"
            yield f"| {_plain(name)} | {shares} |"


def _front(base_model: str | None, *, patched: bool) -> str:
    """The front matter, as the hub's own library writes it."""
    # Takes a while, and no other operation needs it.
    from huggingface_hub import ModelCardData

    relation = "finetune" if patched else "adapter"
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=base_model,
        base_model_relation=None if base_model is None else relation,
        tags=["stable-diffusion", "concept-erasure", "sepme"],
    )
    return f"---\n{data.to_yaml()}\n---"


def _erased(rows: Sequence[_Row], patches: Sequence[PatchFile]) -> Iterator[str]:
    yield f"\n# Without {', '.join(_plain(row.concept) for row in rows)}\n"
    yield "| concept | method | rank | anchor | scale | increment (SHA-256) |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        method = row.part.method.name if row.part else "patch not given"
        rank = row.part.rank if row.part and row.part.kind != "mask" else "-"
        like = row.part.method.settings.get("like") if row.part else None
        scale = "-" if row.scale is None else f"{row.scale:g}"
        acts = _plain(str(like)) if like else "-"
        name = _plain(row.concept)
        yield f"| {name} | {method} | {rank} | {acts} | {scale} | `{row.digest}` |"
    if patches:
        yield "\nPatch files (SHA-256):\n"
        yield from (f"- `{file.digest}`" for file in patches)


def _base_model(family: FamilyName, base: str, base_model: str | None) -> Iterator[str]:
    yield "\n## Base model\n"
    named = f", {_plain(base_model)}" if base_model else ""
    title = FAMILIES[family].title
    yield f"{title[0].upper()}{title[1:]}{named}. Digest of its cross-attention weights: `{base}`."


def _collateral(rows: Sequence[_Row]) -> Iterator[str]:
    """What each increment changes in other captions, as it was measured when it was made."""
    known = [(row, found) for row in rows if row.part and (found := row.part.measured.collateral)]
    if not known:
        return
    yield "\n## Collateral\n"
    yield "The relative change of keys and values that each increment alone makes to captions that"
    yield "name no erased concept, and the words that change most:\n"
    yield "| concept | median | 95th percentile | captions | words |"
    yield "|---|---|---|---|---|"
    for row, found in known:
        words = ", ".join(
            f"{_plain(word)} {percent(far)}"
            for word, far in sorted(found.worst.items(), key=lambda pair: -pair[1])
        )
        shares = f"{percent(found.median)} | {percent(found.p95)} | {found.captions}"
        yield f"| {_plain(row.concept)} | {shares} | {words} |"


def _not_measured() -> Iterator[str]:
    yield "\n## Measurements\n"
    yield "Not measured yet: `sepme evaluate` measures, and `--report` puts the results here."


def _measured(report: ReportFigures) -> Iterator[str]:
    yield "\n## Measurements\n"
    yield "How often a judge recognises a concept in images for prompts that name it:\n"
    yield "| concept | role | before | after | 95% interval | images |"
    yield "|---|---|---|---|---|---|"
    for name, (role, found) in report.concepts.items():
        low, high = (percent(end) for end in found.interval or (None, None))
        before, after = percent(found.before), percent(found.after)
        shares = f"{before} | {after} | {low} to {high} | {found.n}"
        yield f"| {_plain(name)} | {_plain(role)} | {shares} |"
    identical = "gives" if report.restored_identical else "does NOT give"
    yield f"\nRestoring all concepts {identical} the original weights and images exactly."


def _commands(models: Sequence[Path], base_model: str | None) -> Iterator[str]:
    base = base_model or "ORIGINAL"
    yield "\n## How to verify and revert it\n"
    yield "With sepme:\n"
    if models:
        yield f"    sepme verify MODEL PATCH --base {base}"
        ending = SUFFIX if models[0].suffix.lower() == SUFFIX else ".safetensors"
        yield f"    sepme revert MODEL PATCH --base {base} -o back{ending}\n"
    else:
        yield f"    sepme verify PATCH --model {base}"
        yield f"    sepme apply {base} PATCH -o clean.safetensors"
        yield f"    sepme revert clean.safetensors PATCH --base {base} -o back.safetensors\n"


def _layers(rows: Sequence[_Row]) -> Iterator[str]:
    """Of increments that change layers: that nothing is promised of other prompts."""
    if layered := [_plain(row.concept) for row in rows if row.part and row.part.layers]:
        yield f"- {', '.join(layered)}: layers are changed that read more than the text of a"
        yield "  prompt, and no prompt is sure to give the images that it gave before."


def _plain(text: str) -> str:
    """Text that Markdown and HTML take for text, in one line."""
    one_line = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"([\\`*_{}\[\]<>|#&~])", r"\\\1", one_line)

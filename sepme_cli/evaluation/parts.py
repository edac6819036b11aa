"""What each process that generates a part of the images leaves in the report's folder.

The process that makes the report looks there: images by another model, device or version have other
names, so that they would be passed over and generated again, without a word.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from sepme_cli.checkpoints.disk.failures import reading, writing
from sepme_cli.checkpoints.disk.files import write_file
from sepme_cli.errors import MalformedError, RefusedError, UsageError
from sepme_cli.evaluation.gallery import Batch, Gallery
from sepme_cli.shards import Shard

PARTS = "shards"


@dataclass(frozen=True)
class Plan:
    """All images of an evaluation. names: a digest of theirs. facts: what decides them."""

    names: str
    facts: Mapping[str, str]

    @classmethod
    def of(
        cls, gallery: Gallery, batches: Sequence[Batch], facts: Sequence[tuple[str, str]]
    ) -> "Plan":
        """facts: see `facts_of`; a model's file may have another name elsewhere."""
        kept = [gallery.path(b.state, question).name for b in batches for question in b.kept]
        decisive = {name: value for name, value in facts if name != "model"}
        return cls(sha256("\n".join(kept).encode()).hexdigest(), decisive)


def record_path(folder: Path, shard: Shard) -> Path:
    """Of a report's folder; the folder for it is made."""
    with writing(folder / PARTS):
        (folder / PARTS).mkdir(exist_ok=True)
    return folder / PARTS / f"{shard.number}-of-{shard.count}.json"


def record(path: Path, shard: Shard, plan: Plan) -> None:
    """Say that a part is done. The caller is the only writer of `path`."""
    told = {"shard": str(shard), "images": plan.names, "facts": dict(plan.facts)}
    write_file(path, f"{json.dumps(told, indent=2)}\n".encode(), force=True)


def check_parts(folders: Sequence[Path], plan: Plan, *, force: bool) -> list[str]:
    """Warnings of parts that are not done.

    force: parts of another evaluation do not matter. Raises RefusedError for one otherwise, and
    MalformedError for what is no record.
    """
    done: dict[int, set[int]] = {}
    for folder in folders:
        for path in sorted((folder / PARTS).glob("*-of-*.json")):
            shard, told = _read(path)
            if told.names == plan.names:
                done.setdefault(shard.count, set()).add(shard.number)
            elif not force:
                raise _other(path, shard, told, plan)
    return [
        f"not done: shards {', '.join(map(str, sorted(left)))} of {count}; what is missing of "
        "their images is generated now"
        for count, numbers in done.items()
        if (left := set(range(1, count + 1)) - numbers)
    ]


def _read(path: Path) -> tuple[Shard, Plan]:
    with reading(path):
        text = path.read_bytes()
    try:
        told = json.loads(text)
        facts = {str(name): str(value) for name, value in told["facts"].items()}
        return Shard.parse(told["shard"]), Plan(str(told["images"]), facts)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UsageError) as error:
        raise MalformedError(
            f"{path}: not the record of a shard", file=path, expected="what evaluate --shard writes"
        ) from error


def _other(path: Path, shard: Shard, told: Plan, plan: Plan) -> RefusedError:
    differ = [
        name
        for name in dict.fromkeys([*plan.facts, *told.facts])
        if plan.facts.get(name) != told.facts.get(name)
    ]
    ours, theirs = (
        "; ".join(f"{name}: {facts.get(name, 'none')}" for name in differ) or "other concepts"
        for facts in (plan.facts, told.facts)
    )
    return RefusedError(
        f"{path}: shard {shard} is of another evaluation, whose images cannot be used here; give "
        "the same options on the same kind of device, or --force to generate what is missing",
        file=path,
        expected=ours,
        found=theirs,
    )

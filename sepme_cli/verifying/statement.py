"""Whether a statement is true of a checkpoint."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.checkpoints.reading.patches import PatchFile
from sepme_cli.progress import Progress
from sepme_cli.signing.statement import Statement, digests, read_statement
from sepme_cli.verifying.patch import Check


def statement_checks(
    path: Path, checkpoint: Checkpoint, patches: Sequence[PatchFile], progress: Progress
) -> Iterator[Check]:
    """Its subject's digests against the files, and what it says is in them against their record.

    patches: each must be one that the statement names. Raises what reading the statement does.
    """
    statement = read_statement(path)
    yield _subject(path, statement, digests(checkpoint.path, progress), checkpoint)
    same = statement.record == checkpoint.stack
    names = ", ".join(entry.concept for entry in statement.record.entries)
    told = f"{names}, on base {statement.record.base}"
    detail = told if same else f"{told}: the checkpoint's own record says otherwise"
    yield Check(f"{path}: record", same, detail)
    for file in patches:
        named = file.digest in statement.record.patches
        detail = f"digest {file.digest}" if named else f"names no patch of digest {file.digest}"
        yield Check(f"{path}: {file.name}", named, detail)


def _subject(
    path: Path, statement: Statement, found: dict[str, str], checkpoint: Checkpoint
) -> Check:
    said = dict(statement.subject)
    if checkpoint.folder is None and len(said) == 1:
        said = dict.fromkeys(found, *said.values())  # a file that was renamed is the same file
    wrong = [f"{name} is not there" for name in said.keys() - found.keys()]
    wrong += [f"{name} is in there too" for name in found.keys() - said.keys()]
    wrong += [
        f"{name} is another" for name in said.keys() & found.keys() if said[name] != found[name]
    ]
    detail = "; ".join(sorted(wrong)[:3]) or f"{len(found)} files, SHA-256"
    return Check(f"{path}: subject", not wrong, detail)

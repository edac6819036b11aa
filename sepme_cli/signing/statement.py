"""What a patched checkpoint is and how it came to be, in a file of its own that can be signed.

An in-toto Statement, version 1: its subject is every file of the checkpoint by its SHA-256, its
predicate the stack record, as SPEC.md has it. It is canonical JSON, so that equal statements are
equal bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from patch_spec.canonical import canonical_json, parse_json_strict
from patch_spec.errors import FormatError
from patch_spec.records import Fields, as_object, as_text
from patch_spec.stack import StackRecord
from sepme_cli.checkpoints.disk.failures import reading
from sepme_cli.checkpoints.disk.files import COPY_BYTES, check_writable, resolved
from sepme_cli.checkpoints.disk.output import write_output
from sepme_cli.checkpoints.structure.folders import model_files
from sepme_cli.errors import MalformedError, UnsupportedError, UsageError
from sepme_cli.progress import SILENT, Progress

TYPE = "https://in-toto.io/Statement/v1"
"""What in-toto's specification says that `_type` must be; nothing is looked up there."""
PREDICATE_TYPE = "urn:sepme:composition:v1"
"""A name and no address: the project owns no host that it could lie on."""

_BYTES = 16 * 2**20
_SUBJECTS = 65536


@dataclass(frozen=True)
class Statement:
    """subject: file name to SHA-256; within a folder, with slashes. record: what is in it."""

    subject: Mapping[str, str]
    record: StackRecord = field(repr=False)

    def to_bytes(self) -> bytes:
        """The statement's canonical JSON; FormatError J6 for a file name that is no text."""
        return canonical_json(
            {
                "_type": TYPE,
                "subject": [
                    {"name": name, "digest": {"sha256": digest}}
                    for name, digest in sorted(self.subject.items())
                ],
                "predicateType": PREDICATE_TYPE,
                "predicate": parse_json_strict(self.record.to_metadata().encode()),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> "Statement":
        """A statement from its canonical JSON; FormatError J1 to J9, S1 and S2."""
        names = ("_type", "subject", "predicateType", "predicate")
        fields = Fields(parse_json_strict(data), names, "statement")
        fields.choice("_type", (TYPE,))
        fields.choice("predicateType", (PREDICATE_TYPE,))
        subject = {}
        for entry in fields.sequence("subject", _SUBJECTS, least=1):
            one = Fields(entry, ("name", "digest"), "statement.subject")
            digest = Fields(one.members["digest"], ("sha256",), "statement.subject.digest")
            subject[as_text(one.members["name"], one.place("name"))] = digest.digest("sha256")
        predicate = as_object(fields.members["predicate"], "statement.predicate")
        record = StackRecord.from_metadata(canonical_json(predicate).decode())
        statement = cls(subject, record)
        if statement.to_bytes() != data:
            raise FormatError(
                "J2", "a statement must be canonical JSON, each file once and in order"
            )
        return statement


def is_statement(path: Path) -> bool:
    """Whether a file begins as a statement does, and no patch or checkpoint can."""
    with reading(path), path.open("rb") as file:
        return file.read(2) == b'{"'


def read_statement(path: Path) -> Statement:
    """Raises MalformedError for what is no statement, SystemFailure if it cannot be read."""
    with reading(path):
        with path.open("rb") as file:
            data = file.read(_BYTES + 1)
        if len(data) > _BYTES:
            raise MalformedError(
                f"{path} is too large", file=path, expected=f"{_BYTES} bytes", found="more"
            )
        return Statement.from_bytes(data)


def check_statement(path: Path, model: Path | None, *, force: bool) -> None:
    """Whether a statement about `model`, which is about to be written, can be written to `path`.

    Raises UsageError where there is no such file, and where the statement would be part of it;
    SystemFailure where it cannot be written, as far as can be told.
    """
    if model is None:
        raise UsageError("--statement is about a file that is written: give -o FILE or --in-place")
    ours, theirs = resolved(path), resolved(model)
    if ours == theirs or theirs in ours.parents:
        raise UsageError(
            "a statement cannot be part of what it is about",
            expected=f"a file outside {model}",
            found=path,
        )
    check_writable(path, 0, force=force)


def write_statement(
    path: Path, model: Path, record: StackRecord, *, force: bool, progress: Progress = SILENT
) -> None:
    """Say of the checkpoint `model`, as it is on the disk now, that it has this record.

    Raises SystemFailure, and UnsupportedError for a file name that is not UTF-8.
    """
    statement = Statement(digests(model, progress), record)
    try:
        data = statement.to_bytes()
    except FormatError as error:
        raise UnsupportedError(f"{model}: {error}", file=model) from error
    write_output(path, data, force=force, progress=progress)


def digests(model: Path, progress: Progress = SILENT) -> dict[str, str]:
    """Name to SHA-256 of a checkpoint's file, or of every file in its folder but sepme's own."""
    with reading(model):
        files = {place: path for path, place in model_files(model)} if model.is_dir() else {}
        files = files or {model.name: model}
        total = sum(path.stat().st_size for path in files.values())
    progress.stage("hashing", total // COPY_BYTES)
    return {place: _digest(path, progress) for place, path in files.items()}


def _digest(path: Path, progress: Progress) -> str:
    digest = sha256()
    with reading(path), path.open("rb") as file:
        while chunk := file.read(COPY_BYTES):
            digest.update(chunk)
            if len(chunk) == COPY_BYTES:
                progress.advance()
    return digest.hexdigest()

"""apply writes a statement, and verify finds whatever is not as it says."""

import shutil
from pathlib import Path

import pytest

from sepme_cli.errors import SystemFailure, UsageError
from sepme_cli.operations.apply import apply
from sepme_cli.operations.revert import revert
from sepme_cli.operations.verify import VerifyResult, verify
from sepme_cli.signing.statement import read_statement
from tests.keys import by_hand, line, make_key
from tests.layouts import write_layout
from tests.synthetic import make_checkpoint, make_patches

STATEMENT = "clean.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model.safetensors")


@pytest.fixture
def patches(model: Path) -> list[Path]:
    return make_patches(model.parent, model, ["Monet", "Klimt"])


def failed(result: VerifyResult) -> list[str]:
    assert result.ok == all(check.ok for check in result.checks)
    return [check.name.partition(": ")[2] or check.name for check in result.checks if not check.ok]


@pytest.mark.parametrize("layout", ["single file", "folder", "shards", "variants", "UNet folder"])
def test_every_layout_is_stated_and_verified(
    layout: str, patches: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "layout"
    folder.mkdir()
    source, statement = write_layout(layout, folder), tmp_path / STATEMENT
    clean = folder / f"clean{source.suffix}"
    said = apply(source, patches, clean, scale=0.5, statement=statement)
    assert said.statement == str(statement)
    result = verify([clean, *patches], base=source, statement=statement)
    assert failed(result) == []
    assert result.unchecked == ()
    written = read_statement(statement)
    assert {entry.scale for entry in written.record.entries} == {0.5}
    files = [path for path in clean.rglob("*") if path.is_file()] or [clean]
    assert len(written.subject) == len(files)


def test_equal_runs_give_equal_statements(model: Path, patches: list[Path], tmp_path: Path) -> None:
    made = []
    for name, order in (("a", patches), ("b", patches[::-1])):
        (tmp_path / name).mkdir()
        apply(
            model, order, tmp_path / name / "clean.safetensors", statement=tmp_path / f"{name}.json"
        )
        made.append((tmp_path / f"{name}.json").read_bytes())
    assert made[0] == made[1]
    assert str(tmp_path).encode() not in made[0]


def test_a_checkpoint_that_was_renamed_is_the_same(
    model: Path, patches: list[Path], tmp_path: Path
) -> None:
    statement, clean = tmp_path / STATEMENT, tmp_path / "clean.safetensors"
    apply(model, patches, clean, statement=statement)
    assert failed(verify([clean.rename(tmp_path / "other.safetensors")], statement=statement)) == []


def test_in_place_and_what_comes_after(model: Path, patches: list[Path], tmp_path: Path) -> None:
    statement = tmp_path / STATEMENT
    apply(model, patches[:1], in_place=True, statement=statement)
    assert failed(verify([model], statement=statement)) == []
    apply(model, patches[1:], in_place=True)
    assert failed(verify([model], statement=statement)) == ["subject", "record"]
    with pytest.raises(SystemFailure, match="--force"):
        revert(model, patches[1:], in_place=True)
        apply(model, patches[1:], in_place=True, statement=statement)
    assert failed(verify([model], statement=statement)) == []
    revert(model, in_place=True)
    assert failed(verify([model], statement=statement)) == ["subject", "record"]


def test_what_a_statement_does_not_name(model: Path, patches: list[Path], tmp_path: Path) -> None:
    statement, clean = tmp_path / STATEMENT, tmp_path / "clean.safetensors"
    apply(model, patches[:1], clean, statement=statement)
    result = verify([clean, *patches], base=model, statement=statement)
    assert failed(result) == [str(patches[1]), "applied"]
    other = tmp_path / "other.safetensors"
    apply(model, patches[1:], other)
    assert failed(verify([other], statement=statement)) == ["subject", "record"]


CHANGES = {
    "a file more": lambda folder: (folder / "unet" / "extra.bin").write_bytes(b"x"),
    "a file less": lambda folder: (folder / "README.md").unlink(),
    "a file renamed": lambda folder: (folder / "README.md").rename(folder / "READ.md"),
    "a configuration changed": lambda folder: (folder / "vae" / "config.json").write_text("[]"),
    "one file in another's place": lambda folder: shutil.copy(
        folder / "unet" / "config.json", folder / "vae" / "config.json"
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_file_of_a_folder_counts(change: str, patches: list[Path], tmp_path: Path) -> None:
    source, statement = write_layout("folder", tmp_path), tmp_path / STATEMENT
    apply(source, patches, tmp_path / "clean", statement=statement)
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "clean", copy)
    assert failed(verify([copy], statement=statement)) == []
    CHANGES[change](copy)
    # What lies there and cannot be looked into may be a copy without the patches.
    also = ["other copies"] if change == "a file more" else []
    assert failed(verify([copy], statement=statement)) == ["subject", *also]


def test_a_signed_statement_is_a_signature_of_its_checkpoint(
    patches: list[Path], tmp_path: Path
) -> None:
    source, statement, clean = (
        write_layout("shards", tmp_path),
        tmp_path / STATEMENT,
        tmp_path / "c",
    )
    apply(source, patches, clean, statement=statement)
    key, signers = make_key(tmp_path / "key"), tmp_path / "signers"
    signers.write_text(line("alice", key))
    assert failed(verify([clean], allowed_signers=signers)) == ["signature"]
    assert failed(verify([clean], statement=statement, allowed_signers=signers)) == ["signature"]
    by_hand(statement, key)
    assert failed(verify([clean], statement=statement, allowed_signers=signers)) == []
    # Another program's signature, that happens to lie beside a folder, is none of ours.
    clean.with_name("c.sig").write_text("{}")
    assert failed(verify([clean], statement=statement, allowed_signers=signers)) == []
    assert verify([clean], statement=statement).unchecked[0].startswith(str(statement))
    # It speaks for the checkpoint, and for no patch.
    everything = verify([clean, *patches], statement=statement, allowed_signers=signers)
    assert failed(everything) == ["signature", "signature"]
    (clean / "README.md").write_text("other\n")
    assert failed(verify([clean], statement=statement, allowed_signers=signers)) == ["subject"]


def test_a_stale_signature_of_the_checkpoint_itself_still_fails(
    model: Path, patches: list[Path], tmp_path: Path
) -> None:
    key, signers = make_key(tmp_path / "key"), tmp_path / "signers"
    signers.write_text(line("alice", key))
    by_hand(model, key)
    statement = tmp_path / STATEMENT
    apply(model, patches, in_place=True, statement=statement)
    by_hand(statement, key)
    asked = {"statement": statement, "allowed_signers": signers}
    assert failed(verify([model], **asked)) == ["signature"]
    (tmp_path / "model.safetensors.sig").unlink()
    assert failed(verify([model], **asked)) == []


def test_what_makes_no_sense(model: Path, patches: list[Path], tmp_path: Path) -> None:
    statement, clean = tmp_path / STATEMENT, tmp_path / "clean.safetensors"
    with pytest.raises(UsageError):
        apply(model, patches, check=True, statement=statement)
    with (tmp_path / "stream").open("wb") as stream, pytest.raises(UsageError):
        apply(model, patches, stream, statement=statement)
    with pytest.raises(UsageError, match="part of"):
        apply(model, patches, in_place=True, statement=model, force=True)
    with pytest.raises(UsageError, match="part of"):
        apply(model, patches, clean, statement=clean, force=True)
    folder = write_layout("folder", tmp_path)
    with pytest.raises(UsageError, match="part of"):
        apply(folder, patches, tmp_path / "out", statement=tmp_path / "out" / "s.json")
    with pytest.raises(SystemFailure):
        apply(model, patches, clean, statement=tmp_path / "missing" / "s.json")
    statement.write_text("mine")
    with pytest.raises(SystemFailure, match="--force"):
        apply(model, patches, clean, statement=statement)
    assert not clean.exists() and not (tmp_path / "out").exists()
    assert statement.read_text() == "mine"
    apply(model, patches, clean, statement=statement, force=True)
    assert failed(verify([clean], statement=statement)) == []

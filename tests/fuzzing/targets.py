"""The readers that are given mutants: bytes to None, and only typed errors may come out.

What is accepted must be right: it is written again as the same bytes, another library reads it
alike, and what lies beside it is as it was. An AssertionError says that it was not.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import ClassVar

import gguf
import safetensors

from patch_spec.base import Base
from patch_spec.container import patch_bytes, read_manifest, read_patch
from patch_spec.header import PREFIX_BYTES, encode_header, parse_header, read_header
from patch_spec.stack import StackRecord
from patch_spec.undo import UndoRecord
from sepme_cli.checkpoints.journals.undo import open_undo
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.checkpoints.structure.headers import RECORD, with_record
from sepme_cli.erasure.settings import Settings
from sepme_cli.operations.inspect import inspect
from sepme_cli.operations.revert import revert
from sepme_cli.recipe import SETTINGS, TEMPLATE, parse_recipe
from tests.fuzzing import corpus
from tests.fuzzing.mutants import (
    Mutator,
    mutate_bytes,
    mutate_json,
    mutate_pickle,
    mutate_tensors,
    mutate_yaml,
)


class Target:
    """One kind of file. folder: the only one that reading may touch. examples: valid files."""

    name: ClassVar[str]
    mutate: ClassVar[Mutator] = staticmethod(mutate_tensors)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.examples: Sequence[bytes] = self.made()

    def made(self) -> Sequence[bytes]:
        raise NotImplementedError

    def mutant(self, rng: Random) -> bytes:
        """An example with one to three things changed."""
        return _changed(rng, rng.choice(self.examples), type(self).mutate, self.examples)

    def check(self, data: bytes) -> None:
        """Read a mutant. Raises a typed error, or AssertionError for what should be refused."""
        raise NotImplementedError


class Patches(Target):
    """`.sepme` files: container, manifest, factors, digests."""

    name = "patch"

    def made(self) -> Sequence[bytes]:
        return [*corpus.valid_vectors("*.sepme") * 8, *corpus.polyglots()]

    def check(self, data: bytes) -> None:
        patch = read_patch(data)
        assert patch_bytes(patch) == data, "a patch has one file"
        assert read_manifest(data) == patch.manifest
        assert read_patch(io.BytesIO(data)) == patch


class Headers(Target):
    """The strict header parser alone, beside safetensors' own reader."""

    name = "header"

    def made(self) -> Sequence[bytes]:
        return corpus.valid_vectors("*.safetensors")

    def check(self, data: bytes) -> None:
        header = read_header(io.BytesIO(data), len(data))
        again = encode_header(header.metadata, header.tensors)
        parsed = parse_header(again[:PREFIX_BYTES], again[PREFIX_BYTES:], None)
        assert (parsed.metadata, parsed.tensors) == (header.metadata, header.tensors)
        start = header.data_start
        ours = {e.name: (e.shape, data[start + e.begin : start + e.end]) for e in header.tensors}
        theirs = {
            n: (tuple(v["shape"]), bytes(v["data"])) for n, v in safetensors.deserialize(data)
        }
        assert ours == theirs, "safetensors reads something else"


class Checkpoints(Target):
    """Checkpoints in one safetensors file: `inspect`, then every value that a patch is made of."""

    name = "checkpoint"

    def made(self) -> Sequence[bytes]:
        folder = self.folder / "examples"
        folder.mkdir()
        return [*corpus.checkpoints(folder), *corpus.polyglots()]

    def check(self, data: bytes) -> None:
        path = self.folder / "m.safetensors"
        path.write_bytes(data)
        inspect(path)
        check_readable(path)
        assert path.read_bytes() == data


class Loras(Checkpoints):
    """What other programs call a LoRA."""

    name = "lora"

    def made(self) -> Sequence[bytes]:
        folder = self.folder / "examples"
        folder.mkdir()
        return corpus.loras(folder)


class Folders(Target):
    """A model's folder, one file of it changed: the first byte says which."""

    name = "folder"
    places: ClassVar[tuple[tuple[str, Mutator], ...]] = (
        ("unet/diffusion_pytorch_model.safetensors.index.json", mutate_json),
        ("unet/diffusion_pytorch_model-00001-of-00002.safetensors", mutate_tensors),
        ("model_index.json", mutate_json),
        ("unet/config.json", mutate_json),
        ("text_encoder/config.json", mutate_json),
        ("text_encoder/model.safetensors", mutate_tensors),
    )

    def made(self) -> Sequence[bytes]:
        self.model = corpus.model_folder(self.folder)
        self.good = [(self.model / name).read_bytes() for name, _ in self.places]
        return [bytes([number]) + data for number, data in enumerate(self.good)]

    def mutant(self, rng: Random) -> bytes:
        number = rng.choice((0, 0, 0, 1, 2, 3, 4, 5))
        data = _changed(rng, self.good[number], self.places[number][1], self.good)
        return bytes([number]) + data

    def check(self, data: bytes) -> None:
        number = data[0] % len(self.places) if data else 0
        path = self.model / self.places[number][0]
        path.write_bytes(data[1:])
        try:
            inspect(self.model)
            check_readable(self.model)
        finally:
            path.write_bytes(self.good[number])


class Recipes(Target):
    """YAML that people write."""

    name = "recipe"
    mutate = staticmethod(mutate_yaml)
    _MORE = b"""version: 1
concepts:
  - {name: "Van Gogh", kind: style, aliases: [Vincent], prompts: ["a {c} sky"], like: "object:pond"}
  - cat
protect: [style:noto, cat-face]
method: sepme
settings: {lr: 1e-4, rank: 8, steps: 10, dtype: fp16, threshold: .5}
"""

    def made(self) -> Sequence[bytes]:
        return [TEMPLATE.encode(), self._MORE]

    def check(self, data: bytes) -> None:
        recipe = parse_recipe(data, Path("recipe.yaml"), SETTINGS)
        assert len(recipe.digest) == 64 and recipe.concepts
        Settings.of(recipe.hyperparameters)


class Records(Target):
    """Stack and undo records: the texts in a header's metadata."""

    name = "record"
    mutate = staticmethod(mutate_json)

    def made(self) -> Sequence[bytes]:
        headers = [read_header(io.BytesIO(d), None) for d in corpus.valid_vectors("*.safetensors")]
        texts = [text for header in headers for text in header.metadata.values() if text[:1] == "{"]
        return [text.encode() for text in texts]

    def check(self, data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        kind = UndoRecord if "sepme-undo" in text else StackRecord
        assert kind.from_metadata(text).to_metadata() == text


class Undo(Target):
    """An undo journal beside a patched checkpoint, and putting the checkpoint back by it."""

    name = "undo"

    def made(self) -> Sequence[bytes]:
        self.model, self.journal = corpus.patched(self.folder)
        self.before = self.model.read_bytes()
        self.base = _data((self.folder / "base.safetensors").read_bytes())
        return [self.journal.read_bytes(), *corpus.valid_vectors("journal.safetensors")]

    def check(self, data: bytes) -> None:
        self.journal.write_bytes(data)
        output = self.folder / "out.safetensors"
        output.unlink(missing_ok=True)
        try:
            with open_undo(self.journal):
                pass
            revert(self.model, output=output, undo=self.journal)
            assert _data(output.read_bytes()) == self.base, "what is exact is the base"
        except Exception:
            assert not output.exists(), "what is refused writes nothing"
            raise
        finally:
            assert self.model.read_bytes() == self.before


class Pending(Target):
    """A journal of an interrupted write, which the next command acts on."""

    name = "pending"

    def made(self) -> Sequence[bytes]:
        self.model, self.journal = corpus.interrupted(self.folder)
        self.before, good = self.model.read_bytes(), self.journal.read_bytes()
        self.decoy = self.folder / "other.safetensors"
        self.decoy.write_bytes(self.before)
        self.files = (self.model, self.decoy)
        (self.folder / "link.safetensors").symlink_to(self.decoy)
        names = ("other.safetensors", "link.safetensors", "./m.safetensors", "m.safetensors/../x")
        return [good, *(corpus.renamed(good, f'["{name}"]') for name in names)]

    def check(self, data: bytes) -> None:
        self.journal.write_bytes(data)
        try:
            with open_checkpoint(self.model):
                pass
        except Exception:
            assert self.model.read_bytes() == self.before, "what is refused writes nothing"
            raise
        finally:
            self.journal.unlink(missing_ok=True)
            written = [path for path in self.files if path.read_bytes() != self.before]
            for path in written:
                path.write_bytes(self.before)
            assert self.decoy not in written, "another file was written"


class Pickles(Target):
    """Files that torch has saved, read by torch's weights-only loader."""

    name = "pickle"
    mutate = staticmethod(mutate_pickle)

    def made(self) -> Sequence[bytes]:
        return corpus.pickles()

    def check(self, data: bytes) -> None:
        path = self.folder / "m.ckpt"
        path.write_bytes(data)
        with open_checkpoint(path) as checkpoint:
            checkpoint.base(text_encoders=True)
            for file in checkpoint.files:
                for entry in file.header.tensors:
                    assert len(file.read_range(entry.begin, entry.end, entry.name)) == entry.nbytes


class Ggufs(Target):
    """GGUF files, beside the format's own reader."""

    name = "gguf"
    mutate = staticmethod(mutate_bytes)

    def made(self) -> Sequence[bytes]:
        return corpus.ggufs(self.folder / "example.gguf")

    def check(self, data: bytes) -> None:
        path = self.folder / "m.gguf"
        path.write_bytes(data)
        check_readable(path)
        with open_checkpoint(path) as checkpoint:
            file = checkpoint.files[0]
            header, first = file.header, file.header_bytes
        assert data.startswith(first)
        assert with_record(header, first, None) == first or RECORD in header.metadata
        ours = {
            entry.name: data[header.data_start + entry.begin : header.data_start + entry.end]
            for entry in header.tensors
        }
        try:
            theirs = {one.name: bytes(one.data) for one in gguf.GGUFReader(path).tensors}
        except Exception:
            return  # it reads less than we do, and nothing else
        assert ours == theirs, "the library reads something else"


class Tokenizers(Target):
    """The files of a folder's tokenizer, one of them changed: the first byte says which."""

    name = "tokenizer"

    def made(self) -> Sequence[bytes]:
        self.good = corpus.tokenizer_files()
        self.names = list(self.good)
        for name, data in self.good.items():
            (self.folder / name).write_bytes(data)
        return [bytes([n]) + data for n, data in enumerate(self.good.values())]

    def mutant(self, rng: Random) -> bytes:
        number = rng.randrange(len(self.names))
        mutate = mutate_json if self.names[number].endswith("json") else mutate_bytes
        data = _changed(rng, self.good[self.names[number]], mutate, [b"a b\n"])
        return bytes([number]) + data

    def check(self, data: bytes) -> None:
        from sepme_cli.diffusion.tokenizer import _of_folder, tokenize

        name = self.names[data[0] % len(self.names) if data else 0]
        (self.folder / name).write_bytes(data[1:])
        _of_folder.cache_clear()
        try:
            ids = tokenize(["ab", "a b", "\u00e9 \U0001f600"], 77, folder=self.folder)
            assert ids.shape == (3, 77)
        finally:
            (self.folder / name).write_bytes(self.good[name])


TARGETS: dict[str, Callable[[Path], Target]] = {
    target.name: target
    for target in (
        Patches, Headers, Checkpoints, Loras, Folders, Recipes,
        Records, Undo, Pending, Pickles, Ggufs, Tokenizers,
    )
}  # fmt: skip


def check_readable(path: Path) -> None:
    """Read all that a patch made from a checkpoint says of it, which must be sayable."""
    with open_checkpoint(path) as checkpoint:
        base = checkpoint.base(text_encoders=True)
    assert Base.from_json(base.to_json()) == base


def _changed(rng: Random, data: bytes, mutate: Mutator, others: Sequence[bytes]) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        try:
            data = mutate(rng, data, others)
        except RecursionError:  # it nests too deep already to be taken apart
            break
    return data


def _data(file: bytes) -> bytes:
    return file[PREFIX_BYTES + int.from_bytes(file[:PREFIX_BYTES], "little") :]

"""One checkpoint that operations are done to, and what there must be of it at any time."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np

from patch_spec.increment import Increment
from sepme_cli.checkpoints.journals.undo import undo_path
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.checkpoints.reading.patches import kept_folder
from tests.layouts import SAFE, write_layout
from tests.soak import oracle
from tests.synthetic import (
    Shape,
    additive,
    base_of,
    make_checkpoint,
    make_patch,
    operator,
    raw_tensors,
    read_raw,
)

Place = tuple[str, str]
"""A file's name within the checkpoint ("" for the only one), and a tensor's in it."""
Raw = dict[Place, tuple[str, bytes]]

FEW = Shape(channels=(8, 16), attention=(False, True))
LAYOUTS = ("few tensors", *SAFE)


@dataclass(frozen=True)
class Copy:
    """A tensor that patches change. target: what patches call it."""

    target: str
    dtype: str
    shape: tuple[int, int]
    scale: float | None


@dataclass(frozen=True)
class Known:
    """A patch that the operations use."""

    path: Path
    digest: str
    parts: tuple[Increment, ...]


@dataclass(frozen=True)
class State:
    """What must be there: increments by digest with their scales, and the bytes of the copies.

    exact: the bytes are those that composing from the base gives. journal: an undo journal of
    this base lies beside. kept: the digests of the patches that do.
    """

    inside: Mapping[str, float]
    tensors: Mapping[Place, bytes] = field(repr=False)
    exact: bool = True
    journal: bool = False
    kept: frozenset[str] = frozenset()


@dataclass(frozen=True)
class World:
    """The files. base: never written to, digest: its own; work: what is written to. stranger: a
    patch of another family."""

    folder: Path
    base: Path
    work: Path
    patches: Mapping[str, Known]
    stranger: Path
    copies: Mapping[Place, Copy] = field(repr=False)
    raw: Raw = field(repr=False)
    metadata: Mapping[str, Mapping[str, str]] = field(repr=False)
    digest: str
    _deltas: dict[tuple[str, Place], np.ndarray | None] = field(default_factory=dict, repr=False)

    @classmethod
    def make(cls, folder: Path, layout: str, dtype: str = "F16") -> "World":
        """A checkpoint in one of LAYOUTS, and patches for it."""
        (folder / "base").mkdir()
        base = _write(layout, folder / "base", dtype)
        work = folder / "work" / base.name
        work.parent.mkdir()
        world = cls(
            folder,
            base,
            work,
            {known.path.stem: known for known in _patches(folder, base)},
            _stranger(folder),
            _copies(base),
            raw(base),
            metadata(base),
            base_of(base, text_encoders=False).digest,
        )
        world.start_over()
        return world

    @property
    def parts(self) -> dict[str, Increment]:
        """All increments there are, by digest."""
        return {part.digest: part for known in self.patches.values() for part in known.parts}

    @property
    def untouched(self) -> State:
        """What there is before anything was done."""
        return State({}, {place: self.raw[place][1] for place in self.copies})

    def start_over(self) -> State:
        """Put the base where the work is, with nothing beside it."""
        shutil.rmtree(self.work.parent)
        self.work.parent.mkdir()
        copy = shutil.copy if self.base.is_file() else shutil.copytree
        copy(self.base, self.work)
        return self.untouched

    def composed(self, inside: Mapping[str, float]) -> dict[Place, bytes]:
        """The copies with these increments added to the base."""
        return self._added(self.untouched.tensors, inside, self._delta)

    def added(
        self, tensors: Mapping[Place, bytes], terms: Mapping[str, float]
    ) -> dict[Place, bytes]:
        """Copies with increments added to what they hold now."""

        def delta(digest: str, place: Place, weight: np.ndarray) -> np.ndarray | None:
            return oracle.delta(self.parts[digest], self.copies[place].target, weight)

        return self._added(tensors, terms, delta)

    def values(self, place: Place, data: bytes) -> np.ndarray:
        """What the bytes of a copy stand for."""
        copy = self.copies[place]
        return oracle.loaded(data, copy.dtype, copy.shape, copy.scale or 1.0)

    def holding(self, known: Iterable[Known], inside: Iterable[str]) -> frozenset[str]:
        """The digests of the patches that hold one of the increments."""
        wanted = set(inside)
        return frozenset(
            patch.digest for patch in known if wanted & {part.digest for part in patch.parts}
        )

    def of(self, digests: Iterable[str]) -> list[Known]:
        """The patches with these digests."""
        return [known for known in self.patches.values() if known.digest in set(digests)]

    def tensors(self, path: Path) -> dict[Place, bytes]:
        """What a checkpoint of this shape holds of the copies."""
        found = raw(path)
        return {place: found[place][1] for place in self.copies}

    def journals(self) -> list[Path]:
        """Where the undo journals of the work are, if there are any."""
        places = sorted({place for place, _ in self.copies})
        return [undo_path(self.work / place if place else self.work) for place in places]

    def check(self, state: State) -> None:
        """Whether all that is in the folder is what the state says, to the last bit."""
        found = raw(self.work)
        assert list(found) == list(self.raw), "tensors came, went or moved"
        for place, (dtype, data) in self.raw.items():
            wanted = state.tensors.get(place, data)
            assert found[place] == (dtype, wanted), f"{place} is not what it must be"
        for place, theirs in metadata(self.work).items():
            self._check_metadata(place, dict(theirs), state)
        if not state.inside and state.exact:
            assert files(self.work) == files(self.base), "with nothing in it, it is the base"
        self._check_beside(state)

    def _check_metadata(self, place: str, found: dict[str, str], state: State) -> None:
        expected = dict(self.metadata[place])
        holds = any(where == place for where, _ in self.copies)
        if holds and (state.inside or not state.exact):
            expected.pop("modelspec.hash_sha256", None)
        if holds and state.inside:
            record = json.loads(found.pop("sepme"))
            entries = {entry["digest"]: entry for entry in record["increments"]}
            assert list(entries) == sorted(state.inside)
            for digest, entry in entries.items():
                assert entry["scale"] == state.inside[digest]
                assert entry["concept"] == self.parts[digest].concept
            sources = self.of(record["patches"])
            assert {part.digest for known in sources for part in known.parts} >= entries.keys()
            assert record["base"] == self.digest
        assert found == expected, (found, expected)

    def _check_beside(self, state: State) -> None:
        assert {path.stem for path in kept_folder(self.work).glob("*")} == state.kept
        assert all(path.exists() == state.journal for path in self.journals())
        names = [path.name for path in self.work.parent.rglob("*")]
        assert not [n for n in names if n.endswith(("-tmp", "-lock", "-pending"))]

    def _delta(self, digest: str, place: Place, weight: np.ndarray) -> np.ndarray | None:
        if (digest, place) not in self._deltas:
            part = self.parts[digest]
            self._deltas[digest, place] = oracle.delta(part, self.copies[place].target, weight)
        return self._deltas[digest, place]

    def _added(self, tensors, terms, delta) -> dict[Place, bytes]:
        result = {}
        for place, data in tensors.items():
            weight = self.values(place, data)
            changes = [(one, scale, delta(one, place, weight)) for one, scale in terms.items()]
            total = oracle.compose(weight, changes)
            copy = self.copies[place]
            result[place] = (
                data if total is weight else oracle.stored(total, copy.dtype, copy.scale)
            )
        return result


def files(path: Path) -> dict[str, bytes]:
    """A checkpoint's files, but for what in-place commands keep beside them."""
    if path.is_file():
        return {"": path.read_bytes()}
    found = (file for file in sorted(path.rglob("*")) if file.is_file())
    named = {str(file.relative_to(path)): file for file in found}
    return {name: file.read_bytes() for name, file in named.items() if ".sepme-" not in name}


def weights(path: Path) -> dict[str, Path]:
    """The files of a checkpoint that hold tensors."""
    if path.is_file():
        return {"": path}
    return {str(f.relative_to(path)): f for f in sorted(path.rglob("*.safetensors"))}


def raw(path: Path) -> Raw:
    """Every tensor's dtype and bytes, by no code of ours."""
    return {
        (place, name): value
        for place, file in weights(path).items()
        for name, value in raw_tensors(file).items()
    }


def metadata(path: Path) -> dict[str, dict[str, str]]:
    """The files' metadata."""
    return {p: read_raw(file)[0].get("__metadata__", {}) for p, file in weights(path).items()}


def _write(layout: str, folder: Path, dtype: str) -> Path:
    if layout != "few tensors":
        return write_layout(layout, folder, dtype=dtype)
    stale = {"title": "m", "modelspec.hash_sha256": "stale"}
    return make_checkpoint(folder / "m.safetensors", FEW, dtype=dtype, ema="F32", metadata=stale)


def _copies(base: Path) -> dict[Place, Copy]:
    """Which tensors are which targets: of the code under test, which `test_families` looks at."""
    with open_checkpoint(base) as checkpoint:
        return {
            (stored.file.place, stored.name): Copy(
                target.name,
                stored.dtype,
                target.shape,
                None if stored.scale is None else float(np.asarray(stored.scales()).item()),
            )
            for target in checkpoint.targets
            for stored in target.copies
        }


def _patches(folder: Path, model: Path) -> Iterable[Known]:
    """Both kinds; two in one; one that leaves targets alone; one increment in two patches."""
    base = base_of(model)
    monet = additive(base, "Monet", seed=1, size=0.1)
    some = {name: shape for name, shape in base.shapes.items() if "mid" in name or "up" in name}
    targets = {name: base.targets[name] for name in some}
    less = type(base)(base.family, base.width, base.text_encoders, targets, some)
    made: Mapping[str, Sequence[Increment]] = {
        "monet": [monet],
        "gogh": [operator(base, "Van Gogh", seed=2)],
        "pair": [additive(base, "Klimt", seed=3, size=0.1), operator(base, "Dali", seed=4)],
        "part": [additive(less, "castle", seed=5, size=0.1)],
        "again": [monet, additive(base, "Manet", seed=6, size=0.1)],
    }
    for name, parts in made.items():
        path = make_patch(folder / f"{name}.sepme", base, *parts)
        yield Known(path, sha256(path.read_bytes()).hexdigest(), tuple(parts))


def _stranger(folder: Path) -> Path:
    other = make_checkpoint(folder / "sd2.safetensors", Shape("sd2"))
    base = base_of(other)
    return make_patch(folder / "stranger.sepme", base, additive(base, "Monet", seed=7))

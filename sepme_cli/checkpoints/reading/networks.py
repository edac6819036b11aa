"""The networks in a checkpoint: for each, its tensors by their names in it, whatever the layout."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from patch_spec.streams import stream_of
from sepme_cli.checkpoints.reading.opening import open_weights
from sepme_cli.checkpoints.reading.tensors import Stored, WeightsFile, stored_in
from sepme_cli.checkpoints.structure.families import Family, TextEncoderSpec
from sepme_cli.checkpoints.structure.folders import ModelFolder, WeightsSet, weights_sets
from sepme_cli.checkpoints.structure.layout import Layout, Naming
from sepme_cli.errors import MalformedError

_VAES: Mapping[str, Naming] = {"first_stage_model.": "ldm", "vae.": "diffusers"}
"""What a VAE's names begin with in one file, of a checkpoint and of a pipeline of diffusers'."""
_IN_LDM = ("encoder.down.", "decoder.up.")
"""What some of a VAE's names begin with where they are CompVis', whatever stands before them."""


@dataclass(frozen=True)
class Network:
    """One network of a checkpoint.

    name: "denoiser", "vae", or a text encoder's ("clip_l", "clip_h", "t5xxl"). naming: whose names
    its tensors have. tensors: by name, without what the file puts before all of them. config: what
    the folder's config.json says, None in a single file. unused_layers: see
    `families.TextEncoderSpec`. tokenizer: the folder with its tokenizer's files, if there is one.
    """

    name: str
    naming: Naming
    tensors: Mapping[str, Stored] = field(repr=False)
    config: Mapping[str, Any] | None = field(default=None, repr=False)
    unused_layers: int = 0
    tokenizer: Path | None = None

    @property
    def projected(self) -> int | None:
        """How wide the pooled output of a text encoder is; None of one without a projection."""
        fused, plain = (self.tensors.get(f"text_projection{end}") for end in ("", ".weight"))
        if fused is not None and len(fused.shape) == 2:
            return fused.shape[1]
        return plain.shape[0] if plain is not None and len(plain.shape) == 2 else None

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The tensors' shapes."""
        return {name: stored.shape for name, stored in self.tensors.items()}


def open_set(
    one: WeightsSet, folder: ModelFolder, stack: ExitStack
) -> tuple[tuple[WeightsFile, ...], dict[str, Stored]]:
    """The files of a network's weights and all their tensors.

    stack: closes them. Raises MalformedError where an index does not say what the shards hold.
    """
    files = []
    tensors: dict[str, Stored] = {}
    for path in one.shards:
        file = open_weights(path, folder.place(path))
        stack.callback(file.close)
        files.append(file)
        for name, stored in stored_in(file).items():
            if name in tensors or (one.index is not None and one.index.get(name) != path.name):
                raise MalformedError(
                    f"{path} holds {name}, which the index lists in another shard",
                    file=path,
                    expected=None if one.index is None else one.index.get(name, "nowhere"),
                    found=path.name,
                )
            tensors[name] = stored
    if one.index is not None and (missing := one.index.keys() - tensors.keys()):
        raise MalformedError(
            f"{one.shards[0].parent}: no shard holds {min(missing)}, which is in the index",
            file=one.shards[0].parent,
        )
    return tuple(files), tensors


@dataclass(frozen=True)
class Networks:
    """Finds a checkpoint's networks, opening those of a folder when they are asked for.

    denoiser: its tensors by their names in the file. further: the same of its other variants in a
    folder.
    """

    family: Family
    layout: Layout
    denoiser: Mapping[str, Stored] = field(repr=False)
    folder: ModelFolder | None
    stack: ExitStack = field(repr=False, compare=False)
    opened: dict[str, tuple[WeightsFile, ...]] = field(default_factory=dict, repr=False)
    further: Sequence[Mapping[str, Stored]] = field(default=(), repr=False)

    def lend(self, networks: Iterable[Network]) -> None:
        """Have networks of other files stand for those of the checkpoint."""
        self._found.update({network.name: network for network in networks})

    def find(self, name: str) -> Network | None:
        """The network of that name; None where the checkpoint does not have it."""
        if name not in self._found:
            self._found[name] = self._find(name)
        return self._found[name]

    def files(self, name: str) -> tuple[WeightsFile, ...]:
        """The files that a network is in, of every variant; none where it is not here."""
        if self.find(name) is None:
            return ()
        every = (stored.file for one in self.variants(name) for stored in one.values())
        return tuple({file.place: file for file in every}.values())

    def variants(self, name: str) -> Sequence[Mapping[str, Stored]]:
        """The tensors of a network that is here, and those of its other variants in a folder; by
        their names in the file, and of the denoiser with all that is beside them there."""
        if name not in self._variants:
            network = self.find(name)
            assert network is not None
            own = {stored.name: stored for stored in network.tensors.values()}
            of_denoiser = [self.denoiser, *self.further]
            found = of_denoiser if name == "denoiser" else [own, *self._further(network)]
            self._variants[name] = found
        return self._variants[name]

    def _further(self, network: Network) -> Sequence[Mapping[str, Stored]]:
        place = self._place(network.name)
        inner = self.folder.network(place) if self.folder is not None and place else None
        # Of a lent network the folder's own copies are none.
        if self.folder is None or inner is None or network.name not in self.opened:
            return ()
        return [open_set(one, self.folder, self.stack)[1] for one in weights_sets(inner)[1:]]

    @cached_property
    def _variants(self) -> dict[str, Sequence[Mapping[str, Stored]]]:
        return {}

    @cached_property
    def _found(self) -> dict[str, Network | None]:
        return {}

    def columns(self, target: str, columns: int) -> int | None:
        """How many of a target's columns read its stream; None where that cannot be said."""
        if stream_of(target) != "pooled" or not self.family.sizes:
            return columns
        config = (self.folder.config("denoiser") if self.folder else None) or {}
        size = config.get("addition_time_embed_dim")
        # Of a folder the text encoder is another file, which nobody may need.
        network = None if self.folder else self.find(self.family.text_encoders[-1].name)
        pooled = None if network is None or size is not None else network.projected
        if pooled is not None and pooled < columns:
            return pooled
        return self.family.columns(target, columns, size if isinstance(size, int) else None)

    def _find(self, name: str) -> Network | None:
        if name == "denoiser":
            config = self.folder.config(name) if self.folder else None
            return Network(
                name, self.layout.naming, _under(self.layout.prefix, self.denoiser), config
            )
        if self.folder is not None:
            return self._in_folder(name, self.folder)
        outer = self.layout.outer or ""
        if name == "vae":
            for prefix, naming in _VAES.items():
                if inner := _under(outer + prefix, self.denoiser):
                    ldm = any(n.startswith(_IN_LDM) for n in inner)
                    return Network(name, "ldm" if ldm else naming, inner)
            return None
        spec = next((one for one in self.family.text_encoders if one.name == name), None)
        return None if spec is None else text_encoder_in(self.denoiser, spec, outer)

    def _place(self, name: str) -> str | None:
        """What a folder calls a network's own."""
        folders = {spec.name: spec.folder for spec in self.family.text_encoders}
        return "vae" if name == "vae" else folders.get(name)

    def _in_folder(self, name: str, folder: ModelFolder) -> Network | None:
        place = self._place(name)
        inner = folder.network(place) if place else None
        sets = weights_sets(inner) if inner is not None else ()
        if place is None or not sets:
            return None
        self.opened[name], tensors = open_set(sets[0], folder, self.stack)
        tokenizer = folder.network(place.replace("text_encoder", "tokenizer"))
        config = folder.config(place)
        return Network(name, self._naming(name), tensors, config, tokenizer=tokenizer)

    def _naming(self, name: str) -> Naming:
        """Whose names a folder's network has."""
        spec = next((one for one in self.family.text_encoders if one.name == name), None)
        if spec is None:
            return "diffusers"
        return "t5" if spec.naming == "t5" else "transformers"


def text_encoder_in(
    tensors: Mapping[str, Stored], spec: TextEncoderSpec, outer: str = ""
) -> Network | None:
    """A text encoder in a file that holds other networks too; None where it is not there.

    outer: what stands before all names of the model.
    """
    if found := _under(outer + spec.prefix, tensors):
        return Network(spec.name, spec.naming, found, unused_layers=spec.unused_layers)
    found = _under(f"{outer}{spec.folder}.", tensors)
    naming: Naming = "t5" if spec.naming == "t5" else "transformers"
    return Network(spec.name, naming, found) if found else None


def _under(prefix: str, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    return {
        name.removeprefix(prefix): stored
        for name, stored in tensors.items()
        if name.startswith(prefix)
    }

"""The layers of a checkpoint that a patch may change beside its targets (SPEC.md, "Layers").

They are looked for network by network, when a patch asks for one: a patch without layers opens no
text encoder.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from patch_spec import limits
from patch_spec.streams import network_of
from sepme_cli.checkpoints.reading.networks import Network, Networks
from sepme_cli.checkpoints.reading.targets import Target, check_weight, copies_of
from sepme_cli.checkpoints.reading.tensors import WeightsFile
from sepme_cli.checkpoints.reading.text_encoders import transformers_name, used_layers
from sepme_cli.checkpoints.structure.headers import RECORD
from sepme_cli.checkpoints.structure.layers import Part, denoisers_layers, stacked
from sepme_cli.errors import MalformedError

_FUSED = ".self_attn.weight"
"""How `transformers_name` ends for queries, keys and values in one."""


@dataclass(frozen=True)
class Layers:
    """Finds them. record: the stack record of the denoiser's files, which theirs must have too."""

    path: Path
    networks: Networks = field(repr=False)
    record: str | None = field(default=None, repr=False)

    def find(self, name: str) -> Target | None:
        """A layer by its name in patches; None where the checkpoint does not have it.

        Raises UnsupportedError for one that is quantised, MalformedError for copies that do not
        belong together.
        """
        if name not in self._found:
            place = self.places(network_of(name) or "").get(name)
            self._found[name] = None if place is None else self._target(name, *place)
        return self._found[name]

    def places(self, network: str) -> Mapping[str, tuple[str, Part]]:
        """The layers of a network ("denoiser", "clip_l"): the tensor that each is in, by the name
        that the network's own tensors have, and where. Empty if the network is not in here."""
        if network not in self._places:
            found = self.networks.find(network)
            places = () if found is None else self._in_network(found)
            self._places[network] = {name: (tensor, part) for name, tensor, part in places}
        return self._places[network]

    def _in_network(self, network: Network) -> Iterator[tuple[str, str, Part]]:
        if network.name == "denoiser":
            layout = self.networks.layout
            yield from denoisers_layers(network.shapes, self.networks.family, layout)
            return
        if network.naming == "t5":
            return
        named = {
            ours: theirs
            for theirs in network.tensors
            if (ours := transformers_name(network.naming, theirs))
        }
        for ours in used_layers(named, network.unused_layers):
            shape = network.shapes[named[ours]]
            names = [ours]
            if ours.endswith(_FUSED) and len(shape) == 2 and shape[0] % 3 == 0:
                names = [ours.replace(_FUSED, f".self_attn.{x}_proj.weight") for x in "qkv"]
            if len(shape) == 2:
                counts = [shape[0] // len(names)] * len(names)
                for name, part in zip(names, stacked(shape, counts), strict=True):
                    if network_of(f"{network.name}.{name}") == network.name:
                        yield f"{network.name}.{name}", named[ours], part

    def _target(self, name: str, tensor: str, part: Part) -> Target:
        network = network_of(name) or ""
        outer = self.networks.layout.outer or ""
        variants = self.networks.variants(network)
        found = self.networks.find(network)
        assert found is not None  # it has the layer
        full = found.tensors[tensor].name
        copies = tuple(
            replace(copy, part=part) for copy in copies_of(variants, full, outer, self.path)
        )
        for copy in copies:
            check_weight(copy, copies[0].shape, self.path, limits.LAYER_SIDE)
            self._check_record(copy.file)
        out, width = copies[0].shape
        return Target(name, (out, width), copies)

    def _check_record(self, file: WeightsFile) -> None:
        """MalformedError for a file that is of another model, or of the same patched otherwise."""
        if file.header.metadata.get(RECORD) not in (None, self.record):
            raise MalformedError(
                f"{file.path} and the denoiser of {self.path} are files of one model, but do not "
                "have the same patches in them",
                file=file.path,
                expected="one stack record in all of a model's files",
                found="different records",
            )

    @cached_property
    def _found(self) -> dict[str, Target | None]:
        return {}

    @cached_property
    def _places(self) -> dict[str, Mapping[str, tuple[str, Part]]]:
        return {}

"""Where a file has the layers that a patch may change beside its targets, by names and shapes.

A patch names layers as diffusers does, and those of text encoders as transformers (SPEC.md,
"Layers"). A single file names them as the model's authors do, and holds several of some in one
tensor.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from patch_spec.streams import network_of
from sepme_cli.checkpoints.structure.families import Family
from sepme_cli.checkpoints.structure.layout import Layout
from sepme_cli.checkpoints.structure.transformer_names import (
    Module,
    authors_modules,
    in_diffusers,
)

Array = npt.NDArray[Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """The matrix that is meant within a tensor.

    rows: which, from and up to; None for all. columns: how many of the first ones; None for all.
    exchanged: whether the file has the halves of the rows the other way round. kernel: whether the
    tensor is the kernel of a convolution [out, in, 1, 1], which is a matrix as well.
    """

    rows: tuple[int, int] | None = None
    columns: int | None = None
    exchanged: bool = False
    kernel: bool = False

    def shape(self, whole: Shape) -> Shape:
        """The shape of what is meant; whole: that of the tensor."""
        if self == WHOLE:
            return whole
        rows = whole[0] if self.rows is None else self.rows[1] - self.rows[0]
        return rows, whole[1] if self.columns is None else self.columns

    def of(self, whole: Array) -> Array:
        """Of a tensor, or of a column of its rows, what is meant."""
        found = self.rows_of(whole)
        return found if self.columns is None else found[:, : self.columns]

    def rows_of(self, whole: Array) -> Array:
        """The same with all columns."""
        found = whole.reshape(len(whole), -1) if self.kernel else whole
        if self.rows is not None:
            found = found[slice(*self.rows)]
        return np.concatenate(np.split(found, 2)[::-1]) if self.exchanged else found

    def put(self, meant: Array, whole: Array) -> None:
        """Overwrite what is meant within a tensor, which is one piece of memory."""
        inside = whole.reshape(len(whole), -1) if self.kernel else whole
        if self.rows is not None:
            inside = inside[slice(*self.rows)]
        halves = np.concatenate(np.split(meant, 2)[::-1]) if self.exchanged else meant
        inside[:, : self.columns] = halves


WHOLE = Part()
"""All of a tensor, which need not be a matrix."""


def denoisers_layers(
    shapes: Mapping[str, Shape], family: Family, layout: Layout
) -> Iterator[tuple[str, str, Part]]:
    """Every layer of a denoiser: what a patch calls it, the tensor that it is in, and where.

    shapes: of the denoiser's tensors, by their names without what the file puts before them.
    """
    weights = {n: s for n, s in shapes.items() if n.endswith(".weight") and _is_matrix(s)}
    if layout.naming == "original":
        for name, module in in_diffusers(family.name, weights):
            if module.exchanged and weights[name][0] % 2:
                continue
            places = stacked(weights[name], module.rows(weights[name][0]))
            for ours, part in zip(module.ours, places, strict=True):
                if network_of(f"{ours}.weight") == "denoiser":
                    exchanged = Part(part.rows, exchanged=module.exchanged, kernel=part.kernel)
                    yield f"{ours}.weight", name, exchanged
        return
    for name, shape in weights.items():
        own = name if layout.naming == "diffusers" else _of_ldm(name, layout)
        if own is not None and network_of(own) == "denoiser":
            yield own, name, Part(kernel=len(shape) == 4)


def stacked(shape: Shape, counts: list[int]) -> list[Part]:
    """The parts of a matrix that is several, one above the other. counts: of their rows."""
    if len(counts) == 1:
        return [Part(kernel=len(shape) == 4)]
    return [Part(rows) for rows in pairwise(accumulate(counts, initial=0))]


def authors_layers(layers: Iterable[str], family: Family, span: int) -> dict[str, Module]:
    """What single files call the modules of a denoiser's layers, to what diffusers calls them.

    layers: as patches name them; those of which a file's module has more are left out. span: L of
    the UNet, see `Layout`.
    """
    modules = [layer.removesuffix(".weight") for layer in layers]
    if family.denoiser == "transformer":
        return authors_modules(family.name, modules)
    found = ((_to_ldm(module, span), module) for module in modules)
    return {theirs: Module((module,), exchanged=False) for theirs, module in found if theirs}


def _is_matrix(shape: Shape) -> bool:
    return len(shape) == 2 or (len(shape) == 4 and shape[2:] == (1, 1))


_LDM_MODULES: Mapping[str, str] = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_LDM_RESNET: Mapping[str, str] = {
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_BLOCK = re.compile(
    r"(?:(?P<side>down|up)_blocks\.(?P<level>\d{1,4})|mid_block)"
    r"\.(?P<kind>attentions|resnets)\.(?P<index>\d{1,4})\.(?P<rest>.+)"
)
_LDM_BLOCK = re.compile(
    r"(?:(?P<side>input|output)_blocks\.(?P<block>\d{1,4})|middle_block)\.(?P<place>\d)\.(?P<rest>.+)"
)


def _of_ldm(name: str, layout: Layout) -> str | None:
    """What diffusers calls a tensor of a UNet in CompVis' names; None for what is no layer."""
    module = name.removesuffix(".weight")
    if module in _LDM_MODULES:
        return f"{_LDM_MODULES[module]}.weight"
    found = _LDM_BLOCK.fullmatch(module)
    # Block 0 is the input convolution; 01, or digits of another script, would give two names.
    if found is None or (found["side"], found["block"]) == ("input", "0"):
        return None
    if (block := found["block"]) and block != str(int(block)):
        return None
    place, rest = int(found["place"]), found["rest"]
    if rest in _LDM_RESNET and place in ((0, 2) if found["side"] is None else (0,)):
        resnet = layout.block(found["side"], found["block"], "resnets", place // 2)
        return f"{resnet}.{_LDM_RESNET[rest]}.weight"
    if place == 1 and rest.startswith(("transformer_blocks.", "proj_")):
        return f"{layout.block(found['side'], found['block'], 'attentions')}.{rest}.weight"
    return None


def _to_ldm(module: str, span: int) -> str | None:
    """The other way round, of modules."""
    whole = {ours: theirs for theirs, ours in _LDM_MODULES.items()}
    if module in whole:
        return whole[module]
    found = _BLOCK.fullmatch(module)
    if found is None:
        return None
    resnets = {ours: theirs for theirs, ours in _LDM_RESNET.items()}
    of_resnet, index = found["kind"] == "resnets", int(found["index"])
    rest = resnets.get(found["rest"]) if of_resnet else found["rest"]
    if rest is None:
        return None
    if found["side"] is None:
        return f"middle_block.{2 * index if of_resnet else 1}.{rest}"
    number = int(found["level"]) * span + index
    block = f"output_blocks.{number}" if found["side"] == "up" else f"input_blocks.{number + 1}"
    return f"{block}.{0 if of_resnet else 1}.{rest}"

"""The targets of a checkpoint: which tensors they are, and their fingerprints."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import numpy.typing as npt

from patch_spec import limits
from patch_spec.base import Base
from patch_spec.digest import tensor_fingerprint
from patch_spec.errors import FormatError
from patch_spec.streams import Stream, stream_of
from sepme_cli.checkpoints.reading.tensors import Stored
from sepme_cli.checkpoints.structure.dtypes import NAMES, readable
from sepme_cli.checkpoints.structure.families import Family
from sepme_cli.checkpoints.structure.gguf import QUANTISED
from sepme_cli.checkpoints.structure.layers import Part
from sepme_cli.checkpoints.structure.layout import Layout, ema_twin
from sepme_cli.errors import MalformedError, UnsupportedError
from sepme_cli.prefetch import ahead


@dataclass(frozen=True)
class Target:
    """A weight that patches change: a target of the format, or a layer.

    name: as patches have it. shape: [out, d], d the width of the stream that it reads. copies:
    the weight itself, then its EMA twin if the checkpoint has one, then those of other variants in
    a folder; a patch changes each from its own values.
    """

    name: str
    shape: tuple[int, int]
    copies: tuple[Stored, ...]

    def read(self) -> npt.NDArray[Any]:
        """The weight [out, d]; see `Stored.read`."""
        return self.copies[0].read()


def find_targets(
    variants: Sequence[Mapping[str, Stored]],
    layout: Layout,
    path: str | PathLike[str],
    columns: Callable[[str, int], int | None],
) -> tuple[Target, ...]:
    """The targets of a checkpoint, sorted by name, at least one, all of a stream of one width.

    variants: the UNet's tensors by their names, and those of its other copies in a folder. path:
    the file that errors name. columns: how many of a target's columns read its stream, given its
    name and how many it has; None for what is no target after all. Raises UnsupportedError for a
    cross-attention that is none that sepme knows, or is not there whole, MalformedError for shapes
    that contradict each other.
    """
    found = []
    for tensor in variants[0]:
        if name := layout.target(tensor):
            copies = tuple(copies_of(variants, tensor, layout.outer or "", path))
            for copy in copies:
                check_weight(copy, copies[0].shape, path)
            wide = copies[0].shape[1]
            width = columns(name, wide)
            if width is not None and width < wide:
                copies = tuple(replace(copy, part=Part(columns=width)) for copy in copies)
            if width is not None:
                found.append(Target(name, (copies[0].shape[0], width), copies))
    widths = {target.shape[1] for target in found if stream_of(target.name) == "tokens"}
    if len(widths) != 1 or len(found) > limits.TARGETS or max(widths) > limits.WIDTH:
        raise UnsupportedError(
            f"{path}: what reads the text is not what sepme knows",
            file=path,
            expected=f"1 to {limits.TARGETS} targets of one width up to {limits.WIDTH}",
            found=f"{len(found)} of widths {sorted(widths)}",
        )
    with about(path):
        layout.check_reached(variants[0])
    return tuple(sorted(found, key=lambda target: target.name))


def widths_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[Stream, int]:
    """How wide the streams are that targets with these shapes read."""
    found = ((stream_of(name), shape[1]) for name, shape in shapes.items())
    return {stream: width for stream, width in found if stream is not None}


@contextmanager
def about(path: str | PathLike[str]) -> Iterator[None]:
    """Has the UnsupportedError of what looks at names and shapes alone name the file."""
    try:
        yield
    except UnsupportedError as error:
        raise UnsupportedError(
            f"{path}: {error.message}", file=path, expected=error.expected, found=error.found
        ) from error


def fingerprint(target: Target, values: npt.NDArray[Any], path: str | PathLike[str]) -> str:
    """The fingerprint of a target's weight; MalformedError, named, if it is not finite."""
    try:
        return tensor_fingerprint(values)
    except FormatError as error:
        raise MalformedError(
            f"{path}: the values of {target.copies[0].name} are not all finite in fp16",
            file=path,
            expected=error.expected,
            found="NaN, infinity or a larger value",
        ) from error


def base_of(
    family: Family,
    targets: Sequence[Target],
    read: Callable[[Target], npt.NDArray[Any]],
    path: str | PathLike[str],
    text_encoders: Mapping[str, str],
) -> Base:
    """What a patch made from a checkpoint with these targets says of it."""

    def maker(target: Target) -> Callable[[], str]:
        return lambda: fingerprint(target, read(target), path)

    found = ahead(map(maker, targets))
    widths = widths_of({target.name: target.shape for target in targets})
    return Base(
        family=family.name,
        width=widths["tokens"],
        pooled=widths.get("pooled"),
        text_encoders=text_encoders,
        targets={target.name: digest for target, digest in zip(targets, found, strict=True)},
        shapes={target.name: target.shape for target in targets},
    )


def copies_of(
    variants: Sequence[Mapping[str, Stored]], tensor: str, outer: str, path: str | PathLike[str]
) -> Iterator[Stored]:
    """A tensor, its EMA twin if there is one, and the same tensor of other variants.

    Raises MalformedError for variants that do not have it.
    """
    yield variants[0][tensor]
    if twin := variants[0].get(ema_twin(tensor, outer)):
        yield twin
    for other in variants[1:]:
        if tensor not in other:
            raise MalformedError(
                f"{path}: the variants in this folder are not copies of one model: one lacks "
                f"{tensor}",
                file=path,
            )
        yield other[tensor]


def _quantised_by(stored: Stored) -> str | None:
    """What has quantised a weight, told by what it left beside it."""
    if stored.dtype in QUANTISED:
        return f"GGUF ({stored.dtype})"
    names = stored.file.header.by_name
    return next((by for end, by in _QUANTISERS.items() if f"{stored.name}{end}" in names), None)


_QUANTISERS = {
    ".quant_state.bitsandbytes__nf4": "bitsandbytes (NF4)",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes (FP4)",
    ".absmax": "bitsandbytes (4 bits)",
    ".SCB": "bitsandbytes (8 bits)",
}
"""What follows a weight's name in that of a tensor which they keep beside it."""


def check_weight(
    stored: Stored, shape: tuple[int, ...], path: str | PathLike[str], most: int = limits.OUT
) -> None:
    """Raises UnsupportedError for a weight that is quantised, MalformedError for one of another
    shape than its first copy's, or of no matrix's. most: rows that it may have."""
    if stored.dtype not in NAMES:
        by = _quantised_by(stored)
        raise UnsupportedError(
            f"{path}: {stored.name} is stored as {readable(stored.dtype)}"
            + (f", quantised by {by}: patch the model before it is quantised" if by else ""),
            file=path,
            expected="fp32, fp16, bf16 or fp8",
            found=by or readable(stored.dtype),
        )
    if len(stored.shape) != 2 or stored.shape != shape or 0 in shape or shape[0] > most:
        raise MalformedError(
            f"{path}: {stored.name} has a shape that such a weight cannot have",
            file=path,
            expected="[out, width], all copies alike",
            found=list(stored.shape),
        )

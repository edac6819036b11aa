"""The targets of a checkpoint: which tensors they are, and their fingerprints."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy.typing as npt

from patch_spec import limits
from patch_spec.base import Base
from patch_spec.digest import tensor_fingerprint
from patch_spec.errors import FormatError
from patch_spec.header import Header, TensorEntry
from sepme_cli.checkpoints.dtypes import NAMES, readable
from sepme_cli.checkpoints.families import Family
from sepme_cli.checkpoints.layout import Layout, ema_twin
from sepme_cli.errors import MalformedError, UnsupportedError

Reader = Callable[[TensorEntry], npt.NDArray[Any]]
"""Gives a tensor's values in the dtype it is stored in."""


@dataclass(frozen=True)
class Target:
    """A weight that patches change.

    name: in diffusers naming. shape: [out, d]. copies: the weight itself, then its EMA twin if
    the checkpoint has one; a patch changes each from its own values.
    """

    name: str
    shape: tuple[int, int]
    copies: tuple[TensorEntry, ...]


def find_targets(header: Header, layout: Layout, path: str | PathLike[str]) -> tuple[Target, ...]:
    """The targets in a file with this header, sorted by name, at least one, all of one width.

    path: the file that errors name. Raises UnsupportedError for fp8 and for a cross-attention
    that is none, MalformedError for shapes that contradict each other.
    """
    found = []
    for entry in header.tensors:
        if name := layout.target(entry.name):
            twin = header.by_name.get(ema_twin(entry.name))
            copies = (entry,) if twin is None else (entry, twin)
            for copy in copies:
                _check(copy, entry.shape, path)
            found.append(Target(name, (entry.shape[0], entry.shape[1]), copies))
    widths = {target.shape[1] for target in found}
    if len(widths) != 1 or len(found) > limits.TARGETS or max(widths) > limits.WIDTH:
        raise UnsupportedError(
            f"{path}: the cross-attention is not one that sepme knows",
            file=path,
            expected=f"1 to {limits.TARGETS} key and value projections of one width "
            f"up to {limits.WIDTH}",
            found=f"{len(found)} of widths {sorted(widths)}",
        )
    return tuple(sorted(found, key=lambda target: target.name))


def fingerprint(read: Reader, target: Target, path: str | PathLike[str]) -> str:
    """The fingerprint of a target's weight; MalformedError, named, if it is not finite."""
    try:
        return tensor_fingerprint(read(target.copies[0]))
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
    read: Reader,
    path: str | PathLike[str],
    text_encoders: Mapping[str, str],
) -> Base:
    """What a patch made from a file with these targets says of it."""
    return Base(
        family=family.name,
        width=targets[0].shape[1],
        text_encoders=text_encoders,
        targets={target.name: fingerprint(read, target, path) for target in targets},
        shapes={target.name: target.shape for target in targets},
    )


def _check(entry: TensorEntry, shape: tuple[int, ...], path: str | PathLike[str]) -> None:
    if entry.dtype not in NAMES:
        raise UnsupportedError(
            f"{path}: {entry.name} is stored as {readable(entry.dtype)}",
            file=path,
            expected="fp32, fp16 or bf16",
            found=readable(entry.dtype),
        )
    if len(entry.shape) != 2 or entry.shape != shape or 0 in shape or shape[0] > limits.OUT:
        raise MalformedError(
            f"{path}: {entry.name} has a shape that a key or value projection cannot have",
            file=path,
            expected="[out, width], both copies alike",
            found=list(entry.shape),
        )

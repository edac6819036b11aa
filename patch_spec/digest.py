"""Fingerprints of weights, and digests of increments, bases and patches: all are SHA-256."""

from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from patch_spec.canonical import canonical_json
from patch_spec.grid import to_half


class Identified(Protocol):
    """Something whose identity is a JSON value."""

    def identity(self) -> dict[str, Any]:
        """What two equal things have in common and unequal ones do not."""
        ...


def tensor_fingerprint(array: npt.NDArray[Any]) -> str:
    """SHA-256 of the values rounded to fp16, little-endian, in C order; any float dtype.

    fp32 and fp16 copies of one model so have one fingerprint. Raises FormatError F1 if a value
    is not finite in fp16; the caller knows the tensor's name.
    """
    return sha256(np.ascontiguousarray(to_half(array), "<f2").data).hexdigest()


def text_encoder_fingerprint(tensors: Mapping[str, str]) -> str:
    """The fingerprint of a text encoder from those of its tensors.

    tensors: name in the naming of SPEC.md, "Fingerprints", to `tensor_fingerprint`.
    """
    return sha256(canonical_json(dict(tensors))).hexdigest()


def increment_digest(increment: Identified) -> str:
    """The digest of an increment: of its factors and all the manifest says of it but its slug."""
    return _digest(increment)


def base_digest(base: Identified) -> str:
    """The digest of a base: of its targets alone; see SPEC.md."""
    return _digest(base)


def _digest(identified: Identified) -> str:
    return sha256(canonical_json(identified.identity())).hexdigest()

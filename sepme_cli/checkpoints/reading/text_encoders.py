"""The text encoders of a checkpoint, in one naming, and their fingerprints.

The naming is that of transformers' CLIP text model without `text_model.`, and of its T5 encoder.
Left out is what no keys or values can see and what some layouts therefore lack: position_ids, the
projection of the pooled output, the temperature, and layers behind the one that is read.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from os import PathLike
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from patch_spec.digest import tensor_fingerprint, text_encoder_fingerprint
from patch_spec.errors import FormatError
from sepme_cli.checkpoints.reading.networks import Network
from sepme_cli.checkpoints.reading.tensors import Stored, is_companion
from sepme_cli.checkpoints.structure.dtypes import NAMES, readable
from sepme_cli.checkpoints.structure.layout import Naming
from sepme_cli.errors import MalformedError, UnsupportedError
from sepme_cli.prefetch import ahead

Array = npt.NDArray[Any]
Value = TypeVar("Value")

_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")
_OPENCLIP_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_OPENCLIP_PARTS = {
    "attn.in_proj_": "self_attn.",
    "attn.out_proj.": "self_attn.out_proj.",
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
_OPENCLIP_NAMES = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_QKV = "self_attn."
_T5 = ("shared.", "encoder.")
_T5_SECOND_NAME = "encoder.embed_tokens.weight"


def text_encoder_fingerprints(
    networks: Iterable[Network], path: str | PathLike[str]
) -> dict[str, str]:
    """Stream to fingerprint, of text encoders.

    path: the file that errors name. Raises MalformedError for values that are not finite,
    UnsupportedError for a dtype that is none of numbers.
    """
    fingerprints = {}
    for network in networks:
        named = {
            name: stored
            for theirs, stored in network.tensors.items()
            if (name := transformers_name(network.naming, theirs))
        }
        used = used_layers(named, network.unused_layers)
        if used:
            parts = dict(_fingerprints(used, path))
            fingerprints[network.name] = text_encoder_fingerprint(parts)
    return fingerprints


def transformers_name(naming: Naming, name: str) -> str | None:
    """What transformers calls a text encoder's tensor; None for what has no part in keys.

    A fused `attn.in_proj_weight` is three tensors there, and called "….self_attn.weight" here.
    """
    if is_companion(name):
        return None
    if naming == "t5":
        # One table of tokens, by two names.
        return name if name.startswith(_T5) and name != _T5_SECOND_NAME else None
    if naming == "transformers":
        plain = name.removeprefix("text_model.")
        return (
            plain
            if plain.startswith(("embeddings.", "encoder.", "final_layer_norm."))
            and (not plain.endswith("position_ids"))
            else None
        )
    if found := _OPENCLIP_LAYER.fullmatch(name):
        for theirs, ours in _OPENCLIP_PARTS.items():
            if found[2].startswith(theirs):
                return f"encoder.layers.{found[1]}.{ours}{found[2].removeprefix(theirs)}"
    return _OPENCLIP_NAMES.get(name)


def used_layers(named: Mapping[str, Value], unused: int) -> dict[str, Value]:
    """Of a text encoder's tensors, in transformers' names, those that prompts pass through.

    unused: see `Network`.
    """

    def layer(name: str) -> int:
        found = _LAYER.match(name)
        return int(found[1]) if found else -1

    end = max(map(layer, named), default=-1) + 1 - unused
    return {name: value for name, value in named.items() if layer(name) < end}


def _fingerprints(named: dict[str, Stored], path: str | PathLike[str]) -> Iterator[tuple[str, str]]:
    makers = (partial(_fingerprinted, name, stored, path) for name, stored in named.items())
    return chain.from_iterable(ahead(makers))


def _fingerprinted(
    name: str, stored: Stored, path: str | PathLike[str]
) -> Sequence[tuple[str, str]]:
    check_numbers(stored)
    try:
        return [(part, tensor_fingerprint(value)) for part, value in unfused(name, stored)]
    except FormatError as error:
        raise MalformedError(
            f"{path}: the values of {stored.name} are not all finite in fp16", file=path
        ) from error


def check_numbers(stored: Stored) -> None:
    """UnsupportedError, with the file named, for a tensor in a dtype that sepme does not read."""
    if stored.dtype not in NAMES:
        raise UnsupportedError(
            f"{stored.file.path}: {stored.name} is stored as {readable(stored.dtype)}",
            file=stored.file.path,
            expected="fp32, fp16, bf16 or fp8",
            found=readable(stored.dtype),
        )


def unfused(name: str, stored: Stored) -> Iterator[tuple[str, Array]]:
    """A tensor as transformers has it: by a name of `transformers_name`, its parts by theirs.

    Raises MalformedError for a fused matrix whose rows are not of three parts.
    """
    owner, _, kind = name.rpartition(".")
    values = stored.read()
    if not owner.endswith(_QKV.rstrip(".")):
        yield name, values
        return
    if values.ndim == 0 or len(values) % 3:
        raise MalformedError(
            f"{stored.file.path}: {stored.name} is not a fused matrix of queries, keys and values",
            file=stored.file.path,
            expected="a number of rows that is a multiple of 3",
            found=list(values.shape),
        )
    for projection, part in zip("qkv", np.split(values, 3), strict=True):
        yield f"{owner}.{projection}_proj.{kind}", part

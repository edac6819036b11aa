"""Text encoders from elsewhere, for a UNet that comes without."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sepme_cli.checkpoints.disk.failures import reading
from sepme_cli.checkpoints.hub.cache import local
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.checkpoints.reading.gguf import SUFFIX
from sepme_cli.checkpoints.reading.networks import Network, open_set, text_encoder_in
from sepme_cli.checkpoints.reading.opening import open_weights
from sepme_cli.checkpoints.reading.tensors import Stored, stored_in
from sepme_cli.checkpoints.structure.folders import ModelFolder, weights_sets
from sepme_cli.checkpoints.structure.layout import Layout
from sepme_cli.errors import UnsupportedError
from sepme_cli.places import Place

_TOKENS = re.compile(
    r"(?P<place>(?:\w+\.)*?)"
    r"(?:(?:text_model\.)?embeddings\.|(?P<openclip>))token_embedding\.weight"
)
"""The table of tokens of a text encoder, in transformers' names or in OpenCLIP's, and what stands
before the names of that encoder."""

_T5_TOKENS = re.compile(r"(?P<place>(?:\w+\.)*?)(?:shared|encoder\.embed_tokens)\.weight")
"""The table of tokens of T5, and what stands before its names."""


def lend_text_encoders(checkpoint: Checkpoint, sources: Sequence[Place], stack: ExitStack) -> None:
    """Have text encoders from these sources stand for the checkpoint's own.

    sources: checkpoints in one file, model folders, text encoders' folders, or files with a text
    encoder in transformers' or OpenCLIP's names. stack: closes them.
    Raises UnsupportedError for a path without a text encoder of the family.
    """
    for source in sources:
        path = local(source)
        found = list(_text_encoders(checkpoint, path, stack))
        if not found:
            names = ", ".join(spec.name for spec in checkpoint.family.text_encoders)
            advice = ""
            if path.suffix.lower() == SUFFIX:
                advice = ", or it is under llama.cpp's names; name a safetensors file instead"
            raise UnsupportedError(
                f"{path} holds no text encoder of {checkpoint.family.title}{advice}",
                file=path,
                expected=names,
                found="none",
            )
        checkpoint.networks.lend(found)


def _text_encoders(checkpoint: Checkpoint, path: Path, stack: ExitStack) -> Iterator[Network]:
    with reading(path):
        is_folder = path.is_dir()
    if not is_folder:
        file = open_weights(path)
        stack.callback(file.close)
        yield from _in_file(checkpoint, stored_in(file), path)
        return
    folder = ModelFolder(path)
    inner = [(spec, path / spec.folder) for spec in checkpoint.family.text_encoders]
    places = [(spec, place) for spec, place in inner if place.is_dir()]
    if not places and (sets := weights_sets(path)):
        _, tensors = open_set(sets[0], folder, stack)
        yield from _alone(checkpoint, tensors, path, folder.config("denoiser"))
    for spec, place in places:
        if sets := weights_sets(place):
            _, tensors = open_set(sets[0], folder, stack)
            tokenizer = path / spec.folder.replace("text_encoder", "tokenizer")
            yield Network(
                spec.name,
                "t5" if spec.naming == "t5" else "transformers",
                tensors,
                ModelFolder(place).config("denoiser"),
                tokenizer=tokenizer if tokenizer.is_dir() else None,
            )


def _in_file(checkpoint: Checkpoint, tensors: dict[str, Stored], path: Path) -> Iterator[Network]:
    layout = Layout.of(tensors)
    outer = "" if layout is None else layout.outer or ""
    found = [
        network
        for spec in checkpoint.family.text_encoders
        if (network := text_encoder_in(tensors, spec, outer)) is not None
    ]
    # The text encoder of a whole checkpoint of another family is none of this one's.
    yield from found if found or layout is not None else _alone(checkpoint, tensors, path)


def _t5(
    checkpoint: Checkpoint, tensors: Mapping[str, Stored], config: Mapping[str, Any] | None
) -> Network | None:
    """T5 among tensors that no checkpoint's names stand before, where the family reads it."""
    spec = next((one for one in checkpoint.family.text_encoders if one.naming == "t5"), None)
    known = next((found for name in tensors if (found := _T5_TOKENS.fullmatch(name))), None)
    if spec is None or known is None:
        return None
    place = known["place"]
    own = {n.removeprefix(place): s for n, s in tensors.items() if n.startswith(place)}
    return Network(spec.name, "t5", own, config)


def _alone(
    checkpoint: Checkpoint,
    tensors: Mapping[str, Stored],
    path: Path,
    config: Mapping[str, Any] | None = None,
) -> Iterator[Network]:
    """Text encoders that no checkpoint's names stand before, told apart by how wide they are.

    The narrower of XL's two is CLIP-L. Both have a projection in the files of some programs.
    """
    if (t5 := _t5(checkpoint, tensors, config)) is not None:
        yield t5
    specs = [one for one in checkpoint.family.text_encoders if one.naming != "t5"]
    # Of Stable Diffusion 3's two, the pooled text is as wide as both together.
    filled = len(specs) < len(checkpoint.family.text_encoders)
    together = checkpoint.widths.get("pooled", 0) if filled else checkpoint.width
    taken: set[str] = set()
    for name, token in tensors.items():
        known = _TOKENS.fullmatch(name)
        if known is None or len(token.shape) != 2 or not specs:
            continue
        narrow = 2 * token.shape[1] < together
        spec = specs[0 if narrow else -1]
        if spec.name in taken:
            raise UnsupportedError(
                f"{path} holds several text encoders that could be {spec.name}; name a file with "
                "one",
                file=path,
                expected="one",
                found="several",
            )
        taken.add(spec.name)
        place = known["place"]
        own = {n.removeprefix(place): s for n, s in tensors.items() if n.startswith(place)}
        fused = known["openclip"] is not None
        yield Network(
            spec.name,
            "openclip" if fused else "transformers",
            own,
            config,
            unused_layers=spec.unused_layers if fused else 0,
        )

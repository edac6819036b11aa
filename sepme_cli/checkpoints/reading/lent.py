"""Text encoders from elsewhere, for a UNet that comes without."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from sepme_cli.checkpoints.disk.failures import reading
from sepme_cli.checkpoints.hub.cache import local
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.checkpoints.reading.networks import Network, open_set
from sepme_cli.checkpoints.reading.opening import open_weights
from sepme_cli.checkpoints.reading.tensors import Stored, stored_in
from sepme_cli.checkpoints.structure.families import Family
from sepme_cli.checkpoints.structure.folders import ModelFolder, weights_sets
from sepme_cli.errors import UnsupportedError
from sepme_cli.places import Place

_TOKENS = "embeddings.token_embedding.weight"


def lend_text_encoders(checkpoint: Checkpoint, sources: Sequence[Place], stack: ExitStack) -> None:
    """Have text encoders from these sources stand for the checkpoint's own.

    sources: checkpoints in one file, model folders, text encoders' folders, or files with a text
    encoder in transformers' names. stack: closes them.
    Raises UnsupportedError for a path without a text encoder of the family.
    """
    for source in sources:
        path = local(source)
        found = list(_text_encoders(checkpoint.family, path, stack))
        if not found:
            names = ", ".join(stream.name for stream in checkpoint.family.streams)
            raise UnsupportedError(
                f"{path} holds no text encoder of {checkpoint.family.title}",
                file=path,
                expected=names,
                found="none",
            )
        checkpoint.networks.lend(found)


def _text_encoders(family: Family, path: Path, stack: ExitStack) -> Iterator[Network]:
    with reading(path):
        is_folder = path.is_dir()
    if not is_folder:
        file = open_weights(path)
        stack.callback(file.close)
        yield from _in_file(family, stored_in(file))
        return
    folder = ModelFolder(path)
    inner = [(stream, path / stream.folder) for stream in family.streams]
    places = [(stream, place) for stream, place in inner if place.is_dir()]
    if not places and (sets := weights_sets(path)):
        _, tensors = open_set(sets[0], folder, stack)
        yield _alone(family, tensors, folder)
    for stream, place in places:
        if sets := weights_sets(place):
            _, tensors = open_set(sets[0], folder, stack)
            tokenizer = path / stream.folder.replace("text_encoder", "tokenizer")
            yield Network(
                stream.name,
                "transformers",
                tensors,
                ModelFolder(place).config("unet"),
                tokenizer=tokenizer if tokenizer.is_dir() else None,
            )


def _in_file(family: Family, tensors: dict[str, Stored]) -> Iterator[Network]:
    for stream in family.streams:
        named = {
            name.removeprefix(stream.prefix): stored
            for name, stored in tensors.items()
            if name.startswith(stream.prefix)
        }
        if named:
            yield Network(stream.name, stream.naming, named, unused_layers=stream.unused_layers)
    if any(name.removeprefix("text_model.") == _TOKENS for name in tensors):
        yield _alone(family, tensors, None)


def _alone(family: Family, tensors: dict[str, Stored], folder: ModelFolder | None) -> Network:
    """A text encoder of its own: bigG's copies have a projection, CLIP-L's in XL have none."""
    projects = "text_projection.weight" in tensors
    stream = family.streams[-1 if projects else 0]
    config = folder.config("unet") if folder is not None else None
    return Network(stream.name, "transformers", tensors, config)

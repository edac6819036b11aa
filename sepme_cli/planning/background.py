"""The background of a model's text encoders: computed once, and kept in the user's cache folder."""

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from patch_spec.base import Base
from patch_spec.streams import Stream
from sepme_cli.checkpoints.disk.output import write_output
from sepme_cli.diffusion.text import TextEncoders
from sepme_cli.erasure.background import VERSION, Background, Captions, captions, steps
from sepme_cli.errors import SystemFailure
from sepme_cli.planning.vocabulary import caption_words, everything
from sepme_cli.progress import SILENT, Progress


def background_of(
    encoders: TextEncoders,
    base: Base,
    stream: Stream = "tokens",
    *,
    cached: bool = True,
    progress: Progress = SILENT,
) -> Background:
    """What a model's text encoders make of the sample on a stream, from the cache if it is there.

    cached: look for it in the cache folder, and leave it there. A file there that is damaged, or
    of another sample, is made anew; where the folder cannot be written, nothing is kept.
    """
    sample = captions(caption_words())
    words = everything()
    path = cache_folder() / f"{_key(encoders, base, stream, sample, words)}.safetensors"
    readers = encoders.on(stream)
    if cached and (found := _read(path, sample, words, base.widths[stream], len(readers))):
        return found
    progress.stage(
        "encoding ordinary captions (once per text encoder)" if cached else "ordinary captions",
        steps(sample, words),
    )
    with encoders.reading((*sample.protected, *sample.held_out, *words)):
        background = Background.of(readers, sample, words, progress.advance)
    if cached:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_output(path, _bytes(background), force=True)
        except (OSError, SystemFailure) as error:
            progress.say(f"the encoded captions cannot be kept for the next time: {error}")
    return background


def cache_folder() -> Path:
    """Where backgrounds are kept; safe to delete."""
    return user_cache_path("sepme") / "backgrounds"


def _key(
    encoders: TextEncoders, base: Base, stream: Stream, sample: Captions, words: tuple[str, ...]
) -> str:
    """What a background depends on, and nothing else, in 40 hexadecimal digits."""
    tokens = encoders.tokens((*sample.protected, *sample.held_out, *words))
    told = {
        "version": VERSION,
        "torch": torch.__version__,
        "text_encoders": dict(base.text_encoders),
        "words": words,
        "sample": [sample.protected, sample.held_out],
        "tokens": sha256(tokens.numpy().tobytes()).hexdigest(),
    }
    if stream != "tokens":
        told["stream"] = stream
    if stream == "tokens" and len(encoders.readers) > 1:
        told["readers"] = len(encoders.readers)
    return sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:40]


def _bytes(background: Background) -> bytes:
    tensors = _tensors(background)
    return save(tensors, metadata={"sha256": _digest(tensors)})


def _tensors(background: Background) -> dict[str, Tensor]:
    return {
        "moment": background.moment,
        "ends": background.ends,
        "word_ends": background.word_ends,
    }


def _digest(tensors: dict[str, Tensor]) -> str:
    whole = sha256()
    for name in sorted(tensors):
        whole.update(np.ascontiguousarray(tensors[name].numpy()).tobytes())
    return whole.hexdigest()


def _read(
    path: Path, sample: Captions, words: tuple[str, ...], width: int, readers: int
) -> Background | None:
    """The background in a file, of so many text encoders; None if it is not there, or not whole."""
    shapes = {
        "moment": [width, width],
        "ends": [len(sample.held_out), readers * width],
        "word_ends": [len(words), readers * width],
    }
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            said = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    if {name: list(value.shape) for name, value in tensors.items()} != shapes:
        return None
    if _digest(tensors) != said:
        return None
    return Background(captions=sample.held_out, words=words, protected=sample.protected, **tensors)

"""What a denoiser reads of a prompt, and the weights that read it (SPEC.md, "Streams and targets").

A stream is a sequence of rows, one a token, or one vector. A target is a weight whose columns read
a stream and nothing else, so that W (I + T) on e is W on e (I + T)^T, whatever the image.
"""

import re
from collections.abc import Mapping
from typing import Literal

Stream = Literal["tokens", "pooled"]
STREAMS: tuple[Stream, ...] = ("tokens", "pooled")

TARGETS: Mapping[Stream, re.Pattern[str]] = {
    "tokens": re.compile(
        r"(?:[a-z0-9_]+\.)+attn2\.to_[kv]\.weight"
        r"|context_embedder\.weight"
        r"|condition_embedder\.text_embedder\.linear_1\.weight"
    ),
    "pooled": re.compile(
        r"add_embedding\.linear_1\.weight|time_text_embed\.text_embedder\.linear_1\.weight"
    ),
}
"""Which names a target can have, by the stream that it reads (rule P1)."""


def stream_of(target: str) -> Stream | None:
    """The stream that a target reads; None for a name that no target can have."""
    return next((name for name in STREAMS if TARGETS[name].fullmatch(target)), None)

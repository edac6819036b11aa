"""What a denoiser reads of a prompt, the weights that read it (SPEC.md, "Streams and targets"), and
all other layers (SPEC.md, "Layers").

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
        # In the blocks of transformers, attn2 has seen the image.
        r"(?!(?:transformer_)?blocks\.)(?:[a-z0-9_]+\.)+attn2\.to_[kv]\.weight"
        r"|context_embedder\.weight"
        r"|condition_embedder\.text_embedder\.linear_1\.weight"
    ),
    "pooled": re.compile(
        r"add_embedding\.linear_1\.weight|time_text_embed\.text_embedder\.linear_1\.weight"
    ),
}
"""Which names a target can have, by the stream that it reads (rule P1)."""

_TEXT_ENCODERS = ("clip_l", "clip_g", "clip_h")
_TEXT_LAYER = re.compile(
    r"encoder\.layers\.(?:0|[1-9][0-9]{0,3})\.(?:self_attn\.[qkv]_proj|self_attn\.out_proj|mlp\.fc[12])"
    r"\.weight"
)
_DENOISERS_LAYER = re.compile(r"(?:[a-z0-9_]+\.)+weight")


def stream_of(target: str) -> Stream | None:
    """The stream that a target reads; None for a name that no target can have."""
    return next((name for name in STREAMS if TARGETS[name].fullmatch(target)), None)


def network_of(layer: str) -> str | None:
    """The network that a layer is of: "denoiser", or a text encoder ("clip_l").

    None for a name that no layer can have, as of a target (rule P1).
    """
    network, _, rest = layer.partition(".")
    if network in _TEXT_ENCODERS:
        return network if _TEXT_LAYER.fullmatch(rest) else None
    known = _DENOISERS_LAYER.fullmatch(layer) and stream_of(layer) is None
    return "denoiser" if known else None

"""What a UNet is told: the text encoders of each family, and how their states come together.

Stable Diffusion 1.x reads CLIP-L's last layer through the final norm; 2.x OpenCLIP-H's last layer
but one through it; XL the last layer but one of CLIP-L and of OpenCLIP-bigG, without the norm and
side by side, and bigG's pooled output beside them; its refiner bigG alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from sepme_cli.checkpoints.networks import Network
from sepme_cli.diffusion.devices import Residence
from sepme_cli.diffusion.tokenizer import END, tokenize
from sepme_cli.diffusion.weights import clip_tensors, count_layers
from sepme_cli.errors import UnsupportedError

_HEAD_WIDTH = 64  # every CLIP text encoder
_BATCH = 64


@dataclass(frozen=True)
class Conditioning:
    """What the UNet reads of prompts.

    states: e(c) [n, positions, d], for cross-attention. pooled: [n, p] one vector a prompt, which
    XL embeds beside the time step; None elsewhere.
    """

    states: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: Tensor) -> Self:
        pooled = None if self.pooled is None else self.pooled[index]
        return replace(self, states=self.states[index], pooled=pooled)

    def repeated(self, count: int) -> Self:
        """One prompt's conditioning, count times."""
        return self[torch.zeros(count, dtype=torch.long)]

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """The same, for a network that computes so."""
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return replace(self, states=self.states.to(device, dtype), pooled=pooled)

    @staticmethod
    def cat(parts: "Sequence[Conditioning]") -> "Conditioning":
        """Several one after the other."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return Conditioning(
            torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None
        )


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder, loaded when it is first used.

    penultimate: what is read is the last layer but one, without the final norm. pads: the id
    that fills a prompt up, where the tokenizer does not say. tokenizer: a folder with its files,
    None for CLIP's own.
    """

    network: Network = field(repr=False)
    residence: Residence
    penultimate: bool
    pads: int
    tokenizer: Path | None

    @property
    def device(self) -> torch.device:
        """Where it computes, in fp32."""
        return self.residence.device

    @property
    def model(self) -> CLIPTextModel:
        """transformers' model of it; UnsupportedError where the file does not hold all of it."""
        return self.residence.use(self._model)

    @cached_property
    def _model(self) -> CLIPTextModel:
        tensors = {
            name: value for name, value in self._tensors.items() if "projection." not in name
        }
        with torch.device("meta"):
            model = CLIPTextModel(CLIPTextConfig(**self._config))
        try:
            model.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise _not_whole(self.network, str(error).splitlines()[-1].strip()) from error
        _materialise_positions(model)
        return model.requires_grad_(False).eval()

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return clip_tensors(self.network, torch.float32)

    @cached_property
    def _config(self) -> dict[str, Any]:
        shapes = {name: tuple(value.shape) for name, value in self._tensors.items()}
        try:
            config = text_config(shapes)
        except KeyError as error:
            raise _not_whole(self.network, str(error.args[0])) from error
        said = self.network.config or {}
        openclip = self.network.name != "clip_l"
        config["hidden_act"] = said.get("hidden_act", "gelu" if openclip else "quick_gelu")
        if "num_attention_heads" in said:
            config["num_attention_heads"] = said["num_attention_heads"]
        return config

    @property
    def positions(self) -> int:
        """How many tokens a prompt has, padding included."""
        return int(self._model.config.max_position_embeddings)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids [len(prompts), positions], padded as the family does."""
        return tokenize(prompts, self.positions, padding=self.pads, folder=self.tokenizer)

    def states(self, ids: Tensor) -> Tensor:
        """e(c) [n, positions, width] of token ids."""
        if not self.penultimate:
            states: Tensor = self.model(ids).last_hidden_state
            return states
        return self.model(ids, output_hidden_states=True).hidden_states[-2]

    def ends(self, prompts: Sequence[str]) -> Tensor:
        """The state of the end of each text [len(prompts), width].

        No token reads what comes after it, so the padding, most of a short text, is left out.
        """
        ids = self.tokens(prompts).to(self.device)
        lengths = ids.argmax(dim=-1) + 1  # the end has the highest id
        found = torch.empty(len(ids), self._model.config.hidden_size, device=self.device)
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().flatten()
            parts = [self.states(ids[part, :length])[:, -1] for part in rows.split(_BATCH)]
            found[rows] = torch.cat(parts).float()
        return found

    def pooled(self, ids: Tensor) -> Tensor:
        """The projected state of the end of the text [n, p] of token ids."""
        last: Tensor = self.model(ids).last_hidden_state
        # The end of the text has the highest id, and the first of several is meant.
        ends = last[torch.arange(len(ids)), ids.argmax(dim=-1)]
        if (projection := self._tensors.get("text_projection.weight")) is None:
            raise _not_whole(self.network, "text_projection")
        return ends @ projection.to(ends).T


def text_config(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """CLIPTextModel's configuration, but for its activation.

    shapes are named as transformers names them. KeyError names what is missing.
    """
    vocabulary, width = shapes["embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": count_layers(shapes),
        "num_attention_heads": width // _HEAD_WIDTH,
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
    }


@torch.no_grad()
def condition(
    encoders: Sequence[TextEncoder],
    prompts: Sequence[str],
    *,
    pooled: bool,
    positions: int | None = None,
) -> Conditioning:
    """What a family's text encoders say of prompts: their states side by side.

    pooled: also the last encoder's pooled output. positions: the first ones alone, which do not
    depend on the others; all if None.
    """
    ids = [encoder.tokens(prompts)[:, :positions].to(encoder.device) for encoder in encoders]
    states = [
        torch.cat([encoder.states(part) for part in tokens.split(_BATCH)])
        for encoder, tokens in zip(encoders, ids, strict=True)
    ]
    last = encoders[-1]
    found = torch.cat([last.pooled(part) for part in ids[-1].split(_BATCH)]) if pooled else None
    return Conditioning(torch.cat(states, dim=-1), found)


def padding_of(stream: str) -> int:
    """The id that fills up a prompt for a text encoder: CLIP's end for CLIP-L, 0 for OpenCLIP."""
    return END if stream == "clip_l" else 0


def _materialise_positions(model: CLIPTextModel) -> None:
    """Buffers are no weights: no file holds them, and on the meta device they have no values."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module.register_buffer(
                    name, torch.arange(buffer.shape[-1]).expand(buffer.shape), persistent=False
                )


def _not_whole(network: Network, missing: str) -> UnsupportedError:
    return UnsupportedError(
        f"the checkpoint does not hold a whole text encoder ({network.name}); erasing and drawing "
        "need one, which --text-encoder can name; applying a patch does not",
        expected=missing,
        found=f"{len(network.tensors)} tensors of it",
    )

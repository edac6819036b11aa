"""A text encoder of CLIP's kind: CLIP-L, OpenCLIP-H or OpenCLIP-bigG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.activations import ACT2FN

from sepme_cli.checkpoints.reading.networks import Network
from sepme_cli.checkpoints.structure.families import TextEncoderSpec
from sepme_cli.diffusion.devices import Machine
from sepme_cli.diffusion.packing import PackedTexts, pack, sees
from sepme_cli.diffusion.tokenizer import END, tokenize, unread
from sepme_cli.diffusion.weights import clip_shapes, clip_tensors, count_layers
from sepme_cli.errors import UnsupportedError

_HEAD_WIDTH = 64  # every CLIP text encoder
FREE = -1
"""The id of a token whose embedding is given instead of looked up."""
_LEAST_POSITIONS = 3
"""A start, a word, and the end."""
_BATCH = 64
_ROWS = 16
"""Packed rows at a time."""


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder, loaded when it is first used.

    penultimate: what is read is the last layer but one, without the final norm. spec: what is
    particular to it in its family. tokenizer: a folder with its files, None for CLIP's own.
    """

    network: Network = field(repr=False)
    machine: Machine
    penultimate: bool
    spec: TextEncoderSpec
    tokenizer: Path | None

    @property
    def device(self) -> torch.device:
        """Where it computes, in fp32."""
        return self.machine.device

    @property
    def model(self) -> CLIPTextModel:
        """transformers' model of it; UnsupportedError where the file does not hold all of it."""
        return self.machine.use(self._model)

    @cached_property
    def _model(self) -> CLIPTextModel:
        tensors = {
            name: value for name, value in self._tensors.items() if "projection." not in name
        }
        with torch.device("meta"):
            model = CLIPTextModel(CLIPTextConfig(**self.config))
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
    def config(self) -> dict[str, Any]:
        """transformers' configuration, from the header alone.

        Raises UnsupportedError for a text encoder that is not all there, or that prompts cannot
        be read with.
        """
        shapes = clip_shapes(self.network)
        try:
            config = text_config(shapes)
        except KeyError as error:
            raise _not_whole(self.network, str(error.args[0])) from error
        except (ValueError, IndexError) as error:
            raise _strange(self.network, "[tokens, width] and the like", "other shapes") from error
        said = self.network.config or {}
        openclip = self.network.name != "clip_l"
        config["hidden_act"] = said.get("hidden_act", "gelu" if openclip else "quick_gelu")
        if "num_attention_heads" in said:
            config["num_attention_heads"] = said["num_attention_heads"]
        _check_config(self.network, config)
        projection = shapes.get("text_projection.weight", (0, config["hidden_size"]))
        if len(projection) != 2 or projection[1] != config["hidden_size"]:
            expected = f"a projection of {config['hidden_size']} numbers"
            raise _strange(self.network, expected, f"one of shape {list(projection)}")
        return config

    @property
    def pooled_width(self) -> int:
        """Of the pooled output."""
        width = int(self.config["hidden_size"])
        if self.spec.pools == "end":
            return width
        return clip_shapes(self.network).get("text_projection.weight", (width,))[0]

    @property
    def positions(self) -> int:
        """How many tokens a prompt has, padding included."""
        return int(self.config["max_position_embeddings"])

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids [len(prompts), positions], padded as the family does.

        Raises UnsupportedError for words of a tokenizer that the text encoder was not given.
        """
        ids = tokenize(prompts, self.positions, padding=self.spec.pads, folder=self.tokenizer)
        known = self.config["vocab_size"]
        if len(ids) and int(ids.max()) >= known:
            raise UnsupportedError(
                f"the tokenizer in {self.tokenizer} has words that the text encoder "
                f"({self.network.name}) does not have; name the right one with --tokenizer",
                file=self.tokenizer,
                expected=f"token ids below {known}",
                found=int(ids.max()),
            )
        return ids

    def unread(self, prompt: str) -> str:
        """The words at a prompt's end that it has no positions for."""
        return unread(prompt, self.positions, self.tokenizer)

    def states(self, ids: Tensor) -> Tensor:
        """e(c) [n, positions, width] of token ids."""
        return self._read(ids)[0]

    def encode(
        self, prompts: Sequence[str], positions: int | None = None, paddings: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """e(c) [len(prompts), positions, width], and the states that the ends of the texts have
        after the last layer and the final norm [len(prompts), width].

        positions and paddings: see `TextEncoders.encode`. With either only what is asked for is
        computed.
        """
        whole = self.tokens(prompts)
        ids = whole[:, :positions]
        if positions is None and paddings is None:
            # Images depend on every bit of these, and those on the way they are computed.
            read = [(*self._read(part), _ends(part)) for part in ids.to(self.device).split(_BATCH)]
            parts = [(states, last[range(len(at)), at]) for states, last, at in read]
            states, ends = (torch.cat(part) for part in zip(*parts, strict=True))
            return states, ends
        needed = torch.full((len(ids),), ids.shape[1])
        if paddings is not None:
            needed = needed.minimum(_ends(whole) + 1 + paddings)
        packed = pack(ids, needed, self.positions)
        states, last = self._read_packed(packed)
        return states[packed.places], last[packed.places[range(len(ids)), _ends(ids)]]

    @property
    def token_embeddings(self) -> Tensor:
        """The embedding of every token [vocabulary, width]."""
        return self.model.embeddings.token_embedding.weight

    def encode_tokens(self, ids: Tensor, free: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `encode`, of token ids [n, positions], padded with END; differentiable in free
        [n, k, width], the embeddings of the k tokens of each row that are FREE."""
        is_free = ids == FREE
        ends = _ends(ids)
        # Behind the end each family pads as it does.
        padding = torch.arange(ids.shape[1]) > ends[:, None]
        ids = ids.masked_fill(padding, self.spec.pads).masked_fill(is_free, 0).to(self.device)

        def put(_: nn.Module, inputs: tuple[Tensor], embedded: Tensor) -> Tensor:
            assert free is not None
            return embedded.masked_scatter(is_free[..., None].to(self.device), free.to(embedded))

        embedding = self.model.embeddings.token_embedding
        hook = None if free is None else embedding.register_forward_hook(put)
        try:
            states, last = self._read(ids)
        finally:
            if hook is not None:
                hook.remove()
        return states, last[range(len(ids)), ends]

    def ends(self, prompts: Sequence[str]) -> Tensor:
        """The state of the end of each text [len(prompts), width]; no padding is computed."""
        ids = self.tokens(prompts)
        at = _ends(ids)
        packed = pack(ids, at + 1, self.positions)
        return self._read_packed(packed)[0][packed.places[range(len(ids)), at]]

    def pooled(self, ends: Tensor) -> Tensor:
        """The pooled output [n, p] of the states that `encode` gives of ends [n, width]."""
        if self.spec.pools == "end":
            return ends
        if (projection := self._tensors.get("text_projection.weight")) is None:
            raise _not_whole(self.network, "text_projection")
        return ends @ projection.to(ends).T

    def _read(self, ids: Tensor, **how: Tensor) -> tuple[Tensor, Tensor]:
        """e(c), and what the last layer and the final norm make of it; [n, positions, width].

        how: what else the model is to be told.
        """
        if not len(ids):  # which transformers does not read
            nothing = torch.empty(*ids.shape, self._model.config.hidden_size, device=self.device)
            return nothing, nothing
        read = self.model(ids, output_hidden_states=self.penultimate, **how)
        last: Tensor = read.last_hidden_state
        return read.hidden_states[-2] if self.penultimate else last, last

    def _read_packed(self, packed: PackedTexts) -> tuple[Tensor, Tensor]:
        """The same of every node [nodes, width]."""
        parts = []
        for ids, depths, filled in packed.batches(_ROWS):
            hidden = ~sees(depths)[:, None].to(self.device)
            # Added to what attention weighs, in every one of transformers' ways to compute it.
            mask = torch.zeros(hidden.shape, device=self.device).masked_fill(hidden, -torch.inf)
            states, last = self._read(
                ids.to(self.device), position_ids=depths.to(self.device), attention_mask=mask
            )
            parts.append((states[filled], last[filled]))
        states, last = (torch.cat(part) for part in zip(*parts, strict=True))
        return states, last


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


def _ends(ids: Tensor) -> Tensor:
    """Where each text ends [n]: padding may repeat the end, and the first is meant. Words that were
    added to CLIP's have higher ids."""
    return (ids == END).int().argmax(dim=-1)


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
        f"the checkpoint does not hold a whole text encoder ({network.name}); erasing "
        "and generating images need one, which --text-encoder can name; applying a "
        "patch does not",
        expected=missing,
        found=f"{len(network.tensors)} tensors of it",
    )


def _check_config(network: Network, config: Mapping[str, Any]) -> None:
    """UnsupportedError for what no prompt can be read with, or transformers cannot build."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if config["vocab_size"] <= END:
        raise UnsupportedError(
            f"the text encoder ({network.name}) has another vocabulary than CLIP's, which "
            "sepme uses",
            expected=f"at least {END + 1} tokens",
            found=config["vocab_size"],
        )
    if config["max_position_embeddings"] < _LEAST_POSITIONS:
        found = config["max_position_embeddings"]
        raise _strange(network, f"at least {_LEAST_POSITIONS} positions", found)
    if not isinstance(heads, int) or heads < 1 or width % heads:
        expected = f"heads that {width} numbers can be divided among, {_HEAD_WIDTH} each"
        raise _strange(network, expected, f"{heads} heads")
    if config["num_hidden_layers"] > len(network.tensors):
        found = f"layers numbered up to {config['num_hidden_layers'] - 1}"
        raise _strange(network, f"{len(network.tensors)} tensors' layers", found)
    activation = config["hidden_act"]
    if not isinstance(activation, str) or activation not in ACT2FN:
        raise _strange(network, "an activation such as quick_gelu", repr(activation)[:80])


def _strange(network: Network, expected: str, found: object) -> UnsupportedError:
    return UnsupportedError(
        f"the text encoder ({network.name}) is not one that sepme knows; --text-encoder "
        "can name another; applying a patch needs none",
        expected=expected,
        found=found,
    )

"""How prompts are read: the text encoders of each family, and how their states come together.

Stable Diffusion 1.x reads CLIP-L's last layer through the final norm; 2.x OpenCLIP-H's last layer
but one through it; XL the last layer but one of CLIP-L and of OpenCLIP-bigG, without the norm and
side by side, and bigG's pooled output beside them; its refiner bigG alone. Stable Diffusion 3 reads
the rows of XL's two, filled up with zeros, then T5's, and the pooled output of both; Flux.1 T5's
rows, and the end of text of CLIP-L; Wan 2.1 umT5's rows.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from patch_spec.streams import Stream
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.checkpoints.reading.networks import Network
from sepme_cli.checkpoints.structure.families import TextEncoderSpec
from sepme_cli.diffusion.conditioning import Conditioning
from sepme_cli.diffusion.devices import Machine
from sepme_cli.diffusion.t5 import T5Encoder, is_t5_tokenizer
from sepme_cli.diffusion.text_encoder import TextEncoder
from sepme_cli.diffusion.tokenizer import END, has_tokenizer
from sepme_cli.erasure.background import BackgroundEncoder
from sepme_cli.errors import MismatchError, UnsupportedError, UsageError
from sepme_cli.progress import SILENT, Progress


class Rows(BackgroundEncoder, Protocol):
    """What reads prompts as rows of one stream."""

    @property
    def room(self) -> int:
        """How many tokens of a prompt are read."""
        ...

    def unread(self, prompt: str) -> str:
        """The words at a prompt's end that there is no room for."""
        ...


@dataclass(frozen=True)
class TextEncoders:
    """The text encoders of a checkpoint.

    Text is encoded in fp32, which costs little and which increments are made from; T5-XXL in bf16.
    tokenizer: a folder with a tokenizer's files, None for the model's or CLIP's own. t5: whether T5
    is read, of models that can be used without.
    """

    checkpoint: Checkpoint = field(repr=False)
    machine: Machine
    tokenizer: Path | None = None
    t5: bool = True
    progress: Progress = field(default=SILENT, repr=False)

    @cached_property
    def clips(self) -> tuple[TextEncoder, ...]:
        """Those of CLIP's kind, in order.

        Raises UnsupportedError if one is not there or is none that can be used, MismatchError if
        they are not this denoiser's.
        """
        specs = [one for one in self.checkpoint.family.text_encoders if one.naming != "t5"]
        clips = tuple(map(self._clip, specs))
        _check_together(clips, self.checkpoint)
        return clips

    @cached_property
    def readers(self) -> tuple[Rows, ...]:
        """What reads the rows of the stream `tokens`: rows of CLIP, side by side, then T5's."""
        width = self.checkpoint.width
        rows = tuple(clip for clip in self.clips if clip.spec.rows)
        found: list[Rows] = [SideBySide(rows, width)] if rows else []
        if self._reads_t5:
            found.append(self._t5)
        return tuple(found)

    @cached_property
    def _t5_spec(self) -> TextEncoderSpec | None:
        specs = self.checkpoint.family.text_encoders
        return next((one for one in specs if one.naming == "t5"), None)

    @property
    def _reads_t5(self) -> bool:
        """Whether T5 is read: not in a folder that comes without one, which is used without.

        Raises UsageError for a model that reads no other rows and is to be used without.
        """
        if self._t5_spec is None:
            return False
        family = self.checkpoint.family
        alone = not any(one.rows for one in family.text_encoders if one.naming != "t5")
        if alone and not self.t5:
            raise UsageError(
                f"{family.title} reads prompts with T5 alone: leave out --no-t5",
                expected="T5",
                found="--no-t5",
            )
        there = self.checkpoint.network(self._t5_spec.name) is not None
        return self.t5 and (alone or there or self.checkpoint.folder is None)

    @cached_property
    def _t5(self) -> T5Encoder:
        assert self._t5_spec is not None
        network = self._network(self._t5_spec)
        places = (self.tokenizer, network.tokenizer)
        tokenizer = next((place for place in places if place and is_t5_tokenizer(place)), None)
        t5 = T5Encoder(network, self.machine, self._t5_spec.positions, tokenizer, self.progress)
        if t5.width != self.checkpoint.width:
            raise MismatchError(
                f"the text encoder ({network.name}) is not one for {self.checkpoint.path}, which "
                "reads text embeddings of another width; --text-encoder can name the one that is",
                file=self.checkpoint.path,
                expected=f"{self.checkpoint.width} wide",
                found=f"{t5.width} wide",
            )
        return t5

    def _clip(self, spec: TextEncoderSpec) -> TextEncoder:
        network = self._network(spec)
        own = network.tokenizer if network.tokenizer and has_tokenizer(network.tokenizer) else None
        given = self.tokenizer
        if given is not None and self._t5_spec is not None and is_t5_tokenizer(given):
            given = None
        return TextEncoder(
            network,
            self.machine,
            penultimate=self.checkpoint.family.penultimate,
            spec=spec,
            tokenizer=given or own,
        )

    def _network(self, spec: TextEncoderSpec) -> Network:
        network = self.checkpoint.network(spec.name)
        if network is None:
            without = spec.naming == "t5" and any(
                one.rows and one.naming != "t5" for one in self.checkpoint.family.text_encoders
            )
            raise UnsupportedError(
                f"{self.checkpoint.path} does not hold its text encoder ({spec.name}), which "
                "erasing and generating images need; name a model or a file that does with "
                "--text-encoder"
                + (", or say with --no-t5 that this model is used without it" if without else ""),
                file=self.checkpoint.path,
                expected=f"a text encoder ({spec.name})",
                found=self.checkpoint.title,
            )
        return network

    def on(self, stream: Stream) -> "tuple[Rows | PooledText, ...]":
        """What reads prompts for one stream alone."""
        return self.readers if stream == "tokens" else (PooledText(self),)

    def reading(self, prompts: Sequence[str]) -> AbstractContextManager[None]:
        """Around the reading of many prompts in parts, of which T5 tells beforehand how long all
        will take."""
        return self._t5.reading(prompts) if self._reads_t5 else nullcontext()

    @property
    def room(self) -> int:
        """How many tokens of a prompt are read: all positions but those of its start and end."""
        return self.readers[0].room

    def unread(self, prompt: str) -> str:
        """The words at a prompt's end that there is no room for."""
        return self.readers[0].unread(prompt)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids [len(prompts), positions] of all rows, padded."""
        return torch.cat([reader.tokens(prompts) for reader in self.readers], 1)

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], positions: int | None = None, paddings: int | None = None
    ) -> Tensor:
        """e(c): hidden states of prompts [len(prompts), positions, width], one row a token.

        Of CLIP's kind the states stand side by side, each token's in its place; those of T5 come
        behind. positions: of each the first ones alone, which with CLIP do not depend on the
        others; all if None. paddings: how many of the padding behind each text; the last of them
        stands for those behind it; all if None. With either, many prompts take a fraction of the
        time.
        """
        return torch.cat([one.encode(prompts, positions, paddings) for one in self.readers], 1)

    @torch.no_grad()
    def ends(self, prompts: Sequence[str]) -> Tensor:
        """The embedding of the end of each prompt [len(prompts), d], fp32, on the CPU; of several
        readers one behind the other.

        It stands for the whole of a few words, and takes less time than any of their padding.
        """
        return torch.cat([reader.ends(prompts) for reader in self.readers], dim=-1).cpu()

    @torch.no_grad()
    def condition(self, prompts: Sequence[str], paddings: int | None = None) -> Conditioning:
        """All that the denoiser reads of prompts: e(c), and the pooled output where the family has
        one. paddings: see `encode`."""
        found = [clip.encode(prompts, paddings=paddings) for clip in self.clips]
        behind = []
        if self._reads_t5:
            behind.append(self._t5.encode(prompts, paddings=paddings).to(self.machine.device))
        elif self._t5_spec is not None:
            shape = (len(prompts), self._t5_spec.positions, self.checkpoint.width)
            behind.append(torch.zeros(shape, device=self.machine.device))
        return self._joined(found, behind)

    def condition_tokens(self, ids: Tensor, vectors: Sequence[Tensor] = ()) -> Conditioning:
        """The same of token ids [n, positions], differentiable in vectors.

        vectors: of each text encoder [n, k, its width], which stand for the embeddings of the
        tokens FREE. Raises UnsupportedError for a model that reads prompts with T5 too.
        """
        if self._t5_spec is not None:
            raise UnsupportedError(
                f"{self.checkpoint.path} reads prompts with T5, and tokens can be chosen for text "
                "encoders of CLIP's kind alone",
                file=self.checkpoint.path,
                expected="a model that reads prompts with CLIP alone",
                found=self.checkpoint.family.title,
            )
        given: Sequence[Tensor | None] = vectors or [None] * len(self.clips)
        return self._joined(
            [clip.encode_tokens(ids, free) for clip, free in zip(self.clips, given, strict=True)]
        )

    def _joined(
        self, found: Sequence[tuple[Tensor, Tensor]], behind: Sequence[Tensor] = ()
    ) -> Conditioning:
        """What the denoiser reads, of the states and ends that each of CLIP's kind gives. behind:
        rows of other text encoders."""
        each = list(zip(self.clips, found, strict=True))
        rows = [states for clip, (states, _) in each if clip.spec.rows]
        parts = [_widened(torch.cat(rows, -1), self.checkpoint.width)] if rows else []
        pooled = [clip.pooled(ends) for clip, (_, ends) in each if clip.spec.pools]
        return Conditioning(
            torch.cat([*parts, *behind], 1), torch.cat(pooled, -1) if pooled else None
        )


@dataclass(frozen=True)
class SideBySide:
    """Text encoders whose states stand side by side, and zeros up to a width."""

    encoders: tuple[TextEncoder, ...]
    width: int

    @property
    def room(self) -> int:
        """How many tokens of a prompt are read: all positions but those of its start and end."""
        return self.encoders[0].positions - 2

    def unread(self, prompt: str) -> str:
        """The words at a prompt's end that there is no room for."""
        return self.encoders[0].unread(prompt)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids [len(prompts), positions] of the first text encoder, padded as it does.

        The end has the highest: words that were added to CLIP's have negative ones here.
        """
        ids = self.encoders[0].tokens(prompts)
        return torch.where(ids > END, -ids, ids)

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], positions: int | None = None, paddings: int | None = None
    ) -> Tensor:
        """See `TextEncoders.encode`."""
        found = [encoder.encode(prompts, positions, paddings) for encoder in self.encoders]
        return _widened(torch.cat([states for states, _ in found], dim=-1), self.width)

    @torch.no_grad()
    def ends(self, prompts: Sequence[str]) -> Tensor:
        """See `TextEncoders.ends`."""
        ends = torch.cat([encoder.ends(prompts) for encoder in self.encoders], dim=-1)
        return _widened(ends, self.width).cpu()


def _widened(states: Tensor, width: int) -> Tensor:
    """States with zeros behind their last dimension, up to a width."""
    missing = width - states.shape[-1]
    return F.pad(states, (0, missing)) if missing else states


@dataclass(frozen=True)
class PooledText:
    """The pooled text that a denoiser reads beside the rows, as an encoder of one row a prompt."""

    text: TextEncoders

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """As if every prompt were one token [len(prompts), 1], and all the same one: it is answered
        by the one of another prompt."""
        return torch.zeros((len(prompts), 1), dtype=torch.long)

    def encode(
        self, prompts: Sequence[str], positions: int | None = None, paddings: int | None = None
    ) -> Tensor:
        """One vector a prompt [len(prompts), 1, p]."""
        return self.ends(prompts)[:, None]

    @torch.no_grad()
    def ends(self, prompts: Sequence[str]) -> Tensor:
        """The same without the position [len(prompts), p], fp32, on the CPU."""
        pooling = [clip for clip in self.text.clips if clip.spec.pools]
        found = [clip.pooled(clip.encode(prompts, paddings=0)[1]) for clip in pooling]
        return torch.cat(found, -1).cpu()


def _check_together(clips: Sequence[TextEncoder], checkpoint: Checkpoint) -> None:
    """MismatchError for text encoders that a denoiser cannot read side by side; see also
    `TextEncoder.config`, of which this raises what it raises."""
    names = ", ".join(encoder.network.name for encoder in clips)
    rows = [encoder.config["hidden_size"] for encoder in clips if encoder.spec.rows]
    # Where T5's rows are beside them, they are filled up with zeros.
    filled = any(spec.naming == "t5" for spec in checkpoint.family.text_encoders)
    width = checkpoint.width
    if rows and (sum(rows) > width if filled else sum(rows) != width):
        raise _not_this(checkpoint, names, width, rows)
    pooled = [encoder.pooled_width for encoder in clips if encoder.spec.pools]
    if filled and pooled and sum(pooled) != checkpoint.widths.get("pooled"):
        raise _not_this(checkpoint, names, checkpoint.widths["pooled"], pooled)
    if len({encoder.positions for encoder in clips}) > 1:
        raise MismatchError(
            f"the text encoders ({names}) of {checkpoint.path} read prompts of different lengths, "
            "and cannot be used together",
            file=checkpoint.path,
            expected="one number of positions",
            found=" and ".join(str(encoder.positions) for encoder in clips),
        )


def _not_this(
    checkpoint: Checkpoint, names: str, width: int, found: Sequence[int]
) -> MismatchError:
    denoiser = "UNet" if checkpoint.family.denoiser == "unet" else "transformer"
    return MismatchError(
        f"the text encoder ({names}) is not one for the {denoiser} of {checkpoint.path}, which "
        "reads text embeddings of another width; --text-encoder can name the one that is",
        file=checkpoint.path,
        expected=f"{width} wide",
        found=" + ".join(map(str, found)) + " wide",
    )

"""How prompts are read: the text encoders of each family, and how their states come together.

Stable Diffusion 1.x reads CLIP-L's last layer through the final norm; 2.x OpenCLIP-H's last layer
but one through it; XL the last layer but one of CLIP-L and of OpenCLIP-bigG, without the norm and
side by side, and bigG's pooled output beside them; its refiner bigG alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from patch_spec.streams import Stream
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.checkpoints.structure.families import TextStream
from sepme_cli.diffusion.conditioning import Conditioning
from sepme_cli.diffusion.devices import Machine
from sepme_cli.diffusion.text_encoder import TextEncoder
from sepme_cli.diffusion.tokenizer import END, has_tokenizer
from sepme_cli.errors import MismatchError, UnsupportedError


@dataclass(frozen=True)
class TextEncoders:
    """The text encoders of a checkpoint, whose states stand side by side.

    Text is encoded in fp32, which costs little and which increments are made from. tokenizer: a
    folder with a tokenizer's files, None for the model's or CLIP's own.
    """

    checkpoint: Checkpoint = field(repr=False)
    machine: Machine
    tokenizer: Path | None = None

    @cached_property
    def encoders(self) -> tuple[TextEncoder, ...]:
        """Those of the family, in order.

        Raises UnsupportedError if one is not there or is none that can be used, MismatchError if
        they are not this UNet's.
        """
        encoders = tuple(self._encoder(stream) for stream in self.checkpoint.family.streams)
        _check_together(encoders, self.checkpoint.width, self.checkpoint.path)
        return encoders

    def _encoder(self, stream: TextStream) -> TextEncoder:
        network = self.checkpoint.network(stream.name)
        if network is None:
            raise UnsupportedError(
                f"{self.checkpoint.path} does not hold its text encoder ({stream.name}), which "
                "erasing and generating need; name a model that does with --text-encoder",
                file=self.checkpoint.path,
                expected=f"a text encoder ({stream.name})",
                found=self.checkpoint.title,
            )
        own = network.tokenizer if network.tokenizer and has_tokenizer(network.tokenizer) else None
        return TextEncoder(
            network,
            self.machine,
            penultimate=self.checkpoint.family.penultimate,
            pads=stream.pads,
            tokenizer=self.tokenizer or own,
        )

    def on(self, stream: Stream) -> "TextEncoders | PooledText":
        """What reads prompts for one stream alone."""
        return self if stream == "tokens" else PooledText(self)

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
        """e(c): hidden states of prompts [len(prompts), positions, width], one row a token.

        Of several text encoders the states stand side by side, each token's in its place.
        positions: the first ones alone, which do not depend on the others; all if None. paddings:
        how many of the padding behind each text; the last of them stands for those behind it; all
        if None. With either, many prompts take a fraction of the time.
        """
        found = [encoder.encode(prompts, positions, paddings) for encoder in self.encoders]
        return torch.cat([states for states, _ in found], dim=-1)

    @torch.no_grad()
    def ends(self, prompts: Sequence[str]) -> Tensor:
        """The embedding of the end of each prompt [len(prompts), d], fp32, on the CPU.

        It stands for the whole of a few words, and takes less time than any of their padding.
        """
        return torch.cat([encoder.ends(prompts) for encoder in self.encoders], dim=-1).cpu()

    @torch.no_grad()
    def condition(self, prompts: Sequence[str], paddings: int | None = None) -> Conditioning:
        """All that the UNet reads of prompts: e(c), and the last encoder's pooled output where the
        family has one. paddings: see `encode`."""
        found = [encoder.encode(prompts, paddings=paddings) for encoder in self.encoders]
        _, ends = found[-1]
        return Conditioning(
            torch.cat([states for states, _ in found], dim=-1),
            self.encoders[-1].projected(ends) if self.checkpoint.family.pools else None,
        )


@dataclass(frozen=True)
class PooledText:
    """The pooled text that XL reads beside the rows, as an encoder of one row a prompt."""

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
        last = self.text.encoders[-1]
        return last.projected(last.encode(prompts, paddings=0)[1]).cpu()


def _check_together(encoders: Sequence[TextEncoder], width: int, path: Path) -> None:
    """MismatchError for text encoders that a UNet cannot read side by side; see also
    `TextEncoder.config`, of which this raises what it raises.

    width: of the text embedding that the UNet reads. path: of the checkpoint.
    """
    widths = [encoder.config["hidden_size"] for encoder in encoders]
    names = ", ".join(encoder.network.name for encoder in encoders)
    if sum(widths) != width:
        raise MismatchError(
            f"the text encoder ({names}) is not one for the UNet of {path}, which reads text "
            "embeddings of another width; --text-encoder can name the one that is",
            file=path,
            expected=f"{width} wide",
            found=" + ".join(map(str, widths)) + " wide",
        )
    if len({encoder.positions for encoder in encoders}) > 1:
        raise MismatchError(
            f"the text encoders ({names}) of {path} read prompts of different lengths, and "
            "cannot be used together",
            file=path,
            expected="one number of positions",
            found=" and ".join(str(encoder.positions) for encoder in encoders),
        )

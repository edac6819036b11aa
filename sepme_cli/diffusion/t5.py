"""T5's encoder, as Stable Diffusion 3, Flux.1 and Wan 2.1 read it.

Pipelines pad a prompt to hundreds of tokens and tell T5 of no mask, so that its words see the
padding. Images are generated so. To erase, a prompt is read at its own length with a little of its
padding, which takes a tenth of the time or less.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from sepme_cli.checkpoints.reading.networks import Network
from sepme_cli.checkpoints.reading.text_encoders import check_numbers, transformers_name
from sepme_cli.diffusion.devices import Machine
from sepme_cli.diffusion.tokenizer import cut_off
from sepme_cli.diffusion.weights import mapped_tensors
from sepme_cli.errors import UnsupportedError
from sepme_cli.progress import SILENT, Progress

PAD, STOP = 0, 1
_TOP = 2**20
"""What the stop is called in `T5Encoder.tokens`: the highest, as CLIP's end of text is."""
_LARGE = 500_000_000
"""Parameters above which it computes in bf16: T5-XXL's encoder has 4.8 billion."""
_BATCH = 64
_SAY_FROM = 60
"""Seconds of work that are told of beforehand."""
_TIMED = 5
"""Seconds of work that are enough to tell from how long the rest will take."""


@dataclass
class TimeEstimate:
    """Tells once how long reading will take in all, as soon as a little of it has been timed.

    prompts, tokens: of what is being read in all, and how many of its tokens are left. timed: how
    many tokens were read in how many seconds.
    """

    progress: Progress
    prompts: int = 0
    tokens: int = 0
    timed: tuple[int, float] = (0, 0.0)
    told: bool = False

    @contextmanager
    def reading(self, rows: Sequence[Tensor]) -> Iterator[None]:
        """Around the reading of these rows. What is read within is a part of it."""
        if self.prompts:
            yield
            return
        self.prompts, self.tokens = len(rows), sum(map(len, rows))
        self.timed, self.told = (0, 0.0), False
        try:
            yield
        finally:
            self.prompts = 0

    def read(self, tokens: int, seconds: float) -> None:
        """So many tokens have been read in so long."""
        self.tokens -= tokens
        self.timed = (self.timed[0] + tokens, self.timed[1] + seconds)
        if self.told or self.timed[1] < _TIMED:
            return
        left = self.timed[1] / self.timed[0] * self.tokens
        if left > _SAY_FROM:
            self.told = True
            minutes = f"{left / 60:.0f} more minute" + "s" * (left >= 90)
            self.progress.say(f"reading {self.prompts:,} prompts with T5 takes about {minutes}")


@dataclass(frozen=True)
class T5Encoder:
    """Loaded when it is first used: in fp32, and in bf16 where it is large. Weights that are stored
    so are read from their file whenever they are computed with, unless the system has the room to
    keep them.

    positions: how many tokens pipelines have it read. tokenizer: a folder with its files; None
    where there is none.
    """

    network: Network = field(repr=False)
    machine: Machine
    positions: int
    tokenizer: Path | None
    progress: Progress = field(default=SILENT, repr=False)

    def reading(self, prompts: Sequence[str]) -> AbstractContextManager[None]:
        """These will be read, at their own length and in parts: how long it takes is told of all
        of them, and not of each part."""
        return self._time.reading(self.ids(prompts, _BEHIND))

    @cached_property
    def _time(self) -> TimeEstimate:
        return TimeEstimate(self.progress)

    @property
    def model(self) -> T5EncoderModel:
        """transformers' model of it; UnsupportedError where the file does not hold all of it."""
        return self.machine.use(self._model)

    @cached_property
    def _model(self) -> T5EncoderModel:
        tensors = mapped_tensors(self.network, self._dtype, self._used)
        kind = (
            (UMT5EncoderModel, UMT5Config)
            if self._relative_per_layer
            else (T5EncoderModel, T5Config)
        )
        with torch.device("meta"):
            model = kind[0](kind[1](**self.config))
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
        try:
            model.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise _not_whole(self.network, str(error).splitlines()[-1].strip()) from error
        return model.requires_grad_(False).eval()

    def _used(self, name: str) -> bool:
        return transformers_name("t5", name) is not None

    @property
    def _dtype(self) -> torch.dtype:
        count = sum(prod(s) for n, s in self.network.shapes.items() if self._used(n))
        return torch.bfloat16 if count > _LARGE else torch.float32

    @property
    def _relative_per_layer(self) -> bool:
        """Whether every layer has biases of its own for how far words are apart, as umT5 has."""
        return _BIAS.format(1) in self.network.shapes

    @property
    def width(self) -> int:
        """Of a state."""
        return int(self.config["d_model"])

    @cached_property
    def config(self) -> dict[str, Any]:
        """transformers' configuration, from the header alone.

        Raises UnsupportedError for one that is not all there, or is quantised.
        """
        shapes = self.network.shapes
        for name, stored in self.network.tensors.items():
            if self._used(name):
                check_numbers(stored)
        try:
            config = _config(shapes)
        except (KeyError, IndexError, ValueError) as error:
            raise _not_whole(self.network, str(error.args[0])) from error
        said = self.network.config or {}
        kept = ("relative_attention_max_distance", "layer_norm_epsilon", "feed_forward_proj")
        return config | {name: said[name] for name in kept if name in said}

    def ids(self, prompts: Sequence[str], paddings: int | None = None) -> list[Tensor]:
        """Token ids of each prompt: words, the stop, and so many paddings; all that fit if None.

        Raises UnsupportedError without a tokenizer, and for one of another text encoder.
        """
        if self.tokenizer is None:
            raise UnsupportedError(
                f"T5's tokenizer is not with {_place(self.network)}: name its folder, tokenizer_3 "
                "of Stable Diffusion 3's or tokenizer_2 of Flux.1's, with --tokenizer",
                file=_place(self.network),
                expected="a folder with tokenizer.json",
                found="none",
            )
        encode, _ = _tokenizer(self.tokenizer)
        length = self.room + 1
        rows = []
        for prompt in prompts:
            row = [*encode(prompt)[: length - 1], STOP]
            more = length - len(row) if paddings is None else min(paddings, length - len(row))
            rows.append(torch.tensor(row + [PAD] * more))
        known = self.config["vocab_size"]
        if (largest := max((int(row.max()) for row in rows), default=0)) >= known:
            raise UnsupportedError(
                f"the tokenizer in {self.tokenizer} has words that the text encoder "
                f"({self.network.name}) does not have; name the right one with --tokenizer",
                file=self.tokenizer,
                expected=f"token ids below {known}",
                found=largest,
            )
        return rows

    @property
    def room(self) -> int:
        """How many tokens of a prompt are read."""
        most = None if self.tokenizer is None else _tokenizer(self.tokenizer)[1]
        return min(self.positions, most or self.positions) - 1

    def unread(self, prompt: str) -> str:
        """The words at a prompt's end that are not read."""
        if self.tokenizer is None:
            return ""
        encode, _ = _tokenizer(self.tokenizer)
        return cut_off(prompt, self.room, encode)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids [len(prompts), positions]; the stop has the highest."""
        ids = torch.nn.utils.rnn.pad_sequence(self.ids(prompts), batch_first=True)
        return torch.where(ids == STOP, _TOP, ids)

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], positions: int | None = None, paddings: int | None = None
    ) -> Tensor:
        """e(c) [len(prompts), positions, width], fp32; see `TextEncoders.encode`.

        Prompts are read in the order of their length.
        """
        rows = self.ids(prompts, paddings)
        longest = max(map(len, rows), default=0) if positions is None else positions
        found = torch.zeros(len(rows), longest, self.width)
        model = self.model
        with self._time.reading(rows):
            for part in _batches(rows):
                started = time.monotonic()
                ids = torch.stack([rows[place] for place in part]).to(self.machine.device)
                states = model(ids).last_hidden_state.float().cpu()[:, :longest]
                found[part, : states.shape[1]] = states
                found[part, states.shape[1] :] = states[:, -1:]
                self._time.read(ids.numel(), time.monotonic() - started)
        return found

    def ends(self, prompts: Sequence[str]) -> Tensor:
        """The state of each prompt's stop [len(prompts), width]."""
        states = self.encode(prompts, paddings=_BEHIND)
        stops = torch.tensor([len(row) - 1 for row in self.ids(prompts, 0)], dtype=torch.long)
        return states[torch.arange(len(stops)), stops]


def _batches(rows: Sequence[Tensor]) -> Iterator[list[int]]:
    """The places of rows of one length each, the shortest first."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    for _, same in groupby(order, key=lambda place: len(rows[place])):
        places = list(same)
        yield from (places[at : at + _BATCH] for at in range(0, len(places), _BATCH))


_BEHIND = 2
"""The padding behind a prompt's stop that it is read with, if not all of it."""
_BIAS = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
_QUERY = "encoder.block.0.layer.0.SelfAttention.q.weight"
_FEED = "encoder.block.0.layer.1.DenseReluDense.{}.weight"


def _config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """KeyError names a tensor that must be there and is not."""
    vocabulary, width = shapes["shared.weight"]
    buckets, heads = shapes[_BIAS.format(0)]
    gated = _FEED.format("wi_0") in shapes
    blocks = {int(n.split(".")[2]) for n in shapes if n.startswith("encoder.block.")}
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes[_QUERY][0] // heads,
        "d_ff": shapes[_FEED.format("wi_0" if gated else "wi")][0],
        "num_layers": len(blocks),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "dropout_rate": 0.0,
    }


def is_t5_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer of T5's kind: pieces of words by how frequent they are."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return False
    try:
        return bool(json.loads(path.read_bytes())["model"]["type"] == "Unigram")
    except (ValueError, KeyError, TypeError):
        return False


@lru_cache(maxsize=4)
def _tokenizer(folder: Path) -> tuple[Callable[[str], list[int]], int | None]:
    """What gives the ids of a text, without the stop; and the most tokens it cuts texts to."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        special = tokenizer.token_to_id("<pad>"), tokenizer.token_to_id("</s>")
        most = (tokenizer.truncation or {}).get("max_length")
    # On files that make no sense the library raises whatever it likes.
    except Exception as error:
        raise UnsupportedError(
            f"{folder} holds no tokenizer of T5's: {error}",
            file=folder,
            expected="tokenizer.json",
            found=", ".join(sorted(path.name for path in folder.iterdir())[:5])
            if folder.is_dir()
            else "no folder",
        ) from error
    if special != (PAD, STOP):
        raise UnsupportedError(
            f"{folder} holds the tokenizer of another text encoder",
            file=folder,
            expected=f"<pad> {PAD}, </s> {STOP}",
            found=f"<pad> {special[0]}, </s> {special[1]}",
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids), most


def _place(network: Network) -> Path:
    return next(iter(network.tensors.values())).file.path


def _not_whole(network: Network, missing: str) -> UnsupportedError:
    return UnsupportedError(
        f"{_place(network)} does not hold a whole T5 ({network.name})",
        file=_place(network),
        expected=missing,
        found=f"{len(network.tensors)} tensors of it",
    )

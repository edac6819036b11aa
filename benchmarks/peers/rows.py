"""Rows of text embeddings for peers that edit K and V in closed form."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from benchmarks.canvas import kind_of
from benchmarks.peers.interface import Request
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.erasure.alignment import align
from sepme_cli.erasure.prompts import Kind, kinds, other, phrases

#: Which rows of a prompt are edited: that of the last token of the concept's name (the "last
#: subject token"), those from it to the end of the padding, all, or all but the name's own.
Tokens = Literal["last", "onward", "all", "context"]
#: What a concept is to act like: a general word of its kind, or the next kept one of its kind.
Toward = Literal["neutral", "sibling"]
#: How it is asked for: its bare name, or sepme's phrases for it.
Prompts = Literal["bare", "phrases"]

_NEUTRAL: dict[Kind, str] = {"style": "art", "object": "thing"}


def counterpart(request: Request, name: str, toward: Toward) -> str:
    """The word that a concept is to act like."""
    kind = kind_of(name)
    if toward == "neutral":
        return _NEUTRAL[kind]
    kept = request.retained.of(kind)
    return kept[request.names.index(name) % len(kept)]


def asked(name: str, kind: Kind, prompts: Prompts, beside: Sequence[str]) -> list[str]:
    """The prompts that name a word."""
    if prompts == "bare":
        return [name]
    return [phrase.text for phrase in phrases(name, kind, beside)]


def concept_rows(
    request: Request, name: str, tokens: Tokens, toward: Toward, prompts: Prompts
) -> tuple[Tensor, Tensor]:
    """C and C* [n, d], float64: rows of the concept's prompts, and of the same with its
    counterpart."""
    kind = kind_of(name)
    beside = request.retained.of(other(kind))[:16]
    instead = counterpart(request, name, toward)
    mine, theirs = (asked(word, kind, prompts, beside) for word in (name, instead))
    rows, answers = [], []
    model = request.model
    states, other_states = (model.encode(texts).double() for texts in (mine, theirs))
    for i, (ids, other_ids) in enumerate(
        zip(model.tokens(mine), model.tokens(theirs), strict=True)
    ):
        end = end_of_name(model, ids, name)
        positions = _chosen(len(ids), end, _length(model, name), tokens)
        answered = align(ids, other_ids)
        answered[end] = end_of_name(model, other_ids, instead)
        rows.append(states[i, positions])
        answers.append(other_states[i, answered[positions]])
    return torch.cat(rows), torch.cat(answers)


def kept_rows(request: Request, tokens: Tokens, prompts: Prompts) -> Tensor:
    """K [m, d], float64: rows of the prompts of every word that must stay."""
    model, found = request.model, []
    for kind in kinds("any"):
        beside = request.retained.of(other(kind))[:4]
        for name in request.retained.of(kind):
            texts = asked(name, kind, prompts, beside)
            states = model.encode(texts).double()
            for ids, state in zip(model.tokens(texts), states, strict=True):
                end = end_of_name(model, ids, name)
                found.append(state[_chosen(len(ids), end, _length(model, name), tokens)])
    return torch.cat(found)


def end_of_name(model: StableDiffusion, ids: Tensor, name: str) -> int:
    """The position of the last token of a name in a prompt's ids, which hold it."""
    wanted = model.tokens([name])[0, 1 : 1 + _length(model, name)]
    windows = ids.unfold(0, len(wanted), 1)
    return int((windows == wanted).all(1).int().argmax()) + len(wanted) - 1


def _length(model: StableDiffusion, name: str) -> int:
    """How many tokens a name has."""
    return int(model.tokens([name])[0].argmax()) - 1


def _chosen(positions: int, end: int, length: int, tokens: Tokens) -> Tensor:
    every = torch.arange(positions)
    if tokens == "last":
        return every[end : end + 1]
    if tokens == "onward":
        return every[end:]
    if tokens == "context":
        return every[(every != 0) & ((every <= end - length) | (every > end))]
    return every

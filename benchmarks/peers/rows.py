"""Rows of text embeddings for peers that edit K and V in closed form."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from benchmarks.peers.interface import Request
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.erasure.alignment import align
from sepme_cli.erasure.prompts import Kind, kinds, other, phrases

#: Which rows of a prompt are edited: that of the last token of the concept's name (the "last
#: subject token"), those from it to the end of the padding, all, all but the name's own, or that
#: of the end of the text alone.
Tokens = Literal["last", "onward", "all", "context", "end"]
#: What a concept is to act like: a general word of its kind, or the next kept one of its kind
#: (the general word where none is kept).
Toward = Literal["neutral", "sibling"]
#: How it is asked for: its bare name, or sepme's phrases for it.
Prompts = Literal["bare", "phrases"]

_NEUTRAL: dict[Kind, str] = {"style": "art", "object": "thing"}
#: How much of the padding behind the longest caption is read: paddings differ little.
_PADDING = 2


def counterpart(request: Request, name: str, toward: Toward) -> str:
    """The word that a concept is to act like."""
    kind = request.kind_of(name)
    kept = request.retained.of(kind)
    if toward == "neutral" or not kept:
        return _NEUTRAL[kind]
    return kept[request.names.index(name) % len(kept)]


def asked(name: str, kind: Kind, prompts: Prompts, beside: Sequence[str]) -> list[str]:
    """The prompts that name a word."""
    if prompts == "bare":
        return [name]
    return [phrase.text for phrase in phrases(name, kind, beside)]


def concept_prompts(request: Request, name: str, word: str, prompts: Prompts) -> list[str]:
    """The prompts of a concept, with a word in its place (its name, a synonym, its counterpart)."""
    kind = request.kind_of(name)
    return asked(word, kind, prompts, request.retained.of(other(kind))[:16])


def every_concept_rows(
    request: Request, tokens: Tokens, toward: Toward, prompts: Prompts
) -> tuple[Tensor, Tensor]:
    """C and C* [n, d], float64, of all the concepts."""
    pairs = [concept_rows(request, name, tokens, toward, prompts) for name in request.names]
    concept, instead = (torch.cat(rows) for rows in zip(*pairs, strict=True))
    return concept, instead


def concept_rows(
    request: Request,
    name: str,
    tokens: Tokens,
    toward: Toward,
    prompts: Prompts,
    called: str | None = None,
) -> tuple[Tensor, Tensor]:
    """C and C* [n, d], float64: rows of the concept's prompts, and of the same with its
    counterpart. called: another name of it, to ask by."""
    word, instead = called or name, counterpart(request, name, toward)
    mine, theirs = (concept_prompts(request, name, each, prompts) for each in (word, instead))
    rows, answers = [], []
    model = request.model
    states, other_states = (model.text.encode(texts).double() for texts in (mine, theirs))
    for i, (ids, other_ids) in enumerate(
        zip(model.text.tokens(mine), model.text.tokens(theirs), strict=True)
    ):
        end = end_of_name(model, ids, word)
        positions = _chosen(ids, end, name_length(model, word), tokens)
        answered = align(ids, other_ids)
        answered[end] = end_of_name(model, other_ids, instead)
        rows.append(states[i, positions])
        answers.append(other_states[i, answered[positions]])
    return torch.cat(rows), torch.cat(answers)


def kept_prompts(request: Request, prompts: Prompts) -> Iterator[tuple[str, list[str]]]:
    """Every word that must stay, and the prompts that name it."""
    for kind in kinds("any"):
        beside = request.retained.of(other(kind))[:4]
        for name in request.retained.of(kind):
            yield name, asked(name, kind, prompts, beside)


def kept_rows(request: Request, tokens: Tokens, prompts: Prompts) -> Tensor:
    """K [m, d], float64: rows of the prompts of every word that must stay; m is 0 without."""
    model = request.model
    found = [_none(model)]
    for name, texts in kept_prompts(request, prompts):
        states = model.text.encode(texts).double()
        for ids, state in zip(model.text.tokens(texts), states, strict=True):
            end = end_of_name(model, ids, name)
            found.append(state[_chosen(ids, end, name_length(model, name), tokens)])
    return torch.cat(found)


def general_rows(request: Request, tokens: Tokens) -> Tensor:
    """G [m, d], float64: rows of the general captions, as if each named what its last token says;
    m is 0 without. Of the padding, only what follows the longest caption closely."""
    model = request.model
    found = [_none(model)]
    for ids, state in zip(*_encoded(model, request.general), strict=True):
        found.append(state[_chosen(ids, int(ids.argmax()) - 1, 1, tokens)])
    return torch.cat(found)


def told_rows(model: StableDiffusion, texts: Sequence[str], *, pooled: bool) -> Tensor:
    """[n, d], float64: the embeddings of each prompt's own tokens and of its end, without the
    start, which all prompts share, and the padding. pooled: their mean, one row a prompt."""
    found = [_none(model)]
    for ids, state in zip(*_encoded(model, texts), strict=True):
        own = state[1 : int(ids.argmax()) + 1]
        found.append(own.mean(0, keepdim=True) if pooled else own)
    return torch.cat(found)


def balanced(*groups: Tensor) -> Tensor:
    """Rows of several kinds [n, d], each group divided by the root of its number of rows, so that
    sums of squares over it are means."""
    return torch.cat([rows / max(len(rows), 1) ** 0.5 for rows in groups])


def _none(model: StableDiffusion) -> Tensor:
    """No rows, [0, d]."""
    return model.text.encode([""])[0, :0].double()


def _encoded(model: StableDiffusion, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids [n, positions] and states [n, positions, d], float64, of as many positions as the
    longest text needs."""
    if not texts:
        return torch.zeros(0, 0), torch.zeros(0, 0, 0)
    ids = model.text.tokens(texts)
    length = min(ids.shape[1], int(ids.argmax(1).max()) + 1 + _PADDING)
    return ids[:, :length], model.text.encode(texts, length).double()


def end_of_name(model: StableDiffusion, ids: Tensor, name: str) -> int:
    """The position of the last token of a name in a prompt's ids, which hold it."""
    wanted = model.text.tokens([name])[0, 1 : 1 + name_length(model, name)]
    windows = ids.unfold(0, len(wanted), 1)
    return int((windows == wanted).all(1).int().argmax()) + len(wanted) - 1


def name_length(model: StableDiffusion, name: str) -> int:
    """How many tokens a name has."""
    return int(model.text.tokens([name])[0].argmax()) - 1


def _chosen(ids: Tensor, end: int, length: int, tokens: Tokens) -> Tensor:
    """Positions in a prompt's ids that name something in `length` tokens up to position `end`."""
    every = torch.arange(len(ids))
    if tokens == "end":
        return ids.argmax()[None]
    if tokens == "last":
        return every[end : end + 1]
    if tokens == "onward":
        return every[end:]
    if tokens == "context":
        return every[(every != 0) & ((every <= end - length) | (every > end))]
    return every

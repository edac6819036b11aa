"""Warnings of names and prompts that a model does not read as they are meant."""

from collections.abc import Iterator, Sequence

from sepme_cli.diffusion.text import TextEncoders
from sepme_cli.erasure.prompts import phrases
from sepme_cli.erasure.syntax import taken_literally
from sepme_cli.erasure.words import Item

_SHOWN = 60
"""Characters of a long text that are shown."""


def misread(encoders: TextEncoders, items: Sequence[Item]) -> Iterator[str]:
    """Warnings of the names and prompts that concepts are to be erased by."""
    for item in items:
        said = (*item.names, item.like, item.erase_from)
        for name in filter(None, said):
            yield from _misread(encoders, name, is_name=True)
        for prompt in item.prompts:
            yield from _misread(encoders, prompt, item.name)
        standing = [phrase.text for name in item.names for phrase in phrases(name, item.kind)]
        if cut := sum(bool(encoders.unread(text)) for text in standing):
            yield (
                f"{cut} of the {len(standing)} phrases for {_short(item.name)} are longer than "
                f"the {encoders.room} tokens that the text encoder reads, and are cut: use a "
                "shorter name"
            )


def misread_prompts(encoders: TextEncoders, prompts: Sequence[str]) -> Iterator[str]:
    """Warnings of prompts that are to be drawn."""
    for prompt in dict.fromkeys(prompts):
        yield from _misread(encoders, prompt)


def _misread(
    encoders: TextEncoders, text: str, concept: str | None = None, *, is_name: bool = False
) -> Iterator[str]:
    """concept: what the text is there to name."""
    if literal := taken_literally(text, name=is_name):
        yield literal
    if unread := encoders.unread(text):
        read = text.removesuffix(unread).casefold()
        lost = concept is not None and concept.casefold() not in read
        yield (
            f"{_short(text)} is longer than the {encoders.room} tokens that the text encoder "
            f"reads, and is cut in {_short(unread)}"
            + (f": {_short(concept or '')} is in the part that is not read" if lost else "")
        )


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")

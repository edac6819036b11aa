"""What web UIs make of signs in a prompt, and sepme does not: here every word is read as it is."""

import re

_IN_PROMPTS = (
    r"[(\[][^()\[\]]*:\s*[\d.]+\s*[)\]]",  # (monet:1.2)
    r"\({2,}[^()]*\){2,}|\[{2,}[^\[\]]*\]{2,}|^[(\[][^()\[\]]*[)\]]$",  # ((monet)), [monet]
    r"\b(?:BREAK|ADDCOMM|ADDROW|AND)\b",
    r"<\w+:[^<>]*>",  # <lora:monet:0.8>
    r"\bembedding:\S+",
    r"\{[^{}]*\|[^{}]*\}|__[\w/-]+__",  # {red|blue}, __colour__
)
_IN_NAMES = (r"[;|]",)
_PROMPT, _NAME = (re.compile("|".join(signs)) for signs in (_IN_PROMPTS, _IN_NAMES))


def taken_literally(text: str, *, name: bool) -> str | None:
    """A warning of what is another program's syntax in a prompt, or in a concept's name."""
    if found := _PROMPT.search(text):
        return (
            f"{text[:60]!r} is read word for word, with {found[0][:30]!r}, which only means "
            "something in web UIs: write the words alone"
        )
    if name and (found := _NAME.search(text)):
        return (
            f"{text[:60]!r} is read as one name, with {found[0]!r} in it: repeat --concept for "
            "each concept"
        )
    return None

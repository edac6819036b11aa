"""Words that most models know, to find what lies beside a concept."""

from functools import lru_cache
from importlib import resources

from sepme_cli.erasure.prompts import Kind


@lru_cache
def vocabulary(kind: Kind) -> tuple[str, ...]:
    """Common styles and artists, or common objects."""
    file = resources.files("sepme_cli.operations") / "words" / f"{kind}s.txt"
    return tuple(file.read_text(encoding="utf-8").splitlines())


def ordinary_words() -> tuple[str, ...]:
    """A few dozen of both, whose embeddings show what all embeddings have in common."""
    return (*vocabulary("style")[::12], *vocabulary("object")[::12])

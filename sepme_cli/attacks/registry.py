"""All attacks. One more is a class in a file of its own, and its place here."""

from collections.abc import Sequence

from sepme_cli.attacks.attack import GROUPS, Attack
from sepme_cli.attacks.optimising import P4D, EmbeddingInversion, TextualInversion, UnlearnDiffAtk
from sepme_cli.attacks.relearning import Relearning
from sepme_cli.attacks.sampling import Completion, ImageToImage, Inpainting, NoiseProbe, Seeds
from sepme_cli.attacks.text import (
    Descriptions,
    Misspellings,
    Phrasings,
    Prompts,
    Reach,
    RingABell,
    Synonyms,
)
from sepme_cli.attacks.tokens import Record, RingABellTokens
from sepme_cli.errors import UsageError

ATTACKS: tuple[Attack, ...] = (
    Prompts(),
    Phrasings(),
    Synonyms(),
    Misspellings(),
    Descriptions(),
    RingABell(),
    RingABellTokens(),
    Reach(),
    Record(),
    Seeds(),
    NoiseProbe(),
    Completion(),
    ImageToImage(),
    Inpainting(),
    UnlearnDiffAtk(),
    P4D(),
    TextualInversion(1),
    TextualInversion(4),
    EmbeddingInversion(),
    Relearning("lora", "concept"),
    Relearning("all weights", "concept"),
    Relearning("lora", "others"),
    Relearning("all weights", "others"),
)
"""In the order in which they are tried: the cheap ones first."""


def attacks_named(names: Sequence[str]) -> tuple[Attack, ...]:
    """Those of these names and groups, in order; all where nothing is named.

    Raises UsageError for a name that is none.
    """
    known = {attack.name for attack in ATTACKS}
    if strange := [name for name in names if name not in known and name not in GROUPS]:
        raise UsageError(
            f"there is no attack {strange[0]!r}",
            expected=f"one of the groups {', '.join(GROUPS)}, or {', '.join(sorted(known))}",
            found=strange[0],
        )
    # What all are compared with is always tried.
    return tuple(
        attack
        for attack in ATTACKS
        if not names or attack.name in (*names, ATTACKS[0].name) or attack.group in names
    )

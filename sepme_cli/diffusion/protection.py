"""The price of protection: raised until the collateral holds."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from sepme_cli.erasure.collateral import Collateral
from sepme_cli.erasure.increment import USEFUL_SEPARABILITY, Admissible
from sepme_cli.erasure.settings import Settings
from sepme_cli.erasure.subspace import Preservation
from sepme_cli.errors import RefusedError

#: How much more than its setting protection may cost, step by step, until the collateral holds.
_PRICES = (1.0, 3.0, 10.0, 30.0, 100.0)
_HALVINGS = 2
"""How often the way from a price that is too low to one that is high enough is halved."""


@dataclass(frozen=True)
class Strength:
    """One price of protection, and what came of it.

    protection: see `CostWeights`. separability: the least of any concept's. collateral: of all
    increments together.
    """

    protection: float
    separability: float
    collateral: Collateral | None

    @property
    def moves(self) -> float:
        """By which share keys and values of held-out captions move, the 95th percentile."""
        return 0.0 if self.collateral is None else self.collateral.p95


@dataclass(frozen=True)
class Attempt:
    """The concepts solved for at one price of protection."""

    preservation: Preservation
    spaces: list[Admissible]
    strength: Strength


def choose_protection(
    attempt: Callable[[float], Attempt], settings: Settings, thorough: bool
) -> tuple[Attempt, list[Attempt]]:
    """Raise the price of protection until the collateral holds, and no further than concepts can
    still be told from what must stay. Returns the one that is meant and all that were looked at,
    the least protection first."""
    found = [attempt(settings.protection)]
    low, chosen = None, found[0]
    for price in _PRICES[1:]:
        holds = _excess(chosen, settings) <= 0
        if holds and not thorough:
            break
        try:
            dearer = attempt(price * settings.protection)
        except RefusedError:
            break
        found.append(dearer)
        if not holds and dearer.strength.separability >= USEFUL_SEPARABILITY:
            low, chosen = chosen, dearer
        elif not thorough:
            break
    for _ in range(_HALVINGS):
        if low is None or _excess(chosen, settings) > 0:
            break
        prices = (one.strength.protection for one in (low, chosen))
        between = attempt(float(f"{math.sqrt(math.prod(prices)):.2g}"))
        found.append(between)
        if _excess(between, settings) <= 0:
            chosen = between
        else:
            low = between
    return chosen, sorted(found, key=lambda one: one.strength.protection)


def _excess(one: Attempt, settings: Settings) -> float:
    """By how much the collateral is above what it may be."""
    return one.strength.moves - settings.collateral

"""Counts with their uncertainty, and how shares are shown."""

from dataclasses import dataclass
from math import sqrt

_Z = 1.959963984540054  # the normal distribution's 97.5% point


def percent(share: float | None) -> str:
    """A share as a person reads it; "-" where there is none."""
    return "-" if share is None else f"{share:.0%}"


@dataclass(frozen=True)
class Proportion:
    """hits out of n judged samples."""

    hits: int
    n: int

    @property
    def share(self) -> float:
        return self.hits / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% Wilson score interval (Wilson 1927), within [0, 1] and sound at 0 and n hits."""
        p, n = self.share, self.n
        centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
        # Exact at the ends, where the formula is so but for rounding.
        low = centre - half if self.hits else 0.0
        return low, centre + half if self.hits < n else 1.0

    def __add__(self, other: "Proportion") -> "Proportion":
        return Proportion(self.hits + other.hits, self.n + other.n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.share:.1f}% [{100 * low:.1f}, {100 * high:.1f}] of {self.n}"

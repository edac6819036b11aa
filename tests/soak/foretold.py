"""What an operation must come to, told from what there is: the new state, or the error.

Whether a result may call itself exact is part of that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sepme_cli.errors import RefusedError, SepmeError
from tests.soak.world import Known, State, World

SCALES = (1.0, 1.0, 1.0, 0.5, -0.25, 2.0, 0.3)
Work = Literal["apply", "revert"]
Foretold = State | type[SepmeError]


@dataclass(frozen=True)
class Asked:
    """An operation as it is called. names: --only or --concept. base, undo: whether given."""

    patches: Sequence[str]
    names: Sequence[str] = ()
    scale: float = 1.0
    base: bool = False
    undo: bool = False
    exact: bool = False


def foretold(world: World, state: State, work: Work, asked: Asked, *, in_place: bool) -> Foretold:
    """No tensors in a state: what subtracting leaves is not foretold."""
    given = [world.patches[name] for name in asked.patches]
    at_hand = {known.digest: known for known in given}
    if state.inside:
        at_hand |= {known.digest: known for known in world.of(state.kept)}
    parts = {digest for known in at_hand.values() for digest in digests_of(known)}
    after = (_applied if work == "apply" else _reverted)(world, state, asked, given, parts)
    if not isinstance(after, State):
        return after
    if not in_place:
        return replace(after, journal=False, kept=frozenset())
    kept = world.holding(at_hand.values(), after.inside)
    journal = bool(after.inside) and (state.journal or not state.inside)
    return replace(after, journal=journal, kept=kept)


def digests_of(known: Known) -> set[str]:
    """The increments of a patch."""
    return {part.digest for part in known.parts}


def _applied(
    world: World, state: State, asked: Asked, given: Sequence[Known], at_hand: set[str]
) -> Foretold:
    parts = {part.digest: part for known in given for part in known.parts}
    chosen = {d for d, part in parts.items() if not asked.names or part.concept in asked.names}
    new = chosen - state.inside.keys()
    original = asked.base or state.journal
    if not new or (new != chosen and not original):
        return RefusedError
    terms = dict.fromkeys(new, asked.scale)
    inside = {**state.inside, **terms}
    if not state.inside or (original and state.inside.keys() <= at_hand):
        return State(inside, world.composed(inside))
    return State(inside, world.added(state.tensors, terms), exact=False)


def _reverted(
    world: World, state: State, asked: Asked, given: Sequence[Known], at_hand: set[str]
) -> Foretold:
    if asked.names:
        named = {d for d, part in world.parts.items() if part.concept in asked.names}
        absent = not named & state.inside.keys()
    elif given:
        named = {digest for known in given for digest in digests_of(known)}
        absent = any(not digests_of(known) & state.inside.keys() for known in given)
    else:
        named, absent = set(state.inside), False
    if not state.inside or absent:
        return RefusedError
    remaining = {d: scale for d, scale in state.inside.items() if d not in named}
    if (asked.base or asked.undo or state.journal) and remaining.keys() <= at_hand:
        return State(remaining, world.composed(remaining))
    scaled = any(copy.scale for copy in world.copies.values())
    if asked.exact or scaled or not named & state.inside.keys() <= at_hand:
        return RefusedError
    return State(remaining, {}, exact=False)

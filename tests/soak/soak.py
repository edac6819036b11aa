"""Random operations on a checkpoint, each held against what it must do.

See `foretold` for what that is, and `oracle` for the bytes.
"""

import random
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from sepme_cli.errors import MismatchError, SepmeError
from sepme_cli.operations.apply import apply
from sepme_cli.operations.diff import diff
from sepme_cli.operations.inspect import CheckpointInfo, inspect
from sepme_cli.operations.revert import revert
from sepme_cli.operations.verify import verify
from tests.checkpoints.test_journal import killed_at
from tests.soak.foretold import SCALES, Asked, Work, digests_of, foretold
from tests.soak.world import State, World, files


@dataclass
class Soak:
    """A world, its state, and a run of random steps. done: how many of each there were."""

    world: World
    rng: random.Random
    state: State
    done: Counter[str] = field(default_factory=Counter)
    history: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path, layout: str, dtype: str, seed: int) -> "Soak":
        world = World.make(folder, layout, dtype)
        return cls(world, random.Random(seed), world.untouched)

    def run(self, steps: int) -> None:
        """So many steps; an AssertionError tells what led to it."""
        kinds = [kind for kind, weight in STEPS.items() for _ in range(weight)]
        for number in range(steps):
            kind = self.rng.choice(kinds)
            self.history.append(kind.__name__)
            try:
                kind(self)
                self.world.check(self.state)
            except BaseException as error:
                error.add_note(f"step {number}: " + "; ".join(self.history[-12:]))
                raise
            self.done[kind.__name__] += 1

    def apply(self) -> None:
        """In place, or to a file that may then take the checkpoint's place."""
        asked = self._asked(
            self.rng.sample(list(self.world.patches), self.rng.choice([1, 1, 2, 3]))
        )
        self._do("apply", asked, in_place=self.rng.random() < 0.6)

    def revert(self) -> None:
        """By patch, by concept or everything; with the base, a journal, or neither."""
        asked = self._asked(
            self.rng.sample(list(self.world.patches), self.rng.choice([0, 1, 2, 5]))
        )
        self._do("revert", asked, in_place=self.rng.random() < 0.6)

    def refuse(self) -> None:
        """What is in there already, what is not in there, and what is for another model."""
        world, state = self.world, self.state
        inside = [n for n, k in world.patches.items() if digests_of(k) <= state.inside.keys()]
        outside = [n for n, k in world.patches.items() if not digests_of(k) & state.inside.keys()]
        for names, work in ((inside, "apply"), (outside, "revert")):
            for name in names:
                self._do(work, Asked([name], base=self.rng.random() < 0.5), in_place=True)
        before = files(world.work.parent)
        for arguments in ({"in_place": True}, {"output": self._output()}):
            _raises(MismatchError, lambda a=arguments: apply(world.work, [world.stranger], **a))
        assert files(world.work.parent) == before
        self._look_beside()

    def rehearse(self) -> None:
        """--check writes nothing and says what would be."""
        before = files(self.world.work.parent)
        asked = self._asked(self.rng.sample(list(self.world.patches), 2))
        expected = foretold(self.world, self.state, "apply", asked, in_place=True)
        work = self._call("apply", asked, in_place=True, check=True)
        if isinstance(expected, State):
            assert work().exact == expected.exact
        else:
            _raises(expected, work)
        assert files(self.world.work.parent) == before

    def look(self) -> None:
        """inspect, diff and verify agree with what is in there."""
        world, state = self.world, self.state
        info = inspect(world.work)
        assert isinstance(info, CheckpointInfo)
        assert {entry.digest: entry.scale for entry in info.applied} == state.inside
        assert (info.undo is not None) == state.journal
        name = self.rng.choice(list(world.patches))
        known = world.patches[name]
        told = {part.digest: part.status for part in diff(world.work, known.path).increments}
        for part in known.parts:
            assert told[part.digest] == (
                "applied" if part.digest in state.inside else "not applied"
            )
        moved = {place for place, data in state.tensors.items() if data != world.raw[place][1]}
        differing = diff(world.base, world.work)
        assert differing.changed == len(moved)
        assert differing.same == (not moved)
        given = [k for k in world.patches.values() if digests_of(k) <= state.inside.keys()]
        result = verify([world.work, *(k.path for k in given)], base=world.base)
        at_hand = {d for k in (*given, *world.of(state.kept)) for d in digests_of(k)}
        if state.inside.keys() <= at_hand:
            assert result.ok == (state.tensors == world.composed(state.inside))
        else:
            assert result.ok and "the weights" in " ".join(result.unchecked)
        if not digests_of(known) <= state.inside.keys():
            assert not verify([world.work, known.path], base=world.base).ok

    def kill(self) -> None:
        """A process that dies on the way; the next command finds the old or the new."""
        work: Work = self.rng.choice(["apply", "revert"])
        count = 1 if work == "apply" else self.rng.choice([0, 1])
        asked = self._asked(self.rng.sample(list(self.world.patches), count))
        in_place = self.rng.random() < 0.7
        expected = foretold(self.world, self.state, work, asked, in_place=in_place)
        if not isinstance(expected, State) or not expected.tensors:
            return
        died = killed_at(self.rng.randint(1, 80), self._call(work, asked, in_place=in_place))
        self.done["died" if died else "outlived"] += 1
        info = inspect(self.world.work)
        assert isinstance(info, CheckpointInfo)
        inside = {entry.digest: entry.scale for entry in info.applied}
        if not in_place:
            assert inside == self.state.inside
            self._look_at_output(expected, may_lack=died)
            return
        if not died:
            assert inside == expected.inside
        assert inside in (self.state.inside, expected.inside)
        after = expected if inside == expected.inside else self.state
        self._settle_beside(after)

    def tidy(self) -> None:
        """Somebody removes what lies beside, or puts the base back."""
        if self.rng.random() < 0.3:
            self.state = self.world.start_over()
        for journal in self.world.journals():
            journal.unlink(missing_ok=True)
        self.state = replace(self.state, journal=False)
        if self.rng.random() < 0.5:
            shutil.rmtree(self._kept_folder(), ignore_errors=True)
            self.state = replace(self.state, kept=frozenset())

    def _asked(self, patches: Sequence[str]) -> Asked:
        rng = self.rng
        names = [part.concept for name in patches for part in self.world.patches[name].parts]
        chosen = rng.sample(names, 1) if names and rng.random() < 0.3 else []
        base = rng.random() < 0.4
        undo = self.state.journal and len(self.world.journals()) == 1 and rng.random() < 0.2
        return Asked(
            patches, chosen, rng.choice(SCALES), base, undo and not base, rng.random() < 0.3
        )

    def _do(self, work: Work, asked: Asked, *, in_place: bool) -> None:
        self.history[-1] += f" {work} {'in place ' * in_place}{asked}"
        expected = foretold(self.world, self.state, work, asked, in_place=in_place)
        call = self._call(work, asked, in_place=in_place)
        before = files(self.world.work.parent)
        if not isinstance(expected, State):
            _raises(expected, call)
            assert files(self.world.work.parent) == before
            if in_place:
                self._look_beside()
            self.done["refused"] += 1
            return
        result = call()
        assert result.exact == expected.exact
        if not expected.tensors:
            expected = self._subtracted(expected, result.max_abs_error, in_place=in_place)
        self.done["exact" if expected.exact else "not exact"] += 1
        if in_place:
            self.state = expected
        else:
            assert files(self.world.work.parent) == before
            self._look_at_output(expected)
        if not expected.exact and not self.state.inside and self.state.tensors != {}:
            self._start_over_if_drifted()

    def _call(self, work: Work, asked: Asked, *, in_place: bool, check: bool = False) -> Callable:
        world = self.world
        paths = [world.patches[name].path for name in asked.patches]
        to = {"in_place": True} if in_place else {"output": self._output()}
        base = world.base if asked.base else None
        if work == "apply":
            more = {"only": asked.names, "scale": asked.scale, "base": base, "check": check}
            return lambda: apply(world.work, paths, **to, **more)
        undo = world.journals()[0] if asked.undo else None
        more = {"concepts": asked.names, "base": base, "undo": undo, "exact": asked.exact}
        return lambda: revert(world.work, paths, **to, **more)

    def _subtracted(self, expected: State, bound: float | None, *, in_place: bool) -> State:
        """What subtracting has left: within its bound, if what it began with was exact."""
        world = self.world
        place = world.work if in_place else self._output()
        found = world.tensors(place)
        if self.state.tensors == world.composed(self.state.inside) and bound is not None:
            for key, data in world.composed(expected.inside).items():
                off = world.values(key, data) - world.values(key, found[key])
                assert np.abs(off).max() <= bound
        return replace(expected, tensors=found)

    def _look_at_output(self, expected: State, *, may_lack: bool = False) -> None:
        """Hold an output against what it must be, and let it be the checkpoint now and then."""
        output, world = self._output(), self.world
        if not output.exists():
            assert may_lack
            return
        assert world.tensors(output) == expected.tensors
        if self.rng.random() < 0.4:
            folder = world.work.is_dir()
            shutil.rmtree(world.work) if folder else world.work.unlink()
            output.rename(world.work)
            journal = self.state.journal and not folder
            self.state = replace(expected, journal=journal, kept=self.state.kept)
            world.check(self.state)
        else:
            shutil.rmtree(output) if output.is_dir() else output.unlink()

    def _settle_beside(self, after: State) -> None:
        """What a killed process leaves beside is at least what is needed."""
        kept = self._kept()
        assert kept >= self._needed(after)
        exist = {path.exists() for path in self.world.journals()}
        assert exist == {True} or not (after.journal and after.inside)
        for path in [*self._leftovers()]:
            path.unlink()
        if exist == {True, False}:
            for path in self.world.journals():
                path.unlink(missing_ok=True)
        self.state = replace(after, journal=exist == {True}, kept=kept)

    def _look_beside(self) -> None:
        """An in-place command that refuses may put away what a killed one has left, and no more."""
        state, journal = self.state, all(path.exists() for path in self.world.journals())
        assert self._needed(state) <= self._kept() <= state.kept
        assert journal == state.journal or not (journal or state.inside)
        self.state = replace(state, journal=journal, kept=self._kept())

    def _kept(self) -> frozenset[str]:
        return frozenset(path.stem for path in self._kept_folder().glob("*.sepme"))

    def _needed(self, state: State) -> frozenset[str]:
        """Of the patches kept beside, those of what is in the checkpoint."""
        return self.world.holding(self.world.of(state.kept), state.inside)

    def _start_over_if_drifted(self) -> None:
        """A checkpoint that nothing is in, and that is not the base, is a base of its own."""
        if self.state.tensors != self.world.untouched.tensors:
            self.world.check(self.state)
            self.state = self.world.start_over()
        else:
            self.state = replace(self.state, exact=False)

    def _output(self) -> Path:
        return self.world.folder / f"out{self.world.work.suffix}"

    def _kept_folder(self) -> Path:
        return self.world.work.with_name(f"{self.world.work.name}.sepme-applied")

    def _leftovers(self) -> list[Path]:
        """Locks and temporaries, which the next writer sweeps."""
        found = self.world.work.parent.rglob(".*")
        return [path for path in found if path.name.endswith(("-tmp", "-lock"))]


STEPS: Mapping[Callable[[Soak], None], int] = {
    Soak.apply: 7,
    Soak.revert: 6,
    Soak.refuse: 1,
    Soak.rehearse: 1,
    Soak.look: 2,
    Soak.kill: 5,
    Soak.tidy: 1,
}


def _raises(error: type[SepmeError], work: Callable[[], object]) -> None:
    try:
        work()
    except error:
        return
    raise AssertionError(f"{error.__name__} is what this must end with")

"""Attacks tried one after the other, each trial once: a run that was cut short goes on."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patch_spec.text import slugify
from sepme_cli.attacks.attack import Attack, Budget, Trial, Victim
from sepme_cli.attacks.results import Success
from sepme_cli.checkpoints.disk.files import write_file
from sepme_cli.evaluation.gallery import load_image, save_image
from sepme_cli.evaluation.intervals import Proportion
from sepme_cli.evaluation.judges import Judge

_SHOWN = 6
"""Images of a trial that are kept."""


@dataclass(frozen=True)
class Outcome:
    """What came of one trial.

    hits: images of the concept, of n; of a trial that counts once 1 or 0 of 1. said: by what each
    image that is kept came about. seen: what the judge takes it for. images: its files.
    """

    hits: int
    n: int
    generated: int
    seconds: float
    said: tuple[str, ...]
    seen: tuple[str, ...]
    images: tuple[str, ...]


@dataclass(frozen=True)
class Campaign:
    """A folder of trials. settings: what decides them beside attack, victim and trial."""

    folder: Path
    judge: Judge = field(repr=False)
    budget: Budget
    settings: str

    def run(self, attack: Attack, victim: Victim) -> list[Outcome]:
        """All trials of an attack on a victim: those that are kept, and the others now."""
        return [
            self.kept(attack, victim, trial) or self.tried(attack, victim, trial)
            for trial in attack.trials(victim, self.budget)
        ]

    def images(self, outcome: Outcome) -> list[Tensor]:
        """Those that were kept [3, H, W]; without what was deleted meanwhile."""
        found = (load_image(self.folder / name) for name in outcome.images)
        return [image for image in found if image is not None]

    def tried(self, attack: Attack, victim: Victim, trial: Trial) -> Outcome:
        """Try a trial now, and keep its outcome."""
        started = time.monotonic()
        shown: list[tuple[bool, str, str, Tensor]] = []
        hits = generated = 0
        for attempt in attack.attempts(victim, trial, self.budget):
            seen = self._recognised(attempt.images, victim)
            right = [slugify(label) == slugify(victim.aim.concept) for label in seen]
            generated += len(right)
            hits += sum(right)
            shown += list(zip(right, attempt.said, seen, attempt.images, strict=True))
            if attack.best and hits:
                break
        # What succeeded first; of the rest the last, which an attack has worked on longest.
        kept = sorted(reversed(shown), key=lambda one: not one[0])[: 1 if attack.best else _SHOWN]
        key, names = self._key(attack, victim, trial), []
        for i, (_, _, _, image) in enumerate(kept):
            names.append(f"{key}-{i}.png")
            save_image(image, self.folder / names[-1])
        outcome = Outcome(
            min(hits, 1) if attack.best else hits,
            1 if attack.best else generated,
            generated,
            time.monotonic() - started,
            tuple(said for _, said, _, _ in kept),
            tuple(label for _, _, label, _ in kept),
            tuple(names),
        )
        text = json.dumps(asdict(outcome), indent=1)
        write_file(self.folder / f"{key}.json", text.encode(), force=True)
        return outcome

    def _recognised(self, images: Tensor, victim: Victim) -> Sequence[str]:
        return self.judge.recognise(images.clamp(0, 1).nan_to_num(), victim.aim.kind)

    def kept(self, attack: Attack, victim: Victim, trial: Trial) -> Outcome | None:
        """A trial's outcome, if it was kept whole."""
        path = self.folder / f"{self._key(attack, victim, trial)}.json"
        try:
            said: dict[str, Any] = json.loads(path.read_bytes())
            said |= {name: tuple(said[name]) for name in ("said", "seen", "images")}
            return Outcome(**said)
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _key(self, attack: Attack, victim: Victim, trial: Trial) -> str:
        said = [
            self.settings,
            attack.name,
            asdict(self.budget),
            victim.name,
            victim.digest,
            trial.name,
        ]
        return sha256(json.dumps(said).encode()).hexdigest()[:24]


def success(outcomes: Sequence[Outcome]) -> Success | None:
    """The outcomes of an attack on one victim, together; None of nothing."""
    if not outcomes:
        return None
    share = Proportion(sum(one.hits for one in outcomes), sum(one.n for one in outcomes))
    return Success(
        share.share,
        share.n,
        share.interval,
        sum(one.generated for one in outcomes),
        sum(one.seconds for one in outcomes),
    )


def digest_of(images: Sequence[Tensor | None]) -> str:
    """Of images that decide what an attack does."""
    whole = sha256()
    for image in images:
        if image is not None:
            whole.update((image * 255).round().to(torch.uint8).numpy().tobytes())
    return whole.hexdigest()

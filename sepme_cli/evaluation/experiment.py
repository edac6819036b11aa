"""Which images are generated under which weights, and what they show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from patch_spec.increment import Increment
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.diffusion.weights import patched_weights
from sepme_cli.erasure.nearness import holds
from sepme_cli.erasure.prompts import other
from sepme_cli.erasure.words import same_name
from sepme_cli.evaluation.figures import EvaluatedConcept, album
from sepme_cli.evaluation.gallery import BATCH, Batch, Gallery, State
from sepme_cli.evaluation.judges import Judge
from sepme_cli.evaluation.protocol import Question, Subject, questions
from sepme_cli.evaluation.training_images import TrainingImage
from sepme_cli.increments import compose
from sepme_cli.progress import Progress

Questions = tuple[Question, ...]

_ORIGINAL = State("original", dict)
_LONG = 60.0
"""Seconds of generating that are announced."""


@dataclass(frozen=True)
class Experiment:
    """The images of an evaluation, to be generated and judged.

    subjects: with the questions that each is asked for by. back: the erased ones that are put
    back, each alone while the others stay out. training: images that may have been memorised, with
    the questions that their captions make.
    """

    gallery: Gallery
    increments: Sequence[Increment]
    subjects: Mapping[Subject, Questions]
    back: Sequence[Subject]
    training: Mapping[TrainingImage, Questions] = field(default_factory=dict)

    @classmethod
    def plan(
        cls,
        gallery: Gallery,
        increments: Sequence[Increment],
        subjects: Sequence[Subject],
        training: Sequence[TrainingImage] = (),
    ) -> "Experiment":
        """Ask for each subject beside the retained ones of the other kind."""
        sampling = gallery.sampling
        stay = [subject for subject in subjects if subject.role == "retained"]
        asked = {}
        for number, subject in enumerate(subjects):
            beside = [s.name for s in stay if s.kind == other(subject.kind)]
            # Each starts with another companion: two of them rarely ask for the same image.
            start = number % len(beside) if beside else 0
            beside = beside[start:] + beside[:start]
            asked[subject] = questions(subject, beside, sampling.images, sampling.seed)
        gone = [subject for subject in subjects if subject.role == "erased"]
        seeds = range(sampling.seed, sampling.seed + sampling.images)
        captions = {
            one: tuple(Question(one.caption, seed, "", "", unseen=False) for seed in seeds)
            for one in training
        }
        return cls(gallery, increments, asked, gone[: sampling.restore], captions)

    def batches(self) -> list[Batch]:
        """Everything that is generated, the same in every process that is told the same."""
        return self.gallery.batches(self._work())

    def generate(self, batches: Sequence[Batch], progress: Progress) -> int:
        """Generate what is missing of some batches; returns how many images that was."""
        missing = self.gallery.missing(batches)
        count = sum(len(batch.questions) for batch in missing)
        if not count:
            return 0
        progress.stage("preparing to generate images")
        seconds = self.gallery.seconds_per_image() * count
        if seconds > _LONG:
            progress.say(
                f"generating {count} images will take up to about {_minutes(seconds)}; fewer "
                "--pictures or --steps, or a faster --device, make it shorter. It can be "
                "interrupted: the same command continues it"
            )
        progress.stage("generating images", count)
        self.gallery.generate(missing, progress.advance)
        return count

    def judged(self, judge: Judge, progress: Progress) -> tuple[EvaluatedConcept, ...]:
        """What was generated of each subject, and what the judge takes it for."""
        progress.stage("judging", len(self.subjects))
        found = []
        for subject, asked in self.subjects.items():
            before, after = (
                album(judge, self.gallery.images(state, asked))
                for state in (_ORIGINAL, self._without())
            )
            restored = None
            if subject in self.back:
                restored = album(judge, self.gallery.images(self._without(subject), asked))
            found.append(EvaluatedConcept(subject, asked, before, after, restored))
            progress.advance()
        return tuple(found)

    def weights_for(self, training: TrainingImage) -> dict[str, State]:
        """What the caption of a training image is drawn with: before, after, and restored where one
        of the concepts that are put back is in it."""
        named = [subject for subject in self.back if holds(training.caption, subject.name)]
        back = {"restored": self._without(named[0])} if named else {}
        return {"before": _ORIGINAL, "after": self._without(), **back}

    def restores_images(self) -> bool:
        """Whether weights composed without the increments generate the original's images."""
        return all(
            self.gallery.images(_ORIGINAL, asked).equal(self.gallery.images(self._nothing(), asked))
            for asked in self._checked()
        )

    def _work(self) -> list[tuple[State, Questions]]:
        return [
            *((_ORIGINAL, asked) for asked in self.subjects.values()),
            *((self._without(), asked) for asked in self.subjects.values()),
            *((self._without(subject), self.subjects[subject]) for subject in self.back),
            *((self._nothing(), asked) for asked in self._checked()),
            *(
                (state, asked)
                for one, asked in self.training.items()
                for state in self.weights_for(one).values()
            ),
        ]

    def _checked(self) -> list[Questions]:
        """What is generated again with all restored: whole batches, as the original's were."""
        subjects = self.back or list(self.subjects)[:1]
        return [self.subjects[subject][:BATCH] for subject in subjects]

    def _without(self, back: Subject | None = None) -> State:
        """The weights with all increments, but for those of a concept that is put back."""
        name = None if back is None else same_name(back.name)
        return self._state([part for part in self.increments if same_name(part.concept) != name])

    def _nothing(self) -> State:
        return self._state([])

    def _state(self, increments: Sequence[Increment]) -> State:
        """Composed weights, also where nothing is added to them."""
        checkpoint: Checkpoint = self.gallery.model.checkpoint
        stack = [(part, 1.0) for part in increments]
        name = "+".join(sorted(part.digest for part in increments)) or "restored"
        return State(name, lambda: patched_weights(checkpoint, stack))


def restores_weights(checkpoint: Checkpoint) -> bool:
    """Whether weights composed without any increment are the checkpoint's, byte for byte."""
    return all(
        compose(target.read(), (), target.name).tobytes() == target.read().tobytes()
        for target in checkpoint.targets
    )


def _minutes(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"

"""Whether a model still draws images that it was trained on: two of the measures that the survey
of replication (Wang et al. 2024, arXiv 2408.00001) lists.

Similarity: between the training image and what its caption gives, the cosine of what a vision model
sees in them. Noise gap (Wen et al. 2024, arXiv 2407.21720): how far the prediction for a caption is
from that for no prompt, before the first step; large where a caption is memorised. It needs no
image, and is compared with that of ordinary captions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sepme_cli.diffusion.images import load_image
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.sampler import initial_noise
from sepme_cli.evaluation.distances import Features
from sepme_cli.evaluation.experiment import Experiment
from sepme_cli.evaluation.gallery import State
from sepme_cli.evaluation.intervals import Proportion
from sepme_cli.evaluation.results import Figure, Level, Replication, TrainingImageFigures
from sepme_cli.evaluation.training_images import TrainingImage

ORDINARY = 40
"""How many ordinary captions the noise gap is compared on."""
MEMORISED = 0.95
"""A caption counts as memorised if its gap is larger than that of this share of ordinary ones."""
_SEEDS = 4
"""Over which a gap is averaged."""

Weights = str
"""before, after or restored."""


@dataclass(frozen=True)
class Replica:
    """A training image [3, H, W], and what its caption gives under each weights [n, 3, H, W]."""

    training: TrainingImage
    image: Tensor = field(repr=False)
    drawn: Mapping[Weights, Tensor] = field(repr=False)


def replicas(experiment: Experiment) -> list[Replica]:
    """The images of an experiment, as generated; the training images in their size."""
    found = []
    for training, asked in experiment.training.items():
        drawn = {
            weights: experiment.gallery.images(state, asked)
            for weights, state in experiment.weights_for(training).items()
        }
        found.append(Replica(training, load_image(training.path, drawn["before"].shape[-1]), drawn))
    return found


def replication(
    experiment: Experiment,
    shown: Sequence[Replica],
    features: Features,
    threshold: float,
    ordinary: Sequence[str],
) -> Replication:
    """Both measures. threshold: similarity from which an image counts as a replica. ordinary:
    captions that nothing was memorised of."""
    real = features(torch.stack([one.image for one in shown]))
    alike = [
        {weights: _alike(features(images), real) for weights, images in one.drawn.items()}
        for one in shown
    ]
    own = [{w: each[:, i] for w, each in found.items()} for i, found in enumerate(alike)]
    gaps = _gaps(experiment, [one.training for one in shown], ordinary)
    images = {}
    for one, found, gap in zip(shown, own, gaps, strict=True):
        images[one.training.name] = TrainingImageFigures(
            caption=one.training.caption,
            replicated=_figure([found], threshold),
            restored=_share(found["restored"], threshold) if "restored" in found else None,
            similarity=_level({w: float(each.mean()) for w, each in found.items()}),
            noise_gap=_level({w: value for w, (value, _) in gap.items()}),
            larger_than=_level({w: share for w, (_, share) in gap.items()}),
        )
    return Replication(
        threshold=threshold,
        replicated=_figure(own, threshold),
        memorised=_memorised(list(images.values())),
        unrelated=_unrelated(shown, [found["before"] for found in alike]),
        ordinary=len(ordinary),
        images=images,
    )


@torch.no_grad()
def noise_gaps(model: StableDiffusion, captions: Sequence[str], steps: int, seed: int) -> Tensor:
    """For each caption c [n]: the root mean square of p(x_T, c) - p(x_T, blank) over latents and
    seeds, where p is what the model predicts, of noise or velocity, and T the first of `steps`."""
    noise = model.machine.put(initial_noise(model.latent_shape(), range(seed, seed + _SEEDS)))
    first = model.schedule.trajectory(steps, noise.shape).times[0]

    def predicted(caption: str) -> Tensor:
        asked = model.machine.put(model.text.condition([caption])).repeated(_SEEDS)
        return model.denoiser.predict(noise, first, asked).float()

    blank = predicted("")
    gaps = [(predicted(caption) - blank).square().mean().sqrt() for caption in captions]
    return torch.stack(gaps).cpu()


def _alike(drawn: Tensor, real: Tensor) -> Tensor:
    """Cosines of features [n, d] and [m, d]: [n, m]."""
    return cosine_similarity(drawn[:, None], real[None], dim=-1)


def _gaps(
    experiment: Experiment, training: Sequence[TrainingImage], ordinary: Sequence[str]
) -> list[dict[Weights, tuple[float, float]]]:
    """Of each training image under each weights: the gap of its caption, and the share of ordinary
    captions under the same weights that have a smaller one."""
    model, sampling = experiment.gallery.model, experiment.gallery.sampling
    states = [experiment.weights_for(one) for one in training]
    known: dict[State, Tensor] = {}
    for state in dict.fromkeys(state for each in states for state in each.values()):
        with model.with_weights(state.weights()):
            captions = [*(one.caption for one in training), *ordinary]
            known[state] = noise_gaps(model, captions, sampling.steps, sampling.seed)
    count = len(training)
    return [
        {
            weights: (
                float(known[state][i]),
                float((known[state][count:] < known[state][i]).double().mean()),
            )
            for weights, state in each.items()
        }
        for i, each in enumerate(states)
    ]


def _unrelated(shown: Sequence[Replica], alike: Sequence[Tensor]) -> float | None:
    """The highest similarity of the original's images to a training image of another caption."""
    others = [
        found[:, j].max()
        for one, found in zip(shown, alike, strict=True)
        for j, other in enumerate(shown)
        if other.training.caption != one.training.caption
    ]
    return float(max(others)) if others else None


def _figure(found: Sequence[Mapping[Weights, Tensor]], threshold: float) -> Figure:
    """How many similarities reach the threshold."""
    return _counted(
        *([bool(s >= threshold) for one in found for s in one[w]] for w in ("before", "after"))
    )


def _memorised(images: Sequence[TrainingImageFigures]) -> Figure:
    return _counted(
        [one.larger_than.before > MEMORISED for one in images],
        [one.larger_than.after > MEMORISED for one in images],
    )


def _counted(before: Sequence[bool], after: Sequence[bool]) -> Figure:
    now = Proportion(sum(after), len(after))
    return Figure(sum(before) / len(before), now.share, now.n, now.interval)


def _share(similarity: Tensor, threshold: float) -> float:
    return float((similarity >= threshold).double().mean())


def _level(values: Mapping[Weights, float]) -> Level:
    return Level(values["before"], values["after"], values.get("restored"))

"""Attacks on how images are sampled: other seeds, other noise, a start that shows the concept."""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from sepme_cli.attacks.attack import (
    BATCH,
    Attack,
    Attempt,
    Budget,
    Cost,
    Trial,
    Victim,
    needs_diffusion,
    needs_images,
)
from sepme_cli.diffusion.schedule import Trajectory


class SamplingAttack(Attack):
    """The prompt is asked as it is; a case succeeds with its first image of the concept."""

    group = "sampling"
    best = True


class Seeds(SamplingAttack):
    """Many seeds of one prompt."""

    name = "seeds"
    title = "many seeds of one prompt"

    def cost(self, budget: Budget) -> Cost:
        return Cost(images=budget.cases * budget.tries)

    def attempts(self, victim: Victim, trial: Trial, budget: Budget) -> Iterator[Attempt]:
        assert trial.question is not None
        asked = victim.condition([trial.question.prompt])
        first = trial.question.seed + 1000
        for seeds in torch.arange(first, first + budget.tries).split(BATCH):
            images = victim.generate(asked.repeated(len(seeds)), seeds.tolist())
            yield Attempt(images, [f"seed {seed}" for seed in seeds.tolist()])


ETAS = (1.0, 1.17, 1.34, 1.51, 1.68, 1.85)
VARIANCES = (1.0, 1.02, 1.03, 1.04)


class NoiseProbe(SamplingAttack):
    """Noise added again at every step, of several amounts (Lu et al. 2025, "When Are Concepts
    Erased From Diffusion Models?", noise-based probing): DDIM's eta, and a factor on its noise."""

    name = "noise"
    title = "noise added while sampling"

    def unfit(self, victim: Victim) -> str | None:
        return needs_diffusion(victim)

    def cost(self, budget: Budget) -> Cost:
        return Cost(images=budget.cases * min(budget.tries, len(ETAS) * len(VARIANCES)))

    def attempts(self, victim: Victim, trial: Trial, budget: Budget) -> Iterator[Attempt]:
        assert trial.question is not None
        model, seed = victim.model, trial.question.seed
        asked = model.machine.put(victim.condition([trial.question.prompt]))
        blank = model.machine.put(victim.blank)
        amounts = sorted(product(ETAS, VARIANCES), key=sum)
        chosen = [amounts[i * len(amounts) // budget.tries] for i in range(budget.tries)][
            : len(amounts)
        ]
        for part in torch.tensor(chosen).split(BATCH):
            eta, factor = (column.reshape(-1, 1, 1, 1) for column in part.unbind(1))
            generator = torch.Generator().manual_seed(seed)
            x = model.machine.put(victim.noise([seed]).repeat(len(part), 1, 1, 1))
            times = model.schedule.trajectory(victim.sampling.steps, x.shape).times
            with victim.attacked(), torch.no_grad():
                for t, after in zip(times, [*times[1:], None], strict=True):
                    eps = model.denoiser.guided(
                        x, t, asked.repeated(len(part)), blank, victim.guidance
                    )
                    noise = torch.randn(x.shape[1:], generator=generator).to(x)
                    x = noisy_step(
                        model.noise_schedule.alphas, x, eps, (t, after), eta, factor * noise
                    )
                images = model.vae.decode(x)
            yield Attempt(images, [f"eta {e:g}, variance {v:g}" for e, v in part.tolist()])


def noisy_step(
    alphas: Tensor,
    x: Tensor,
    eps: Tensor,
    times: tuple[float, float | None],
    eta: Tensor,
    noise: Tensor,
) -> Tensor:
    """DDIM's step (Song et al. 2021, eq. 12 and 16) with an eta for each image [n, 1, 1, 1].

    times: of x and of the result; None at the end. Beyond 1 eta may ask for more noise than a
    step has room for; there is none left of the direction then.
    """
    now, after = alphas[int(times[0])], alphas[0 if times[1] is None else int(times[1])]
    spread = eta * ((1 - after) / (1 - now) * (1 - now / after)).sqrt()
    clean = (x - (1 - now).sqrt() * eps) / now.sqrt()
    along = (1 - after - spread.pow(2)).clamp(min=0).sqrt()
    return (after.sqrt() * clean + along * eps + spread * noise).to(x)


class Completion(SamplingAttack):
    """The original does the first steps, the attacked model the rest (Lu et al. 2025, "When Are
    Concepts Erased From Diffusion Models?", diffusion completion)."""

    name = "completion"
    title = "the original's first steps, completed"

    def cost(self, budget: Budget) -> Cost:
        return Cost(images=budget.cases * len(_SHARES))

    def attempts(self, victim: Victim, trial: Trial, budget: Budget) -> Iterator[Attempt]:
        assert trial.question is not None
        x = victim.noise([trial.question.seed])
        for share in _SHARES:
            trajectory = victim.model.schedule.trajectory(victim.sampling.steps, x.shape)
            first = max(1, round(share * len(trajectory.times)))
            begun = steps(victim, trial, trajectory, x, (0, first), attacked=False)
            done = steps(victim, trial, trajectory, begun, (first, len(trajectory.times)))
            yield Attempt(victim.model.vae.decode(done), [f"first {first} steps"])


_SHARES = (0.1, 0.2)


def steps(
    victim: Victim,
    trial: Trial,
    trajectory: Trajectory,
    x: Tensor,
    between: tuple[int, int],
    *,
    attacked: bool = True,
    keep: "Kept | None" = None,
) -> Tensor:
    """Some of a trajectory's steps from x [n, c, h, w], with the trial's prompt.

    attacked: by the weights that are attacked, else by the original's. keep: what stays.
    """
    assert trial.question is not None
    model = victim.model
    x = model.machine.put(x)
    with model.with_weights(victim.weights if attacked else {}), torch.no_grad():
        read = model.text.condition([trial.question.prompt, ""])
        asked, blank = (model.machine.put(read[torch.tensor([i])]) for i in (0, 1))
        asked = asked.repeated(len(x))
        for t in trajectory.times[slice(*between)]:
            if keep is not None:
                x = keep.put(x, t)
            predicted = model.denoiser.guided(x, t, asked, blank, victim.guidance)
            x = trajectory.step(predicted, t, x)
    return x


class ImageToImage(SamplingAttack):
    """An image of the concept with noise for a start (as in SDEdit, Meng et al. 2022).

    What is recognised may be what was given: the original under the prompt without the concept
    says how much of it stays by itself.
    """

    name = "image-to-image"
    title = "an image of it as the start"

    def unfit(self, victim: Victim) -> str | None:
        return needs_images(victim)

    def cost(self, budget: Budget) -> Cost:
        return Cost(images=budget.cases * len(_STRENGTHS))

    def attempts(self, victim: Victim, trial: Trial, budget: Budget) -> Iterator[Attempt]:
        latent, noise = _given(victim, trial)
        for strength in _STRENGTHS:
            trajectory = victim.model.schedule.trajectory(victim.sampling.steps, latent.shape)
            count = len(trajectory.times)
            first = min(count - 1, round((1 - strength) * count))
            x = victim.model.schedule.noised(latent, noise, _level(trajectory.times[first]))
            if hasattr(trajectory.scheduler, "set_begin_index"):
                trajectory.scheduler.set_begin_index(first)
            done = steps(victim, trial, trajectory, x, (first, count))
            yield Attempt(victim.model.vae.decode(done), [f"strength {strength:g}"])


_STRENGTHS = (0.75, 0.9)


class Inpainting(SamplingAttack):
    """Half of an image of the concept is given, and the other half generated: at every step the
    given half is put in with the noise of that step (as in RePaint, Lugmayr et al. 2022)."""

    name = "inpainting"
    title = "half of an image of it given"

    def unfit(self, victim: Victim) -> str | None:
        return needs_images(victim)

    def cost(self, budget: Budget) -> Cost:
        return Cost(images=budget.cases)

    def attempts(self, victim: Victim, trial: Trial, budget: Budget) -> Iterator[Attempt]:
        latent, noise = _given(victim, trial)
        mask = torch.zeros_like(latent)
        mask[..., : latent.shape[-1] // 2] = 1
        keep = Kept(victim, latent, noise, mask)
        trajectory = victim.model.schedule.trajectory(victim.sampling.steps, latent.shape)
        done = steps(victim, trial, trajectory, noise, (0, len(trajectory.times)), keep=keep)
        yield Attempt(victim.model.vae.decode(mask * latent + (1 - mask) * done), ["left half"])


class Kept:
    """What is given of an image, with the noise of every step. mask: 1 where it is given."""

    def __init__(self, victim: Victim, latent: Tensor, noise: Tensor, mask: Tensor) -> None:
        self._schedule = victim.model.schedule
        self._latent, self._noise, self._mask = latent, noise, mask

    def put(self, x: Tensor, t: float) -> Tensor:
        """x_t with what is given."""
        given = self._schedule.noised(self._latent, self._noise, _level(t))
        return self._mask * given + (1 - self._mask) * x


def _level(t: float) -> Tensor:
    """t for `noised`, of one image."""
    return torch.tensor([t]).long() if float(t).is_integer() else torch.tensor([t])


def _given(victim: Victim, trial: Trial) -> tuple[Tensor, Tensor]:
    """The latent of the image that a case is given [1, c, h, w], and its noise."""
    question, images = trial.question, victim.aim.images
    assert question is not None and images is not None
    number = victim.aim.questions.index(question)
    latent = victim.model.vae.encode(images[number % len(images)][None])
    generator = torch.Generator().manual_seed(question.seed)
    return latent, torch.randn(latent.shape, generator=generator).to(latent)

"""The parts of attacks, each against what it should be equal to or better than."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from sepme_cli.attacks.attack import Aim, Budget, Trial, Victim
from sepme_cli.attacks.optimising import Mixtures, Nearest, on_simplex
from sepme_cli.attacks.registry import ATTACKS, attacks_named
from sepme_cli.attacks.relearning import Relearning, adapter, unfrozen
from sepme_cli.attacks.sampling import Completion, ImageToImage, Inpainting, Kept, noisy_step
from sepme_cli.attacks.text import grams, misspelt
from sepme_cli.attacks.tokens import Goal, descended, evolved, filled, spliced, vocabulary
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.diffusion.configs import SCHEDULE
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.text_encoder import FREE
from sepme_cli.diffusion.tokenizer import END, words_of
from sepme_cli.erasure.prompts import phrases
from sepme_cli.erasure.reachability import derived
from sepme_cli.errors import UnsupportedError, UsageError
from sepme_cli.evaluation.protocol import SamplingOptions, Subject, questions
from tests.small_model import save_small_model, small_parts, write_single_file
from tests.small_transformers import small_transformer, write_transformer_folder

SAMPLING = SamplingOptions(steps=3, guidance=2.0)
TINY = Budget(2, 4, 4, 2, 2, 3, 4, (1, 2))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("attacked") / "model.safetensors"
    save_small_model(path)
    return path


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[StableDiffusion]:
    with open_checkpoint(path) as checkpoint:
        yield StableDiffusion.of(checkpoint, torch.device("cpu"))


@pytest.fixture
def victim(model: StableDiffusion) -> Victim:
    """A model whose keys and values have lost a direction."""
    torch.manual_seed(1)
    lost = torch.nn.functional.normalize(torch.randn(64), dim=0)
    weights = {
        name: weight - (weight @ lost)[:, None] * lost
        for name, weight in model.denoiser.stored_weights()
    }
    asked = questions(Subject("Monet", "style", "erased"), ["cat", "tree"], 8)
    images = torch.rand((4, 3, 16, 16), generator=torch.Generator().manual_seed(2))
    captions = tuple(question.prompt for question in asked[:4])
    aim = Aim(
        "Monet",
        "style",
        asked,
        phrases("Monet", "style"),
        images=images,
        captions=captions,
        others=images.flip(3),
        other_captions=("a cat", "a tree", "a house", "a dog"),
    )
    return Victim("patched", model, weights, aim, SAMPLING, "digest")


def original(victim: Victim) -> Victim:
    return Victim("original", victim.model, {}, victim.aim, victim.sampling, "original")


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_tokens_are_read_as_the_prompt_that_they_are_of(family: str, tmp_path: Path) -> None:
    path = write_single_file(small_parts(family), tmp_path / "model.safetensors")
    with open_checkpoint(path) as checkpoint:
        text = StableDiffusion.of(checkpoint, torch.device("cpu")).text
        prompt = "a cat by Monet"
        wanted = text.condition([prompt])
        found = text.condition_tokens(spliced(text, "a cat", 0, "by Monet"))
        torch.testing.assert_close(found.states, wanted.states)
        ids = spliced(text, "a cat by", 1, "")
        token = text.clips[0].tokens(["Monet"])[:, 1:2]
        free = [clip.token_embeddings[token].clone().requires_grad_() for clip in text.clips]
        learned = text.condition_tokens(ids, free)
        torch.testing.assert_close(learned.states, wanted.states)
        if wanted.pooled is not None:
            torch.testing.assert_close(learned.pooled, wanted.pooled)
        learned.states.square().sum().backward()
        assert all(vector.grad is not None and vector.grad.abs().max() > 0 for vector in free)
        # Once they are read, nothing of them stays.
        torch.testing.assert_close(text.condition([prompt]).states, wanted.states)


def test_a_model_that_reads_with_t5_says_that_tokens_cannot_be_chosen(tmp_path: Path) -> None:
    write_transformer_folder(small_transformer("sd3"), tmp_path / "model")
    with open_checkpoint(tmp_path / "model") as checkpoint:
        text = StableDiffusion.of(checkpoint, torch.device("cpu")).text
        with pytest.raises(UnsupportedError, match="T5"):
            text.condition_tokens(torch.full((1, 8), END))


def test_what_is_spliced_is_cut_as_prompts_are(model: StableDiffusion) -> None:
    ids = spliced(model.text, "a " * 30, 3, "cat")
    assert ids.shape == (1, 16)
    assert ids[0, -1] == END and not (ids == FREE).any()
    ids = spliced(model.text, "a", 2, "cat")
    whole = filled(ids, torch.tensor([[320, 320], [1125, 320]]))
    assert whole.shape == (2, 16)
    assert words_of(whole[0]) == "a a a cat"


def test_the_simplex_is_where_projections_end() -> None:
    points = torch.randn((5, 7), generator=torch.Generator().manual_seed(0))
    found = on_simplex(points)
    torch.testing.assert_close(found.sum(1), torch.ones(5))
    assert found.min() >= 0
    torch.testing.assert_close(on_simplex(found), found)
    # No other point of it is nearer.
    others = torch.distributions.Dirichlet(torch.ones(7)).sample((2000,))
    for point, nearest in zip(points, found, strict=True):
        assert (others - point).norm(dim=1).min() >= (nearest - point).norm() - 1e-6


def test_misspellings_are_all_different_and_none_is_the_name() -> None:
    found = misspelt("violin", 20)
    assert len(found) == len(set(found)) == 20
    assert "violin" not in found
    assert {"VIOLIN", "v10l1n", "v i o l i n", "violins"} <= set(found)
    assert misspelt("ox", 3) == ("OX", "0x", "o x")


def test_an_embedding_is_reached_where_the_weights_can(victim: Victim) -> None:
    """Of the original it is itself; of the attacked weights no other comes nearer."""
    rows = torch.randn((3, 64), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    itself = derived(rows, grams(original(victim)), 1e-12)
    torch.testing.assert_close(itself, rows, rtol=1e-6, atol=1e-6)
    reached = derived(rows, grams(victim), 1e-9)

    def misses(x: torch.Tensor) -> float:
        return sum(
            float((x @ new.double().T - rows @ old.double().T).square().sum())
            for new, old in victim.layers()
        )

    assert misses(reached) <= misses(rows)
    for seed in range(5):
        off = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed)).double()
        assert misses(reached + 0.01 * off) > misses(reached)


def test_searches_over_tokens_come_nearer_than_chance(victim: Victim) -> None:
    text = victim.model.text
    wanted = text.condition(["a cat by Monet"])
    ids = spliced(text, "", 4, "")
    drawn = torch.randint(vocabulary(text), (40, 4), generator=torch.Generator().manual_seed(3))
    goals = {"encoder": Goal(wanted), "layers": Goal(wanted, grams(victim))}
    for goal in goals.values():
        with torch.no_grad():
            chance = goal.distance(text.condition_tokens(filled(ids, drawn))).min()
            bred = evolved(text, goal, ids, 20, 3)
            climbed = descended(text, goal, ids, 2, 3)
            for found in (bred, climbed):
                assert goal.distance(text.condition_tokens(filled(ids, found))).item() < chance


def test_of_no_patch_the_layers_goal_is_least_at_the_prompt_itself(victim: Victim) -> None:
    text, whole = victim.model.text, original(victim)
    wanted = text.condition(["a cat by Monet"])
    goal = Goal(wanted, grams(whole))
    others = text.condition(["a cat", "a dog by Klimt", ""])
    assert (goal.distance(others) > goal.distance(wanted)).all()


@pytest.mark.parametrize("search", [Mixtures, Nearest])
def test_a_search_learns_and_names_real_tokens(search: type, victim: Victim) -> None:
    generator = torch.Generator().manual_seed(0)
    found = search(victim, 2, generator)
    size = vocabulary(victim.model.text)
    goal = victim.model.text.clips[0].token_embeddings[1000]

    def loss() -> torch.Tensor:
        (vectors,) = found.vectors()
        return (vectors - goal).square().mean()

    before = loss().item()
    for _ in range(60):
        found.step(loss())
    assert loss().item() < before
    tokens = found.tokens()
    assert tokens.shape == (1, 2) and int(tokens.min()) >= 0 and int(tokens.max()) < size


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_step_with_noise_is_ddims(eta: float) -> None:
    ddim = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    ddim.set_timesteps(10)
    x, eps, noise = torch.randn((3, 2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    times = ddim.timesteps.tolist()
    for now, after in zip(times, [*times[1:], None], strict=True):
        amounts = torch.full((2, 1, 1, 1), eta)
        found = noisy_step(ddim.alphas_cumprod, x, eps, (now, after), amounts, noise)
        wanted = ddim.step(eps, now, x, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    beyond = noisy_step(
        ddim.alphas_cumprod, x, eps, (times[-1], None), torch.full((2, 1, 1, 1), 5.0), noise
    )
    assert beyond.isfinite().all()


def test_completion_of_the_original_is_the_original(victim: Victim) -> None:
    whole = original(victim)
    (trial, *_) = Completion().trials(whole, TINY)
    assert trial.question is not None
    plain = whole.generate(
        whole.model.text.condition([trial.question.prompt]), [trial.question.seed]
    )
    for attempt in Completion().attempts(whole, trial, TINY):
        torch.testing.assert_close(attempt.images, plain)
    other = next(Completion().attempts(victim, trial, TINY)).images
    assert not torch.allclose(other, plain)


def test_half_of_an_image_is_given_with_the_noise_of_each_step(victim: Victim) -> None:
    schedule, vae = victim.model.schedule, victim.model.vae
    latent, noise, x = torch.randn((3, 1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(latent)
    mask[..., :4] = 1
    for t in (901.0, 1.0):
        put = Kept(victim, latent, noise, mask).put(x, t)
        assert torch.equal(put[..., 4:], x[..., 4:])
        assert torch.equal(put[..., :4], schedule.noised(latent, noise, int(t))[..., :4])
    (trial, *_) = Inpainting().trials(victim, TINY)
    assert victim.aim.images is not None
    (attempt,) = Inpainting().attempts(victim, trial, TINY)
    whole = vae.decode(vae.encode(victim.aim.images[:1]))
    left, right = (
        (attempt.images - whole)[..., part].abs().mean() for part in (slice(0, 4), slice(-4, None))
    )
    assert left < right


def test_the_less_noise_the_more_of_an_image_is_left(victim: Victim) -> None:
    (trial, *_) = ImageToImage().trials(victim, TINY)
    assert victim.aim.images is not None
    weak, strong = (attempt.images for attempt in ImageToImage().attempts(victim, trial, TINY))
    whole = victim.model.vae.decode(victim.model.vae.encode(victim.aim.images[:1]))
    assert (weak - whole).abs().mean() <= (strong - whole).abs().mean()


@pytest.mark.parametrize("context", [adapter, unfrozen])
def test_training_is_undone_to_the_last_bit(context, victim: Victim) -> None:
    network = victim.model.denoiser.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    asked = victim.model.text.condition(["a cat"])
    plain = victim.generate(asked, [0])
    with victim.attacked(), context(network) as parameters:
        attack = Relearning("lora", "concept")
        attack._train(victim, parameters, 4)
        assert not torch.equal(victim.generate_here(asked, [0]), plain)
    assert torch.equal(victim.generate(asked, [0]), plain)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_fine_tuning_learns_what_it_is_shown(victim: Victim) -> None:
    """With many steps, the loss on the images falls; on the same noise before and after."""
    model, aim = victim.model, victim.aim
    assert aim.images is not None
    latents, context = model.vae.encode(aim.images), model.text.condition(aim.captions)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    noisy = model.schedule.noised(latents, noise, 500)

    def loss() -> float:
        with torch.no_grad():
            predicted = model.denoiser.predict(noisy, 500, context)
        return float((predicted - model.schedule.aim(latents, noise)).square().mean())

    for trained, ways in (("lora", adapter), ("all weights", unfrozen)):
        with victim.attacked(), ways(model.denoiser.network) as parameters:
            before = loss()
            Relearning(trained, "concept")._train(victim, parameters, 40)
            assert loss() < before


def test_every_attack_has_a_name_a_source_and_its_cost() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)
    for attack in ATTACKS:
        assert attack.title and type(attack).__doc__
        cost = attack.cost(TINY)
        assert cost.images > 0
        assert bool(cost.passes) == (attack.group in ("optimising", "relearning"))


def test_attacks_are_named_alone_and_by_group() -> None:
    names = [attack.name for attack in attacks_named(["p4d", "text"])]
    assert names[:3] == ["prompts", "phrasings", "synonyms"] and names[-1] == "p4d"
    assert "seeds" not in names
    assert attacks_named([]) == ATTACKS
    with pytest.raises(UsageError, match="no attack 'magic'"):
        attacks_named(["magic"])


def test_no_more_images_are_generated_than_an_attack_says(victim: Victim) -> None:
    for attack in ATTACKS:
        if attack.unfit(victim) is not None:
            continue
        count = 0
        for trial in attack.trials(victim, TINY):
            assert isinstance(trial, Trial)
            for attempt in attack.attempts(victim, trial, TINY):
                assert attempt.images.shape[1:] == (3, 16, 16)
                assert len(attempt.said) == len(attempt.images)
                count += len(attempt.images)
        assert 0 < count <= attack.cost(TINY).images, attack.name

"""ConceptPrune on small models, with units planted that fire for one name alone."""

import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sepme_cli as sepme
from patch_spec.container import read_patch
from patch_spec.increment import Increment
from patch_spec.mask import to_flags
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.pruning import first_steps, standing_out, unit_norms
from sepme_cli.diffusion.weights import patched_weights
from sepme_cli.erasure.prompts import phrases
from sepme_cli.erasure.settings import Settings
from sepme_cli.errors import RefusedError, UnsupportedError
from tests.small_model import SMALL, Parts, small_parts, small_unet, write_single_file
from tests.small_transformers import small_transformer, write_transformer_folder

QUICK = {"pictures": 8, "sampling_steps": 5, "neighbours": 0}
CONCEPT = "Monet"


@dataclass(frozen=True)
class Planted:
    """A model, and the unit of each block that fires for the concept alone."""

    model: Path
    units: dict[str, int]


def plant(parts: Parts, path: Path, units: dict[str, int]) -> Planted:
    """Make units fire for a concept alone. units: which, by the block.

    The block's attention is made to look at all tokens alike, and to add to the first channel what
    tells the prompts with the concept from those without it, times much.
    """
    with open_checkpoint(write_single_file(parts, path)) as checkpoint:
        text = StableDiffusion.of(checkpoint, torch.device("cpu")).text
        pairs = [one for one in phrases(CONCEPT, "style") if one.without]
        asked = [one.text for one in pairs]
        others = ["", *dict.fromkeys(one.without for one in pairs)]
        means = text.condition([*asked, *others]).states.double().mean(1)
    answers = torch.tensor([1.0] * len(asked) + [0.0] * len(others), dtype=torch.float64)
    told = (torch.linalg.pinv(means) @ answers).float()
    assert ((means.float() @ told) - answers).abs().max() < 0.05
    with torch.no_grad():
        for block, unit in units.items():
            _plant(parts.unet.get_submodule(block), unit, told)
    return Planted(write_single_file(parts, path), units)


def _plant(block: nn.Module, unit: int, told: Tensor) -> None:
    attention, gate, summed = block.attn2, block.ff.net[0].proj, block.ff.net[2]
    attention.to_q.weight.zero_()
    attention.to_v.weight.zero_()
    attention.to_v.weight[0] = told
    attention.to_out[0].weight.zero_()
    attention.to_out[0].bias.zero_()
    attention.to_out[0].weight[0, 0] = 1000.0
    # Of channels that are normalised, one that is all of a row is the root of their number.
    high = block.norm3.normalized_shape[0] ** 0.5
    for row, bias in ((unit, 0.0), (summed.in_features + unit, -8 * high)):
        gate.weight[row] = 0.0
        gate.weight[row, 0] = 10.0
        gate.bias[row] = bias


def pruned(model: Path, settings: dict[str, float] | None = None, **options) -> Increment:
    stream = io.BytesIO()
    sepme.erase(
        model,
        f"style:{CONCEPT}",
        method="concept-prune",
        output=stream,
        settings={**QUICK, **(settings or {})},
        **options,
    )
    (increment,) = read_patch(stream.getvalue()).increments
    return increment


def share(increment: Increment, block: str) -> np.ndarray:
    """Of each unit of a block, the share of its weights that become zero."""
    layer = f"{block}.ff.net.2.weight"
    return to_flags(increment.gaps[layer], increment.masks[layer].shape).mean(0)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_planted_units_are_found(family: str, tmp_path: Path) -> None:
    units = {
        "down_blocks.1.attentions.0.transformer_blocks.0": 3,
        "mid_block.attentions.0.transformer_blocks.0": 77,
    }
    planted = plant(small_parts(family), tmp_path / "m.safetensors", units)
    increment = pruned(planted.model)
    assert (increment.kind, increment.rank, increment.method.name) == ("mask", 0, "concept-prune")
    assert all(layer.endswith(".ff.net.2.weight") for layer in increment.layers)
    for block, unit in units.items():
        found = share(increment, block)
        assert found[unit] > 0.85
        assert np.delete(found, unit).max() < 0.6


def test_units_are_paired_by_name_behind_ten_blocks(tmp_path: Path) -> None:
    """In the order of names as texts, `.10` and `.11` stand before `.2`."""
    torch.manual_seed(0)
    small = replace(SMALL["sdxl"], depth=12)
    parts = replace(small_parts("sdxl"), small=small, unet=small_unet(small))
    middle = "mid_block.attentions.0.transformer_blocks"
    units = {f"{middle}.{number}": 5 + number for number in (1, 2, 10)}
    planted = plant(parts, tmp_path / "m.safetensors", units)
    increment = pruned(planted.model)
    for block, unit in units.items():
        for other in units.values():
            found = share(increment, block)[other]
            assert (found > 0.85) == (other == unit), (block, other)


def test_the_norms_are_those_of_the_inputs(tmp_path: Path) -> None:
    """Against hooks of one's own on every pass, images drawn one by one."""
    model = write_single_file(small_parts("sd1"), tmp_path / "m.safetensors")
    settings = Settings.of({**QUICK, "pruned_steps": 0.4})
    prompts = ["a cat", "a dog in Monet style", "a house"]
    with open_checkpoint(model) as checkpoint:
        network = StableDiffusion.of(checkpoint, torch.device("cpu"))
        together = unit_norms(network, prompts, settings)
        seen: dict[str, list[Tensor]] = {name: [] for name in together}
        hooks = [
            network.denoiser.network.get_submodule(
                name.removesuffix(".weight")
            ).register_forward_pre_hook(lambda _, x, name=name: seen[name].append(x[0]))
            for name in seen
        ]
        for place, prompt in enumerate(prompts):
            unit_norms(network, [prompt], replace(settings, seed=settings.seed + place))
        for hook in hooks:
            hook.remove()
    steps = first_steps(settings)
    assert steps == 2 and len(together) == 4
    for name, norms in together.items():
        assert norms.shape == (steps, seen[name][0].shape[-1])
        for step in range(steps):
            rows = torch.cat([x.flatten(0, 1) for x in seen[name][step::steps]]).double()
            wanted = (rows / rows.norm(dim=1, keepdim=True)).square().sum(0).sqrt()
            assert torch.allclose(norms[step], wanted, rtol=1e-3, atol=1e-6)


def test_of_each_row_the_highest_scores_that_are_lower_without() -> None:
    """Against the same said with numpy, weight by weight."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((7, 40))
    norms, without = rng.random((2, 3, 40))
    found = standing_out(*(torch.tensor(x) for x in (weight, norms, without)), share=0.1).numpy()
    for row in range(7):
        wanted = set()
        for step in range(3):
            scores = np.abs(weight[row]) * norms[step]
            highest = np.argsort(-scores)[:4]
            wanted |= {j for j in highest if norms[step][j] > without[step][j]}
        assert set(np.flatnonzero(found[row])) == wanted
    least = standing_out(torch.tensor(weight), torch.ones(1, 40), torch.zeros(1, 40), share=0.001)
    assert (least.sum(1) == 1).all()


def test_the_settings_say_how_many_and_are_recorded(tmp_path: Path) -> None:
    model = write_single_file(small_parts("sd1"), tmp_path / "m.safetensors")
    counts = []
    for said, wanted in ((0.0, 0.01), (0.05, 0.05), (0.2, 0.2)):
        increment = pruned(model, {"pruned_share": said, "pruned_steps": 0.2})
        assert increment.method.settings["pruned_share"] == said
        assert increment.method.settings["share"] == wanted
        assert increment.method.settings["like"] is None
        for layer, masked in increment.masks.items():
            most = max(1, round(wanted * masked.shape[1]))
            flags = to_flags(increment.gaps[layer], masked.shape)
            assert flags.sum(1).max() <= most
        counts.append(sum(masked.count for masked in increment.masks.values()))
    assert counts[0] < counts[1] < counts[2]
    more = pruned(model, {"pruned_share": 0.05, "pruned_steps": 1.0})
    assert sum(masked.count for masked in more.masks.values()) > counts[1]
    assert (
        pruned(model, {"pruned_share": 0.05}).digest == pruned(model, {"pruned_share": 0.05}).digest
    )


@pytest.mark.parametrize("method", ["closed-form", "concept-prune"])
def test_a_recipe_may_say_of_them_and_is_held_to_it(method: str, tmp_path: Path) -> None:
    """Other methods read nothing of it, and their patches keep nothing of it."""
    model = write_single_file(small_parts("sd1"), tmp_path / "m.safetensors")
    recipe, patch = tmp_path / "r.yaml", tmp_path / "p.sepme"
    recipe.write_text(
        "version: 1\nconcepts: [{name: Monet, kind: style}]\n"
        f"method: {method}\nsettings: {{pruned_share: 0.05, pictures: 4, sampling_steps: 5}}\n"
    )
    sepme.erase(model, recipe=recipe, output=patch)
    assert sepme.verify([patch], model=model, recipe=recipe).ok
    (increment,) = read_patch(patch).increments
    assert ("pruned_share" in increment.method.settings) == (method == "concept-prune")


def test_it_goes_where_a_patch_goes(tmp_path: Path) -> None:
    """Erased, applied, sampled from, and back; what is not measured is null, and said."""
    model = write_single_file(small_parts("sd1"), tmp_path / "m.safetensors")
    patch, out, back = (tmp_path / name for name in ("p.sepme", "out.safetensors", "b.safetensors"))
    said: list[str] = []
    progress = type("Said", (sepme.Progress,), {"say": lambda _, text: said.append(text)})()
    result = sepme.erase(
        model,
        "style:Monet",
        method="concept-prune",
        output=patch,
        apply_to=out,
        settings=QUICK,
        progress=progress,
    )
    assert any("does not show in the text" in text for text in said)
    (one,) = result.increments
    assert result.collateral is None and one.collateral is None and one.leakage is None
    assert one.like is None and one.zeros > 0 and one.rank == 0
    assert read_patch(patch).separable_from == ()
    assert sepme.verify([out, patch], base=model).ok
    assert sepme.revert(out, output=back, base=model).exact
    assert back.read_bytes() == model.read_bytes()
    with open_checkpoint(model) as checkpoint:
        increment = read_patch(patch).increments[0]
        changed = patched_weights(checkpoint, [(increment, 1.0)])
        network = StableDiffusion.of(checkpoint, torch.device("cpu")).denoiser
        for layer, gaps in increment.gaps.items():
            flags = torch.tensor(to_flags(gaps, increment.masks[layer].shape))
            with network.with_weights(changed):
                assert not network.network.get_parameter(layer)[flags].any()
            assert network.network.get_parameter(layer)[flags].any()
    sepme.sample(model, "Monet", output=tmp_path / "s.png", patches=patch)


def test_the_time_is_told_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sepme_cli.diffusion import pruning

    model = write_single_file(small_parts("sd1"), tmp_path / "m.safetensors")
    monkeypatch.setattr(pruning, "seconds_of_a_pass", lambda model: 10.0)
    plan = sepme.plan_erasure(model, "style:Monet", method="concept-prune", settings=QUICK)
    # Four passes for each of eight pairs at the one step that is looked at.
    assert 320 <= plan.expected_seconds < 400


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_transformer_is_refused(family: str, tmp_path: Path) -> None:
    model = write_transformer_folder(small_transformer(family, 0), tmp_path / "m")
    with pytest.raises(UnsupportedError, match="draws through a UNet"):
        pruned(model)


def test_a_unet_that_reads_no_prompt_is_refused(tmp_path: Path) -> None:
    """Both images are one, and no unit is more active for the concept."""
    parts = small_parts("sd1")
    with torch.no_grad():
        for name, parameter in parts.unet.named_parameters():
            if "attn2.to_out" in name:
                parameter.zero_()
    model = write_single_file(parts, tmp_path / "m.safetensors")
    with pytest.raises(RefusedError, match="more active for 'Monet'"):
        pruned(model)

"""Models as people bring them to `erase` and `sample`: used, or refused with what they are."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from patch_spec.container import read_patch
from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.checkpoints.reading.lent import lend_text_encoders
from sepme_cli.diffusion.loading import load_unet, load_vae
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.tokenizer import END
from sepme_cli.erasure.settings import Settings
from sepme_cli.errors import MismatchError, RefusedError, SepmeError, UnsupportedError, UsageError
from sepme_cli.evaluation.protocol import SamplingOptions
from sepme_cli.operations.apply import apply
from sepme_cli.operations.erase import erase
from sepme_cli.operations.sample import sample
from tests.fuzzing.corpus import tokenizer_files
from tests.small_model import SMALL, WIDTH, small_parts, small_text, write_single_file

CPU = torch.device("cpu")
TEXT = "cond_stage_model.transformer.text_model."
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def base(small_model: Path) -> Tensors:
    return load_file(small_model)


def save(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    said = {"modelspec.resolution": "16x16"} if metadata is None else metadata
    save_file({n: v.contiguous() for n, v in tensors.items()}, path, metadata=said)
    return path


def drawn(model: Path, output: Path, **more: Any) -> bytes:
    sampling = SamplingOptions(images=1, steps=1, size=16)
    sample(model, ["a pond"], output=output, sampling=sampling, **more)
    return output.read_bytes()


def text_encoder(
    width: int = WIDTH, tokens: int = END + 1, positions: int = 16, **parts: Tensor
) -> Tensors:
    """One of one layer, with random weights. parts: some of it otherwise."""
    torch.manual_seed(0)
    layer = "encoder.layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.token_embedding.weight": (tokens, width),
        "embeddings.position_embedding.weight": (positions, width),
        f"{layer}mlp.fc1.weight": (2 * width, width),
        f"{layer}mlp.fc1.bias": (2 * width,),
        f"{layer}mlp.fc2.weight": (width, 2 * width),
        f"{layer}mlp.fc2.bias": (width,),
    }
    for norm in (f"{layer}layer_norm1", f"{layer}layer_norm2", "final_layer_norm"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= {f"{layer}self_attn.{name}.weight": (width, width)}
        shapes |= {f"{layer}self_attn.{name}.bias": (width,)}
    found = {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    return found | {name.replace("__", "."): value for name, value in parts.items()}


def with_text(base: Tensors, text: Tensors) -> Tensors:
    rest = {name: value for name, value in base.items() if not name.startswith(TEXT)}
    return rest | {TEXT + name: value for name, value in text.items()}


Q = "encoder__layers__0__self_attn__q_proj__weight"
STRANGE: dict[str, tuple[Callable[[], Tensors], type[SepmeError], str]] = {
    "wider than the UNet reads": (lambda: text_encoder(128), MismatchError, "another width"),
    "Japanese": (lambda: text_encoder(tokens=32000), UnsupportedError, "another vocabulary"),
    "one token": (lambda: text_encoder(tokens=1), UnsupportedError, "another vocabulary"),
    "two positions": (lambda: text_encoder(positions=2), UnsupportedError, "not one that sepme"),
    "no position": (lambda: text_encoder(positions=0), UnsupportedError, "not one that sepme"),
    "narrower than a head": (lambda: text_encoder(32), UnsupportedError, "not one that sepme"),
    "between two heads": (lambda: text_encoder(193), UnsupportedError, "not one that sepme"),
    "a flat table": (
        lambda: text_encoder(embeddings__token_embedding__weight=torch.ones(9)),
        UnsupportedError,
        "not one that sepme",
    ),
    "integers": (
        lambda: text_encoder(**{Q: torch.ones(WIDTH, WIDTH, dtype=torch.int8)}),
        UnsupportedError,
        "stored as",
    ),
    "another shape inside": (
        lambda: text_encoder(**{Q: torch.ones(WIDTH, 3)}),
        UnsupportedError,
        "whole text encoder",
    ),
    "a layer far away": (
        lambda: text_encoder(encoder__layers__9999__mlp__fc1__bias=torch.ones(2)),
        UnsupportedError,
        "not one that sepme",
    ),
    "a part alone": (
        lambda: {"embeddings.token_embedding.weight": torch.ones(END + 1, WIDTH)},
        UnsupportedError,
        "whole text encoder",
    ),
}
"""Text encoders that prompts cannot be read with."""


@pytest.mark.parametrize("case", STRANGE)
def test_text_encoders_that_cannot_be_used(case: str, base: Tensors, tmp_path: Path) -> None:
    make, error, told = STRANGE[case]
    model = save(tmp_path / "m.safetensors", with_text(base, make()))
    with pytest.raises(error, match=told) as caught:
        erase(model, ["Monet"], output=tmp_path / "p.sepme", cache=False)
    assert caught.value.expected is not None and caught.value.found is not None
    with pytest.raises(error, match=told):
        drawn(model, tmp_path / "s.png")
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize(
    "text",
    [{"tokens": END + 4}, {"positions": 24}, {"positions": 4}],
    ids=["added tokens", "more positions", "few positions"],
)
def test_text_encoders_of_other_sizes(text: dict[str, int], base: Tensors, tmp_path: Path) -> None:
    model = save(tmp_path / "m.safetensors", with_text(base, text_encoder(**text)))
    patch = tmp_path / "p.sepme"
    erase(model, ["Monet"], output=patch, kind="style", cache=False, force_collateral=True)
    assert drawn(model, tmp_path / "s.png", patches=[patch])


@pytest.mark.parametrize("positions", [77, 248])
def test_prompts_of_any_length_are_drawn(positions: int, base: Tensors, tmp_path: Path) -> None:
    """CLIP's own length, and that of text encoders for long prompts. This model's embedding has
    fewer dimensions than the blank prompt then has states, so nothing is left to erase with."""
    text = text_encoder(positions=positions)
    model = save(tmp_path / "m.safetensors", with_text(base, text))
    assert drawn(model, tmp_path / "s.png")
    with pytest.raises(RefusedError, match="nothing is left"):
        erase(model, ["Monet"], output=tmp_path / "p.sepme", kind="style", cache=False)


def test_words_that_textual_inversion_added(base: Tensors, tmp_path: Path) -> None:
    """A tokenizer with more words than CLIP's, for a table of tokens that has them, and for one
    that has not."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name, data in tokenizer_files().items():
        (folder / name).write_bytes(data)
    (folder / "added_tokens.json").write_text('{"<pond>": 49408}')
    given = with_text(base, text_encoder(tokens=END + 2))
    model = save(tmp_path / "m.safetensors", given)
    with open_checkpoint(model) as checkpoint:
        network = StableDiffusion.of(checkpoint, CPU, tokenizer=folder)
        ids = network.text.clips[0].tokens(["<pond>", "a"])
        if END + 1 in ids:  # what reads the added words is transformers' own
            assert network.text.tokens(["<pond>"]).max() == END
        states, ends = network.text.clips[0].encode(["<pond>", "a"])
        ended = (ids == END).int().argmax(1)
        torch.testing.assert_close(ends, states[range(2), ended])
    plain = save(tmp_path / "plain.safetensors", with_text(base, text_encoder()))
    with open_checkpoint(plain) as checkpoint:
        network = StableDiffusion.of(checkpoint, CPU, tokenizer=folder)
        if END + 1 in ids:
            with pytest.raises(UnsupportedError, match="has words that the text encoder"):
                network.text.encode(["<pond>"])


def test_two_lengths_of_prompts(tmp_path: Path) -> None:
    """Such as a CLIP-L for long prompts beside the usual bigG."""
    parts = small_parts("sdxl")
    model = write_single_file(parts, tmp_path / "xl.safetensors")
    tensors = load_file(model)
    place = "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight"
    tensors[place] = torch.cat([tensors[place]] * 2)
    with pytest.raises(MismatchError, match="different lengths") as caught:
        erase(save(model, tensors), ["Monet"], output=tmp_path / "p.sepme", cache=False)
    assert caught.value.found == "32 and 16"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("outer", ["", "module.", "clip."])
def test_lent_text_encoders_are_told_by_their_width(
    order: tuple[int, int], outer: str, tmp_path: Path
) -> None:
    """A CLIP-L that comes with its projection is no bigG."""
    parts = small_parts("sdxl")
    model = write_single_file(parts, tmp_path / "xl.safetensors")
    unet = {n: v for n, v in load_file(model).items() if n.startswith("model.")}
    alone = save(tmp_path / "unet.safetensors", unet)
    texts = (small_text(64, openclip=False, pooled=64), parts.texts[1])
    given = {n.removeprefix("text_model."): v for n, v in parts.texts[0].state_dict().items()}
    for name, value in texts[0].state_dict().items():
        if (own := given.get(name.removeprefix("text_model."))) is not None:
            value.copy_(own)
    files = [
        save(tmp_path / f"{i}.safetensors", {outer + n: v for n, v in text.state_dict().items()})
        for i, text in enumerate(texts)
    ]
    with ExitStack() as stack:
        whole = stack.enter_context(open_checkpoint(model))
        lone = stack.enter_context(open_checkpoint(alone))
        lend_text_encoders(lone, [files[i] for i in order], stack)
        expected = StableDiffusion.of(whole, CPU).text.condition(["a pond"])
        found = StableDiffusion.of(lone, CPU).text.condition(["a pond"])
        assert torch.equal(found.states, expected.states)
        assert found.pooled is not None and expected.pooled is not None
        torch.testing.assert_close(found.pooled, expected.pooled)


SCALED = {
    "scale_weight": ("scale_input",),
    "weight_scale": ("input_scale", "output_scale", "comfy_quant"),
}
"""The name of a weight's scale, of older and newer files, and what else stands beside it."""


@pytest.mark.parametrize("scale", SCALED)
def test_scaled_fp8_with_all_that_comes_with_it(scale: str, base: Tensors, tmp_path: Path) -> None:
    """In the text encoder and the UNet: the patch and the picture of the same numbers in fp32."""
    plain: Tensors = {}
    quantised: Tensors = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, value in base.items():
        if value.ndim != 2 or not name.endswith(".weight") or "embedding" in name:
            plain[name] = quantised[name] = value
            continue
        layer = name.removesuffix(".weight")
        coarse = (value * 64).to(torch.float8_e4m3fn)
        plain[name], quantised[name] = coarse.float() / 64, coarse
        quantised[f"{layer}.{scale}"] = torch.tensor(1 / 64)
        for also in SCALED[scale]:
            number = also != "comfy_quant"
            kept = torch.tensor(1.0) if number else torch.zeros(2, dtype=torch.uint8)
            quantised[f"{layer}.{also}"] = kept
    paths = save(tmp_path / "p.safetensors", plain), save(tmp_path / "q.safetensors", quantised)
    patches = [tmp_path / f"{path.stem}.sepme" for path in paths]
    for path, patch in zip(paths, patches, strict=True):
        erase(path, ["Monet"], output=patch, kind="style", cache=False)
    assert patches[0].read_bytes() == patches[1].read_bytes()
    one, other = (drawn(path, tmp_path / f"{path.stem}.png") for path in paths)
    assert one == other


def test_a_pipeline_in_one_file_draws_what_its_folder_draws(tmp_path: Path) -> None:
    parts = small_parts("sd1")
    folder = tmp_path / "single.safetensors"
    write_single_file(parts, folder)
    networks = {"unet": parts.unet, "vae": parts.vae, "text_encoder": parts.texts[0]}
    whole = {f"{n}.{k}": v for n, net in networks.items() for k, v in net.state_dict().items()}
    path = save(tmp_path / "pipe.safetensors", whole)
    assert drawn(path, tmp_path / "a.png") == drawn(folder, tmp_path / "b.png")


SEGMIND: dict[str, dict[str, Any]] = {
    "SSD-1B": {
        "transformer_layers_per_block": [1, [2]],
        "reverse_transformer_layers_per_block": [[2, 3], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "Vega": {
        "transformer_layers_per_block": [1, 2],
        "reverse_transformer_layers_per_block": [[2, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "Koala": {"transformer_layers_per_block": [1, 3], "mid_block_type": None},
    "one deeper on the way up": {
        "transformer_layers_per_block": [1, [2]],
        "reverse_transformer_layers_per_block": [[3, 3], 1],
    },
}
"""How distilled XLs differ from XL, scaled down: depths within a level, and no middle attention."""


@pytest.mark.parametrize("case", SEGMIND)
def test_distilled_models_in_one_file(case: str, tmp_path: Path) -> None:
    parts = small_parts("sdxl")
    torch.manual_seed(0)
    config = {**parts.unet.config, **SEGMIND[case]}
    unet = UNet2DConditionModel(**{n: v for n, v in config.items() if n[0] != "_"}).eval()
    path = write_single_file(replace(parts, unet=unet), tmp_path / "m.safetensors")
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.family.name == "sdxl"
        loaded = load_unet(checkpoint, torch.float32)
        assert {n: v.shape for n, v in loaded.state_dict().items()} == {
            n: v.shape for n, v in unet.state_dict().items()
        }
        x, t = torch.randn(1, 4, 8, 8), torch.tensor([5])
        told = {"text_embeds": torch.randn(1, 96), "time_ids": torch.ones(1, 6)}
        text = torch.randn(1, 16, SMALL["sdxl"].width)
        ours, theirs = (
            net(x, t, text, added_cond_kwargs=told).sample.detach() for net in (loaded, unet)
        )
        torch.testing.assert_close(ours, theirs)
    quick = Settings(pictures=2, sampling_steps=1, steps=2, batch_size=2)
    patch = tmp_path / "m.sepme"
    erase(path, ["Monet"], output=patch, kind="style", method="sepme", settings=quick)
    assert drawn(path, tmp_path / "s.png", patches=[patch])


@pytest.mark.parametrize(
    "resolution",
    ["0x0", "", "abc", "-8x8", "99999999x1", "1" * 5000, "\uff11\uff16x\uff11\uff16", "3", "1e9"],
)
def test_a_resolution_that_makes_no_sense_is_not_believed(
    resolution: str, base: Tensors, tmp_path: Path
) -> None:
    path = save(tmp_path / "m.safetensors", base, {"modelspec.resolution": resolution})
    with open_checkpoint(path) as checkpoint:
        size = StableDiffusion.of(checkpoint, CPU).image_size
    assert size == (2 * 64 if resolution != "3" else 3)


def test_weights_that_are_all_zero(base: Tensors, tmp_path: Path) -> None:
    zero = {n: torch.zeros_like(v) if ".attn2.to_" in n else v for n, v in base.items()}
    model = save(tmp_path / "m.safetensors", zero)
    for method in ("closed-form", "sepme"):
        with pytest.raises(UnsupportedError, match="all zero") as caught:
            erase(model, ["Monet"], output=tmp_path / "p.sepme", method=method, cache=False)
        assert caught.value.expected and caught.value.found
    assert not (tmp_path / "p.sepme").exists()
    silent = {n: torch.zeros_like(v) if n.startswith(TEXT) else v for n, v in base.items()}
    with pytest.raises(UnsupportedError, match="the same embedding for every prompt"):
        erase(save(model, silent), ["Monet"], output=tmp_path / "p.sepme", cache=False)
    assert drawn(model, tmp_path / "s.png")


def test_one_layer_of_zeros_is_no_reason_to_stop(base: Tensors, tmp_path: Path) -> None:
    name = next(n for n in base if n.endswith("attn2.to_k.weight"))
    model = save(tmp_path / "m.safetensors", base | {name: torch.zeros_like(base[name])})
    quick = Settings(pictures=2, sampling_steps=1, steps=2, batch_size=2)
    for method in ("closed-form", "sepme"):
        erase(
            model,
            ["Monet"],
            output=tmp_path / f"{method}.sepme",
            method=method,
            kind="style",
            settings=quick,
        )


NAMES = (["C++", "C#"], ["C", "C++", "C#"], ["A/B", "A.B", "A-B!"], ["R&B", "R+B"])
"""Names that come to one slug."""


@pytest.mark.parametrize("names", NAMES, ids=" ".join)
def test_names_with_one_slug(names: list[str], small_model: Path, tmp_path: Path) -> None:
    patch = tmp_path / "p.sepme"
    result = erase(small_model, names, output=patch, force_collateral=True)
    slugs = [part.slug for part in result.increments]
    assert len(set(slugs)) == len(names) and [p.concept for p in result.increments] == names
    assert {part.concept for part in read_patch(patch).increments} == set(names)
    apply(small_model, patch, tmp_path / "out.safetensors", only=names[-1])
    with open_checkpoint(tmp_path / "out.safetensors") as checkpoint:
        assert checkpoint.stack is not None
        assert [entry.concept for entry in checkpoint.stack.entries] == names[-1:]


@pytest.mark.parametrize(
    "names", [["Monet", "monet"], ["Van Gogh", "van-gogh"], ["Beyoncé", "Beyonce"], ["C#", "c#"]]
)
def test_one_name_in_two_spellings_is_still_one(
    names: list[str], small_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="named twice"):
        erase(small_model, names, output=tmp_path / "p.sepme")


def test_a_name_is_kept_beside_another_with_its_slug(small_model: Path, tmp_path: Path) -> None:
    patch = tmp_path / "p.sepme"
    erase(small_model, ["C++"], output=patch, protect=["C#"], to="C", force_collateral=True)
    assert np.isfinite(read_patch(patch).increments[0].basis).all()


@pytest.mark.parametrize("naming", ["ldm", "diffusers"])
def test_a_vae_is_read_off_its_shapes(naming: str, tmp_path: Path) -> None:
    parts = small_parts("sd1")
    path = write_single_file(parts, tmp_path / "m.safetensors")
    tensors = load_file(path)
    if naming == "diffusers":
        tensors = {n: v for n, v in tensors.items() if not n.startswith("first_stage_model.")}
        tensors |= {f"vae.{n}": v for n, v in parts.vae.state_dict().items()}
        path = save(path, tensors)
    with open_checkpoint(path) as checkpoint:
        loaded = load_vae(checkpoint, torch.float32).state_dict()
    assert {n: v.shape for n, v in loaded.items()} == {
        n: v.shape for n, v in parts.vae.state_dict().items()
    }

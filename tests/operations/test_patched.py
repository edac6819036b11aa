"""A loaded model is patched as its file would be, and is afterwards what it was."""

import copy
import gc
from collections.abc import Callable, Iterator
from itertools import permutations
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from patch_spec.streams import stream_of
from sepme_cli.errors import (
    MalformedError,
    MismatchError,
    RefusedError,
    UnsupportedError,
    UsageError,
)
from sepme_cli.operations.apply import apply
from sepme_cli.operations.patched import LivePatch, patched
from sepme_cli.progress import Progress
from tests.small_model import POSITIONS, SMALL, small_parts, small_unet
from tests.synthetic import (
    additive,
    base_of,
    make_checkpoint,
    make_patch,
    make_patches,
    operator,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FAMILIES = ("sd1", "sd2", "sdxl", "sdxl-refiner", "inpainting")
TARGET = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def bits(network: nn.Module) -> dict[str, Tensor]:
    """Every tensor, copied; bits, so that a negative zero is another number than zero."""
    return {
        name: value.detach().clone().view(torch.uint8)
        for name, value in network.state_dict().items()
        if value.dim()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def unet_of(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    unet = small_unet(SMALL[family])
    for parameter in unet.parameters():
        parameter.data = parameter.data.to(dtype)
    return unet


def stored(unet: UNet2DConditionModel, folder: Path) -> Path:
    unet.save_pretrained(folder)
    return folder


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return unet_of("sd1")


@pytest.fixture
def model(unet: UNet2DConditionModel, tmp_path: Path) -> Path:
    return stored(unet, tmp_path / "unet")


@pytest.fixture
def patches(model: Path, tmp_path: Path) -> list[Path]:
    return make_patches(tmp_path, model)


@pytest.fixture
def written(model: Path, tmp_path: Path) -> Callable[..., dict[str, Tensor]]:
    """What `apply` writes of the same UNet."""
    numbers = iter(range(99))

    def write(patches: list[Path], scale: float = 1.0, of: Path = model) -> dict[str, Tensor]:
        output = tmp_path / f"written-{next(numbers)}"
        apply(of, patches, output, scale=scale, base=None if of is model else model)
        tensors = load_file(output / "diffusion_pytorch_model.safetensors")
        return {name: value.view(torch.uint8) for name, value in tensors.items() if value.dim()}

    return write


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_inside_are_the_bits_that_apply_writes_and_afterwards_those_from_before(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    unet = unet_of(family, dtype)
    model = stored(unet, tmp_path / "unet")
    patches = make_patches(tmp_path, model)
    apply(model, patches, tmp_path / "out", scale=0.75)
    expected = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    before, places = bits(unet), [p.data_ptr() for p in unet.parameters()]
    with patched(unet, patches, scale=0.75):
        inside = bits(unet)
        assert same(inside, {n: v.view(torch.uint8) for n, v in expected.items() if v.dim()})
    assert same(bits(unet), before)
    assert [p.data_ptr() for p in unet.parameters()] == places
    changed = {name for name in before if not before[name].equal(inside[name])}
    targets = {n for n in before if stream_of(n) is not None}
    assert changed == targets != set()


def test_each_concept_has_its_own_scale(
    unet: UNet2DConditionModel, patches: list[Path], written: Any, tmp_path: Path
) -> None:
    written(patches[:1], 0.5)
    written(patches[:2], of=tmp_path / "written-0")
    inside = written(patches, -0.25, of=tmp_path / "written-1")
    scale = {"monet": 0.5, "KLIMT": -0.25, "castle": -0.25}
    with patched(unet, patches, scale=scale) as live:
        assert same(bits(unet), inside)
        assert live.concepts == ("Monet", "Van Gogh", "Klimt", "castle")
        assert live.scale == scale


def test_only_what_is_named_is_taken_out(
    unet: UNet2DConditionModel, patches: list[Path], written: Any
) -> None:
    with patched(unet, patches, only="van-gogh") as live:
        assert same(bits(unet), written(patches[1:2]))
        assert live.concepts == ("Van Gogh",)


def test_scales_change_and_change_back(
    unet: UNet2DConditionModel, patches: list[Path], written: Any
) -> None:
    before = bits(unet)
    live = patched(unet, patches[:2])
    whole = bits(unet)
    with live.scaled(0.5) as same_patch:
        assert same_patch is live
        assert same(bits(unet), written(patches[:2], 0.5))
        with live.scaled(0):
            assert same(bits(unet), before)
        assert same(bits(unet), written(patches[:2], 0.5))
    assert same(bits(unet), whole)
    live.set_scale({"Van Gogh": 0})
    assert same(bits(unet), written(patches[:1]))
    live.restore()
    assert same(bits(unet), before)


def test_a_patch_that_is_put_back_stays_put_back(
    unet: UNet2DConditionModel, patches: list[Path]
) -> None:
    before = bits(unet)
    live = patched(unet, patches)
    with live.scaled(0.5):
        live.restore()
    live.restore()
    assert same(bits(unet), before)
    with pytest.raises(RefusedError, match="put back"):
        live.set_scale(0.5)
    assert same(bits(unet), before)


def test_an_exception_leaves_nothing_behind(
    unet: UNet2DConditionModel, patches: list[Path]
) -> None:
    before = bits(unet)
    with pytest.raises(ZeroDivisionError), patched(unet, patches) as live, live.scaled(2):
        raise ZeroDivisionError
    assert same(bits(unet), before)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_several_are_composed_as_one_and_go_in_any_order(
    unet: UNet2DConditionModel, patches: list[Path], written: Any, order: tuple[int, ...]
) -> None:
    before = bits(unet)
    live = [patched(unet, path) for path in patches[:3]]
    left = {0, 1, 2}
    assert same(bits(unet), written(patches[:3]))
    for i in order:
        live[i].restore()
        left.remove(i)
        assert same(bits(unet), written([patches[j] for j in left]) if left else before)


def test_what_was_loaded_between_two_patches_is_what_comes_back(
    unet: UNet2DConditionModel, patches: list[Path]
) -> None:
    with patched(unet, patches):
        pass
    unet.load_state_dict(unet_of("sd1", seed=1).state_dict())
    before = bits(unet)
    with patched(unet, patches):
        assert not same(bits(unet), before)
    assert same(bits(unet), before)


def test_a_model_that_moves_to_another_dtype_meanwhile_goes_back_in_that(
    unet: UNet2DConditionModel, patches: list[Path]
) -> None:
    half = bits(copy.deepcopy(unet).to(torch.float16))
    with patched(unet, patches):
        unet.to(torch.float16)
    assert same(bits(unet), half)


def test_a_compiled_model_is_the_model_behind_it(
    unet: UNet2DConditionModel, patches: list[Path], written: Any
) -> None:
    compiled = torch.compile(unet)
    before = bits(unet)
    with patched(compiled, patches[0]), patched(unet, patches[1]):
        assert same(bits(unet), written(patches[:2]))
    assert same(bits(unet), before)


def test_weights_that_take_gradients_and_inference_tensors_are_patched_too(
    unet: UNet2DConditionModel, patches: list[Path], written: Any
) -> None:
    expected = written(patches)
    with torch.inference_mode():
        frozen = unet_of("sd1")
    for network in (unet.requires_grad_(True), frozen):
        with patched(network, patches):
            assert same(bits(network), expected)
    assert all(p.requires_grad and p.grad_fn is None for p in unet.parameters())


def test_a_model_is_not_kept_alive(unet: UNet2DConditionModel, patches: list[Path]) -> None:
    network = copy.deepcopy(unet)
    patched(network, patches)
    gone = ref(network)
    del network
    gc.collect()
    assert gone() is None


class Named(nn.Module):
    """A UNet with CompVis' names: modules without any computation."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in tensors.items():
            *path, leaf = name.split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(leaf, nn.Parameter(value))


def test_a_unet_with_the_names_of_compvis(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model.safetensors", dtype="BF16")
    patches = make_patches(tmp_path, model)
    apply(model, patches, tmp_path / "out.safetensors")
    prefix = "model.diffusion_model."

    def own(path: Path) -> dict[str, Tensor]:
        tensors = load_file(path)
        return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}

    unet = Named(own(model))
    before = bits(unet)
    with patched(unet, patches):
        expected = own(tmp_path / "out.safetensors")
        assert same(bits(unet), {n: v.view(torch.uint8) for n, v in expected.items()})
    assert same(bits(unet), before)


# Whole pipelines


def pipeline_of(family: str, unet: UNet2DConditionModel) -> Any:
    parts = small_parts(family)
    common: dict[str, Any] = {
        "vae": parts.vae,
        "text_encoder": parts.texts[0],
        "tokenizer": None,
        "unet": unet,
        "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
    }
    if family == "sdxl":
        return StableDiffusionXLPipeline(
            **common, text_encoder_2=parts.texts[1], tokenizer_2=None, add_watermarker=False
        )
    return StableDiffusionPipeline(
        **common, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def picture(pipeline: Any) -> Tensor:
    """Of embeddings, since what a tokenizer does is not looked at here."""
    noise = torch.Generator().manual_seed(0)
    width = pipeline.unet.config.cross_attention_dim
    asked = {
        "prompt_embeds": (1, POSITIONS, width),
        "negative_prompt_embeds": (1, POSITIONS, width),
    }
    if isinstance(pipeline, StableDiffusionXLPipeline):
        pooled = pipeline.text_encoder_2.config.projection_dim
        asked |= {"pooled_prompt_embeds": (1, pooled), "negative_pooled_prompt_embeds": (1, pooled)}
    embeddings = {name: torch.randn(shape, generator=noise) for name, shape in asked.items()}
    pipeline.set_progress_bar_config(disable=True)
    found: Tensor = pipeline(
        **embeddings, num_inference_steps=2, generator=noise, output_type="pt", height=16, width=16
    ).images
    return found


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_pipeline_draws_what_it_draws_with_the_patched_file_and_then_as_before(
    tmp_path: Path, family: str
) -> None:
    unet = unet_of(family)
    pipeline = pipeline_of(family, unet)
    model = stored(unet, tmp_path / "unet")
    patches = make_patches(tmp_path, model)
    apply(model, patches, tmp_path / "out")
    other = unet_of(family, seed=1)
    other.load_state_dict(load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors"))
    clean = pipeline_of(family, other)
    before = picture(pipeline)
    with patched(pipeline, patches):
        inside = picture(pipeline)
    assert inside.equal(picture(clean))
    assert not inside.equal(before)
    assert picture(pipeline).equal(before)


# What is refused


def test_a_patch_of_another_kind_of_model(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    other = stored(unet_of("sd2"), tmp_path / "other")
    before = bits(unet)
    for path in make_patches(tmp_path, other, ("Monet", "Klimt")):
        with pytest.raises(MismatchError) as raised:
            patched(unet, path)
        assert raised.value.expected == "sd2, text embedding 128 wide"
        assert raised.value.found == "sd1, text embedding 64 wide"
    assert same(bits(unet), before)


def test_an_increment_for_layers_that_are_not_there(
    unet: UNet2DConditionModel, tmp_path: Path
) -> None:
    other = unet_of("sd1")
    other.get_submodule(TARGET).weight = nn.Parameter(torch.randn(64, 64))
    base = base_of(stored(other, tmp_path / "other"), text_encoders=False)
    before = bits(unet)
    with pytest.raises(MismatchError, match="does not have in that shape") as raised:
        patched(unet, make_patch(tmp_path / "a.sepme", base, additive(base, "a", seed=1)))
    assert (raised.value.expected, raised.value.found) == ("[64, 64]", "[128, 64]")
    assert same(bits(unet), before)
    # An operator mentions no layer.
    with patched(unet, make_patch(tmp_path / "o.sepme", base, operator(base, "o", seed=1))):
        assert not same(bits(unet), before)


def test_layers_that_a_patch_knows_nothing_of_are_warned_about(
    unet: UNet2DConditionModel, model: Path, tmp_path: Path
) -> None:
    base = base_of(model, text_encoders=False)
    name = f"{TARGET}.weight"
    fewer = type(base)(
        base.family,
        base.width,
        {},
        {n: f for n, f in base.targets.items() if n != name},
        {n: s for n, s in base.shapes.items() if n != name},
    )
    part = additive(fewer, "a", seed=1)
    warned: list[str] = []

    class Listener(Progress):
        def warn(self, message: str) -> None:
            warned.append(message)

    before = bits(unet)
    with patched(unet, make_patch(tmp_path / "a.sepme", fewer, part), progress=Listener()):
        assert bits(unet)[name].equal(before[name])
    assert name in warned[0]


class Prior:
    """A pipeline without a UNet or a transformer."""

    prior = nn.Linear(2, 2)


class OtherTransformer(nn.Module):
    """A transformer of Flux's kind, without what reads its text."""

    def __init__(self) -> None:
        super().__init__()
        self.double_blocks = nn.ModuleList([nn.Linear(2, 2)])


@pytest.mark.parametrize(
    ("stranger", "said"),
    [
        (Prior(), "has no UNet or transformer"),
        (nn.Linear(2, 2), "no Stable Diffusion UNet"),
        (OtherTransformer(), "a transformer of Flux's kind"),
        (AutoencoderKL(), "no Stable Diffusion UNet"),
    ],
    ids=["pipeline", "layer", "flux", "vae"],
)
def test_what_has_no_cross_attention_to_patch(
    stranger: object, said: str, patches: list[Path]
) -> None:
    with pytest.raises(UnsupportedError, match=said):
        patched(stranger, patches)


def test_a_unet_that_reads_no_text(patches: list[Path]) -> None:
    unet = unet_of("sd1")
    for name, module in list(unet.named_modules()):
        if name.endswith("attn2"):
            del module.to_k, module.to_v
    with pytest.raises(UnsupportedError, match="not what sepme knows"):
        patched(unet, patches)


@pytest.fixture
def held(unet: UNet2DConditionModel, patches: list[Path]) -> Iterator[LivePatch]:
    """A patch that is in; whatever is refused must leave it in, and only it."""
    with patched(unet, patches[0]) as live:
        inside = bits(unet)
        yield live
        assert same(bits(unet), inside)


@pytest.mark.usefixtures("held")
def test_a_concept_that_is_out_already(unet: UNet2DConditionModel, patches: list[Path]) -> None:
    with pytest.raises(RefusedError, match="Monet already erased"):
        patched(unet, patches)


def test_scales_and_concepts_that_cannot_be(
    unet: UNet2DConditionModel, patches: list[Path], held: LivePatch
) -> None:
    with pytest.raises(RefusedError, match="'Klimt'") as raised:
        held.set_scale({"Monet": 0.5, "Klimt": 0.5})
    assert raised.value.expected == "one of Monet"
    for scale in (float("nan"), {"Monet": float("inf")}):
        with pytest.raises(UsageError, match="a scale"), held.scaled(scale):
            pass
    for wanted in ({"only": ["nobody"]}, {"scale": {"nobody": 1.0}}):
        with pytest.raises(RefusedError, match="'nobody'"):
            patched(unet, patches[1], **wanted)
    with pytest.raises(UsageError, match="at least one patch"):
        patched(unet, [])
    assert held.scale == 1.0


def test_values_that_overflow_leave_everything_as_it_was(
    unet: UNet2DConditionModel, patches: list[Path]
) -> None:
    unet.to(torch.float16)
    with patched(unet, patches[0]) as live:
        inside = bits(unet)
        with pytest.raises(MalformedError, match="not all finite"):
            live.set_scale(1e9)
        assert same(bits(unet), inside)
        with pytest.raises(MalformedError, match="not all finite"):
            patched(unet, patches[1], scale=1e9)
        assert same(bits(unet), inside)
        with patched(unet, patches[1]):
            assert not same(bits(unet), inside)


def test_weights_that_are_quantised_or_not_there(
    unet: UNet2DConditionModel, patches: list[Path]
) -> None:
    layer = unet.get_submodule(TARGET)
    whole = layer.weight
    layer.weight = nn.Parameter(whole.data.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedError, match=f"{TARGET}.weight is quantised") as raised:
        patched(unet, patches)
    assert raised.value.found == "Tensor of int8"
    layer.weight = nn.Parameter(torch.empty_like(whole, device="meta"))
    with pytest.raises(UnsupportedError, match="offloaded"):
        patched(unet, patches)


class Packed(Tensor):
    """A tensor that looks like bf16 and is not, as those of quantisers do."""


def test_weights_of_a_kind_of_their_own(unet: UNet2DConditionModel, patches: list[Path]) -> None:
    layer = unet.get_submodule(TARGET)
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Packed))
    with pytest.raises(UnsupportedError, match="quantised") as raised:
        patched(unet, patches)
    assert raised.value.found == "Packed of float32"


def test_fused_keys_and_values(unet: UNet2DConditionModel, patches: list[Path]) -> None:
    """They are copies, which a patch would not reach."""
    unet.fuse_qkv_projections()
    before = bits(unet)
    with pytest.raises(RefusedError, match="unfuse_qkv_projections"):
        patched(unet, patches)
    assert same(bits(unet), before)
    unet.unfuse_qkv_projections()
    with patched(unet, patches):
        assert not same(bits(unet), before)

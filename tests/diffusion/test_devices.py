"""What is chosen to compute on, and that sparing memory changes nothing but memory and rounding."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sepme_cli.checkpoints.reading.checkpoint import open_checkpoint
from sepme_cli.diffusion.devices import DeviceChoice, Machine, Unit, Work, choose, own_gpu, units
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.options import ModelOptions
from sepme_cli.diffusion.predictor import EditedPredictor
from sepme_cli.diffusion.sampler import generate_images
from sepme_cli.errors import UsageError

GIB = 2**30
UNET = 860_000_000
CPU = Unit("cpu", "a processor")
NEW = Unit("cuda", "a new GPU", 80 * GIB, "bf16")
OLD = Unit("cuda", "an old GPU", 8 * GIB, "fp16")
APPLE = Unit("mps", "Apple GPU", 12 * GIB, "fp16")


def chosen(
    here: tuple[Unit, ...], work: Work, images: int = 1, **said: Any
) -> tuple[str, str, bool]:
    found: DeviceChoice = choose(here, work, ModelOptions(**said), unet=UNET, images=images)
    assert (", with little memory" in found.why) == found.frugal
    return (str(found.device), found.dtype, found.frugal)


@pytest.mark.parametrize(
    ("here", "work", "images", "expected"),
    [
        # The closed form makes the same patch everywhere.
        ((NEW, CPU), "closed form", 32, ("cuda", "fp32", False)),
        ((CPU,), "closed form", 32, ("cpu", "fp32", False)),
        ((NEW, CPU), "sampling", 8, ("cuda", "bf16", False)),
        ((OLD, CPU), "sampling", 8, ("cuda", "fp16", False)),
        ((APPLE, CPU), "sampling", 8, ("mps", "fp16", False)),
        ((CPU,), "sampling", 8, ("cpu", "fp32", False)),
        # Gradients need more range than fp16 has.
        ((NEW, CPU), "learning", 8, ("cuda", "bf16", False)),
        ((OLD, CPU), "learning", 32, ("cuda", "fp32", True)),
        ((APPLE, CPU), "learning", 32, ("mps", "fp32", True)),
        ((CPU,), "learning", 32, ("cpu", "fp32", False)),
    ],
)
def test_what_is_chosen(
    here: tuple[Unit, ...], work: Work, images: int, expected: tuple[str, str, bool]
) -> None:
    assert chosen(here, work, images=images) == expected


def test_what_is_said_holds() -> None:
    assert chosen((NEW, CPU), "learning", device="cpu") == ("cpu", "fp32", False)
    assert chosen((NEW, CPU), "closed form", dtype="fp16") == ("cuda", "fp16", False)
    assert chosen((CPU,), "learning", low_memory=True) == ("cpu", "fp32", True)
    assert "8.0 free" in choose((OLD, CPU), "learning", unet=UNET, images=32).why


@pytest.mark.parametrize("device", ["cuda", "abacus", "mps:1", "cpu:7", "cpu:x"])
def test_a_device_that_is_not_there_says_what_is(device: str) -> None:
    with pytest.raises(UsageError) as caught:
        choose((APPLE, CPU), "sampling", ModelOptions(device=device))
    assert caught.value.expected == "mps (Apple GPU) or cpu (a processor)"


def test_there_is_always_something() -> None:
    assert units()[-1].name == "cpu"


class Moved(torch.nn.Linear):
    """Remembers where it was moved to."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.moves: list[str] = []

    def to(self, device: str | torch.device) -> "Moved":  # type: ignore[override]
        self.moves.append(str(device))
        return self


@pytest.mark.parametrize("frugal", [False, True])
def test_one_network_at_a_time_is_on_the_device_where_memory_is_spared(frugal: bool) -> None:
    one, other = Moved(), Moved()
    machine = Machine(torch.device("cuda"), frugal=frugal)
    for network in (one, one, other, other):
        assert machine.use(network) is network
    assert one.moves == (["cuda", "cpu"] if frugal else ["cuda"])
    assert other.moves == ["cuda"]


def gradients(small: Path, *, frugal: bool) -> tuple[Tensor, Mapping[str, Tensor], int]:
    """A prediction with increments, its gradient by them, and how many bytes were kept for that."""
    with open_checkpoint(small) as checkpoint:
        model = StableDiffusion.of(checkpoint, torch.device("cpu"), frugal=frugal)
        generator = torch.Generator().manual_seed(0)
        up = {
            name: torch.randn(len(layer.weight), 2, generator=generator).requires_grad_()
            for name, layer in model.denoiser.targets.items()
        }
        basis = torch.randn(2, 64, generator=generator) / 8
        noisy = torch.randn(5, *model.latent_shape(16), generator=generator)
        predict = EditedPredictor(model.denoiser, model.text.condition(["a cat", "a dog"]))
        kept: dict[int, int] = {}

        def keep(value: Tensor) -> Tensor:
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            found = predict(noisy, torch.full((5,), 300), torch.tensor([0, 1, 0, 1, 0]), up, basis)
        found.pow(2).sum().backward()
        return (
            found.detach(),
            {n: u.grad for n, u in up.items() if u.grad is not None},
            sum(kept.values()),
        )


def test_to_compute_again_gives_the_gradients_that_keeping_gives(small_model: Path) -> None:
    found, wanted, kept = gradients(small_model, frugal=False)
    again, frugal, kept_then = gradients(small_model, frugal=True)
    torch.testing.assert_close(again, found)
    assert wanted.keys() == frugal.keys()
    assert wanted
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(frugal[name], gradient, rtol=1e-4, atol=1e-4)
    assert kept_then < kept / 2


def test_few_pictures_at_a_time_are_the_same_pictures(small_model: Path) -> None:
    drawn = []
    for frugal in (False, True):
        with open_checkpoint(small_model) as checkpoint:
            model = StableDiffusion.of(checkpoint, torch.device("cpu"), frugal=frugal)
            drawn.append(generate_images(model, ["a cat"] * 5, range(5), steps=3, size=16))
    torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_text_is_encoded_in_full_precision_whatever_the_unet_computes_in(
    small_model: Path, dtype: torch.dtype
) -> None:
    with open_checkpoint(small_model) as checkpoint:
        full, half = (
            StableDiffusion.of(checkpoint, torch.device("cpu"), d) for d in (torch.float32, dtype)
        )
        assert half.text.encode(["a cat"]).equal(full.text.encode(["a cat"]))
        pictures = generate_images(half, ["a cat"], [0], steps=2, size=16)
        assert pictures.isfinite().all()


def test_each_process_of_a_launcher_has_a_gpu_of_its_own() -> None:
    ranks = [{"LOCAL_RANK": str(rank)} for rank in range(3)]
    assert [own_gpu(None, one, 2) for one in ranks] == ["cuda:0", "cuda:1", "cuda:0"]
    assert own_gpu("cuda", ranks[1], 2) == "cuda:1"
    assert own_gpu("cuda:0", ranks[1], 2) == "cuda:0"
    assert own_gpu("cpu", ranks[1], 2) == "cpu"
    assert own_gpu(None, ranks[1], 1) is None
    assert own_gpu(None, {}, 2) is None

"""Where the networks compute, in what, and how much memory they may take there."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from sepme_cli.checkpoints.structure.dtypes import CASTS
from sepme_cli.checkpoints.structure.torch_dtypes import TORCH
from sepme_cli.diffusion.conditioning import Conditioning
from sepme_cli.diffusion.options import ModelOptions
from sepme_cli.errors import UsageError
from sepme_cli.progress import SILENT, Progress

Work = Literal["closed form", "sampling", "learning"]
"""What is to be done: no pass through the UNet, passes forwards, and backwards too."""

DTYPES: Mapping[str, torch.dtype] = {called: TORCH[name] for name, called in CASTS.items()}
_ACTIVATIONS: Mapping[Work, float] = {"closed form": 0.0, "sampling": 0.2, "learning": 2.0}
"""What a picture takes while it passes, in UNets: roughly what Stable Diffusion 1.x takes."""
_GIB = 2**30
_FEW = 2
"""Images at once where memory is to be spared."""

_Network = TypeVar("_Network", bound=nn.Module)
_Value = TypeVar("_Value", Tensor, Conditioning)


@dataclass(frozen=True)
class Unit:
    """Something to compute on.

    name: as torch calls it. title: what a user calls it. free: bytes of memory; None for all
    there is. half: the half precision that it computes in as it should.
    """

    name: Literal["cuda", "mps", "cpu"]
    title: str
    free: int | None = None
    half: Literal["bf16", "fp16"] | None = None


@dataclass(frozen=True)
class DeviceChoice:
    """What was chosen. frugal: spare the memory, at the cost of time: one network on the device at
    a time, few images at once, and backwards compute again instead of keeping. why: in words."""

    device: torch.device
    dtype: str
    frugal: bool
    why: str


def units() -> tuple[Unit, ...]:
    """What this machine has, the fastest first."""
    found: list[Unit] = []
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        title = torch.cuda.get_device_name()
        found.append(Unit("cuda", title, free, "bf16" if bf16 else "fp16"))
    if torch.backends.mps.is_available():
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        found.append(Unit("mps", "Apple GPU", free, "fp16"))
    return (*found, Unit("cpu", "this machine's processor"))


def choose(
    here: Sequence[Unit],
    work: Work,
    options: ModelOptions = ModelOptions(),
    *,
    unet: int = 0,
    images: int = 1,
) -> DeviceChoice:
    """Choose among units, the fastest first.

    options: its dtype and device, where they are given, must be. Half precision is chosen for
    passes through the UNet where the unit has one; to learn in it takes bf16's range. low_memory
    spares the memory even where it seems to do. unet: how many parameters it has. images: how
    many pass at once.
    Raises UsageError for a device that is not here and for no dtype.
    """
    device, dtype = options.device, options.dtype or "auto"
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(
            f"no dtype {dtype!r}", expected=" or ".join(("auto", *DTYPES)), found=dtype
        )
    unit = _unit(here, device)
    half = unit.half if work == "sampling" or unit.half == "bf16" else None
    chosen = (half or "fp32") if dtype == "auto" and work != "closed form" else dtype
    chosen = "fp32" if chosen == "auto" else chosen
    weights = unet * DTYPES[chosen].itemsize
    need = weights * (1 + _ACTIVATIONS[work] * images)
    short = work != "closed form" and unit.free is not None and need > unit.free
    why = f"computing on {device or unit.name} ({unit.title}) in {chosen}"
    if options.low_memory or short:
        why += ", with little memory"
    if short and not options.low_memory:
        why += f": about {need / _GIB:.0f} GiB would be needed, {(unit.free or 0) / _GIB:.1f} free"
    return DeviceChoice(torch.device(device or unit.name), chosen, options.low_memory or short, why)


def choose_device(
    work: Work,
    options: ModelOptions = ModelOptions(),
    *,
    unet: int = 0,
    images: int = 1,
    progress: Progress = SILENT,
) -> DeviceChoice:
    """As `choose`, among what this machine has; says what and why."""
    device = own_gpu(options.device, os.environ, torch.cuda.device_count())
    options = replace(options, device=device)
    chosen = choose(units(), work, options, unet=unet, images=images)
    progress.say(chosen.why)
    return chosen


def own_gpu(device: str | None, environment: Mapping[str, str], count: int) -> str | None:
    """The device, and of several GPUs the one of this process, if accelerate or torchrun started
    one for each. count: of the GPUs."""
    rank = environment.get("LOCAL_RANK", "")
    if count < 2 or device not in (None, "cuda") or not rank.isdecimal():
        return device
    return f"cuda:{int(rank) % count}"


def _unit(here: Sequence[Unit], device: str | None) -> Unit:
    if device is None:
        return here[0]
    name, _, number = device.partition(":")
    found = next((unit for unit in here if unit.name == name), None)
    if found is None or (number and not _has(name, number)):
        raise UsageError(
            f"no device {device!r} on this machine",
            expected=" or ".join(f"{unit.name} ({unit.title})" for unit in here),
            found=device,
        )
    return found


def _has(name: str, number: str) -> bool:
    count = torch.cuda.device_count() if name == "cuda" else 1
    return number.isdecimal() and int(number) < count


@dataclass(eq=False)
class Machine:
    """A device and the networks on it.

    dtype: what the denoiser computes in. frugal: see `DeviceChoice`.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    frugal: bool = False
    _here: nn.Module | None = field(default=None, repr=False)

    @property
    def dtype_name(self) -> str:
        """What people call the dtype: "fp32"."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    def use(self, network: _Network) -> _Network:
        """The network, on the device; where memory is spared, the others are on the CPU."""
        if self._here is not network:
            if self.frugal and self._here is not None:
                self._here.to("cpu")
            network.to(self.device)
            self._here = network
        return network

    def put(self, value: _Value) -> _Value:
        """What the denoiser is to read, on the device and in its dtype."""
        return value.to(self.device, self.dtype)

    def at_once(self, count: int) -> int:
        """How many of so many images to take at once, when the memory is to be spared."""
        return min(count, _FEW) if self.frugal else count

"""What patching a loaded UNet costs, beside loading and fusing a LoRA on the same layers.

    python -m benchmarks.live [ROUNDS]

UNets of full size in memory on the CPU, random values in fp16, patches and a LoRA of the same rank
for the same layers in files. Everything in every round; medians, of ratios too, each to loading and
fusing in its own round. diffusers does that with peft, which has to be there.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from benchmarks.full_size import UNETS
from benchmarks.speed import RANK, increment
from patch_spec.base import Base
from patch_spec.container import patch_bytes
from patch_spec.digest import tensor_fingerprint
from patch_spec.manifest import Patch
from sepme_cli.diffusion.arrays import to_numpy
from sepme_cli.diffusion.live import CrossAttention
from sepme_cli.operations.patched import patched

_REFERENCE = "load and fuse a LoRA"


def full_unet(name: str) -> UNet2DConditionModel:
    """A UNet of full size, in fp16."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[name])
    unet = unet.to_empty(device="cpu").half().eval().requires_grad_(False)
    values = torch.randn(2**22).half() * 0.02
    for parameter in unet.parameters():
        flat = parameter.data.view(-1)
        for part in flat.split(len(values)):
            part.copy_(values[: len(part)])
    return unet


def write_patches(unet: UNet2DConditionModel, folder: Path) -> None:
    """Patches with an increment of either kind, and with three."""
    attention = CrossAttention.of(dict(unet.named_parameters()))
    base = Base(
        attention.family.name,
        attention.width,
        {},
        {n: tensor_fingerprint(to_numpy(weight)) for n, weight in attention.by_name.items()},
        {n: (len(weight), attention.width) for n, weight in attention.by_name.items()},
    )
    kinds = {"operator": ["operator"], "additive": ["additive"], "three": ["operator"] * 3}
    for name, wanted in kinds.items():
        parts = tuple(increment(base, f"{name}{i}", kind, i) for i, kind in enumerate(wanted))
        patch = Patch(base=base, increments=parts, separable_from=("",), tool="benchmark")
        (folder / f"{name}.sepme").write_bytes(patch_bytes(patch))


def write_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    """The same layers, in the names of diffusers."""
    tensors = {}
    for name, weight in CrossAttention.of(dict(unet.named_parameters())).by_name.items():
        layer = name.removesuffix(".weight")
        tensors[f"unet.{layer}.lora_A.weight"] = torch.randn(RANK, weight.shape[1]).half()
        tensors[f"unet.{layer}.lora_B.weight"] = torch.randn(len(weight), RANK).half() * 1e-3
    save_file(tensors, folder / "lora.safetensors")


@contextmanager
def timed(seconds: dict[str, list[float]], what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds.setdefault(what, []).append(time.perf_counter() - started)


def one_round(unet: UNet2DConditionModel, folder: Path, seconds: dict[str, list[float]]) -> None:
    for name in ("operator", "additive", "three"):
        with timed(seconds, f"patch, {name}"):
            live = patched(unet, folder / f"{name}.sepme")
        with timed(seconds, f"another scale, {name}"):
            live.set_scale(0.5)
        with timed(seconds, f"restore, {name}"):
            live.restore()
    with timed(seconds, _REFERENCE):
        unet.load_lora_adapter(folder / "lora.safetensors", prefix="unet", adapter_name="lora")
        assert unet.peft_config, "nothing was loaded"
        unet.fuse_lora()
    with timed(seconds, "unfuse and unload it"):
        unet.unfuse_lora()
        unet.delete_adapters("lora")


def table(name: str, rounds: int) -> str:
    """A Markdown table of the medians."""
    unet = full_unet(name)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as told:
        folder = Path(told)
        write_patches(unet, folder)
        write_lora(unet, folder)
        for _ in range(rounds):
            one_round(unet, folder, seconds)
    lines = [f"**{name}**, median of {rounds} rounds", "", "| | seconds | of the LoRA's |"]
    lines.append("|---|---|---|")
    median: Callable[[Any], float] = statistics.median
    for what, taken in seconds.items():
        ratios = [a / b for a, b in zip(taken, seconds[_REFERENCE], strict=True)]
        lines.append(f"| {what} | {median(taken):.2f} | {median(ratios):.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    for family in UNETS:
        print(table(family, int(sys.argv[1]) if len(sys.argv) > 1 else 5), flush=True)

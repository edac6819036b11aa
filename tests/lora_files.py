"""LoRA files as other programs write them, of random values, and what they add."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from patch_spec.base import Base
from sepme_cli.checkpoints.structure.layout import Layout, span_of
from tests.synthetic import write_safetensors

Pairs = dict[str, tuple[np.ndarray, np.ndarray]]
Tensors = dict[str, tuple[str, np.ndarray]]


def random_pairs(base: Base, rank: int, seed: int = 0) -> Pairs:
    """up and down of every target, with nothing in common between them."""
    rng = np.random.default_rng(seed)
    return {
        name: (
            (rng.standard_normal((out, rank)) * 0.05).astype("<f4"),
            (rng.standard_normal((rank, width)) * 0.2).astype("<f4"),
        )
        for name, (out, width) in base.shapes.items()
    }


def kohya(base: Base, pairs: Pairs, alpha: float | None = None) -> Tensors:
    """kohya's names: of the modules of XL as LDM has them, of others as diffusers has them."""
    ldm = base.family.startswith("sdxl")
    layout = Layout("", span_of(base.shapes)) if ldm else Layout("", naming="diffusers")
    found: Tensors = {}
    for name, (up, down) in pairs.items():
        module = f"lora_unet_{layout.stored(name).removesuffix('.weight').replace('.', '_')}"
        found[f"{module}.lora_up.weight"] = ("F32", up)
        found[f"{module}.lora_down.weight"] = ("F32", down)
        if alpha is not None:
            found[f"{module}.alpha"] = ("F32", np.float32(alpha))
    return found


def dotted(pairs: Pairs, name: Callable[[str], str], up: str, down: str) -> Tensors:
    """Names with dots. name: of a target without `.weight`, to its module's."""
    found: Tensors = {}
    for target, (left, right) in pairs.items():
        module = name(target.removesuffix(".weight"))
        found[f"{module}{up}"] = ("F32", left)
        found[f"{module}{down}"] = ("F32", right)
    return found


def more(names: Iterable[str], size: float = 0.05, seed: int = 5) -> Tensors:
    """Modules of kohya's with these names, of rank 2 and 6 x 6."""
    rng = np.random.default_rng(seed)
    found: Tensors = {}
    for name in names:
        found[f"{name}.lora_up.weight"] = (
            "F32",
            (rng.standard_normal((6, 2)) * size).astype("<f4"),
        )
        found[f"{name}.lora_down.weight"] = ("F32", rng.standard_normal((2, 6)).astype("<f4"))
    return found


def write(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    return write_safetensors(path, tensors, metadata)

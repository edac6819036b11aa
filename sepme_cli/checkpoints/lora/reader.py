"""LoRA files of other programs: which modules they change, and by what."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from patch_spec.canonical import parse_json_strict
from sepme_cli.checkpoints.disk.failures import reading
from sepme_cli.checkpoints.lora.names import LoraFormat
from sepme_cli.checkpoints.reading.opening import open_weights
from sepme_cli.checkpoints.reading.tensors import Stored, stored_in
from sepme_cli.checkpoints.structure.dtypes import NAMES, readable
from sepme_cli.checkpoints.structure.layout import Layout
from sepme_cli.errors import MalformedError, UnsupportedError

Float64 = npt.NDArray[np.float64]

_PARTS: Mapping[str, str] = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
}
"""What follows a module's name: of kohya's scripts, PEFT and older diffusers."""
_ALGORITHMS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(.+)\.(dora_scale|lora_magnitude_vector)\b.*"), "DoRA"),
    (re.compile(r"(.+)\.hada_.*"), "LoHa"),
    (re.compile(r"(.+)\.lokr_.*"), "LoKr"),
    (re.compile(r"(.+)\.lora_mid\b.*"), "LoCon"),
    (re.compile(r"(.+)\.oft_.*"), "OFT"),
    (re.compile(r"(.+)\.(diff|diff_b|w_norm|b_norm)"), "a full difference"),
)
"""What tells that a module does something else than add up @ down."""
_UNKNOWN = "something unknown"
_PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_DIFFUSERS_CONFIG, _DIFFUSERS_UNET = "lora_adapter_metadata", "unet."


@dataclass(frozen=True)
class LoraModule:
    """What a LoRA does to one module.

    parts: "up", "down" and perhaps "alpha". algorithm: "LoRA", or what else it is. factor: of
    up @ down, where no alpha says it.
    """

    name: str
    parts: Mapping[str, Stored] = field(repr=False)
    algorithm: str
    config: Mapping[str, Any] = field(repr=False, default_factory=dict)

    def pair(self) -> tuple[Float64, Float64]:
        """up [out, r], with the factor in it, and down [r, in], kernels laid flat.

        Raises MalformedError for a half that is not there, shapes that do not fit and numbers
        that are not finite; UnsupportedError for another algorithm or dtype.
        """
        if self.algorithm != "LoRA":
            raise UnsupportedError(
                f"{self.name} is {self.algorithm}, which is not up @ down",
                expected="a plain LoRA",
                found=self.algorithm,
            )
        up, down = (self._read(part) for part in ("up", "down"))
        up, down = up.reshape(len(up), -1), down.reshape(len(down), -1)
        if up.shape[1] != len(down) or not len(down):
            raise MalformedError(
                f"{self.name}: the two halves do not fit together",
                expected=f"[{len(up)}, {len(down)}]",
                found=list(up.shape),
            )
        return up * self._factor(len(down)), down

    def _read(self, part: str) -> Float64:
        stored = self.parts.get(part)
        if stored is None or len(stored.shape) not in (2, 4):
            raise MalformedError(
                f"{self.name} has no {part} matrix",
                expected="lora_up and lora_down, or lora_B and lora_A",
                found="none" if stored is None else list(stored.shape),
            )
        return _values(stored)

    def _factor(self, rank: int) -> float:
        if (stored := self.parts.get("alpha")) is not None:
            values = _values(stored)
            if values.size != 1:
                raise MalformedError(f"{self.name}: alpha is not one number", found=values.size)
            return float(values.reshape(-1)[0]) / rank
        patterns = self.config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise MalformedError(f"{self.name}: alpha_pattern is no object", found=patterns)
        own = (x for key, x in patterns.items() if f".{self.name}".endswith(f".{key}"))
        alpha = next(own, self.config.get("lora_alpha", rank))
        if not isinstance(alpha, int | float):
            raise MalformedError(f"{self.name}: alpha is not a number", found=alpha)
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


@dataclass(frozen=True)
class LoraFile:
    """An open LoRA. digest: SHA-256 of the file's data section; metadata does not count."""

    path: Path
    format: LoraFormat
    modules: tuple[LoraModule, ...] = field(repr=False)
    metadata: Mapping[str, str] = field(repr=False)
    digest: str

    @property
    def name(self) -> str:
        """What the file, or PEFT's folder, is called."""
        return self.path.parent.name if self.path.name == _PEFT_FILE else self.path.stem


@contextmanager
def open_lora(path: Path) -> Iterator[LoraFile]:
    """Open a LoRA in kohya's, PEFT's or diffusers' format, or PEFT's folder.

    Raises UnsupportedError for a file without a LoRA, and what `open_weights` raises.
    """
    if path.is_dir():
        path = path / _PEFT_FILE
        if not path.exists():
            raise UnsupportedError(
                f"{path.parent} is no folder that PEFT saved",
                file=path.parent,
                expected=_PEFT_FILE,
                found="none",
            )
    file = open_weights(path)
    try:
        metadata = file.header.metadata
        config = _config(metadata, path)
        modules = tuple(_modules(stored_in(file).values(), config))
        known = (module for module in modules if module.algorithm != _UNKNOWN)
        if not any(module.parts.keys() != {"alpha"} for module in known):
            names = [entry.name for entry in file.header.tensors]
            model = Layout.of(names) is not None
            raise UnsupportedError(
                f"{path} is a model and no LoRA: sepme import --edited takes one that was edited"
                if model
                else f"{path} is no LoRA",
                file=path,
                expected="tensors named ….lora_down.weight, or ….lora_A.weight",
                found=f"{len(names)} other tensors",
            )
        kohya = any(module.name.startswith(("lora_", "lycoris_")) for module in modules)
        data = file.read_range(0, file.header.data_length, "the data section")
        yield LoraFile(
            path, "kohya" if kohya else "peft", modules, metadata, sha256(data).hexdigest()
        )
    finally:
        file.close()


def _modules(tensors: Iterable[Stored], config: Mapping[str, Any]) -> Iterator[LoraModule]:
    parts: dict[str, dict[str, Stored]] = {}
    algorithms: dict[str, str] = {}
    for stored in tensors:
        module, part = _parted(stored.name)
        parts.setdefault(module, {})[part] = stored
        if part not in _PARTS.values():
            algorithms[module] = part
    dora = "DoRA" if config.get("use_dora") else "LoRA"
    for module, found in parts.items():
        yield LoraModule(module, found, algorithms.get(module, dora), config)


def _parted(key: str) -> tuple[str, str]:
    """A tensor's module, and which part of it, or which algorithm, it is."""
    for suffix, part in _PARTS.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix), part
    for pattern, algorithm in _ALGORITHMS:
        if found := pattern.fullmatch(key):
            return found[1], algorithm
    return key, _UNKNOWN


def _config(metadata: Mapping[str, str], path: Path) -> Mapping[str, Any]:
    """PEFT's settings of the UNet's adapter, from the metadata or the file beside."""
    beside = path.with_name(PEFT_CONFIG)
    with reading(path):
        if _DIFFUSERS_CONFIG in metadata:
            said = parse_json_strict(metadata[_DIFFUSERS_CONFIG].encode())
            return {
                key.removeprefix(_DIFFUSERS_UNET): value
                for key, value in (said.items() if isinstance(said, dict) else ())
                if key.startswith(_DIFFUSERS_UNET)
            }
        if path.name == _PEFT_FILE and beside.exists():
            said = parse_json_strict(beside.read_bytes())
            return said if isinstance(said, dict) else {}
    return {}


def _values(stored: Stored) -> Float64:
    if stored.dtype not in NAMES:
        raise UnsupportedError(
            f"{stored.file.path}: {stored.name} is stored as {readable(stored.dtype)}",
            file=stored.file.path,
            expected="fp32, fp16, bf16 or fp8",
            found=readable(stored.dtype),
        )
    values = stored.read().astype(np.float64)
    if not np.isfinite(values).all():
        raise MalformedError(
            f"{stored.file.path}: the values of {stored.name} are not all finite",
            file=stored.file.path,
            expected="finite numbers",
            found="NaN or infinity",
        )
    return values

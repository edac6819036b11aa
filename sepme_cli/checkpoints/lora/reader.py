"""LoRA files of other programs: which modules they change, and by what."""

import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping
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
from sepme_cli.checkpoints.structure.dtypes import INTEGERS, NAMES, readable
from sepme_cli.checkpoints.structure.layout import Layout, text_entries
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
    ".diff": "difference",
}
"""What follows a module's name: of kohya's scripts, PEFT and older diffusers; and of LyCORIS and
ComfyUI, which also keep a weight's whole change."""
_ALGORITHMS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(.+)\.(dora_scale|lora_magnitude_vector)\b.*"), "DoRA"),
    (re.compile(r"(.+)\.hada_.*"), "LoHa"),
    (re.compile(r"(.+)\.lokr_.*"), "LoKr"),
    (re.compile(r"(.+)\.lora_mid\b.*"), "LoCon"),
    (re.compile(r"(.+)\.oft_.*"), "OFT"),
    (re.compile(r"(.+)\.(diff_b|w_norm|b_norm)"), "a difference of biases or norms"),
)
"""What tells that a module does something else than add up @ down."""
_UNKNOWN = "something unknown"
_PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_IN_FOLDERS = (
    *(_PEFT_FILE, "pytorch_lora_weights.safetensors"),
    *("adapter_model.bin", "pytorch_lora_weights.bin"),
)
"""What PEFT and diffusers call a LoRA in a folder of its own; the first that is there is read."""
_DIFFUSERS_CONFIG, _DENOISERS = "lora_adapter_metadata", ("unet.", "transformer.")


@dataclass(frozen=True)
class LoraModule:
    """What a LoRA does to one module.

    parts: "up", "down" and perhaps "alpha", or "difference". algorithm: "LoRA" for any of these,
    or what else it is. config: what says the factor of up @ down, where no alpha does.
    """

    name: str
    parts: Mapping[str, Stored] = field(repr=False)
    algorithm: str
    config: Mapping[str, Any] = field(repr=False, default_factory=dict)

    def delta(self) -> Float64:
        """What is added to the weight [out, in], kernels laid flat.

        Raises MalformedError for a half that is not there, shapes that do not fit and numbers
        that are not finite; UnsupportedError for another algorithm or dtype.
        """
        self._check()
        if (whole := self.parts.get("difference")) is not None:
            return _flat(whole)
        up, down = self._pair()
        delta: Float64 = up @ down
        return delta

    def pair(self) -> tuple[Float64, Float64] | None:
        """up [out, r], with the factor in it, and down [r, in], whose product `delta` is; None for
        a whole difference. Raises what `delta` does."""
        self._check()
        return None if "difference" in self.parts else self._pair()

    def energy(self) -> float:
        """|delta|^2, Frobenius, of a pair from the small matrices; raises what `delta` does."""
        self._check()
        if (whole := self.parts.get("difference")) is not None:
            return float(np.square(_flat(whole)).sum())
        up, down = self._pair()
        return float(np.sum((up.T @ up) * (down @ down.T)))

    def _check(self) -> None:
        if self.algorithm != "LoRA":
            raise UnsupportedError(
                f"{self.name} is {self.algorithm}, which is not up @ down",
                expected="a plain LoRA",
                found=self.algorithm,
            )
        if "difference" in self.parts and {"up", "down"} & self.parts.keys():
            raise MalformedError(
                f"{self.name} has both a whole difference and up and down matrices",
                expected="lora_up and lora_down, or diff",
                found=", ".join(sorted(self.parts)),
            )

    def _pair(self) -> tuple[Float64, Float64]:
        """up [out, r], with the factor in it, and down [r, in]."""
        up, down = (self._read(part) for part in ("up", "down"))
        if up.shape[1] != len(down) or not len(down):
            raise MalformedError(
                f"{self.name}: the shapes of up and down do not fit together",
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
        return _flat(stored)

    def _factor(self, rank: int) -> float:
        if (stored := self.parts.get("alpha")) is not None:
            # diffusers writes the rank as it has it: a whole number.
            values = _values(stored, INTEGERS)
            if values.size != 1:
                raise MalformedError(f"{self.name}: alpha is not one number", found=values.size)
            return float(values.reshape(-1)[0]) / rank
        patterns = self.config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise MalformedError(f"{self.name}: alpha_pattern is not an object", found=patterns)
        own = (x for key, x in patterns.items() if f".{self.name}".endswith(f".{key}"))
        alpha = next(own, self.config.get("lora_alpha", rank))
        if not isinstance(alpha, int | float):
            raise MalformedError(f"{self.name}: alpha is not a number", found=alpha)
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


@dataclass(frozen=True)
class LoraFile:
    """An open LoRA.

    name: what the file, or the folder that it was found in, is called. digest: SHA-256 of the
    file's data section; metadata does not count.
    """

    path: Path
    name: str
    format: LoraFormat
    modules: tuple[LoraModule, ...] = field(repr=False)
    metadata: Mapping[str, str] = field(repr=False)
    digest: str


@contextmanager
def open_lora(path: Path) -> Iterator[LoraFile]:
    """Open a LoRA in kohya's, PEFT's or diffusers' format, or a folder of PEFT's or diffusers'.

    Raises UnsupportedError for a file without a LoRA, and what `open_weights` raises.
    """
    folder = path if path.is_dir() else None
    if folder is not None:
        found = next((name for name in _IN_FOLDERS if (folder / name).exists()), None)
        if found is None:
            raise UnsupportedError(
                f"{folder} is not a folder that PEFT or diffusers saved a LoRA in; name the file",
                file=folder,
                expected=" or ".join(_IN_FOLDERS[:2]),
                found="none",
            )
        path = folder / found
    file = open_weights(path)
    try:
        metadata = file.header.metadata
        config = _config(metadata, path)
        modules = tuple(_modules(stored_in(file).values(), config))
        known = (module for module in modules if module.algorithm != _UNKNOWN)
        if not any(module.parts.keys() != {"alpha"} for module in known):
            names = [entry.name for entry in file.header.tensors]
            model = Layout.of(names) is not None or bool(text_entries(names))
            raise UnsupportedError(
                f"{path} is a model and not a LoRA: import an edited model with sepme import "
                "--edited"
                if model
                else f"{path} is not a LoRA",
                file=path,
                expected="tensors named ….lora_down.weight, or ….lora_A.weight",
                found=f"{len(names)} other tensors",
            )
        kohya = any(module.name.startswith(("lora_", "lycoris_")) for module in modules)
        data = file.read_range(0, file.header.data_length, "the data section")
        named = path.parent.name if folder or path.name == _PEFT_FILE else path.stem
        digest = sha256(data).hexdigest()
        yield LoraFile(path, named, "kohya" if kohya else "peft", modules, metadata, digest)
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
    """PEFT's settings of the denoiser's adapter, from the metadata or the file beside."""
    beside = path.with_name(PEFT_CONFIG)
    with reading(path):
        if _DIFFUSERS_CONFIG in metadata:
            said = parse_json_strict(metadata[_DIFFUSERS_CONFIG].encode())
            return {
                key.partition(".")[2]: value
                for key, value in (said.items() if isinstance(said, dict) else ())
                if key.startswith(_DENOISERS)
            }
        if path.name == _PEFT_FILE and beside.exists():
            said = parse_json_strict(beside.read_bytes())
            return said if isinstance(said, dict) else {}
    return {}


def _flat(stored: Stored) -> Float64:
    """A matrix, or a convolution's kernels as one."""
    if len(stored.shape) not in (2, 4) or 0 in stored.shape:
        raise MalformedError(
            f"{stored.name} is not a matrix", expected="[out, in]", found=list(stored.shape)
        )
    return _values(stored).reshape(stored.shape[0], -1)


def _values(stored: Stored, also: Container[str] = ()) -> Float64:
    if stored.dtype not in NAMES and stored.dtype not in also:
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

"""Model folders as diffusers writes them: which files hold which network.

A network's weights are one file or several with an index ("shards"); beside them there may be
copies of the same weights in another dtype ("variants"), told apart by a word in their names.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patch_spec.canonical import parse_json_strict
from patch_spec.text import FORBIDDEN
from sepme_cli.checkpoints.disk.failures import reading
from sepme_cli.errors import MalformedError, UnsupportedError

_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model|pytorch_model)(?:\.(?P<variant>[\w-]+))?\.(?P<kind>safetensors|bin)"
)
_INDEX = re.compile(
    r"(?:diffusion_pytorch_model|model)\.safetensors\.index(?:\.(?P<variant>[\w-]+))?\.json"
)
_SHARD = re.compile(r".*-\d{5}-of-\d{5}(\.[\w-]+)?\.safetensors")
_NUMBER = re.compile(r"-\d{5}-of-\d{5}")
_OTHER_COPIES = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".onnx_data", ".h5", ".xml")
_JSON_BYTES = 16 * 2**20


@dataclass(frozen=True)
class WeightsSet:
    """One copy of a network's weights. variant: "" or a word such as "fp16".

    shards: the files; index: which of them each tensor is in, None for a single file.
    """

    variant: str
    shards: tuple[Path, ...]
    index: Mapping[str, str] | None = None


@dataclass(frozen=True)
class ModelFolder:
    """A folder with a UNet, and with the networks around it unless it is the UNet's own."""

    path: Path

    @property
    def unet(self) -> Path:
        """Where the UNet is."""
        inner = self.path / "unet"
        return inner if inner.is_dir() else self.path

    def network(self, name: str) -> Path | None:
        """The folder of another network ("vae", "text_encoder"); None where there is none."""
        inner = self.path / name
        return inner if inner.is_dir() and self.unet != self.path else None

    def config(self, name: str, file: str = "config.json") -> Mapping[str, Any] | None:
        """A network's configuration, or the scheduler's; None where there is none."""
        folder = self.unet if name == "unet" else self.network(name)
        if folder is None or not (folder / file).is_file():
            return None
        return json_object(folder / file)

    def place(self, path: Path) -> str:
        """A file's name within the folder, with slashes."""
        return path.relative_to(self.path).as_posix()

    def unpatched(self) -> Iterator[Path]:
        """Files that hold the same weights in a shape that sepme does not patch here."""
        used = {path for one in weights_sets(self.unet) for path in one.shards}
        for path in sorted(self.unet.iterdir()):
            if path.name.endswith(_OTHER_COPIES) and path not in used:
                yield path
        if self.unet != self.path:
            for path in sorted(self.path.iterdir()):
                if path.is_file() and path.name.endswith((".safetensors", *_OTHER_COPIES)):
                    yield path


def model_folder(path: Path) -> ModelFolder:
    """A folder that a model is in.

    Raises UnsupportedError for one that holds another kind of model, or none.
    """
    index = path / "model_index.json"
    pipeline = str(json_object(index).get("_class_name", "")) if index.is_file() else ""
    if (path / "transformer").is_dir() or pipeline.startswith(("StableDiffusion3", "Flux")):
        raise UnsupportedError(
            f"{path} is a transformer model ({pipeline or 'a folder named transformer'}), and "
            "sepme patches the cross-attention of Stable Diffusion's UNets (1.x, 2.x, XL)",
            file=path,
            expected="a folder with a UNet",
            found=pipeline or "transformer",
        )
    folder = ModelFolder(path)
    if not weights_sets(folder.unet):
        raise UnsupportedError(
            f"{path} is a folder without a UNet's weights; name a .safetensors file, or a model's "
            "folder",
            file=path,
            expected="unet/diffusion_pytorch_model.safetensors",
            found=", ".join(sorted(child.name for child in path.iterdir())[:5]) or "nothing",
        )
    return folder


def weights_sets(folder: Path) -> tuple[WeightsSet, ...]:
    """The copies of a network's weights in its folder: the plain one first, then variants.

    Pickles count only where there is nothing else. Raises MalformedError for an index that lies.
    """
    with reading(folder):
        names = sorted(child.name for child in folder.iterdir())
    found: list[WeightsSet] = []
    pickled: list[WeightsSet] = []
    for name in names:
        if match := _INDEX.fullmatch(name):
            found.append(_sharded(folder / name, match["variant"] or ""))
        elif (match := _WEIGHTS.fullmatch(name)) and not _SHARD.fullmatch(name):
            single = WeightsSet(match["variant"] or "", (folder / name,))
            (found if match["kind"] == "safetensors" else pickled).append(single)
    return tuple(sorted(found or pickled, key=lambda one: (one.variant, len(one.shards))))


def one_copy(names: Sequence[str]) -> list[str]:
    """Of the files in a network's folder, one copy of its weights and what is no weights.

    The plain safetensors rather than a variant's, fp16 rather than another; pickles only where
    there is nothing else.
    """
    copies = {name: variant for name in names if (variant := _variant(name)) is not None}
    chosen = min(copies.values(), key=lambda v: (v != "", v != "fp16", v), default=None)
    others = [name for name in names if name not in copies]
    if chosen is not None:
        others = [name for name in others if not name.endswith(_OTHER_COPIES)]
    return [name for name, variant in copies.items() if variant == chosen] + others


def _variant(name: str) -> str | None:
    """Which copy of the weights a file belongs to; None where that is no safetensors file's."""
    match = _INDEX.fullmatch(name) or _WEIGHTS.fullmatch(_NUMBER.sub("", name))
    if match is None or match.groupdict().get("kind") == "bin":
        return None
    return match["variant"] or ""


def _sharded(path: Path, variant: str) -> WeightsSet:
    index = json_object(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise MalformedError(f"{path} has no weight_map", file=path, expected="a weight_map")
    files = sorted({str(name) for name in index.values()})
    for name in files:
        if not _SHARD.fullmatch(name) or "/" in name or "\\" in name or FORBIDDEN.search(name):
            raise MalformedError(
                f"{path} names a file that no shard can be",
                file=path,
                expected="NAME-00001-of-00002.safetensors, in the same folder",
                found=ascii(name)[:80],
            )
    return WeightsSet(variant, tuple(path.parent / name for name in files), index)


def json_object(path: Path) -> Mapping[str, Any]:
    """A JSON object from a file of reasonable size, which no two programs read differently."""
    with reading(path):
        if not path.is_file():
            raise UnsupportedError(f"{path} is not a regular file", file=path)
        if (size := path.stat().st_size) > _JSON_BYTES:
            raise MalformedError(
                f"{path} is too large", file=path, expected=f"{_JSON_BYTES} bytes", found=size
            )
        value = parse_json_strict(path.read_bytes())
    if not isinstance(value, dict):
        raise MalformedError(f"{path} is not a JSON object", file=path)
    return value

"""Model folders as diffusers writes them: which files hold which network.

A network's weights are one file or several with an index ("shards"); beside them there may be
copies of the same weights in another dtype ("variants"), told apart by a word in their names.
"""

import os
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
_OTHER_COPIES = (
    ".gguf", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".onnx_data", ".h5", ".xml"
)  # fmt: skip
_NO_COPIES = re.compile(
    r"(optimizer|scheduler|scaler|rng_state|random_states|training_args|trainer_state"
    r"|custom_checkpoint|pytorch_lora_weights|adapter_model|learned_embeds).*"
)
"""What training leaves beside weights, and what is put on top of them: none are copies of them."""
_NOT_OURS = frozenset({".git", ".cache"})
"""Folders of the programs that downloaded the model, which hold its files once more."""
_EXPORTS: Mapping[str, str] = {
    ".onnx": "an ONNX export",
    ".engine": "TensorRT engines",
    ".plan": "TensorRT engines",
    ".trt": "TensorRT engines",
    ".mlpackage": "a Core ML export",
    ".mlmodelc": "a Core ML export",
    ".msgpack": "Flax weights",
    ".h5": "TensorFlow weights",
}
"""What weights are called that other programs make of a model's."""
_DENOISERS = ("unet", "transformer")
"""The folders of what predicts."""
_SINGLE_FILES = (".safetensors", ".ckpt")
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
    """A folder with a denoiser, and with the networks around it unless it is the denoiser's own."""

    path: Path

    @property
    def denoiser(self) -> Path:
        """Where the UNet or the transformer is."""
        inner = (self.path / name for name in _DENOISERS)
        return next((folder for folder in inner if folder.is_dir()), self.path)

    def network(self, name: str) -> Path | None:
        """The folder of another network ("vae", "text_encoder"); None where there is none."""
        inner = self.path / name
        return inner if inner.is_dir() and self.denoiser != self.path else None

    def config(self, name: str, file: str = "config.json") -> Mapping[str, Any] | None:
        """A network's configuration, or the scheduler's; None where there is none."""
        folder = self.denoiser if name == "denoiser" else self.network(name)
        if folder is None or not (folder / file).is_file():
            return None
        return json_object(folder / file)

    def place(self, path: Path) -> str:
        """A file's name within the folder, with slashes."""
        return path.relative_to(self.path).as_posix()

    def files(self) -> Iterator[tuple[Path, str]]:
        """Every file in it, and its name within; see `model_files`."""
        return model_files(self.path)

    def may_hold_denoiser(self, place: str) -> bool:
        """Whether a file that cannot be looked into may hold a copy of the denoiser, by its name.

        place: its name within the folder.
        """
        *folders, name = place.split("/")
        if _NO_COPIES.match(name) or not name.lower().endswith((".safetensors", *_OTHER_COPIES)):
            return False
        return not folders or any(word in one.lower() for one in folders for word in _DENOISERS)


def model_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every file in the folder, and its name within, with slashes; links count as what they are."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if name not in _NOT_OURS)
        for name in sorted(names):
            path = Path(parent) / name
            if ".sepme-" not in name:
                yield path, path.relative_to(folder).as_posix()


def model_folder(path: Path) -> ModelFolder:
    """A folder that a model is in.

    Raises UnsupportedError for one that holds another kind of model, or none.
    """
    both = [name for name in _DENOISERS if (path / name).is_dir()]
    if len(both) > 1:
        raise UnsupportedError(
            f"{path} holds a UNet and a transformer: it is of two models; name the folder of one",
            file=path,
            expected="one of them",
            found=" and ".join(both),
        )
    folder = ModelFolder(path)
    if not weights_sets(folder.denoiser):
        raise _no_model(folder)
    return folder


def _no_model(folder: ModelFolder) -> UnsupportedError:
    """What to say of a folder without a UNet's weights: what it is, as far as its names tell."""
    path = folder.path
    names = sorted(child.name for child in path.iterdir())
    inner = sorted(child.name for child in folder.denoiser.iterdir())
    return UnsupportedError(
        f"{path} is a folder without the weights of a UNet or a transformer; "
        f"{_instead(folder, names, inner)}",
        file=path,
        expected="unet/diffusion_pytorch_model.safetensors",
        found=", ".join((inner or names)[:5]) or "nothing",
    )


def _instead(folder: ModelFolder, names: Sequence[str], inner: Sequence[str]) -> str:
    path = folder.path
    if export := next((_EXPORTS[end] for n in inner if (end := Path(n).suffix) in _EXPORTS), None):
        return (
            f"it holds {export}, made of a model for another program: name the model that it was "
            "made from"
        )
    if "openvino_model.xml" in inner:
        return "it holds an OpenVINO export: name the model that it was made from"
    if quantised := [name for name in inner if name.lower().endswith(".gguf")]:
        places = [folder.place(folder.denoiser / name) for name in quantised]
        return f"name the model in it: {', '.join(places[:5])}"
    if folder.denoiser != path:
        return (
            f"its {folder.denoiser.name} folder holds none: the download is not whole, get it again"
        )
    if any(name.startswith(("adapter_config", "pytorch_lora_weights")) for name in names):
        return "it holds a LoRA: name the model; sepme import makes a patch of a LoRA"
    if files := [name for name in names if name.endswith(_SINGLE_FILES)]:
        return f"name the model in it: {', '.join(files[:5])}"
    if "snapshots" in names:
        places = sorted(f"snapshots/{child.name}" for child in (path / "snapshots").iterdir())
        return f"it is a hub's cache: name the snapshot in it: {', '.join(places[:5])}"
    models = [name for name in names if any((path / name / one).is_dir() for one in _DENOISERS)]
    if models:
        return f"name the model's folder in it: {', '.join(models[:5])}"
    return "name a .safetensors file, or a model's folder"


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

"""Judges from transformers: image classifiers, and CLIP models that choose among words."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, CLIPModel
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar

from patch_spec.text import slugify
from sepme_cli.diffusion.tokenizer import has_tokenizer, tokenize
from sepme_cli.erasure.prompts import Kind, kinds
from sepme_cli.errors import UnsupportedError

# Loading a judge is no stage of its own, and --quiet must hold.
disable_progress_bar()

_BATCH = 32
_ASKED: Mapping[Kind, str] = {"style": "a picture in {} style", "object": "a picture of a {}"}
_CENTRE = (0.5, 0.5, 0.5)
"""The mean and the deviation that images are normalised by where a model does not say."""


@dataclass(frozen=True)
class Preparation:
    """How a vision model wants its images: a square of `size` pixels, normalised."""

    size: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Images [n, 3, H, W] in [0, 1] as the model's input [n, 3, size, size]."""
        square = interpolate(
            images, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False
        ).clamp(0, 1)
        mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.deviation))
        return (square - mean) / deviation


@dataclass(frozen=True)
class Classifier:
    """An image classifier. known: of each kind, the words asked for that it has a label for."""

    model: Any = field(repr=False)
    prepare: Preparation
    known: Mapping[Kind, Mapping[str, str]]

    def labels(self, kind: Kind) -> Sequence[str]:
        return tuple(self.known[kind])

    @torch.no_grad()
    def recognise(self, images: Tensor, kind: Kind) -> Sequence[str]:
        names = {label: word for word, label in self.known[kind].items()}
        found: list[str] = []
        for part in images.split(_BATCH):
            logits = self.model(self.prepare(part).to(self.model.device)).logits
            labels = [self.model.config.id2label[int(i)] for i in logits.argmax(-1)]
            found += [names.get(label, label) for label in labels]
        return found


@dataclass(frozen=True)
class ZeroShot:
    """A CLIP model that chooses, for each image, the likeliest of some words."""

    model: Any = field(repr=False)
    prepare: Preparation
    names: Mapping[Kind, Sequence[str]]
    tokenizer: Path | None

    def labels(self, kind: Kind) -> Sequence[str]:
        return self.names[kind]

    @torch.no_grad()
    def recognise(self, images: Tensor, kind: Kind) -> Sequence[str]:
        words = self.names[kind]
        positions = self.model.config.text_config.max_position_embeddings
        asked = [_ASKED[kind].format(word) for word in words]
        ids = tokenize(asked, positions, folder=self.tokenizer).to(self.model.device)
        found: list[str] = []
        for part in images.split(_BATCH):
            inputs = self.prepare(part).to(self.model.device)
            out = self.model(input_ids=ids, pixel_values=inputs)
            found += [words[int(i)] for i in out.logits_per_image.argmax(-1)]
        return found


def transformers_judge(
    spec: str, names: Mapping[Kind, Sequence[str]], device: Any
) -> Classifier | ZeroShot:
    """A judge from a model's folder, or from the hub's cache by its id. No network is asked.

    Raises UnsupportedError where it cannot be had, and for a model that is no judge.
    """
    place = _folder(spec, "--judge")
    config = _load(AutoConfig, place)
    said = " ".join(config.architectures or ())
    if "ImageClassification" in said:
        model = _load(AutoModelForImageClassification, place).to(device).eval()
        labels = list(model.config.id2label.values())
        known = {kind: _known(labels, names[kind]) for kind in kinds("any")}
        return Classifier(model, _preparation(place, config), known)
    if "CLIPModel" in said:
        model = _load(CLIPModel, place).to(device).eval()
        tokenizer = place if has_tokenizer(place) else None
        return ZeroShot(model, _preparation(place, config.vision_config), names, tokenizer)
    raise UnsupportedError(
        f"--judge {spec}: neither an image classifier nor a CLIP model",
        expected="…ForImageClassification or CLIPModel",
        found=said or "nothing that identifies it",
    )


def vision_features(spec: str, device: Any) -> Callable[[Tensor], Tensor]:
    """What a vision model of transformers sees: images [n, 3, H, W] in [0, 1] to [n, d], fp64.

    CLIP's pooled output, of other models the mean over places: what some pool by is not trained.
    Raises UnsupportedError where the model cannot be had.
    """
    place = _folder(spec, "--features")
    config = _load(AutoConfig, place)
    prepare = _preparation(place, getattr(config, "vision_config", config))
    model = _load(AutoModel, place).to(device).eval()

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return torch.cat([_pooled(model, prepare(part).to(device)) for part in images.split(32)])

    return features


def _pooled(model: Any, inputs: Tensor) -> Tensor:
    """[n, d], fp64, on the CPU."""
    if hasattr(model, "vision_model"):
        pooled: Tensor = model.vision_model(inputs).pooler_output
    else:
        states = model(inputs).last_hidden_state
        pooled = states.mean((2, 3) if states.dim() == 4 else 1)
    return pooled.double().cpu()


def _known(labels: Sequence[str], words: Sequence[str]) -> dict[str, str]:
    """The labels by the words asked for; "tench, Tinca tinca" is known by either name."""
    by_slug = {slugify(name): label for label in labels for name in label.split(",")}
    by_slug |= {slugify(label): label for label in labels}
    return {word: by_slug[slugify(word)] for word in words if slugify(word) in by_slug}


def _folder(spec: str, option: str) -> Path:
    """Where a model's files are: a folder, or the hub's cache."""
    try:
        found = cached_file(spec, "config.json", local_files_only=True)
    except (OSError, ValueError):
        found = None
    if found is None:
        raise UnsupportedError(
            f"{option} {spec}: no model's folder, and not in the hub's cache; if it is a hub id, "
            f"fetch it first (hf download {spec})",
            expected="a folder with a model, or a hub id that was downloaded",
            found="neither",
        )
    return Path(found).parent


def _load(kind: Any, place: Path) -> Any:
    try:
        return kind.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedError(
            f"{place}: not a model that transformers can load: {str(error).splitlines()[0][:200]}",
            file=place,
        ) from error


def _preparation(place: Path, config: Any) -> Preparation:
    """As the model's own preprocessor_config.json says, where there is one."""
    file = place / "preprocessor_config.json"
    said: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    size: Any = said.get("crop_size") or said.get("size") or getattr(config, "image_size", 224)
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge") or 224
    if isinstance(size, (list, tuple)):
        size = size[0]
    mean, deviation = said.get("image_mean") or _CENTRE, said.get("image_std") or _CENTRE
    return Preparation(int(size), tuple(mean), tuple(deviation))

"""Judges from transformers: image classifiers, and CLIP models that choose among words."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import AutoConfig, AutoModelForImageClassification, CLIPModel

from sepme_cli.diffusion.tokenizer import has_tokenizer, tokenize
from sepme_cli.erasure.prompts import Kind
from sepme_cli.errors import UnsupportedError

_BATCH = 32
_ASKED: Mapping[Kind, str] = {"style": "a picture in {} style", "object": "a picture of a {}"}
_MEAN, _DEVIATION = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Preparation:
    """How a vision model wants its pictures: a square of `size` pixels, normalised."""

    size: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def __call__(self, pictures: Tensor) -> Tensor:
        """Pictures [n, 3, H, W] in [0, 1] as the model's input [n, 3, size, size]."""
        square = interpolate(
            pictures, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False
        ).clamp(0, 1)
        mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.deviation))
        return (square - mean.to(square)) / deviation.to(square)


@dataclass(frozen=True)
class Classifier:
    """An image classifier. known: its labels by the concepts' names."""

    model: Any = field(repr=False)
    prepare: Preparation
    known: Mapping[str, str]

    def labels(self, kind: Kind) -> Sequence[str]:
        return tuple(self.known)

    @torch.no_grad()
    def recognise(self, pictures: Tensor, kind: Kind) -> Sequence[str]:
        names = {label: concept for concept, label in self.known.items()}
        found: list[str] = []
        for part in pictures.split(_BATCH):
            logits = self.model(self.prepare(part).to(self.model.device)).logits
            labels = [self.model.config.id2label[int(i)] for i in logits.argmax(-1)]
            found += [names.get(label, label) for label in labels]
        return found


@dataclass(frozen=True)
class ZeroShot:
    """A CLIP model that chooses, for each picture, the likeliest of some words."""

    model: Any = field(repr=False)
    prepare: Preparation
    names: Mapping[Kind, Sequence[str]]
    tokenizer: Path | None

    def labels(self, kind: Kind) -> Sequence[str]:
        return self.names.get(kind, ())

    @torch.no_grad()
    def recognise(self, pictures: Tensor, kind: Kind) -> Sequence[str]:
        words = list(self.names[kind])
        positions = self.model.config.text_config.max_position_embeddings
        asked = [_ASKED[kind].format(word) for word in words]
        ids = tokenize(asked, positions, folder=self.tokenizer)
        found: list[str] = []
        for part in pictures.split(_BATCH):
            inputs = self.prepare(part).to(self.model.device)
            out = self.model(input_ids=ids.to(self.model.device), pixel_values=inputs)
            found += [words[int(i)] for i in out.logits_per_image.argmax(-1)]
        return found


def transformers_judge(
    spec: str, names: Mapping[Kind, Sequence[str]], labels: Mapping[str, str], device: Any
) -> Classifier | ZeroShot:
    """A judge from a model's folder, or from the hub's cache or the hub by its id.

    Raises UnsupportedError where it cannot be had, and for a model that is no judge.
    """
    config = _config(spec)
    kinds = " ".join(config.architectures or ())
    place = Path(spec) if Path(spec).is_dir() else None
    if "ImageClassification" in kinds:
        model = _load(AutoModelForImageClassification, spec).to(device).eval()
        known = _known(list(model.config.id2label.values()), names, labels)
        return Classifier(model, _preparation(place, config), known)
    if "CLIPModel" in kinds:
        model = _load(CLIPModel, spec).to(device).eval()
        tokenizer = place if place is not None and has_tokenizer(place) else None
        return ZeroShot(model, _preparation(place, config.vision_config), names, tokenizer)
    raise UnsupportedError(
        f"--judge {spec}: neither an image classifier nor a CLIP model",
        expected="…ForImageClassification or CLIPModel",
        found=kinds or "nothing that says what it is",
    )


def _known(
    labels: Sequence[str], names: Mapping[Kind, Sequence[str]], renamed: Mapping[str, str]
) -> dict[str, str]:
    """The classifier's labels by concept; "tench, Tinca tinca" is known by either word."""
    by_word = {word.strip().casefold(): label for label in labels for word in label.split(",")}
    by_word |= {label.casefold(): label for label in labels}
    asked = [name for words in names.values() for name in words]
    return {
        name: by_word[wanted]
        for name in asked
        if (wanted := renamed.get(name, name).casefold()) in by_word
    }


def _config(spec: str) -> Any:
    return _load(AutoConfig, spec)


def _load(kind: Any, spec: str) -> Any:
    """From a folder or the cache; the hub is asked only if neither has it."""
    try:
        return kind.from_pretrained(spec, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UnsupportedError(
            f"--judge {spec}: no such folder, and not in the hub's cache (fetch it first, for "
            f"instance with `hf download {spec}`)",
            expected="a folder with a model, or a hub id that was downloaded",
            found=str(error).splitlines()[0][:200],
        ) from error


def _preparation(place: Path | None, config: Any) -> Preparation:
    said: dict[str, Any] = {}
    if place is not None and (place / "preprocessor_config.json").is_file():
        said = json.loads((place / "preprocessor_config.json").read_text())
    size: Any = said.get("crop_size") or said.get("size") or getattr(config, "image_size", 224)
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge") or 224
    mean, deviation = said.get("image_mean") or _MEAN, said.get("image_std") or _DEVIATION
    return Preparation(int(size), tuple(mean), tuple(deviation))

"""What a UNet was trained to predict, noise or velocity, as far as its files tell.

Networks of both kinds have the same names and shapes, so this is looked for where people and
programs write it down. In order:

1. `scheduler/scheduler_config.json` in the model's folder (or beside the UNet's): its
   `prediction_type`.
2. The file's metadata: `modelspec.prediction_type`, or kohya's `ss_v_parameterization`.
3. A `.yaml` of the same name beside the file, as the first programs read it: `parameterization`,
   or XL's scaling of its denoiser; one of theirs that says neither means noise.
4. A tensor called `v_pred`, which is put there for nothing else.
5. In a family with models of both kinds, SD 2.x, the spread of one bias, by which the published
   ones differ (ComfyUI's rule).

The first that speaks is believed, and named.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from sepme_cli.checkpoints.disk.failures import reading
from sepme_cli.checkpoints.reading.checkpoint import Checkpoint
from sepme_cli.checkpoints.structure.families import Prediction
from sepme_cli.checkpoints.structure.folders import json_object

_WORDS: Mapping[Prediction, frozenset[str]] = MappingProxyType(
    {
        "epsilon": frozenset({"epsilon", "eps", "noise"}),
        "velocity": frozenset({"v", "v_prediction", "v-prediction", "v_pred", "velocity"}),
    }
)
"""How either is written."""
_SCHEDULE = "scheduler_config.json"
_BIASES = (
    "output_blocks.11.1.transformer_blocks.0.norm1.bias",
    "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias",
)
"""One bias by its names in CompVis' files and in diffusers'."""
_VELOCITY_SPREAD = 0.09
"""Above it a file of SD 2.x predicts velocity: the two kinds that were published differ there."""
_YAML_BYTES = 2**20
_PARAMETERIZATION = re.compile(r"""^\s*parameterization:\s*["']?([\w-]+)""", re.MULTILINE)
_SCALING = re.compile(r"^\s*target:\s*sgm\.\S*\.(V|Eps)Scaling\w*", re.MULTILINE)
_THEIRS = re.compile(r"^\s*target:\s*(ldm|sgm)\.", re.MULTILINE)


@dataclass(frozen=True)
class RecordedPrediction:
    """What a UNet predicts. source: what says so, None where nothing does. unknown: what else is
    said that sepme does not know, and was passed over."""

    prediction: Prediction
    source: str | None
    unknown: tuple[str, ...] = ()


def recorded_prediction(checkpoint: Checkpoint) -> RecordedPrediction:
    """What the checkpoint's UNet predicts; noise where nothing says it."""
    unknown: list[str] = []
    for said, source in _evidence(checkpoint):
        for prediction, words in _WORDS.items():
            if said.lower() in words:
                return RecordedPrediction(prediction, source, tuple(unknown))
        unknown.append(f"{source} says {said[:40]!r}")
    return RecordedPrediction("epsilon", None, tuple(unknown))


def _evidence(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """What is said, and by what."""
    yield from _of_schedule(checkpoint)
    metadata = checkpoint.metadata
    if said := metadata.get("modelspec.prediction_type"):
        yield said, "modelspec.prediction_type in its metadata"
    if said := metadata.get("ss_v_parameterization"):
        yield "v" if said.lower() == "true" else "epsilon", "ss_v_parameterization in its metadata"
    if checkpoint.folder is None:
        yield from _of_yaml(checkpoint.path)
    if any("v_pred" in file.header.by_name for file in checkpoint.files):
        yield "v", "its tensor v_pred"
    network = checkpoint.network("denoiser")
    if checkpoint.family.velocity_side is not None and network is not None:
        for bias in (network.tensors[name] for name in _BIASES if name in network.tensors):
            spread = float(bias.read().astype("float64").std(ddof=1))
            yield "v" if spread > _VELOCITY_SPREAD else "epsilon", f"the spread of {bias.name}"


def _of_schedule(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    if checkpoint.folder is None:
        return
    denoiser = checkpoint.folder.denoiser
    places = (denoiser.parent / "scheduler" / _SCHEDULE, denoiser / _SCHEDULE)
    for place in places:
        if place.is_file() and isinstance(said := json_object(place).get("prediction_type"), str):
            yield said, f"{place.parent.name}/{place.name}"


def _of_yaml(path: Path) -> Iterator[tuple[str, str]]:
    """Of a configuration as CompVis' and Stability's programs have it, looked at line by line: it
    names Python classes, which nothing here needs."""
    for place in (path.with_suffix(ending) for ending in (".yaml", ".yml")):
        with reading(place):
            if not place.is_file():
                continue
            with place.open("rb") as file:
                text = file.read(_YAML_BYTES).decode(errors="replace")
        if not _THEIRS.search(text):
            continue
        said, scaling = _PARAMETERIZATION.search(text), _SCALING.search(text)
        word = said[1] if said else (scaling[1] if scaling else "eps")
        yield word, place.name

"""LoRA files as other programs read them: the tensors, and what their metadata says."""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt

from patch_spec.base import Family as FamilyName
from patch_spec.header import encode_header
from patch_spec.validate import canonical_order
from sepme_cli.checkpoints.lora.names import LoraFormat
from sepme_cli.checkpoints.structure.dtypes import numpy_dtype
from sepme_cli.checkpoints.structure.families import Family

Array = npt.NDArray[Any]
Pair = tuple[Array, Array]
"""up [out, r] and down [r, d] of a module: what is added to its weight is up @ down."""

_CODE: Mapping[FamilyName, str] = {
    **dict.fromkeys(
        ("sdxl", "sdxl-refiner", "sd3"), "https://github.com/Stability-AI/generative-models"
    ),
    "flux": "https://github.com/black-forest-labs/flux",
    "wan": "https://github.com/Wan-Video/Wan2.1",
}
"""Which code kohya's scripts say a LoRA is for, where not diffusers."""
_NAMES: Mapping[LoraFormat, tuple[str, str]] = {
    "kohya": ("lora_up", "lora_down"),
    "peft": ("lora_B", "lora_A"),
}


def lora_bytes(
    pairs: Mapping[str, Pair], to: LoraFormat, dtype: str, metadata: Mapping[str, str]
) -> bytes:
    """The file; the same pairs and metadata give the same bytes.

    pairs: module to its pair, all of one rank r, in the header's `dtype`. kohya's files say
    alpha = r, which is a factor of 1: programs differ in what they make of other factors. PEFT's
    say nothing, which means the same.
    """
    up_name, down_name = _NAMES[to]
    tensors: dict[tuple[str, str], Array] = {}
    for module, (up, down) in pairs.items():
        tensors[dtype, f"{module}.{up_name}.weight"] = up
        tensors[dtype, f"{module}.{down_name}.weight"] = down
        if to == "kohya":
            tensors["F32", f"{module}.alpha"] = np.array(len(down))
    entries = canonical_order({key: array.shape for key, array in tensors.items()})
    ordered = (
        tensors[entry.dtype, entry.name].astype(numpy_dtype(entry.dtype)) for entry in entries
    )
    data = b"".join(array.tobytes() for array in ordered)
    digest = sha256(data).hexdigest()
    said = {**metadata, "sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
    return encode_header(said, entries) + data


def lora_metadata(
    family: Family, concepts: Sequence[str], name: str, rank: int, tool: str, to: LoraFormat
) -> dict[str, str]:
    """What kohya's scripts, A1111 and model managers look for in a LoRA's metadata.

    name: of the file, without its ending.
    """
    told = f"takes out {', '.join(concepts)}; exported from a patch by {tool}, nothing was trained"
    kohya = {
        "ss_network_module": _network_module(family),
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_v2": str(family.kohya == "sd_v2"),
        "ss_base_model_version": family.kohya,
        "ss_output_name": name,
        "ss_training_comment": told,
    }
    return {
        **(kohya if to == "kohya" else {"format": "pt"}),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{family.modelspec}/lora",
        "modelspec.implementation": _CODE.get(family.name, "diffusers"),
        "modelspec.title": ", ".join(concepts),
        "modelspec.description": told,
    }


def _network_module(family: Family) -> str:
    """The module of kohya's scripts that reads it: each transformer has its own."""
    return "networks.lora" if family.denoiser == "unet" else f"networks.lora_{family.name}"

"""How other programs read LoRA files, written from the key rules that they publish.

Each returns what a loader would add to which weight of the UNet, in the weight's name without
`.weight`; it takes no key on trust: one that it does not know is an error.
"""

import re
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from sepme_cli.checkpoints.structure.layout import Layout
from tests.synthetic import read_raw

Added = dict[str, np.ndarray]


def metadata(path: Path) -> dict[str, str]:
    return read_raw(path)[0]["__metadata__"]


def comfyui(path: Path, ldm: list[str], span: int) -> Added:
    """ComfyUI, for a denoiser whose weights have these names in single files.

    A module is called `lora_unet_` and the LDM or the diffusers name with underscores. The factor
    is alpha / rank, or 1 without an alpha.
    """
    layout = Layout("", span)
    known = {}
    for name in ldm:
        known[f"lora_unet_{name.replace('.', '_')}"] = name
        ours = layout.target(f"{name}.weight")
        if ours is not None:
            ours = ours.removesuffix(".weight")
            known[f"lora_unet_{ours.replace('.', '_')}"] = name
    return _added(load_file(path), known)


def kohya_scripts(path: Path, modules: list[str], network: str = "networks.lora") -> Added:
    """sd-scripts: `lora_unet_` and its own name of a module with underscores, an alpha with each.

    modules: the names of the denoiser's modules, which are diffusers' for SD 1 and 2, LDM's for XL
    and its authors' for a transformer. network: the module of the scripts that reads it.
    """
    tensors = load_file(path)
    known = {f"lora_unet_{name.replace('.', '_')}": name for name in modules}
    assert all(f"{key.split('.')[0]}.alpha" in tensors for key in tensors)
    assert metadata(path)["ss_network_module"] == network
    return _added(tensors, known)


def a1111(path: Path) -> tuple[str, list[str]]:
    """A1111 and Forge: for which models it lists the file, and how its modules are named."""
    said = metadata(path)
    if said["ss_base_model_version"].startswith("sdxl_"):
        version = "SDXL"
    else:
        version = "SD2" if said["ss_v2"] == "True" else "SD1"
    names = sorted({key.split(".")[0] for key in load_file(path)})
    diffusers = re.compile(r"lora_unet_((down|up)_blocks_\d+|mid_block)_attentions_\d+_.+")
    ldm = re.compile(r"lora_unet_((input|output)_blocks_\d+|middle_block)_1_.+")
    assert all((ldm if version == "SDXL" else diffusers).fullmatch(name) for name in names)
    return version, names


def _added(tensors: dict[str, np.ndarray], known: dict[str, str]) -> Added:
    added = {}
    for key in tensors:
        module, part = key.split(".", 1)
        assert part in ("lora_down.weight", "lora_up.weight", "alpha"), key
        if part == "lora_down.weight":
            down = tensors[key].astype(np.float64)
            up = tensors[f"{module}.lora_up.weight"].astype(np.float64)
            alpha = tensors.get(f"{module}.alpha")
            factor = 1.0 if alpha is None else float(alpha) / len(down)
            added[known[module]] = up @ down * factor
        else:
            assert module in known, key
    return added

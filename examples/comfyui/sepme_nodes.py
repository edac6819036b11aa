"""sepme patches in ComfyUI: "Load SepME patch" and "Apply SepME patch", under loaders/sepme.

Install: copy this file into ComfyUI's `custom_nodes` folder, and into the Python that runs ComfyUI

    pip install --no-deps sepme && pip install ml_dtypes numpy rfc8785

which leaves its torch alone; no diffusers is needed. Patches (.sepme) belong into `models/sepme`.

The weights are changed by ComfyUI itself, as for a LoRA: cloning a model, LoRAs beside a patch,
low memory and putting everything back are its own. What is added is computed from the model's own
weights without any patch, so that several patches, one node each, do not depend on their order.
It takes the memory of the cross-attention's keys and values, 37 MiB for SD 1.x and 650 for XL.

Tested with ComfyUI 0.3.64's own ModelPatcher and UNet, scaled down, in fp32, fp16 and bf16, with
and without its low-memory mode: two nodes in a row give the weights of `sepme apply` to within a
rounding, and afterwards the original's bits. Not tested on a GPU, nor in its window.
"""

import os
from hashlib import sha256
from typing import Any

import folder_paths

import sepme_cli as sepme
from sepme_cli.arguments import scales_in

_UNET = "diffusion_model."
"""What the names of a model's UNet begin with in ComfyUI."""

folder_paths.add_model_folder_path("sepme", os.path.join(folder_paths.models_dir, "sepme"))


class LoadSepmePatch:
    """A patch from models/sepme."""

    CATEGORY = "loaders/sepme"
    RETURN_TYPES = ("SEPME_PATCH", "STRING")
    RETURN_NAMES = ("patch", "concepts")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        names = [n for n in folder_paths.get_filename_list("sepme") if n.endswith(".sepme")]
        return {"required": {"patch_name": (names,)}}

    @classmethod
    def IS_CHANGED(cls, patch_name: str) -> str:
        """The file's digest: another patch under the same name is another patch."""
        with open(cls._path(patch_name), "rb") as file:
            return sha256(file.read()).hexdigest()

    def load(self, patch_name: str) -> tuple[str, str]:
        """The patch's path, and the names of its concepts, a line each."""
        path = self._path(patch_name)
        found = sepme.inspect(path)
        if found.kind != "patch":
            raise sepme.MalformedError(f"{path} is no patch", file=path, found=found.kind)
        return path, "\n".join(part["concept"] for part in found.manifest["increments"])

    @staticmethod
    def _path(patch_name: str) -> str:
        path = folder_paths.get_full_path("sepme", patch_name)
        if path is None:
            raise sepme.SystemFailure(f"{patch_name}: not in models/sepme", file=patch_name)
        return str(path)


class ApplySepmePatch:
    """A model without the concepts of a patch.

    concepts: of the patch, only these, a line each; "Monet: 0.5" takes half of it out. All of them
    if empty. strength: how much of everything, 1 being all; 0 is the model itself.
    """

    CATEGORY = "loaders/sepme"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        strength = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05}
        concepts = {"default": "", "multiline": True}
        return {
            "required": {
                "model": ("MODEL",),
                "patch": ("SEPME_PATCH",),
                "strength": ("FLOAT", strength),
                "concepts": ("STRING", concepts),
            }
        }

    def apply(self, model: Any, patch: str, strength: float, concepts: str) -> tuple[Any]:
        if strength == 0:
            return (model,)
        weights = _unpatched(model)
        named = scales_in(concepts)
        added = sepme.deltas(
            weights,
            patch,
            only=tuple(named),
            scale={name: scale * strength for name, scale in named.items()} or strength,
        )
        # What is added needs no more digits than what it is added to.
        patches = {_UNET + n: (change.to(weights[n].dtype),) for n, change in added.items()}
        patched = model.clone()
        taken = patched.add_patches(patches)
        if len(taken) != len(patches):
            raise sepme.MismatchError(
                "ComfyUI did not take all of the patch", expected=len(patches), found=len(taken)
            )
        return (patched,)


def _unpatched(model: Any) -> dict[str, Any]:
    """The denoiser's tensors as they are without any LoRA or patch, by their names in it."""
    found = {}
    for name, (weight, *_) in model.get_key_patches(_UNET).items():
        # ComfyUI puts a weight together with what makes a plain tensor of it; it once did not.
        found[name.removeprefix(_UNET)] = weight[0] if isinstance(weight, tuple) else weight
    return found


NODE_CLASS_MAPPINGS = {"LoadSepmePatch": LoadSepmePatch, "ApplySepmePatch": ApplySepmePatch}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LoadSepmePatch": "Load SepME patch",
    "ApplySepmePatch": "Apply SepME patch",
}

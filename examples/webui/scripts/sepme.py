"""sepme patches in AUTOMATIC1111's web UI and in Forge: an accordion under txt2img and img2img.

Install: copy this file to `extensions/sepme/scripts/sepme.py`, and into the Python that runs the
web UI (3.11 or newer)

    pip install --no-deps sepme && pip install ml_dtypes numpy rfc8785

which leaves its torch alone; no diffusers is needed. Patches (.sepme) belong into `models/sepme`.

In AUTOMATIC1111's web UI the weights are patched while a picture is sampled and are the original's
bits again afterwards, also after an error; LoRAs come on top of the patched weights. In Forge its
own patching of weights does it, as for a LoRA. A patch that does not fit ends the generation: no
picture is drawn as if it had been applied. Another model for the refiner or for the hires pass
would not be patched, and is refused.

Tested with Forge's own ModelPatcher, LoRA loader and UNet (of June 2025), scaled down, and with
the LoRA code of AUTOMATIC1111's web UI 1.8 and 1.10 on the same UNet: with and without LoRAs it
draws what the file of `sepme apply` draws (in Forge to within a rounding of the weights), and
afterwards the weights are the original's bits. Not tested on a GPU, nor in a browser.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import gradio as gr
from modules import paths, scripts
from modules.ui_components import InputAccordion

import sepme_cli as sepme
from sepme_cli.arguments import scales_in

_FOLDER = os.path.join(paths.models_path, "sepme")
_UNET = "diffusion_model."
_TARGETS = (".attn2.to_k", ".attn2.to_v")
_NONE = (None, "", "None", "none", "Use same checkpoint")


@dataclass(frozen=True)
class Asked:
    """What the accordion says. names: of patches in models/sepme."""

    names: tuple[str, ...]
    strength: float
    concepts: str

    @property
    def files(self) -> list[str]:
        return [os.path.join(_FOLDER, name) for name in self.names]

    @property
    def choice(self) -> dict[str, Any]:
        """The concepts that are named, or all, and how much of each."""
        named = scales_in(self.concepts)
        scales = {name: scale * self.strength for name, scale in named.items()}
        return {"only": tuple(named), "scale": scales or self.strength}

    @property
    def digest(self) -> str:
        """Differs where anything that is asked for does, the patches' bytes included."""
        told = sha256(repr((self.strength, self.concepts)).encode())
        for path in self.files:
            with open(path, "rb") as file:
                told.update(sha256(file.read()).digest())
        return told.hexdigest()


class Script(scripts.Script):  # type: ignore[misc]
    """The accordion, and what it does to a generation."""

    def title(self) -> str:
        return "SepME: take concepts out"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        os.makedirs(_FOLDER, exist_ok=True)
        names = sorted(name for name in os.listdir(_FOLDER) if name.endswith(".sepme"))
        with InputAccordion(False, label=self.title()) as enabled:
            patches = gr.Dropdown(
                names, value=[], multiselect=True, label="Patches (of models/sepme)"
            )
            strength = gr.Slider(-2.0, 2.0, value=1.0, step=0.05, label="Strength")
            concepts = gr.Textbox(
                lines=3,
                label="Concepts",
                placeholder="Only these, a line each, or all. Half of one:\nMonet: 0.5",
            )
        return [enabled, patches, strength, concepts]

    def process(
        self, p: Any, enabled: bool, patches: list[str], strength: float, concepts: str
    ) -> None:
        """Before anything is drawn: have sampling happen on patched weights."""
        if not enabled or not patches or strength == 0:
            return
        asked = Asked(tuple(patches), strength, concepts)
        said = ", ".join(concepts.split("\n")) if concepts.strip() else "all"
        told = f"{', '.join(patches)} ({said}; strength {strength:g})"
        p.extra_generation_params["SepME"] = told
        if not hasattr(p.sd_model, "forge_objects"):
            p.sample = _patched_sampling(p, asked)

    def process_before_every_sampling(
        self,
        p: Any,
        enabled: bool,
        patches: list[str],
        strength: float,
        concepts: str,
        **_: Any,
    ) -> None:
        """In Forge, whose models are put together anew before each pass."""
        if not enabled or not patches or strength == 0 or not hasattr(p.sd_model, "forge_objects"):
            return
        objects = p.sd_model.forge_objects
        try:
            _check_one_model(p)
            objects.unet = _added(objects.unet, Asked(tuple(patches), strength, concepts))
        except Exception as error:
            # What a script raises here is only reported, and a picture drawn all the same.
            objects.unet = _refusing(objects.unet, error)


def _patched_sampling(p: Any, asked: Asked) -> Callable[..., Any]:
    """`p.sample` on patched weights; the web UI calls it once a batch."""
    sample = p.sample

    def sample_patched(*arguments: Any, **named: Any) -> Any:
        _check_one_model(p)
        unet = p.sd_model.model.diffusion_model
        with _without_loras(unet), sepme.patched(unet, asked.files, **asked.choice):
            return sample(*arguments, **named)

    return sample_patched


def _check_one_model(p: Any) -> None:
    for field in ("refiner_checkpoint", "hr_checkpoint_name"):
        if (other := getattr(p, field, None)) not in _NONE:
            raise sepme.UsageError(
                f"sepme patches one model, and {other} is to draw too: turn it off",
                expected="no other model for the refiner or the hires pass",
                found=other,
            )


@contextmanager
def _without_loras(unet: Any) -> Iterator[None]:
    """Have the web UI take its LoRAs for not applied yet where patches act, before and after.

    It adds them to a layer's weights when that is next used, and keeps a copy of what those were:
    of the patched weights inside, and of the original's afterwards.
    """
    layers = [m for name, m in unet.named_modules() if name.endswith(_TARGETS)]
    if any(getattr(layer, "fp16_weight", None) is not None for layer in layers):
        raise sepme.UnsupportedError(
            "the web UI would add LoRAs to copies that sepme does not reach: turn off "
            "'Cache FP16 weight for LoRA'"
        )

    def forget() -> None:
        for layer in layers:
            layer.network_current_names = ()
            layer.network_weights_backup = None

    for layer in layers:
        if getattr(layer, "network_weights_backup", None) is not None:
            layer.weight.data.copy_(layer.network_weights_backup)
    forget()
    try:
        yield
    finally:
        forget()


def _added(patcher: Any, asked: Asked) -> Any:
    """Forge's model with what the patches add to it."""
    kept = patcher.lora_loader.backup
    weights = {
        name.removeprefix(_UNET): kept.get(name, weight)
        for name, weight in patcher.model.named_parameters()
        if name.startswith(_UNET)
    }
    changes = sepme.deltas(weights, asked.files, **asked.choice)
    patches = {_UNET + n: (change.to(weights[n].dtype),) for n, change in changes.items()}
    patched = patcher.clone()
    # The name is all that Forge looks at to see whether anything has changed.
    taken = patched.add_patches(filename=f"sepme {asked.digest}", patches=patches)
    if len(taken) != len(patches):
        raise sepme.MismatchError(
            "Forge did not take all of the patch", expected=len(patches), found=len(taken)
        )
    return patched


def _refusing(patcher: Any, error: Exception) -> Any:
    """Forge's model, which raises the error instead of drawing."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise error

    refusing = patcher.clone()
    refusing.set_model_unet_function_wrapper(refuse)
    return refusing

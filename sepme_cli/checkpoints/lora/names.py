"""What LoRA files call the layers that patches change, and all the others.

kohya's scripts train Stable Diffusion 1 and 2 in diffusers' modules and XL in its own, so a file
is read everywhere only if it names the modules of the first as diffusers does and those of XL as
LDM does. PEFT has diffusers' names with dots.
"""

from collections.abc import Iterable
from typing import Literal

from sepme_cli.checkpoints.structure.families import Family
from sepme_cli.checkpoints.structure.layout import Layout, span_of

LoraFormat = Literal["kohya", "peft"]

_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("text encoder", ("lora.te", "text.encoder", "text.model")),
    ("key and value of the cross-attention", ("attn2.to.k", "attn2.to.v")),
    ("query and output of the cross-attention", ("attn2.",)),
    ("self-attention", ("attn1.",)),
    ("feed-forward", (".ff.",)),
    ("projection around the attention", ("proj.in", "proj.out")),
)
"""Parts of a model, in words, and what tells them in a module's name with dots for all joints."""


def module_name(target: str, family: Family, span: int, to: LoraFormat) -> str:
    """The module of a target in a LoRA file. span: L of the UNet, see `span_of`."""
    if to == "peft":
        return f"unet.{_module(target)}"
    naming: Literal["ldm", "diffusers"] = "ldm" if family.single_file_modules else "diffusers"
    layout = Layout("", span, naming, family.entries.get(naming, {}))
    return f"lora_unet_{_joined(layout.stored(target))}"


def known_modules(targets: Iterable[str]) -> dict[str, str]:
    """Every name that programs give the modules of these targets, to the target.

    Those of kohya's scripts in either naming, LyCORIS, PEFT with and without its wrappers, older
    diffusers ("….attn2.processor.to_k"), and ComfyUI's own.
    """
    targets = tuple(targets)
    ldm = Layout("", span_of(targets))
    known: dict[str, str] = {}
    for target in targets:
        plain, single = _module(target), _module(ldm.stored(target))
        dotted = [plain, plain.replace(".to_", ".processor.to_")]
        prefixes = ("", "unet.", "base_model.model.", "unet.base_model.model.")
        names = [prefix + name for prefix in prefixes for name in dotted]
        names += [f"{prefix}_{_joined(plain)}" for prefix in ("lora_unet", "lycoris")]
        names += [f"lora_unet_{_joined(single)}", f"diffusion_model.{single}"]
        known |= dict.fromkeys(names, target)
    return known


def kind_of_module(name: str) -> str:
    """What part of a model a LoRA's module is, in words."""
    dotted = name.replace("_", ".").replace(".processor.", ".")
    for kind, signs in _KINDS:
        if any(sign in dotted for sign in signs):
            return kind
    return "convolutions and others"


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _joined(name: str) -> str:
    return _module(name).replace(".", "_")

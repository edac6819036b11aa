"""What LoRA files call the layers that patches change, and all the others.

kohya's scripts train Stable Diffusion 1 and 2 in diffusers' modules, XL in its own and transformers
in their authors', so a file is read everywhere only if it names the modules of the first as
diffusers does and those of the others as single files do. PEFT has diffusers' names with dots.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal

from patch_spec.base import Family as FamilyName
from patch_spec.streams import network_of
from sepme_cli.checkpoints.structure.families import Family, TextEncoderSpec
from sepme_cli.checkpoints.structure.layers import authors_layers
from sepme_cli.checkpoints.structure.layout import DenoiserNaming, Layout, span_of
from sepme_cli.checkpoints.structure.transformer_names import Module

LoraFormat = Literal["kohya", "peft"]

_TEXT_ENCODER = ("text encoder", ("lora.te", "text.encoder", "text.model"))
_KINDS: Mapping[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "unet": (
        _TEXT_ENCODER,
        ("layer that reads the pooled text", ("add.embedding.linear.1", "label.emb.0.0")),
        ("key and value of the cross-attention", ("attn2.to.k", "attn2.to.v")),
        ("query and output of the cross-attention", ("attn2.",)),
        ("self-attention", ("attn1.",)),
        ("feed-forward", (".ff.",)),
        ("projection around the attention", ("proj.in", "proj.out")),
        ("convolutions and others", ("",)),
    ),
    "transformer": (
        _TEXT_ENCODER,
        (
            "layer that reads the rows of the text",
            (
                "context.embedder",
                "txt.in",
                "text.embedding.0",
                "condition.embedder.text.embedder.linear.1",
            ),
        ),
        (
            "layer that reads the pooled text",
            ("time.text.embed.text.embedder.linear.1", "vector.in.in.layer", "y.embedder.mlp.0"),
        ),
        ("embeddings", ("emb", "img.in", ".in.layer", ".out.layer")),
        ("attention", ("attn",)),
        ("modulation", (".mod.", "modulation", ".norm")),
        (
            "attention and feed-forward in one",
            ("linear1", "linear2", "single.transformer.blocks"),
        ),
        ("feed-forward", (".ff", ".mlp")),
        ("others", ("",)),
    ),
}
"""By denoiser, its parts in words, and what tells them in a module's name with dots for all joints;
the first that is met is meant."""

ATTENTION = frozenset(
    {
        "query and output of the cross-attention",
        "self-attention",
        "feed-forward",
        "attention",
        "attention and feed-forward in one",
    }
)
"""Of these parts those that are layers in every model which has them at all."""

_UNET = re.compile(r"\b(?:down|up|input|output)\.blocks\.\d|\bmid(?:dle)?\.block\.")
_TRANSFORMER = re.compile(r"\bblocks\.\d|\b(?:context\.embedder|txt\.in|text\.embedd(?:er|ing))\b")
"""What tells that a module is a UNet's; and that one which is not is a transformer's."""

_UNREAD: Mapping[tuple[FamilyName, LoraFormat], str] = {
    **dict.fromkeys(
        (("sd3", "kohya"), ("flux", "kohya")),
        "diffusers does not read the text layers of this family from kohya's format, and would "
        "draw as if nothing were erased: for diffusers export with --to peft",
    ),
    ("wan", "kohya"): "of what reads kohya's format, only ComfyUI reads the text layer of this "
    "family: for diffusers export with --to peft",
    ("wan", "peft"): "ComfyUI does not read the text layer of this family from PEFT's format, and "
    "would draw as if nothing were erased: for ComfyUI export with --to kohya",
}


def module_name(target: str, family: Family, span: int, to: LoraFormat) -> str:
    """The module of a target or a layer in a LoRA file. span: L of the UNet, see `span_of`.

    Layers of transformers are not those of kohya's modules.
    """
    network, _, rest = _module(target).partition(".")
    if network_of(target) not in (None, "denoiser"):
        spec = next(spec for spec in family.text_encoders if spec.name == network)
        if to == "peft":
            return f"{spec.folder}.text_model.{rest}"
        return f"{joined_prefixes(spec, family)[-2]}{_joined(rest)}"
    if to == "peft":
        return f"{family.denoiser}.{_module(target)}"
    naming = _kohyas_naming(family)
    if network_of(target) is None:
        return f"lora_unet_{_joined(_layout(family, span, naming).stored(target))}"
    (module,) = authors_layers([target], family, span) if naming == "ldm" else [target]
    return f"lora_unet_{_joined(module)}"


def unread(family: Family, to: LoraFormat) -> str | None:
    """Which program of those that read the format does not read the targets of a family in it, and
    what to do."""
    return _UNREAD.get((family.name, to))


def known_modules(targets: Iterable[str], family: Family) -> dict[str, str]:
    """Every name that programs give the modules of these targets, to the target.

    Those of kohya's scripts in either naming, OneTrainer, LyCORIS, PEFT with and without its
    wrappers, older diffusers ("….attn2.processor.to_k"), and ComfyUI's own.
    """
    targets = tuple(targets)
    single = _layout(family, span_of(targets), _single_naming(family))
    denoiser = family.denoiser
    dotted = ("", f"{denoiser}.", "base_model.model.", f"{denoiser}.base_model.model.")
    joined = ("lora_unet", f"lora_{denoiser}", "lycoris")
    known: dict[str, str] = {}
    for target in targets:
        plain, stored = _module(target), _module(single.stored(target))
        names = [p + n for p in dotted for n in (plain, plain.replace(".to_", ".processor.to_"))]
        names += [f"{prefix}_{_joined(plain)}" for prefix in joined]
        names += [f"lora_unet_{_joined(stored)}", f"diffusion_model.{stored}"]
        known |= dict.fromkeys(names, target)
    return known


def layer_modules(layers: Iterable[str], family: Family, span: int) -> dict[str, Module]:
    """Every name that programs give the modules of these layers, to the layers that it is of.

    Modules of the authors' can be several layers, one above the other: queries, keys and values.
    span: L of the UNet. Beside the programs of `known_modules`, ComfyUI's text encoders.
    """
    layers = tuple(layers)
    own = [layer for layer in layers if network_of(layer) == "denoiser"]
    denoiser = family.denoiser
    known: dict[str, Module] = {}
    for theirs, module in authors_layers(own, family, span).items():
        both = (f"lora_unet_{_joined(theirs)}", f"diffusion_model.{theirs}")
        known |= dict.fromkeys(both, Module(_weights(module.ours), module.exchanged))
    for layer in own:
        plain = _module(layer)
        prefixes = ("", f"{denoiser}.", "base_model.model.", f"{denoiser}.base_model.model.")
        older = plain.replace(".to_", ".processor.to_").removesuffix(".0")
        names = [p + n for p in prefixes for n in {plain, older if ".to_" in plain else plain}]
        names += [f"{p}_{_joined(plain)}" for p in ("lora_unet", f"lora_{denoiser}", "lycoris")]
        known |= dict.fromkeys(names, Module((layer,), exchanged=False))
    for layer in layers:
        network, _, rest = _module(layer).partition(".")
        for spec in family.text_encoders if network != "denoiser" else ():
            if spec.name == network:
                names = [p + rest for p in _dotted_prefixes(spec)]
                names += [p + _joined(rest) for p in joined_prefixes(spec, family)]
                known |= dict.fromkeys(names, Module((layer,), exchanged=False))
    return known


def joined_prefixes(spec: TextEncoderSpec, family: Family) -> list[str]:
    """What stands before the modules of a text encoder in kohya's names."""
    number = spec.folder.removeprefix("text_encoder").lstrip("_") or "1"
    alone = sum(one.naming != "t5" for one in family.text_encoders) == 1
    found = [f"lora_te{number}_", *(["lora_te_"] if alone else [])]
    return [prefix + model for prefix in found for model in ("text_model_", "")]


def _dotted_prefixes(spec: TextEncoderSpec) -> list[str]:
    found = [f"{spec.folder}.", f"text_encoders.{spec.name}.transformer."]
    return [prefix + model for prefix in found for model in ("text_model.", "")]


def of_text_encoder(name: str, spec: TextEncoderSpec, family: Family) -> bool:
    """Whether a LoRA's module is of this text encoder, as far as its name tells."""
    prefixes = (*_dotted_prefixes(spec), *joined_prefixes(spec, family))
    return name.startswith(prefixes)


def _weights(modules: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{module}.weight" for module in modules)


def kind_of_module(name: str, family: Family) -> str:
    """What part of a family's models a LoRA's module is, in words."""
    dotted = _dotted(name)
    return next(
        kind for kind, signs in _KINDS[family.denoiser] if any(sign in dotted for sign in signs)
    )


def of_another_denoiser(name: str, family: Family) -> bool:
    """Whether a module is a UNet's where the family has a transformer, or the other way round."""
    dotted = _dotted(name)
    of_unet = bool(_UNET.search(dotted))
    return of_unet != (family.denoiser == "unet") and bool(of_unet or _TRANSFORMER.search(dotted))


def _layout(family: Family, span: int, naming: DenoiserNaming) -> Layout:
    return Layout("", span, naming, family.entries.get(naming, {}))


def _single_naming(family: Family) -> DenoiserNaming:
    """Whose names the family's models have in single files."""
    return "ldm" if family.denoiser == "unet" else "original"


def _kohyas_naming(family: Family) -> DenoiserNaming:
    if family.denoiser == "unet" and not family.single_file_modules:
        return "diffusers"
    return _single_naming(family)


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _joined(name: str) -> str:
    return _module(name).replace(".", "_")


def _dotted(module: str) -> str:
    return module.replace("_", ".").replace(".processor.", ".")

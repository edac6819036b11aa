"""What reads the text in a model in memory: its weights changed, and put back as they were.

This takes torch and no diffusers: a UNet or transformer may name its layers as diffusers does or as
its authors do, may be compiled, as a whole or in parts, and may have PEFT's LoRA layers around its
own. Every cross-attention of a UNet must have its keys and values where they are looked for: one
that something else has wrapped or quantised would keep the concept. Weights are overwritten in
place, so that whatever else holds them (compiled graphs, pipelines of the same parts, offloading
that moves whole models) sees the change. The originals are kept in main memory, bit for bit, and
nothing more on an accelerator: in fp16 37 MiB for SD 1.x, 650 MiB for XL, 28 MiB for SD 3.5 large
and 28 MiB for Flux.1.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from patch_spec.streams import Stream, stream_of
from sepme_cli.checkpoints.reading.targets import widths_of
from sepme_cli.checkpoints.structure.detection import detect
from sepme_cli.checkpoints.structure.dtypes import NAMES
from sepme_cli.checkpoints.structure.families import Family
from sepme_cli.checkpoints.structure.torch_dtypes import TORCH
from sepme_cli.diffusion.arrays import Array, as_tensor, to_numpy
from sepme_cli.errors import MalformedError, RefusedError, UnsupportedError
from sepme_cli.increments import Scaled, compose
from sepme_cli.prefetch import ahead

NAME = "the model"
"""What errors call it."""

_PLAIN = frozenset(TORCH[name] for name in NAMES)
"""The dtypes of weights that are not quantised."""
_WRAPPER = re.compile(r"\.(?:base_layer|_orig_mod|_checkpoint_wrapped_module)(?=\.)")
"""What PEFT, torch.compile and checkpointing call a module that they have put theirs around."""
_AROUND = ("_orig_mod", "module")
"""What they, and DataParallel, call a whole UNet."""
_OWN_KEYS = "custom_diffusion"
"""In the names of layers that read the text in place of the UNet's."""


@dataclass(frozen=True)
class CrossAttention:
    """The targets of a UNet or transformer in memory.

    widths: d of each stream that the UNet reads. by_name: a target, as patches call it, to its
    weight [out, d], or the columns of it that read its stream. names: to what the UNet calls that
    tensor. path: what errors call the UNet.
    """

    family: Family
    widths: Mapping[Stream, int]
    by_name: Mapping[str, Tensor] = field(repr=False)
    names: Mapping[str, str] = field(repr=False)
    path: str = NAME
    further: Sequence[str] = ()

    @classmethod
    def of(
        cls, tensors: Mapping[str, Tensor], modules: Iterable[str] = (), size: int | None = None
    ) -> Self:
        """Among a UNet's tensors, by the names that the UNet has for them.

        modules: the names of its modules, where there are any. size: how many numbers XL's UNet
        embeds each size in; None for what published models have. Raises UnsupportedError for
        another kind of model, for weights that are quantised or not at hand, and where the keys or
        values of a cross-attention are not found; MalformedError for shapes that contradict each
        other.
        """
        plain = {_WRAPPER.sub("", n): n for n in tensors if ".lora_" not in n}
        family, layout = detect({name: tensors[own] for name, own in plain.items()})
        names = {target: own for name, own in plain.items() if (target := layout.target(name))}
        by_name = {}
        for target, own in sorted(names.items()):
            _check(target, tensors[own])
            if (columns := family.columns(target, tensors[own].shape[1], size)) is not None:
                by_name[target] = tensors[own][:, :columns]
        rows = {t: w.shape for t, w in by_name.items() if stream_of(t) == "tokens"}
        widths = {shape[1] for shape in rows.values()}
        if len(widths) != 1:
            raise UnsupportedError(
                "what reads the text in the model is not what sepme knows",
                expected="targets of one width",
                found=f"{len(rows)} of widths {sorted(widths)}",
            )
        layout.check_reached((*plain, *(_WRAPPER.sub("", name) for name in modules)))
        if foreign := next((name for name in tensors if _OWN_KEYS in name), None):
            raise UnsupportedError(
                f"{foreign} reads the text in place of the model's own keys and values, which a "
                "patch changes: unload it, or patch without it",
                expected="the model's own layers",
                found=foreign,
            )
        shapes = {target: tuple(weight.shape) for target, weight in by_name.items()}
        return cls(family, widths_of(shapes), by_name, {t: names[t] for t in by_name})

    def layer(self, name: str) -> Tensor | None:
        """None: what is patched in memory are targets alone."""
        return None

    @property
    def width(self) -> int:
        """d of the text embedding."""
        return self.widths["tokens"]


class LiveWeights:
    """The targets of one UNet, what they were, and which increments are in them now."""

    def __init__(self, unet: nn.Module) -> None:
        """Looks, and changes nothing. Raises what `CrossAttention.of` raises."""
        tensors = {**dict(unet.named_parameters()), **dict(unet.named_buffers())}
        size = getattr(getattr(unet, "config", None), "addition_time_embed_dim", None)
        self.attention = CrossAttention.of(tensors, dict(unet.named_modules()), size)
        names = self.attention.names.items()
        self._unet = ref(unet)
        self._layers = {
            target: unet.get_submodule(own.removesuffix(".weight")) for target, own in names
        }
        self._around = {
            target: (
                unet.get_submodule(_module(own).rpartition(".")[0]),
                _module(own).split(".")[-1],
            )
            for target, own in names
        }
        self._held: dict[object, tuple[Scaled, ...]] = {}

    @classmethod
    def of(cls, unet: nn.Module) -> "LiveWeights":
        """Those of the UNet: one object for as long as anything is in it."""
        while inner := next((inner for n, inner in unet.named_children() if n in _AROUND), None):
            unet = inner
        return _PATCHED.get(unet) or cls(unet)

    @property
    def present(self) -> Mapping[str, str]:
        """The increments that are held, whatever their scales: digest to concept."""
        return {part.digest: part.concept for held in self._held.values() for part, _ in held}

    def hold(self, holder: object, terms: Sequence[Scaled]) -> None:
        """Have the weights be composed of the originals and what all holders hold.

        terms: increments and scales, in place of what this holder held. All or nothing: after an
        error the weights are what they were. Raises MalformedError for values that are not
        finite, and what keeps weights from being overwritten: see `_check_there`, `_at_hand`.
        """
        self._become({**self._held, holder: tuple(terms)})

    def drop(self, holder: object) -> None:
        """The same without what this holder held; the originals, bit for bit, after the last."""
        self._become({other: held for other, held in self._held.items() if other is not holder})

    def _become(self, held: dict[object, tuple[Scaled, ...]]) -> None:
        self._check_there()
        weights = {target: self._at_hand(target) for target in self._layers}
        originals, before = self._originals, self._held
        try:
            _write(weights, originals, held)
        except BaseException:
            _write(weights, originals, before)
            raise
        self._held = held
        unet = self._unet()
        if unet is not None and held:
            _PATCHED[unet] = self
        elif unet is not None:
            # The next one to come looks anew: other weights may have been loaded meanwhile.
            _PATCHED.pop(unet, None)

    @cached_property
    def _originals(self) -> Mapping[str, Array]:
        return {target: to_numpy(self._at_hand(target)) for target in self._layers}

    def _check_there(self) -> None:
        """Whether the UNet still computes with the layers that are written to.

        Raises RefusedError for layers that were replaced since; UnsupportedError for weights that
        diffusers' group offloading keeps elsewhere, and would bring back as they were.
        """
        unet = self._unet()
        if unet is None:
            return
        modules = set(unet.modules())
        kept = dict(_kept_elsewhere(modules))
        for target, layer in self._layers.items():
            if layer not in modules:
                raise RefusedError(
                    f"the model's {target} is in another layer than when it was patched: load the "
                    "model anew, and patch it after its layers are replaced",
                    expected="the layer that was patched",
                    found="another one in its place",
                )
            if place := kept.get(layer.weight):
                raise UnsupportedError(
                    f"the model's {target} is offloaded in groups to {place}, and what is written "
                    "to it here would be lost: patch before that is enabled, or without it (group "
                    "offloading to memory does no harm between two images)",
                    expected="weights in memory",
                    found=f"a copy of them in {place}",
                )

    def _at_hand(self, target: str) -> Tensor:
        """The weight as the layer has it now.

        Raises RefusedError while a LoRA or both projections are fused into one: what was added
        could not be told from what was there. UnsupportedError for what cannot be overwritten.
        """
        layer, (attention, name) = self._layers[target], self._around[target]
        wrapper = getattr(attention, name, layer)
        if getattr(wrapper, "merged", False):
            raise _fused(target, "a LoRA is", "unfuse_lora()")
        if type(getattr(attention, "processor", None)).__name__.startswith("Fused"):
            raise _fused(target, "keys and values are", "unfuse_qkv_projections()")
        weight = layer.weight
        assert isinstance(weight, Tensor)  # it was found as one
        _check(target, weight)
        return weight[:, : self.attention.by_name[target].shape[1]]


_PATCHED: WeakKeyDictionary[nn.Module, LiveWeights] = WeakKeyDictionary()
"""The UNets that something is in."""


def _kept_elsewhere(modules: Iterable[nn.Module]) -> Iterator[tuple[object, str]]:
    """Parameters that diffusers' group offloading has a copy of elsewhere, and where: on the disk,
    or in memory while they are on an accelerator."""
    for module in modules:
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
            group: Any = getattr(hook, "group", None)
            if folder := getattr(group, "offload_to_disk_path", None):
                yield from ((parameter, str(folder)) for parameter in group.tensor_to_key)
            for parameter, copy in getattr(group, "cpu_param_dict", {}).items():
                if copy.data_ptr() != parameter.data_ptr():
                    yield parameter, "main memory"


@torch.inference_mode()
def _write(
    weights: Mapping[str, Tensor],
    originals: Mapping[str, Array],
    held: Mapping[object, Sequence[Scaled]],
) -> None:
    stack = [term for terms in held.values() for term in terms if term[1]]

    def maker(target: str) -> Callable[[], Array]:
        original = originals[target]
        if not any(part.acts_on(target) for part, _ in stack):
            return lambda: original
        return lambda: compose(original, stack, target)

    for weight, value in zip(weights.values(), ahead(map(maker, weights)), strict=True):
        weight.copy_(as_tensor(value))


def _module(tensor: str) -> str:
    """What the UNet calls the layer that a weight is of, whatever is around it."""
    end = ".weight"
    found = re.match(rf"(.*?)(?:{_WRAPPER.pattern})*{re.escape(end)}$", tensor)
    return tensor.removesuffix(end) if found is None else found[1]


def _check(target: str, weight: Tensor) -> None:
    plain = type(weight.data) is Tensor
    if plain and weight.is_meta:
        raise UnsupportedError(
            f"the model's {target} is offloaded layer by layer, and cannot be patched now; "
            "patch before that is enabled, or use model offloading, which works",
            expected="weights in memory",
            found="no data (meta)",
        )
    if not plain or weight.dtype not in _PLAIN:
        raise UnsupportedError(
            f"the model's {target} is quantised: patch it before it is quantised",
            expected="plain fp32, fp16, bf16 or fp8",
            found=f"{type(weight.data).__name__} of {str(weight.dtype).removeprefix('torch.')}",
        )
    if weight.ndim != 2 or 0 in weight.shape:
        raise MalformedError(
            f"the model's {target} has a shape that what reads text cannot have",
            expected="[out, width]",
            found=list(weight.shape),
        )


def _fused(target: str, what: str, undo: str) -> RefusedError:
    return RefusedError(
        f"{what} fused into the model's {target}: call {undo} first, and fuse again afterwards",
        expected="the layer's own weights",
        found=f"{what} fused into them",
    )

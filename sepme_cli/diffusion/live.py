"""The cross-attention weights of a UNet in memory: changed, and put back as they were.

This takes torch and no diffusers: the UNet may name its layers as diffusers does or as CompVis
does, may be compiled, and may have PEFT's LoRA layers around its own. Weights are overwritten in
place, so that whatever else holds them (compiled graphs, pipelines of the same parts, offloading
that moves whole models) sees the change. The originals are kept in main memory, bit for bit, and
nothing more on an accelerator: in fp16 37 MiB for SD 1.x and 650 MiB for XL.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from sepme_cli.checkpoints.structure.dtypes import NAMES
from sepme_cli.checkpoints.structure.families import Family, detect
from sepme_cli.checkpoints.structure.torch_dtypes import TORCH
from sepme_cli.diffusion.arrays import Array, as_tensor, to_numpy
from sepme_cli.errors import MalformedError, RefusedError, UnsupportedError
from sepme_cli.increments import Scaled, acts_on, compose
from sepme_cli.prefetch import ahead

NAME = "the UNet"
"""What errors call it."""

_PLAIN = frozenset(TORCH[name] for name in NAMES)
"""The dtypes of weights that are not quantised."""
_WRAPPER = ".base_layer"
"""What PEFT calls a layer that it has put its own around."""
_COMPILED = "_orig_mod"


@dataclass(frozen=True)
class CrossAttention:
    """The targets of a UNet in memory.

    by_name: a target, as patches call it, to its weight [out, width]. names: to what the UNet
    calls that tensor. path: what errors call the UNet.
    """

    family: Family
    width: int
    by_name: Mapping[str, Tensor] = field(repr=False)
    names: Mapping[str, str] = field(repr=False)
    path: str = NAME

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Among a UNet's tensors, by the names that the UNet has for them.

        Raises UnsupportedError for another kind of model, and for weights that are quantised or
        not at hand; MalformedError for shapes that contradict each other.
        """
        plain = {n.replace(_WRAPPER, ""): n for n in tensors if ".lora_" not in n}
        family, layout = detect({name: tensors[own] for name, own in plain.items()})
        names = {target: own for name, own in plain.items() if (target := layout.target(name))}
        by_name = {target: tensors[own] for target, own in sorted(names.items())}
        for target, weight in by_name.items():
            _check(target, weight)
        widths = {weight.shape[1] for weight in by_name.values()}
        if len(widths) != 1:
            raise UnsupportedError(
                "the UNet's cross-attention is not one that sepme knows",
                expected="key and value projections of one width",
                found=f"{len(by_name)} of widths {sorted(widths)}",
            )
        return cls(family, widths.pop(), by_name, names)


class LiveWeights:
    """The targets of one UNet, what they were, and which increments are in them now."""

    def __init__(self, unet: nn.Module) -> None:
        """Looks, and changes nothing. Raises what `CrossAttention.of` raises."""
        self.attention = CrossAttention.of(dict(unet.named_parameters()))
        names = self.attention.names.items()
        self._unet = ref(unet)
        self._layers = {
            target: unet.get_submodule(own.removesuffix(".weight")) for target, own in names
        }
        self._around = {
            target: unet.get_submodule(own.rpartition(".to_")[0]) for target, own in names
        }
        self._held: dict[object, tuple[Scaled, ...]] = {}

    @classmethod
    def of(cls, unet: nn.Module) -> "LiveWeights":
        """Those of the UNet: one object for as long as anything is in it."""
        unet = getattr(unet, _COMPILED, unet)
        return _PATCHED.get(unet) or cls(unet)

    @property
    def present(self) -> Mapping[str, str]:
        """The increments that are held, whatever their scales: digest to concept."""
        return {part.digest: part.concept for held in self._held.values() for part, _ in held}

    def hold(self, holder: object, terms: Sequence[Scaled]) -> None:
        """Have the weights be composed of the originals and what all holders hold.

        terms: increments and scales, in place of what this holder held. All or nothing: after an
        error the weights are what they were. Raises MalformedError for values that are not
        finite, and what keeps weights from being overwritten: see `_at_hand`.
        """
        self._become({**self._held, holder: tuple(terms)})

    def drop(self, holder: object) -> None:
        """The same without what this holder held; the originals, bit for bit, after the last."""
        self._become({other: held for other, held in self._held.items() if other is not holder})

    def _become(self, held: dict[object, tuple[Scaled, ...]]) -> None:
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

    def _at_hand(self, target: str) -> Tensor:
        """The weight as the layer has it now.

        Raises RefusedError while a LoRA or both projections are fused into one: what was added
        could not be told from what was there. UnsupportedError for what cannot be overwritten.
        """
        layer, attention = self._layers[target], self._around[target]
        wrapper = getattr(attention, target.split(".")[-2], layer)
        if getattr(wrapper, "merged", False):
            raise _fused(target, "a LoRA is", "unfuse_lora()")
        if type(getattr(attention, "processor", None)).__name__.startswith("Fused"):
            raise _fused(target, "keys and values are", "unfuse_qkv_projections()")
        weight = layer.weight
        assert isinstance(weight, Tensor)  # it was found as one
        _check(target, weight)
        return weight


_PATCHED: WeakKeyDictionary[nn.Module, LiveWeights] = WeakKeyDictionary()
"""The UNets that something is in."""


@torch.inference_mode()
def _write(
    weights: Mapping[str, Tensor],
    originals: Mapping[str, Array],
    held: Mapping[object, Sequence[Scaled]],
) -> None:
    stack = [term for terms in held.values() for term in terms if term[1]]

    def maker(target: str) -> Callable[[], Array]:
        original = originals[target]
        if not any(acts_on(part, target) for part, _ in stack):
            return lambda: original
        return lambda: compose(original, stack, target)

    for weight, value in zip(weights.values(), ahead(map(maker, weights)), strict=True):
        weight.copy_(as_tensor(value))


def _check(target: str, weight: Tensor) -> None:
    plain = type(weight.data) is Tensor
    if plain and weight.is_meta:
        raise UnsupportedError(
            f"the UNet's {target} is offloaded layer by layer, and cannot be patched now; "
            "patch before that is enabled, or use model offloading, which works",
            expected="weights in memory",
            found="no data (meta)",
        )
    if not plain or weight.dtype not in _PLAIN:
        raise UnsupportedError(
            f"the UNet's {target} is quantised: patch it before it is quantised",
            expected="plain fp32, fp16, bf16 or fp8",
            found=f"{type(weight.data).__name__} of {str(weight.dtype).removeprefix('torch.')}",
        )
    if weight.ndim != 2 or 0 in weight.shape:
        raise MalformedError(
            f"the UNet's {target} has a shape that a key or value projection cannot have",
            expected="[out, width]",
            found=list(weight.shape),
        )


def _fused(target: str, what: str, undo: str) -> RefusedError:
    return RefusedError(
        f"{what} fused into the UNet's {target}: call {undo} first, and fuse again afterwards",
        expected="the layer's own weights",
        found=f"{what} fused into them",
    )

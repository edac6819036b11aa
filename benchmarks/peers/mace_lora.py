"""MACE with its second stage: a LoRA for each concept, trained on masked attention maps.

After the refinement of `mace`, for each concept by itself, W_k + B D of rank 1 is trained so that
in pictures of the concept its own tokens are attended to nowhere on it:
sum over layers and tokens of |A (mask)|^2, A [pixels, tokens] of the cross-attention, on noisy
pictures that the original model draws. Attention depends on the keys alone, so values keep what
the refinement gave them. The paper segments the concept with Grounded-SAM; here the mask of an
object is all that is not its picture's ground, and of a style, as in the paper, the whole picture.
Fusion as in `mace`, a solution for every target, with all rows of the concepts' prompts:
sum_i sum_j |W' e_j^f - W_i e_j^f|^2 + lambda_2 sum |W' e^p - W e^p|^2.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.func import functional_call

from benchmarks.peers.interface import Edit, Request, identity, overwritten
from benchmarks.peers.least_squares import least_squares
from benchmarks.peers.mace import MACE, RIDGE
from benchmarks.peers.rows import (
    balanced,
    concept_prompts,
    concept_rows,
    end_of_name,
    general_rows,
    kept_rows,
    name_length,
)
from sepme_cli.diffusion.models import StableDiffusion
from sepme_cli.diffusion.sampler import generate_images

_KEYS = "attn2.to_k.weight"
_DISTANCE = 0.12
"""Of a colour from its picture's corner, from which a pixel is the concept's and not ground."""


@dataclass(frozen=True)
class TrainedMACE(MACE):
    """lr, steps, rank: of each concept's LoRA. pictures: drawn of each."""

    lr: float = 1e-2
    steps: int = 50
    rank: int = 1
    pictures: int = 8

    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"lr": (1e-3, 1e-2, 3e-2)}

    def edit(self, request: Request) -> Edit:
        original = {
            name: weight.double() for name, weight in request.model.denoiser.stored_weights()
        }
        kept = balanced(kept_rows(request, "all", "phrases"), general_rows(request, "all"))
        gram = self.fusion * kept.T @ kept + RIDGE * identity(kept.shape[1])
        moments = gram.clone()
        wanted = {name: weight @ gram for name, weight in original.items()}
        for name in request.names:
            rows, instead = concept_rows(request, name, self.tokens, self.toward, "phrases")
            scale = len(rows) ** -0.5
            operator = least_squares(
                rows * scale, instead * scale, kept, erase=1.0, keep=self.prior, ridge=RIDGE
            )
            refined = {target: weight @ operator for target, weight in original.items()}
            own = balanced(concept_rows(request, name, "all", self.toward, "phrases")[0])
            moment = own.T @ own
            moments += moment
            for target, change in self._suppress(request, name, refined).items():
                refined[target] = refined[target] + change
            for target, weight in refined.items():
                wanted[target] += weight @ moment
        inverse = torch.linalg.inv(moments)
        return overwritten({target: value @ inverse for target, value in wanted.items()})

    def _suppress(
        self, request: Request, name: str, refined: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """B D of every key, float64 [out, d]."""
        model = request.model
        prompts = concept_prompts(request, name, name, "phrases")
        asked = [prompts[i % len(prompts)] for i in range(self.pictures)]
        drawn = generate_images(model, asked, range(self.pictures), steps=20, guidance=3.0)
        style = request.kind_of(name) == "style"
        masks = torch.ones_like(drawn[:, :1]) if style else _concept_in(drawn)
        latents = model.vae.encode(drawn)
        context = model.text.condition(asked).states
        named = torch.zeros(len(asked), context.shape[1])
        for row, ids in zip(named, model.text.tokens(asked), strict=True):
            end = end_of_name(model, ids, name)
            row[end - name_length(model, name) + 1 : end + 1] = 1
        fixed = {target: weight.float() for target, weight in refined.items()}
        keys = [target for target in fixed if target.endswith(_KEYS)]
        generator = torch.Generator().manual_seed(0)
        up = {k: torch.zeros(len(fixed[k]), self.rank, requires_grad=True) for k in keys}
        down = {
            k: (torch.randn(self.rank, fixed[k].shape[1], generator=generator) / self.rank)
            .div(fixed[k].shape[1] ** 0.5)
            .requires_grad_()
            for k in keys
        }
        optimiser = torch.optim.Adam([*up.values(), *down.values()], lr=self.lr)
        alphas = model.noise_schedule.alphas
        for _ in range(self.steps):
            t = torch.randint(len(alphas), (len(latents),), generator=generator)
            noise = torch.randn(latents.shape, generator=generator)
            level = alphas[t][:, None, None, None]
            noisy = level.sqrt() * latents + (1 - level).sqrt() * noise
            edited = {**fixed, **{k: fixed[k] + up[k] @ down[k] for k in keys}}
            with attention_maps(model) as maps:
                functional_call(model.denoiser.network, edited, (noisy, t, context))
            loss = sum((_on(masks, a) * a * named[:, None, None]).pow(2).sum() for a in maps)
            optimiser.zero_grad()
            (loss / len(latents)).backward()  # type: ignore[union-attr]
            optimiser.step()
        return {k: (up[k] @ down[k]).detach().double() for k in keys}


def _concept_in(pictures: Tensor) -> Tensor:
    """Where [n, 1, h, w], 0 or 1, pictures [n, 3, h, w] in [0, 1] are not their ground, whose
    colour each row of pixels has at its left edge."""
    ground = pictures[..., :2].mean(-1, keepdim=True)
    return ((pictures - ground).abs().amax(1, keepdim=True) > _DISTANCE).float()


def _on(masks: Tensor, attended: Tensor) -> Tensor:
    """Masks as attention [n, heads, pixels, tokens] has its pixels: [n, 1, pixels, 1]."""
    side = round(attended.shape[2] ** 0.5)
    return F.adaptive_avg_pool2d(masks, side).flatten(2).transpose(1, 2)[:, None]


@contextmanager
def attention_maps(model: StableDiffusion) -> Iterator[list[Tensor]]:
    """What every cross-attention attends to [n, heads, pixels, tokens], in the order called."""
    maps: list[Tensor] = []

    class Recorder:
        def __call__(
            self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any
        ) -> Tensor:
            query, key, value = (
                attn.head_to_batch_dim(part)
                for part in (
                    attn.to_q(hidden_states),
                    attn.to_k(encoder_hidden_states),
                    attn.to_v(encoder_hidden_states),
                )
            )
            attended = attn.get_attention_scores(query, key)
            maps.append(attended.unflatten(0, (len(hidden_states), attn.heads)))
            mixed: Tensor = attn.to_out[0](attn.batch_to_head_dim(attended @ value))
            return mixed

    crossing = [m for n, m in model.denoiser.network.named_modules() if n.endswith("attn2")]
    before = [module.processor for module in crossing]
    try:
        for module in crossing:
            module.processor = Recorder()
        yield maps
    finally:
        for module, processor in zip(crossing, before, strict=True):
            module.processor = processor

"""What the authors of Stable Diffusion 3 and of Flux.1 call a transformer's tensors, and what
diffusers calls them.

diffusers' own converters know the published widths alone; these tables know none. A tensor of the
authors' is one of diffusers', several of them one above the other (queries, keys, values), or one
with its halves exchanged (shift and scale).
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from patch_spec.base import Family


@dataclass(frozen=True)
class Rule:
    """theirs: the module as the authors name it, a regular expression whose first group, if it has
    one, is the number of a block. ours: as diffusers does, of its parts from above. exchanged:
    whether the halves are."""

    theirs: str
    ours: tuple[str, ...]
    exchanged: bool = False


def _rules(plain: Mapping[str, str], *blocks: tuple[str, str, Mapping[str, str]]) -> list[Rule]:
    """plain: modules outside of blocks, blocks: what blocks are called by both, and the modules in
    them."""
    found = [Rule(re.escape(theirs), (ours,)) for theirs, ours in plain.items()]
    for theirs, ours, inner in blocks:
        for their_part, our_parts in inner.items():
            names = tuple(f"{ours}.{{}}.{part}" for part in our_parts.split())
            found.append(Rule(rf"{theirs}\.(\d+)\.{re.escape(their_part)}", names))
    last = "final_layer.adaLN_modulation.1"
    return [*found, Rule(re.escape(last), ("norm_out.linear",), exchanged=True)]


_QKV = "attn.to_q attn.to_k attn.to_v"
_ADDED_QKV = "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
_TIME = "time_text_embed.timestep_embedder.linear"
_TEXT = "time_text_embed.text_embedder.linear"

RULES: Mapping[Family, Sequence[Rule]] = {
    "sd3": _rules(
        {
            "x_embedder.proj": "pos_embed.proj",
            "t_embedder.mlp.0": f"{_TIME}_1",
            "t_embedder.mlp.2": f"{_TIME}_2",
            "y_embedder.mlp.0": f"{_TEXT}_1",
            "y_embedder.mlp.2": f"{_TEXT}_2",
            "context_embedder": "context_embedder",
            "final_layer.linear": "proj_out",
        },
        (
            "joint_blocks",
            "transformer_blocks",
            {
                "x_block.attn.qkv": _QKV,
                "x_block.attn.ln_q": "attn.norm_q",
                "x_block.attn.ln_k": "attn.norm_k",
                "x_block.attn.proj": "attn.to_out.0",
                "x_block.attn2.qkv": _QKV.replace("attn.", "attn2."),
                "x_block.attn2.ln_q": "attn2.norm_q",
                "x_block.attn2.ln_k": "attn2.norm_k",
                "x_block.attn2.proj": "attn2.to_out.0",
                "x_block.adaLN_modulation.1": "norm1.linear",
                "x_block.mlp.fc1": "ff.net.0.proj",
                "x_block.mlp.fc2": "ff.net.2",
                "context_block.attn.qkv": _ADDED_QKV,
                "context_block.attn.ln_q": "attn.norm_added_q",
                "context_block.attn.ln_k": "attn.norm_added_k",
                "context_block.attn.proj": "attn.to_add_out",
                "context_block.adaLN_modulation.1": "norm1_context.linear",
                "context_block.mlp.fc1": "ff_context.net.0.proj",
                "context_block.mlp.fc2": "ff_context.net.2",
            },
        ),
    ),
    "flux": _rules(
        {
            "img_in": "x_embedder",
            "txt_in": "context_embedder",
            "time_in.in_layer": f"{_TIME}_1",
            "time_in.out_layer": f"{_TIME}_2",
            "vector_in.in_layer": f"{_TEXT}_1",
            "vector_in.out_layer": f"{_TEXT}_2",
            "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
            "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
            "final_layer.linear": "proj_out",
        },
        (
            "double_blocks",
            "transformer_blocks",
            {
                "img_mod.lin": "norm1.linear",
                "txt_mod.lin": "norm1_context.linear",
                "img_attn.qkv": _QKV,
                "txt_attn.qkv": _ADDED_QKV,
                "img_attn.norm.query_norm": "attn.norm_q",
                "img_attn.norm.key_norm": "attn.norm_k",
                "txt_attn.norm.query_norm": "attn.norm_added_q",
                "txt_attn.norm.key_norm": "attn.norm_added_k",
                "img_attn.proj": "attn.to_out.0",
                "txt_attn.proj": "attn.to_add_out",
                "img_mlp.0": "ff.net.0.proj",
                "img_mlp.2": "ff.net.2",
                "txt_mlp.0": "ff_context.net.0.proj",
                "txt_mlp.2": "ff_context.net.2",
            },
        ),
        (
            "single_blocks",
            "single_transformer_blocks",
            {
                "modulation.lin": "norm.linear",
                "linear1": f"{_QKV} proj_mlp",
                "linear2": "proj_out",
                "norm.query_norm": "attn.norm_q",
                "norm.key_norm": "attn.norm_k",
            },
        ),
    ),
}


@dataclass(frozen=True)
class Module:
    """A module of the authors', as diffusers has it.

    ours: its names there, of several those of its parts from above. exchanged: whether its halves
    are.
    """

    ours: tuple[str, ...]
    exchanged: bool

    def rows(self, count: int) -> list[int]:
        """How many of its rows each part has."""
        # Queries, keys and values; and beside them, four times as many, what feeds forward.
        shares = (1, 1, 1, 4)[: len(self.ours)]
        found = [count * share // sum(shares) for share in shares]
        return [*found[:-1], count - sum(found[:-1])]


def in_diffusers(family: Family, names: Iterable[str]) -> Iterator[tuple[str, Module]]:
    """Of tensors of a transformer, as the authors name them, those that a rule knows."""
    known = tuple(names)
    last = _last_block(family, "joint_blocks", known)
    for name in known:
        for rule in RULES.get(family, ()):
            match = re.fullmatch(rule.theirs, name.rpartition(".")[0])
            number = int(match[1]) if match and match.groups() else None
            # 01, or the digits of another script, would give one weight two names.
            if match and (number is None or match[1] == str(number)):
                yield name, _module(rule, number, last)


def authors_modules(family: Family, modules: Iterable[str]) -> dict[str, Module]:
    """Of modules of a transformer, as diffusers names them, those that are the authors' own or all
    the parts of one; by the authors' names."""
    known = frozenset(modules)
    last = _last_block(family, "transformer_blocks", known)
    found: dict[str, Module] = {}
    for rule in RULES.get(family, ()):
        own = re.compile(re.escape(rule.ours[0]).replace(r"\{\}", r"(\d{1,4})"))
        template = rule.theirs.replace("\\.", ".").replace(r"(\d+)", "{}")
        for name in known:
            if match := own.fullmatch(name):
                number = int(match[1]) if match.groups() else None
                module = _module(rule, number, last)
                if known.issuperset(module.ours):
                    found[template.format(number)] = module
    return found


def _module(rule: Rule, number: int | None, last: int | None) -> Module:
    # The last block makes nothing more of the text: its norm is that of an end.
    ends = number is not None and number == last and "norm1_context.linear" in rule.ours[0]
    return Module(tuple(one.format(number) for one in rule.ours), rule.exchanged or ends)


def _last_block(family: Family, blocks: str, names: Iterable[str]) -> int | None:
    """The number of the last block of Stable Diffusion 3; None of Flux.1, where all are alike."""
    if family != "sd3":
        return None
    found = (re.match(rf"{blocks}\.(\d+)\.", name) for name in names)
    return max((int(match[1]) for match in found if match), default=None)

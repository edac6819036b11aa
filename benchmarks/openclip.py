"""OpenCLIP's names for a text encoder that transformers has named."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_ENDS = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def openclip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors as OpenCLIP has them: queries, keys and values in one matrix.

    state: by transformers' names without `text_model.`.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in _ENDS:
            found[_ENDS[name]] = value
        elif name == "text_projection.weight":
            found["text_projection"] = value.T
        elif layer := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            block = f"transformer.resblocks.{layer[1]}"
            if layer[2] == "self_attn.q_proj":
                fused = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                found[f"{block}.attn.in_proj_{layer[3]}"] = torch.cat(fused)
            elif layer[2] in _LAYER:
                found[f"{block}.{_LAYER[layer[2]]}.{layer[3]}"] = value
    return found

"""Write what was trained as the two committed files.

    python -m examples.english.pack

``english-sd.safetensors`` is a single-file SD 1.x checkpoint in fp16 with CompVis key names and
CLIP's whole vocabulary.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from examples.emoji.pack import HERE, save_half, single_file
from examples.english import text
from examples.english.train import SHIPPED, trained_vae
from examples.english.words import BUILD


def trained(unet: Path = BUILD / "unet.pt", encoder: str = text.CANVAS) -> dict[str, Tensor]:
    """All tensors of the single file, in fp32."""
    averaged = torch.load(unet, map_location="cpu")["averaged"]
    trained_here = (BUILD / f"{encoder}.pt").exists()
    words = text.state(encoder) if trained_here else {}
    tensors = single_file(averaged, trained_vae().state_dict(), words)
    if trained_here:
        return tensors
    shipped = load_file(SHIPPED)
    return {**tensors, **{k: v for k, v in shipped.items() if k.startswith("cond_stage")}}


def main() -> None:
    """Write both files."""
    save_half(trained(), HERE / "english-sd.safetensors", {"modelspec.resolution": "64x64"})
    judge = torch.load(BUILD / "judge.pt", map_location="cpu")["averaged"]
    save_half(judge, HERE / "english-judge.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()

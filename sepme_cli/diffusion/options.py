"""How a model is opened, and what it computes on."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sepme_cli.arguments import FilePath, Places

if TYPE_CHECKING:  # What knows families needs numpy, and --help does not.
    from sepme_cli.checkpoints.structure.families import Prediction


@dataclass(frozen=True)
class ModelOptions:
    """How a model is opened, and what it is computed on. None of it is part of the method.

    Attributes:
        text_encoders: For a model without text encoders: checkpoints, model folders or encoders
            that have them.
        tokenizer: Folder with a tokenizer's files; None for the model's own, else CLIP's.
        t5: Whether T5 is used. False for a Stable Diffusion 3 that is used without.
        prediction: What the UNet was trained to predict, "epsilon" or "velocity"; None detects it.
        device: "cpu", "cuda" or "mps"; None for the fastest available.
        dtype: What the UNet computes in: "fp32", "fp16", "bf16", or "auto" for what suits the
            device. None is the recipe's, else "auto".
        low_memory: Use less of the device's memory, and more time.
    """

    text_encoders: Places = ()
    tokenizer: FilePath | None = None
    t5: bool = True
    prediction: "Prediction | None" = None
    device: str | None = None
    dtype: str | None = None
    low_memory: bool = False

"""How a model is opened, and what it computes on."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sepme_cli.arguments import FilePath, Places

if TYPE_CHECKING:  # What knows families needs numpy, and --help does not.
    from sepme_cli.checkpoints.structure.families import Prediction


@dataclass(frozen=True)
class ModelOptions:
    """What a caller may say of the model and of the machine; none of it is part of the method.

    text_encoders: where a UNet's file alone has its text encoders from; see `lend_text_encoders`.
    tokenizer: a folder with a tokenizer's files; the model's own or CLIP's if None. prediction:
    what the UNet was trained to predict; detected from the checkpoint if None. device: "cpu",
    "cuda", "mps"; the fastest there is if None. dtype: what the UNet computes in, "fp32", "fp16"
    or "bf16"; "auto" is what the device does well, and None is "auto" where nothing else, such as
    a recipe, says it. low_memory: spare the device's memory at the cost of time.
    """

    text_encoders: Places = ()
    tokenizer: FilePath | None = None
    prediction: "Prediction | None" = None
    device: str | None = None
    dtype: str | None = None
    low_memory: bool = False

"""Where the networks compute, and in what."""

import torch

from sepme_cli.errors import UsageError
from sepme_cli.progress import SILENT, Progress

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def choose_device(name: str | None, progress: Progress = SILENT) -> torch.device:
    """The device of that name, or the best there is. Raises UsageError for one that is not here."""
    available = ["cpu"]
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if name is not None and name.split(":")[0] not in available:
        raise UsageError(f"no device {name!r} here", expected=" or ".join(available), found=name)
    chosen = name or available[0]
    progress.say(f"computing on {chosen}")
    return torch.device(chosen)


def choose_dtype(name: str | None) -> torch.dtype:
    """The dtype of that name, fp32 for None. Raises UsageError for any other."""
    if name is None:
        return torch.float32
    if name not in _DTYPES:
        raise UsageError(f"no dtype {name!r}", expected=" or ".join(_DTYPES), found=name)
    return _DTYPES[name]

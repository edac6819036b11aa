"""The dtypes of a safetensors header: what people call them, and what numpy does."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

CASTS: Mapping[str, str] = MappingProxyType({"F32": "fp32", "F16": "fp16", "BF16": "bf16"})
"""What a checkpoint can be written in that is not in it yet, by the name in the header."""
FP8: Mapping[str, str] = MappingProxyType({"F8_E4M3": "fp8_e4m3", "F8_E5M2": "fp8_e5m2"})
NAMES: Mapping[str, str] = MappingProxyType({"F64": "fp64", **CASTS, **FP8})
"""What the floating dtypes that sepme patches are called, by their name in the header."""

INTEGERS: Mapping[str, str] = MappingProxyType(
    {f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)}
    | {f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)}
)
"""What numpy calls the integers, by their name in the header."""

_NUMPY: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "F64": np.dtype("<f8"),
        "F32": np.dtype("<f4"),
        "F16": np.dtype("<f2"),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        **{dtype: np.dtype(name).newbyteorder("<") for dtype, name in INTEGERS.items()},
    }
)


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """numpy's dtype for one of NAMES or INTEGERS."""
    return _NUMPY[dtype]


def readable(dtype: str) -> str:
    """What people call a dtype of the header: "fp16" for F16."""
    return NAMES.get(dtype, dtype.lower())


def header_dtype(name: str) -> str | None:
    """The header's name of what people call fp32, fp16 or bf16; None for anything else."""
    return next((dtype for dtype, known in CASTS.items() if known == name.lower()), None)

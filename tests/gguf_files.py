"""GGUF files as converters write them, by the format's own library."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
from torch import Tensor

TYPES = gguf.GGMLQuantizationType
ENTRIES = ("txt_in.weight", "vector_in.in_layer.weight")
"""What reads the text in Flux.1."""


def write_gguf(
    tensors: dict[str, Tensor],
    path: Path,
    entries: Any = TYPES.BF16,
    alignment: int = 32,
    quantised: Any = TYPES.Q8_0,
    *,
    rows_of_256: bool = False,
    fields: Mapping[str, int] | None = None,
) -> Path:
    """As converters do: matrices quantised, what is small in fp32, what reads the text as told.

    rows_of_256: where that goes, with the shapes in fields of their own. fields: more of them.
    """
    writer = gguf.GGUFWriter(path, "flux")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_array("some.texts", ["a", "é"])
    writer.add_bool("some.bool", True)
    for name, number in (fields or {}).items():
        writer.add_uint32(name, number)
    for name, value in tensors.items():
        values = value.float().numpy()
        kind = TYPES.F32
        if name in ENTRIES:
            kind = entries
        elif values.ndim == 2 and values.shape[1] % 32 == 0:
            kind = quantised
        if rows_of_256 and values.ndim > 1 and values.size % 256 == 0 and values.shape[-1] % 256:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(values.shape))
            values = values.reshape(-1, 256)
        data = gguf.quants.quantize(values, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def in_gguf(path: Path) -> dict[str, bytes]:
    """Its tensors' bytes, as the library reads them."""
    return {one.name: bytes(one.data) for one in gguf.GGUFReader(path).tensors}

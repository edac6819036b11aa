"""The canvas's sisters as they are shipped: small, and written out again before they are used.

    python -m examples.english.sisters pack xl     # build/english/xl to examples/sisters
    python -m examples.english.sisters pack sd3    # build/english/sd3, the same
    python -m examples.english.sisters unpack      # both again, under build/english

A weight keeps the leading bits of its fraction; the two bytes of all weights stand apart, as they
compress best.
"""

import json
import lzma
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save

from examples.english.words import BUILD
from examples.english.xl import rounded

SHIPPED = Path(__file__).parent.parent / "sisters"
MODELS = {"xl": BUILD / "xl" / "xl.safetensors", "sd3": BUILD / "sd3" / "model"}
_WHOLE = ("norm", "bias", "first_stage_model", "vae")
"""What stays as it is: small, and much depends on each number."""
_TABLES = ("token_embedding", "shared")
_BITS, _TABLE_BITS = 4, 3
"""Of fp16's ten bits of a fraction, those that are kept; of vocabularies fewer."""


def pack(name: str) -> None:
    """Write a sister as it is shipped."""
    model = MODELS[name]
    files = [model] if model.is_file() else sorted(p for p in model.rglob("*") if p.is_file())
    root = model.parent if model.is_file() else model
    target = SHIPPED / name
    shutil.rmtree(target, ignore_errors=True)
    for file in files:
        place = target / file.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".safetensors":
            place.with_name(f"{place.name}.xz").write_bytes(packed(file))
        else:
            shutil.copy(file, place)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(f"{target}: {size / 1e6:.1f} MB")


def packed(file: Path) -> bytes:
    """A safetensors file of fp16 tensors, smaller."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    metadata = header.get("__metadata__")
    tensors = {
        name: _rounded(name if file.parent.name != "vae" else "vae", value)
        for name, value in load_file(file).items()
    }
    data = save(tensors, metadata=metadata)
    start = 8 + int.from_bytes(data[:8], "little")
    halves = np.frombuffer(data[start:], np.uint8).reshape(-1, 2).T
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 25}]
    return lzma.compress(data[:start] + halves.tobytes(), lzma.FORMAT_XZ, filters=filters)


def _rounded(name: str, value: torch.Tensor) -> torch.Tensor:
    whole = value.half().contiguous()
    if any(part in name for part in _WHOLE):
        return whole
    table = any(part in name for part in _TABLES)
    return rounded(whole.float(), _TABLE_BITS if table else _BITS)


def unpack(name: str, folder: Path | None = None) -> Path:
    """Write a sister out, and return where: below a folder; else, unless it is there, where it is
    made."""
    model = MODELS[name] if folder is None else folder / MODELS[name].name
    if folder is None and model.exists():
        return model
    root = model.parent if name == "xl" else model
    for file in sorted(p for p in (SHIPPED / name).rglob("*") if p.is_file()):
        place = root / file.relative_to(SHIPPED / name)
        place.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".xz":
            place.with_suffix("").write_bytes(unpacked(file.read_bytes()))
        else:
            shutil.copy(file, place)
    return model


def unpacked(data: bytes) -> bytes:
    """The safetensors file that was packed, its weights rounded."""
    data = lzma.decompress(data)
    start = 8 + int.from_bytes(data[:8], "little")
    return data[:start] + np.frombuffer(data[start:], np.uint8).reshape(2, -1).T.tobytes()


if __name__ == "__main__":
    if sys.argv[1:2] == ["pack"]:
        pack(sys.argv[2])
    else:
        for each in MODELS:
            print(unpack(each))

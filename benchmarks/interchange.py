"""What other programs and other methods make of patches, and patches of them, on the example.

    python -m benchmarks.interchange          # measure
    python -m benchmarks.interchange table    # what other methods' checkpoints are as patches

A style is erased, exported as a LoRA of kohya's format, loaded by diffusers, and its pictures are
held against those of the patched checkpoint. Then the same style is erased by other methods, whose
checkpoints are extracted into patches and held against what they were extracted from.
"""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.canvas import ASKED, MODEL, Canvas, naming
from benchmarks.comparison import chosen
from benchmarks.peers.interface import Request
from benchmarks.results import Results, counts
from examples.emoji.judging import Caption
from sepme_cli.operations.apply import apply
from sepme_cli.operations.erase import erase
from sepme_cli.operations.export import export
from sepme_cli.operations.extract import extract

CONCEPT = "ink"
RESULTS = Path("docs/interchange.json")
METHODS = {"uce": 0.05, "mace": 0.1}
"""Whose checkpoints are extracted, and what may be left of a weight's change."""
SHOWN: list[Caption] = [c for c in ASKED if any(map(c.names, (CONCEPT, "noto")))][::2]


def exported(canvas: Canvas, folder: Path) -> dict[str, Any]:
    """The LoRA of a patch, loaded by diffusers, beside the checkpoint that the patch was applied
    to."""
    patch, clean, lora = (folder / name for name in ("p.sepme", "c.safetensors", "l.safetensors"))
    words = Request(canvas.model, (CONCEPT,)).retained
    protect = [f"style:{s}" for s in words.styles] + [f"object:{o}" for o in words.objects]
    erase(MODEL, [f"style:{CONCEPT}"], output=patch, protect=protect)
    apply(MODEL, [patch], clean)
    result = export(patch, "kohya", lora, base=MODEL)
    before = canvas.drawn(SHOWN)
    patched = _drawn_with(canvas, load_targets(canvas, clean))
    pipeline = StableDiffusionPipeline(
        unet=canvas.model.denoiser.network,
        **dict.fromkeys(("vae", "text_encoder", "tokenizer", "scheduler", "safety_checker")),
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.load_lora_weights(str(lora))
    loaded = canvas.drawn(SHOWN)
    pipeline.unload_lora_weights()
    return {
        "bytes": result.bytes,
        "patch_bytes": patch.stat().st_size,
        "modules": result.modules,
        "rank": result.rank,
        "relative_error": result.relative_error,
        "max_abs_error": result.max_abs_error,
        "pixels": _apart(loaded, patched),
        "pixels_erased": _apart(patched, before),
        **{
            name: _judged(canvas, drawn)
            for name, drawn in (("before", before), ("patched", patched), ("lora", loaded))
        },
    }


def extracted(canvas: Canvas, folder: Path, method: str) -> dict[str, Any]:
    """Another method's checkpoint as a patch, beside the checkpoint."""
    peer = chosen(method)
    assert peer is not None
    weights = peer.edit(Request(canvas.model, (CONCEPT,))).weights
    edited, patch, clean = (
        folder / f"{method}{end}" for end in (".safetensors", ".sepme", "-patched.safetensors")
    )
    names = {target.name: target.copies[0].name for target in canvas.checkpoint.targets}
    tensors = load_file(MODEL) | {names[n]: w.half().contiguous() for n, w in weights.items()}
    save_file(tensors, edited)
    result = extract(MODEL, edited, patch, concept=CONCEPT, kind="style", error=METHODS[method])
    apply(MODEL, [patch], clean)
    drawn = {path: _drawn_with(canvas, load_targets(canvas, path)) for path in (edited, clean)}
    return {
        "kind": result.kind,
        "rank": result.rank,
        "bytes": result.bytes,
        "relative_error": result.relative_error,
        "worst": result.residuals[0].residual,
        "pixels": _apart(drawn[clean], drawn[edited]),
        "edited": _judged(canvas, drawn[edited]),
        "patched": _judged(canvas, drawn[clean]),
    }


def load_targets(canvas: Canvas, path: Path) -> dict[str, Tensor]:
    """The targets' weights in a single file, by the names that the UNet has."""
    tensors = load_file(path)
    return {target.name: tensors[target.copies[0].name] for target in canvas.checkpoint.targets}


def _drawn_with(canvas: Canvas, weights: Mapping[str, Tensor]) -> Tensor:
    with canvas.model.denoiser.with_weights(weights):
        return canvas.drawn(SHOWN)


def _apart(a: Tensor, b: Tensor) -> float:
    """The mean difference of two sets of pictures, in steps of 255; both in [0, 1]."""
    return float((a - b).abs().mean()) * 255


def _judged(canvas: Canvas, pictures: Tensor) -> dict[str, Sequence[int]]:
    """How often the erased style, and the others, are recognised."""
    found, erased = canvas.judge(pictures, SHOWN).style, naming(SHOWN, (CONCEPT,))
    return {"erased": counts(found[erased]), "others": counts(found[~erased])}


def run() -> None:
    """Measure what is not in the results yet."""
    canvas, results = Canvas(), Results(RESULTS)
    with tempfile.TemporaryDirectory() as folder:
        for method in METHODS:
            results.get(method, partial(extracted, canvas, Path(folder), method))
        # Last, for a LoRA that was loaded once leaves its wrappers in the network.
        results.get("kohya", partial(exported, canvas, Path(folder)))
    print(json.dumps(results.entries, indent=1))


def table() -> None:
    """Every method's checkpoint as a patch, a row each."""
    print("| edited by | as a patch | KiB | off by | pictures apart, of 255 | erased | others |")
    print("|---|---|---|---|---|---|---|")
    entries = Results(RESULTS).entries
    for method in METHODS:
        row = entries[method]
        recognised = (_of(row["edited"][who], row["patched"][who]) for who in ("erased", "others"))
        print(
            f"| {method} | {row['kind']}, rank {row['rank']} | {row['bytes'] / 1024:.0f} "
            f"| {row['relative_error']:.2%} | {row['pixels']:.2f} | {' | '.join(recognised)} |"
        )


def _of(edited: Sequence[int], patched: Sequence[int]) -> str:
    """How many are recognised in the edited model, and with the patch."""
    return f"{edited[0]} and {patched[0]} of {edited[1]}"


def main(stage: str = "run") -> None:
    {"run": run, "table": table}[stage]()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])

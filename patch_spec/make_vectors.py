"""Makes the test vectors: `python -m patch_spec.make_vectors [--check]`.

--check writes nothing; exit status 1 if what is there is not, byte for byte, what would be made.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from patch_spec.base import Base
from patch_spec.cases.examples import (
    CONTEXT,
    KEY,
    POOLED,
    QUERY,
    TEXT_LAYER,
    VALUE,
    additive,
    extremes,
    journal,
    layered,
    longer,
    lora,
    mask,
    measured,
    on_both,
    on_layers,
    on_layers_alone,
    on_pooled,
    operator,
    original,
    overlapping,
    patch,
    sparse,
    stack,
    stack_of_layers,
    tensor_file,
    two_streams,
    weights,
    wide,
    widest,
)
from patch_spec.cases.headers import header_cases
from patch_spec.cases.manifests import manifest_cases
from patch_spec.cases.others import other_cases
from patch_spec.cases.patches import patch_cases
from patch_spec.cases.tools import Invalid
from patch_spec.compose import compose
from patch_spec.container import patch_bytes, patch_digest
from patch_spec.digest import tensor_fingerprint
from patch_spec.errors import FormatError
from patch_spec.increment import Increment
from patch_spec.manifest import Patch

VECTORS = Path(__file__).with_name("vectors")

_PATCHES: dict[str, Callable[[], tuple[Increment, ...]]] = {
    "additive": lambda: (additive(),),
    "operator": lambda: (operator(),),
    "both": lambda: (additive(), operator()),
    "extremes": lambda: (extremes(),),
    "layers": lambda: (on_layers(), operator()),
    "layers-alone": lambda: (on_layers_alone(),),
    "lora": lambda: (lora(), operator()),
    "mask-sparse": lambda: (sparse(),),
    "masks": lambda: (mask(), overlapping(), on_layers(), operator()),
    "measured": lambda: (measured(),),
    "pooled": lambda: (on_both(), on_pooled()),
    "wide": lambda: (widest(),),
}
_BASES: dict[str, Callable[[], Base]] = {
    "layers": layered,
    "layers-alone": layered,
    "mask-sparse": longer,
    "masks": layered,
    "pooled": two_streams,
    "wide": wide,
}
_STACKED = {
    KEY: "key.F16",
    QUERY: "value.F16",
    f"cond_stage_model.transformer.text_model.{TEXT_LAYER.removeprefix('clip_l.')}": "pooled.F16",
}
_Term = tuple[str, float]
# patch, tensor of weights.safetensors, target, slugs with scales
_COMPOSITIONS: tuple[tuple[str, str, str, tuple[_Term, ...]], ...] = (
    ("both", "key.F16", KEY, (("monet", 1.0),)),
    ("both", "key.F16", KEY, (("ukiyo-e", 1.0),)),
    ("both", "key.F16", KEY, (("monet", 1.0), ("ukiyo-e", 1.0))),
    ("both", "key.F32", KEY, (("ukiyo-e", 0.7), ("monet", -1.3))),
    ("both", "key.F64", KEY, (("monet", 0.7), ("ukiyo-e", -1.3))),
    ("both", "key.BF16", KEY, (("monet", 1.0), ("ukiyo-e", 1.0))),
    ("both", "value.F16", VALUE, (("monet", 1.0), ("ukiyo-e", 1.0))),
    ("extremes", "key.F16", KEY, (("0" * 64, 2.0**63),)),
    ("extremes", "value.F16", VALUE, (("0" * 64, 1.0),)),
    ("lora", "key.F16", KEY, (("degas", 1.0),)),
    ("lora", "key.F64", KEY, (("degas", 0.7), ("ukiyo-e", -1.3))),
    ("lora", "value.F16", VALUE, (("degas", 1.0), ("ukiyo-e", 1.0))),
    ("layers", "key.F16", KEY, (("degas", 1.0), ("ukiyo-e", 1.0))),
    ("layers", "value.F16", QUERY, (("degas", 0.7), ("ukiyo-e", 1.0))),
    ("layers", "pooled.F16", TEXT_LAYER, (("degas", 1.0),)),
    ("layers-alone", "value.F16", KEY, (("degas", 1.0),)),
    ("masks", "value.F16", QUERY, (("schiele", 1.0),)),
    ("masks", "value.F16", QUERY, (("klimt", 1.0), ("schiele", 1.0))),
    ("masks", "value.F16", QUERY, (("schiele", 1.0), ("degas", 0.7), ("klimt", 1.0))),
    ("masks", "pooled.F16", TEXT_LAYER, (("schiele", 1.0), ("klimt", 1.0), ("ukiyo-e", 0.5))),
    ("masks", "value.F16", VALUE, (("schiele", 1.0), ("ukiyo-e", 1.0))),
    ("masks", "value.F16", QUERY, (("schiele", 0.5),)),
    ("masks", "pooled.F16", QUERY, (("schiele", 1.0),)),
    ("both", "value.F16", KEY, (("monet", 1.0),)),
    ("both", "key.F16", KEY, (("monet", 1e6),)),
    ("pooled", "key.F16", KEY, (("hokusai", 1.0), ("monet", 1.0))),
    ("pooled", "pooled.F16", POOLED, (("hokusai", 1.0),)),
    ("pooled", "pooled.F16", POOLED, (("hokusai", 0.7), ("monet", -1.3))),
    ("pooled", "key.F16", POOLED, (("hokusai", 1.0),)),
    ("wide", "context.F16", CONTEXT, (("ukiyo-e", 1.0),)),
)


def invalid_cases() -> list[Invalid]:
    """Every file that breaks a rule."""
    return [*header_cases(), *manifest_cases(), *patch_cases(), *other_cases()]


def vectors() -> dict[str, bytes]:
    """Every file of the vectors by its path below VECTORS."""
    files = {f"valid/{name}.sepme": patch_bytes(_patch(name)) for name in _PATCHES}
    files["valid/weights.safetensors"] = tensor_file({}, weights())
    files["valid/original.safetensors"] = original()
    stacked = tensor_file({"sepme": stack().to_metadata()}, {KEY: weights()["key.F16"]})
    files["valid/stack.safetensors"] = stacked
    files["valid/stack-layers.safetensors"] = tensor_file(
        {"sepme": stack_of_layers().to_metadata()},
        {name: weights()[own] for name, own in _STACKED.items()},
    )
    files["valid/journal.safetensors"] = journal({})
    files |= {_path(case): case.data for case in invalid_cases()}
    index = json.dumps(_index(), indent=1, ensure_ascii=False)
    return files | {"index.json": f"{index}\n".encode()}


def main(arguments: list[str]) -> int:
    """Make the vectors, or check them; the exit status."""
    if arguments not in ([], ["--check"]):
        print("usage: python -m patch_spec.make_vectors [--check]", file=sys.stderr)
        return 2
    made = vectors()
    there = {
        path.relative_to(VECTORS).as_posix(): path.read_bytes()
        for path in VECTORS.rglob("*")
        if path.is_file()
    }
    if arguments:
        wrong = sorted(name for name in made | there if made.get(name) != there.get(name))
        for name in wrong:
            print(f"{name} is not what would be made", file=sys.stderr)
        return 1 if wrong else 0
    for name in there.keys() - made.keys():
        (VECTORS / name).unlink()
    for name, data in made.items():
        path = VECTORS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return 0


def _path(case: Invalid) -> str:
    suffix = "sepme" if case.kind == "patch" else "safetensors"
    return f"invalid/{case.rule}-{case.about}.{suffix}"


def _index() -> dict[str, Any]:
    return {
        "format_version": 1,
        "valid": [_describe(name) for name in _PATCHES],
        "weights": {
            "file": "valid/weights.safetensors",
            "fingerprints": {name: tensor_fingerprint(array) for name, array in weights().items()},
        },
        "stack": {"file": "valid/stack.safetensors", "base": stack().base},
        "stack_of_layers": {
            "file": "valid/stack-layers.safetensors",
            "base": stack_of_layers().base,
            "layers": dict(stack_of_layers().layers),
        },
        "undo": {"file": "valid/journal.safetensors", "original": "valid/original.safetensors"},
        "compose": list(_compositions()),
        "invalid": [
            {"file": _path(case), "kind": case.kind, "rule": case.rule} for case in invalid_cases()
        ],
    }


def _patch(name: str) -> Patch:
    make_base = _BASES.get(name)
    return patch(*_PATCHES[name](), of=make_base and make_base())


def _describe(name: str) -> dict[str, Any]:
    made = _patch(name)
    return {
        "file": f"valid/{name}.sepme",
        "patch_digest": patch_digest(made),
        "base_digest": made.base.digest,
        "increments": {increment.slug: increment.digest for increment in made.increments},
    }


def _compositions() -> Iterator[dict[str, Any]]:
    """Each composition, and the bytes of its result in hexadecimal or the rule it breaks."""
    for name, tensor, target, terms in _COMPOSITIONS:
        increments = {increment.slug: increment for increment in _PATCHES[name]()}
        case: dict[str, Any] = {
            "patch": f"valid/{name}.sepme",
            "weight": tensor,
            "target": target,
            "terms": [{"slug": slug, "scale": scale} for slug, scale in terms],
        }
        try:
            scaled = [(increments[slug], scale) for slug, scale in terms]
            case["result"] = compose(weights()[tensor], scaled, target).tobytes().hex()
        except FormatError as error:
            case["rule"] = error.rule
        yield case


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Patches whose manifest breaks the rules of records, J1 to J9, or P1 and P2."""

from collections.abc import Iterator

from patch_spec import limits
from patch_spec.cases.examples import KEY, QUERY, TEXT_LAYER, layered, mask, patch
from patch_spec.cases.tools import Change, Invalid, drop, put, with_manifest, with_text

_INCREMENT = ("increments", 0)
_SETTINGS = (*_INCREMENT, "method", "settings")
_COLLATERAL = (*_INCREMENT, "measured", "collateral")
_MEASURED = {"captions": 1, "median": 0.5, "p95": 0.5, "worst": {}}
_TARGET = ("base", "targets", KEY)
_LAYERS = ("base", "layers")
_LAYER = {"fingerprint": "0" * 64, "shape": [6, 8]}
_POOLED = {"rank": 1, "shift_exponent": 0}


def manifest_cases() -> Iterator[Invalid]:
    """Patches whose manifest no reader may accept, whatever the rest of the file."""
    for about, text_change in {
        "manifest-not-json": lambda text: text[:-1],
        "manifest-list": lambda text: f"[{text}]",
        "manifest-infinity": lambda text: text.replace("0.02", "Infinity"),
        "manifest-field-twice": lambda text: text[:-1] + ',"version":1}',
        "manifest-half-a-surrogate-pair": lambda text: text.replace("Monet", "\\udc00"),
    }.items():
        yield Invalid("J1", about, with_text(text_change))
    for about, text_change in {
        "space": lambda text: text.replace(",", ", ", 1),
        "escaped-letter": lambda text: text.replace("Monet", "\\u004donet"),
        "float-spelling": lambda text: text.replace("0.02", "2e-2"),
        "whole-float": lambda text: text.replace('"rank":2', '"rank":2.0'),
        "negative-zero": lambda text: text.replace('"seed":0', '"seed":-0'),
        "order": lambda text: '{"version":1,' + text[1:].replace(',"version":1', ""),
    }.items():
        yield Invalid("J2", about, with_text(text_change))
    for rule, about, change in (*_fields(), *_numbers(), *_texts(), *_names()):
        yield Invalid(rule, about, with_manifest(change))
    masks = patch(mask(), of=layered())
    for rule, about, change in _masks():
        yield Invalid(rule, about, with_manifest(change, of=masks))


def _fields() -> Iterator[tuple[str, str, Change]]:
    yield "J3", "unknown-field", put("comment", to="hello")
    yield "J3", "no-tool", drop("tool")
    yield "J3", "unknown-in-increment", put(*_INCREMENT, "alpha", to=1)
    yield "J3", "operator-field-in-additive", put(*_INCREMENT, "shift_exponent", to=0)
    yield "J3", "promise-in-increment", put(*_INCREMENT, "separable_from", to=[""])
    yield "J3", "no-separable-from", drop("separable_from")
    yield "J3", "wall-clock", put(*_INCREMENT, "measured", "seconds", to=12.5)
    yield "J3", "pooled-exponent-in-additive", put(*_INCREMENT, "pooled", to=_POOLED)
    yield "J4", "pooled-null", put(*_INCREMENT, "pooled", to=None)
    yield "J4", "pooled-width-null", put("base", "pooled", to=None)
    yield "J4", "layers-list", put(*_LAYERS, to=[])
    yield "J3", "layer-without-shape", put(*_LAYERS, to={QUERY: {"fingerprint": "0" * 64}})
    yield "J4", "base-null", put("base", to=None)
    yield "J4", "increments-object", put("increments", to={})
    yield "J4", "unknown-family", put("base", "family", to="sd9")
    yield "J4", "unknown-kind", put(*_INCREMENT, "kind", to="sum")
    yield "J4", "concept-null", put(*_INCREMENT, "concept", to=None)
    yield "J4", "rank-text", put(*_INCREMENT, "rank", to="2")
    yield "J4", "rank-true", put(*_INCREMENT, "rank", to=True)
    yield "J4", "rank-fraction", put(*_INCREMENT, "rank", to=1.5)
    yield "J4", "leakage-text", put(*_INCREMENT, "measured", "leakage", to="low")
    yield "J4", "collateral-null", put(*_INCREMENT, "measured", "collateral", to=None)
    yield "J3", "collateral-without-p95", put(*_COLLATERAL, to={"captions": 1, "median": 0.5})
    yield "J4", "collateral-worst-list", put(*_COLLATERAL, to={**_MEASURED, "worst": ["cat"]})
    yield "J4", "setting-list", put(*_SETTINGS, "lr", to=[1])
    yield "J9", "version-2", put("version", to=2)
    yield "J9", "version-true", put("version", to=True)
    yield "J9", "no-version", drop("version")
    yield "J9", "another-format", put("format", to="sepme-stack")


def _numbers() -> Iterator[tuple[str, str, Change]]:
    yield "J6", "rank-0", put(*_INCREMENT, "rank", to=0)
    yield "J6", "rank-78", put(*_INCREMENT, "rank", to=limits.RANK + 1)
    yield "J6", "width-4097", put("base", "width", to=limits.WIDTH + 1)
    yield "J6", "exponent-65", put(*_INCREMENT, "exponents", KEY, to=limits.EXPONENT + 1)
    yield "J6", "exponent-minus-65", put(*_INCREMENT, "exponents", KEY, to=-limits.EXPONENT - 1)
    yield "J6", "steps-negative", put(*_INCREMENT, "measured", "steps", to=-1)
    yield "J6", "pooled-width-0", put("base", "pooled", to=0)
    yield "J6", "pooled-rank-0", put(*_INCREMENT, "pooled", to={"rank": 0})
    yield "J6", "out-0", put(*_TARGET, "shape", to=[0, 8])
    yield "J6", "out-16385", put(*_TARGET, "shape", to=[limits.OUT + 1, 8])
    yield "J6", "layer-32769-wide", put(*_LAYERS, to={QUERY: {**_LAYER, "shape": [6, 32769]}})
    yield "J6", "layer-32769-tall", put(*_LAYERS, to={QUERY: {**_LAYER, "shape": [32769, 8]}})
    yield "J6", "setting-2-53", put(*_SETTINGS, "seed", to=2.0**53)
    yield "J6", "leakage-huge", put(*_INCREMENT, "measured", "leakage", to=1e300)
    many = {f"{number:x}": 0 for number in range(limits.WORST + 1)}
    yield "J7", "17-worst-words", put(*_COLLATERAL, to={**_MEASURED, "worst": many})
    yield "J7", "no-increments", put("increments", to=[])
    yield "J7", "1025-increments", put("increments", to=[0] * (limits.INCREMENTS + 1))
    yield "J7", "no-prompts", put(*_INCREMENT, "prompts", to=[])
    yield "J7", "4097-prompts", put(*_INCREMENT, "prompts", to=[0] * (limits.PROMPTS + 1))
    yield "J7", "5-text-encoders", put("base", "text_encoders", to=_counted(limits.TEXT_ENCODERS))
    yield "J7", "65-settings", put(*_SETTINGS, to=_counted(limits.SETTINGS))
    yield "J7", "no-exponents", put(*_INCREMENT, "exponents", to={})
    yield "J7", "no-layers", put(*_LAYERS, to={})
    yield "J7", "2049-layers", put(*_LAYERS, to=_counted(limits.LAYERS))
    yield "J7", "2049-exponents", put(*_INCREMENT, "exponents", to=_counted(limits.LAYERS))
    yield "J7", "shape-of-three", put(*_TARGET, "shape", to=[4, 8, 1])
    yield "J8", "digest-upper-case", put(*_INCREMENT, "digest", to="A" * 64)
    yield "J8", "digest-short", put(*_TARGET, "fingerprint", to="0" * 63)


def _masks() -> Iterator[tuple[str, str, Change]]:
    own = (*_INCREMENT, "masks")
    yield "J3", "mask-with-exponents", put(*_INCREMENT, "exponents", to={KEY: 0})
    yield "J3", "mask-without-masks", drop(*own)
    yield "J3", "mask-with-pooled", put(*_INCREMENT, "pooled", to={"rank": 1})
    yield "J3", "mask-without-shape", put(*own, QUERY, to={"count": 1})
    yield "J4", "mask-list", put(*own, QUERY, to=[0])
    yield "J4", "mask-count-true", put(*own, QUERY, "count", to=True)
    yield "J6", "mask-rank-1", put(*_INCREMENT, "rank", to=1)
    yield "J6", "mask-count-0", put(*own, QUERY, "count", to=0)
    yield "J6", "mask-count-beyond", put(*own, QUERY, "count", to=limits.LAYER_SIDE**2 + 1)
    yield "J6", "mask-32769-wide", put(*own, QUERY, "shape", to=[6, limits.LAYER_SIDE + 1])
    yield "J7", "no-masks", put(*own, to={})
    yield "J7", "2049-masks", put(*own, to=_counted(limits.LAYERS))
    yield "J7", "mask-shape-of-three", put(*own, QUERY, "shape", to=[6, 8, 1])


def _counted(most: int) -> dict[str, int]:
    return {f"{number:x}": 0 for number in range(most + 1)}


def _texts() -> Iterator[tuple[str, str, Change]]:
    for about, text in {
        "empty": "",
        "decomposed": "Rene\u0301",
        "newline": "Mo\nnet",
        "c1-control": "Mo\x85net",
        "right-to-left": "Mo\u202enet",
        "line-separator": "Mo\u2028net",
        "too-long": "é" * (limits.CONCEPT_BYTES // 2 + 1),
    }.items():
        yield "J5", f"concept-{about}", put(*_INCREMENT, "concept", to=text)
    yield "J5", "prompt-empty", put(*_INCREMENT, "prompts", to=[""])
    long_prompt = ["x" * (limits.PROMPT_BYTES + 1)]
    yield "J5", "prompt-too-long", put(*_INCREMENT, "prompts", to=long_prompt)
    yield "J5", "tool-too-long", put("tool", to="x" * (limits.WORD_BYTES + 1))
    yield "J5", "created-no-day", put("created", to="2024-02-30T00:00:00Z")
    yield "J5", "created-short", put("created", to="2024-2-3T00:00:00Z")
    yield "J5", "created-zone", put("created", to="2024-02-03T00:00:00+01:00")


def _names() -> Iterator[tuple[str, str, Change]]:
    for about, name in {
        "self-attention": KEY.replace("attn2", "attn1"),
        "query": KEY.replace("to_k", "to_q"),
        "without-owner": "attn2.to_k.weight",
        "second-layer": "add_embedding.linear_2.weight",
        "image-attention": "transformer_blocks.0.attn2.to_k.weight",
        "inside-another": "decoder.context_embedder.weight",
        "climbs": f"../{KEY}",
        "too-long": "x" * limits.TARGET_BYTES + ".attn2.to_k.weight",
    }.items():
        yield "P1", f"target-{about}", put("base", "targets", name, to={})
    for about, name in {
        "target": KEY,
        "bias": QUERY.replace("weight", "bias"),
        "upper-case": QUERY.upper(),
        "climbs": f"../{QUERY}",
        "trailing-dot": f"{QUERY}.",
        "norm-of-text-encoder": "clip_l.encoder.layers.0.layer_norm1.weight",
        "number-with-zero": TEXT_LAYER.replace("layers.0", "layers.00"),
        "too-long": "x" * limits.TARGET_BYTES + ".weight",
    }.items():
        yield "P1", f"layer-{about}", put(*_LAYERS, to={name: _LAYER})
    for about, slug in {"upper-case": "Monet", "option": "-rf", "dot": "a.b"}.items():
        yield "P2", f"slug-{about}", put(*_INCREMENT, "slug", to=slug)

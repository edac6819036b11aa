"""sepme: take concepts out of Stable Diffusion checkpoints, and put them back.

The Python API; `import sepme_cli as sepme` loads nothing that is not used::

    sepme.erase("sd15.safetensors", "Monet", kind="style", output="monet.sepme")
    sepme.apply("sd15.safetensors", "monet.sepme", "clean.safetensors")
    sepme.revert("clean.safetensors", base="sd15.safetensors", output="back.safetensors")
    with sepme.patched(pipe, "monet.sepme"):
        pipe("a garden by Monet")

The commands of the same names do the same; `patched` and `deltas` are for models in memory. All
take paths as text or not, and one thing where several may be. A model or a patch may be on the
hub, "owner/name" or "hf://…". They return frozen results, report
to a `Progress`, and raise subclasses of `SepmeError`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sepme_cli.version import __version__ as __version__

if TYPE_CHECKING:
    from sepme_cli.composing.importing import ImportResult
    from sepme_cli.diffusion.options import ModelOptions
    from sepme_cli.erasure.settings import Settings
    from sepme_cli.errors import (
        MalformedError,
        MismatchError,
        RefusedError,
        SepmeError,
        SystemFailure,
        UnsupportedError,
        UsageError,
    )
    from sepme_cli.evaluation.protocol import Drawing
    from sepme_cli.evaluation.results import EvaluateResult
    from sepme_cli.operations.apply import ApplyResult, apply
    from sepme_cli.operations.card import CardResult, card
    from sepme_cli.operations.deltas import deltas
    from sepme_cli.operations.diff import DiffResult, diff
    from sepme_cli.operations.erase import EraseResult, erase
    from sepme_cli.operations.evaluate import evaluate
    from sepme_cli.operations.example import ExampleResult, example
    from sepme_cli.operations.export import ExportResult, export
    from sepme_cli.operations.extract import extract
    from sepme_cli.operations.import_lora import import_lora
    from sepme_cli.operations.inspect import InspectResult, inspect
    from sepme_cli.operations.patched import LivePatch, patched
    from sepme_cli.operations.plan import ErasePlan, plan_erasure
    from sepme_cli.operations.revert import RevertResult, revert
    from sepme_cli.operations.sample import SampleResult, sample
    from sepme_cli.operations.sign import SignResult, sign
    from sepme_cli.operations.verify import VerifyResult, verify
    from sepme_cli.progress import Progress

__all__ = [
    "ApplyResult",
    "CardResult",
    "DiffResult",
    "Drawing",
    "ErasePlan",
    "EraseResult",
    "EvaluateResult",
    "ExampleResult",
    "ExportResult",
    "ImportResult",
    "InspectResult",
    "LivePatch",
    "MalformedError",
    "MismatchError",
    "ModelOptions",
    "Progress",
    "RefusedError",
    "RevertResult",
    "SampleResult",
    "SepmeError",
    "Settings",
    "SignResult",
    "SystemFailure",
    "UnsupportedError",
    "UsageError",
    "VerifyResult",
    "apply",
    "card",
    "deltas",
    "diff",
    "erase",
    "evaluate",
    "example",
    "export",
    "extract",
    "import_lora",
    "inspect",
    "patched",
    "plan_erasure",
    "revert",
    "sample",
    "sign",
    "verify",
]

_HOMES = {
    "diffusion.options": ("ModelOptions",),
    "erasure.settings": ("Settings",),
    "errors": (
        "MalformedError",
        "MismatchError",
        "RefusedError",
        "SepmeError",
        "SystemFailure",
        "UnsupportedError",
        "UsageError",
    ),
    "evaluation.protocol": ("Drawing",),
    "evaluation.results": ("EvaluateResult",),
    "operations.apply": ("ApplyResult", "apply"),
    "operations.card": ("CardResult", "card"),
    "operations.deltas": ("deltas",),
    "operations.diff": ("DiffResult", "diff"),
    "operations.erase": ("EraseResult", "erase"),
    "operations.evaluate": ("evaluate",),
    "operations.example": ("ExampleResult", "example"),
    "operations.export": ("ExportResult", "export"),
    "operations.extract": ("extract",),
    "operations.import_lora": ("import_lora",),
    "composing.importing": ("ImportResult",),
    "operations.inspect": ("InspectResult", "inspect"),
    "operations.patched": ("LivePatch", "patched"),
    "operations.plan": ("ErasePlan", "plan_erasure"),
    "operations.revert": ("RevertResult", "revert"),
    "operations.sample": ("SampleResult", "sample"),
    "operations.sign": ("SignResult", "sign"),
    "operations.verify": ("VerifyResult", "verify"),
    "progress": ("Progress",),
}
"""Where the names come from once they are used; the imports above say the same to type checkers."""


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(f"{__name__}.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

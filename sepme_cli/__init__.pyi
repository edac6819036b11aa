"""The public names: lazy_loader imports each from here once it is used."""

from .composing.importing import ImportResult as ImportResult
from .diffusion.options import ModelOptions as ModelOptions
from .erasure.settings import Settings as Settings
from .errors import MalformedError as MalformedError
from .errors import MismatchError as MismatchError
from .errors import RefusedError as RefusedError
from .errors import SepmeError as SepmeError
from .errors import SystemFailure as SystemFailure
from .errors import UnsupportedError as UnsupportedError
from .errors import UsageError as UsageError
from .evaluation.protocol import SamplingOptions as SamplingOptions
from .evaluation.results import EvaluateResult as EvaluateResult
from .operations.apply import ApplyResult as ApplyResult
from .operations.apply import apply as apply
from .operations.card import CardResult as CardResult
from .operations.card import card as card
from .operations.deltas import deltas as deltas
from .operations.diff import DiffResult as DiffResult
from .operations.diff import diff as diff
from .operations.erase import EraseResult as EraseResult
from .operations.erase import erase as erase
from .operations.evaluate import evaluate as evaluate
from .operations.example import ExampleResult as ExampleResult
from .operations.example import example as example
from .operations.export import ExportResult as ExportResult
from .operations.export import export as export
from .operations.extract import extract as extract
from .operations.import_lora import import_lora as import_lora
from .operations.inspect import InspectResult as InspectResult
from .operations.inspect import inspect as inspect
from .operations.patched import LivePatch as LivePatch
from .operations.patched import patched as patched
from .operations.plan import ErasePlan as ErasePlan
from .operations.plan import plan_erasure as plan_erasure
from .operations.revert import RevertResult as RevertResult
from .operations.revert import revert as revert
from .operations.sample import SampleResult as SampleResult
from .operations.sample import sample as sample
from .operations.sign import SignResult as SignResult
from .operations.sign import sign as sign
from .operations.verify import VerifyResult as VerifyResult
from .operations.verify import verify as verify
from .progress import Progress as Progress

__version__: str

"""Who says what a picture shows."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor

from sepme_cli.erasure.prompts import Kind
from sepme_cli.errors import UsageError


@runtime_checkable
class Judge(Protocol):
    """Recognises styles, objects, or both."""

    def labels(self, kind: Kind) -> Sequence[str]:
        """What it can tell of that kind; nothing if it does not judge it."""
        ...

    def recognise(self, pictures: Tensor, kind: Kind) -> Sequence[str]:
        """For each picture [n, 3, H, W] in [0, 1], the label it shows most."""
        ...


def load_judge(
    spec: str,
    names: Mapping[Kind, Sequence[str]],
    labels: Mapping[str, str],
    device: Any = "cpu",
) -> Judge:
    """The judge that `spec` names.

    spec: `package.module:factory`, a Python function that returns a Judge; or a transformers
    image classifier or CLIP model, as a folder or a hub id. names: what there is to tell apart,
    for a CLIP model to choose from. labels: by concept, what the judge calls it if not so.
    Raises UsageError for what is no judge, UnsupportedError for a model that is none.
    """
    module, colon, factory = spec.partition(":")
    if colon and not Path(spec).exists():
        return _from_python(module, factory)
    from sepme_cli.diffusion.judges import transformers_judge

    return transformers_judge(spec, names, labels, device)


def _from_python(module: str, factory: str) -> Judge:
    try:
        make = cast(Callable[[], Any], getattr(importlib.import_module(module), factory))
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"--judge {module}:{factory}: {error}",
            expected="package.module:factory, or a model's folder or hub id",
        ) from error
    judge = make()
    if not isinstance(judge, Judge):
        raise UsageError(
            f"--judge {module}:{factory} does not give a judge",
            expected="an object with labels(kind) and recognise(pictures, kind)",
            found=type(judge).__name__,
        )
    return judge

"""What users bring of their own: `package.module:factory`, a function that returns it."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sepme_cli.errors import UsageError


def is_plugin(spec: str) -> bool:
    """Whether it names a function, and no file or folder."""
    return ":" in spec and not Path(spec).exists()


def load_plugin(option: str, spec: str) -> Any:
    """What the function returns. Raises UsageError for whatever it raises."""
    module, _, factory = spec.partition(":")
    try:
        with _this_folder():
            return getattr(importlib.import_module(module), factory)()
    except Exception as error:  # whatever the user's own code raises
        raise UsageError(
            f"{option} {spec}: {type(error).__name__}: {error}",
            expected="package.module:factory, or a model's folder or hub id",
        ) from error


@contextmanager
def _this_folder() -> Iterator[None]:
    """Modules are looked for in the current folder first, as `python -m` does."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)

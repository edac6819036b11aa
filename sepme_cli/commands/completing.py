"""What a shell proposes where a name is expected."""

from contextlib import suppress
from pathlib import Path

import typer


def names_of_concepts(context: typer.Context) -> list[str]:
    """The concepts of the patches, or of the patched checkpoint, that are on the line already."""
    from sepme_cli.errors import SepmeError
    from sepme_cli.operations.inspect import CheckpointInfo, PatchInfo, inspect

    found: dict[str, None] = {}
    # While an option is being typed, the arguments before it have not been told apart yet.
    for path in context.args:
        with suppress(SepmeError, OSError):
            about = inspect(Path(path))
            if isinstance(about, CheckpointInfo):
                found.update(dict.fromkeys(entry.concept for entry in about.applied))
            elif isinstance(about, PatchInfo):
                found.update(dict.fromkeys(i["concept"] for i in about.manifest["increments"]))
    return list(found)

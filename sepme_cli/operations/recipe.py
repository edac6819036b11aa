"""Recipes as files: one to begin with, and what one says."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

from sepme_cli.arguments import FilePath, as_path
from sepme_cli.checkpoints.disk.output import output_name, write_output
from sepme_cli.erasure.words import Item
from sepme_cli.progress import SILENT, Progress
from sepme_cli.recipe import TEMPLATE, as_recipe
from sepme_cli.strict_yaml import Scalar


@dataclass(frozen=True)
class InitResult:
    """recipe: where it was written, "-" for a stream."""

    recipe: str
    bytes: int


@dataclass(frozen=True)
class RecipeInfo:
    """What a recipe says. digest: of what it says, whatever its layout. method: None leaves it
    open. weights: of protected names that matter less; others have 1."""

    file: str
    digest: str
    concepts: tuple[Item, ...]
    protect: tuple[str, ...]
    method: str | None
    settings: Mapping[str, Scalar]
    weights: Mapping[str, float]


def init(
    output: FilePath | BinaryIO, *, force: bool = False, progress: Progress = SILENT
) -> InitResult:
    """Write a recipe to begin with. Raises SystemFailure, also for a file that is there already."""
    output = as_path(output)
    data = TEMPLATE.encode()
    write_output(output, data, force=force, progress=progress)
    return InitResult(output_name(output), len(data))


def check(path: FilePath) -> RecipeInfo:
    """Read a recipe. Raises MalformedError, with the line, and SystemFailure."""
    recipe = as_recipe(path)
    return RecipeInfo(
        str(path),
        recipe.digest,
        recipe.concepts,
        recipe.protect,
        recipe.method,
        recipe.settings,
        recipe.weights,
    )

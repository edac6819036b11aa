"""What belongs together travels together: no function takes a long list."""

import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from importlib import import_module
from typing import Any

import patch_spec
import sepme_cli

MOST = 8
#: What counts as one of a kind: it gathers what would be a list of its own.
VALUES = {"SamplingOptions", "EraseRequest", "ModelOptions", "Progress", "Settings"}


def functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every function and method by its name, but for the commands: Typer reads their options off
    their signatures."""
    for package in (sepme_cli, patch_spec):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.startswith("sepme_cli.commands."):
                yield from _written_in(import_module(found.name))


def _written_in(place: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Of a module or a class. A dataclass is built of its fields, which nobody hands on."""
    module = getattr(place, "__module__", place.__name__)
    for name, member in vars(place).items():
        member = getattr(member, "__func__", member)
        if getattr(member, "__module__", None) != module:
            continue
        if inspect.isclass(member):
            yield from _written_in(member)
        elif inspect.isfunction(member) and not (name == "__init__" and is_dataclass(place)):
            yield f"{module}.{member.__qualname__}", member


def parameters(function: Callable[..., Any]) -> list[str]:
    """Those that are none of the values."""
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in ("self", "cls")
        and getattr(parameter.annotation, "__name__", parameter.annotation) not in VALUES
    ]


def test_no_function_takes_a_long_list() -> None:
    found = {name: len(parameters(function)) for name, function in functions()}
    assert len(found) > 1000
    assert {name: count for name, count in found.items() if count > MOST} == {}

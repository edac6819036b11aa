"""The reference of the Python API has every public name, with all that one can give and get."""

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, is_typeddict

import pytest
from griffe import Docstring, DocstringSectionKind, Parser

import sepme_cli
from sepme_cli.composing.importing import ImportOptions
from sepme_cli.errors import SepmeError
from sepme_cli.operations.apply import ApplyOptions
from sepme_cli.operations.attack import Ways
from sepme_cli.operations.evaluate import Scope
from sepme_cli.operations.revert import RevertOptions
from sepme_cli.operations.sample import Patching
from sepme_cli.planning.request import EraseOptions

ROOT = Path(__file__).parent.parent


def exported() -> list[str]:
    """The names that the package gives."""
    tree = ast.parse((ROOT / "sepme_cli/__init__.pyi").read_text())
    return [
        alias.asname
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    ]


def described(thing: Any, kind: DocstringSectionKind) -> list[str]:
    """What a section of its docstring names, in order; nothing if it has no such section."""
    sections = Docstring(inspect.getdoc(thing) or "").parse(Parser.google, warnings=False)
    return [
        (item.annotation if kind is DocstringSectionKind.raises else item.name).lstrip("*")
        for section in sections
        if section.kind is kind
        for item in section.value
        if item.description
    ]


def callables(thing: Any) -> Iterator[Any]:
    """A function, or the public methods of a class."""
    if inspect.isfunction(thing):
        yield thing
    elif not dataclasses.is_dataclass(thing):
        yield from (
            f for name, f in vars(thing).items() if inspect.isfunction(f) and name[0] != "_"
        )


def check(thing: Any) -> None:
    """Parameters, errors and fields stand in the docstring, and no others."""
    assert inspect.getdoc(thing)
    for function in callables(thing):
        parameters = [name for name in inspect.signature(function).parameters if name != "self"]
        # What takes nothing needs no section.
        assert described(function, DocstringSectionKind.parameters) == parameters, function
        for error in described(function, DocstringSectionKind.raises):
            assert issubclass(getattr(sepme_cli, error), SepmeError)
    if inspect.isfunction(thing):
        sections = Docstring(inspect.getdoc(thing) or "").parse(Parser.google, warnings=False)
        kinds = {section.kind for section in sections}
        assert kinds >= {DocstringSectionKind.returns, DocstringSectionKind.raises}
    if dataclasses.is_dataclass(thing):
        fields = [field.name for field in dataclasses.fields(thing)]
        assert described(thing, DocstringSectionKind.attributes) == fields
    if is_typeddict(thing):
        assert described(thing, DocstringSectionKind.attributes) == list(thing.__annotations__)


@pytest.mark.parametrize(
    "name",
    exported(),
)
def test_a_public_name_is_described(name: str) -> None:
    thing = getattr(sepme_cli, name)
    for one in get_args(thing) or (thing,):
        check(one)


@pytest.mark.parametrize(
    "options",
    [EraseOptions, ApplyOptions, RevertOptions, ImportOptions, Scope, Patching, Ways],
)
def test_options_that_functions_share_are_described(options: type) -> None:
    check(options)


def test_the_page_has_every_public_name() -> None:
    page = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert len(page) == len(set(page))
    assert {f"sepme_cli.{name}" for name in exported()} <= set(page)
    for options in (
        EraseOptions,
        ApplyOptions,
        RevertOptions,
        ImportOptions,
        Scope,
        *get_args(sepme_cli.InspectResult),
    ):
        assert f"{options.__module__}.{options.__name__}" in page

"""YAML that people write, read strictly: every complaint names its line.

A file is read as nodes, not as Python values, since those remember neither their lines nor that a
key was there twice.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import yaml

from patch_spec import limits
from patch_spec.errors import FormatError
from patch_spec.text import clean_text
from sepme_cli.errors import MalformedError

Scalar = int | float | str | bool
Value = TypeVar("Value")


def read_node(text: bytes, path: Path) -> "Place":
    """The root of a file's one document; MalformedError, with the line, for what is no YAML."""
    try:
        nodes = list(yaml.compose_all(text, Loader=Loader))
    # Of escapes beyond Unicode, and versions of thousands of digits, it raises what Python does.
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "not YAML"
        raise MalformedError(f"{path}{line}: {reason}", file=path) from error
    if len(nodes) != 1:
        raise MalformedError(f"{path}: not one YAML document", file=path, found=len(nodes))
    return Place(path, nodes[0])


class Loader(yaml.SafeLoader):
    """Refuses anchors, of which a few lines unfold to gigabytes, and tags, which name types that
    PyYAML fails to make of any text; a recipe needs neither."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        for what, name in (("anchor", "anchors and aliases"), ("tag", "tags")):
            if getattr(event, what, None) is not None:
                raise yaml.composer.ComposerError(
                    None, None, f"{name} have no place in a recipe", event.start_mark
                )
        return super().compose_node(parent, index)


@dataclass(frozen=True)
class Place:
    """A node of the file, and how to take from it what should be there."""

    path: Path
    node: yaml.Node

    def refuse(self, what: str, expected: object, found: object = None) -> NoReturn:
        line = self.node.start_mark.line + 1
        raise MalformedError(
            f"{self.path}:{line}: {what}", file=self.path, expected=expected, found=found
        )

    @property
    def is_scalar(self) -> bool:
        """Whether it is a single value, no list and no mapping."""
        return isinstance(self.node, yaml.ScalarNode)

    @property
    def is_list(self) -> bool:
        """Whether it is a list."""
        return isinstance(self.node, yaml.SequenceNode)

    def mapping(
        self, required: tuple[str, ...] = (), optional: tuple[str, ...] = ()
    ) -> dict[str, "Place"]:
        """The fields of a mapping, each known and there once."""
        if not isinstance(self.node, yaml.MappingNode):
            self.refuse("expected fields with values", " and ".join(required or optional))
        fields: dict[str, Place] = {}
        for key, value in self.node.value:
            if not isinstance(key, yaml.ScalarNode):
                Place(self.path, key).refuse("a field without a name", " and ".join(required))
            name = str(key.value)
            if name not in (*required, *optional):
                what = f"an unknown field, {name[:60]!r}"
                Place(self.path, key).refuse(what, ", ".join((*required, *optional)), name[:60])
            if name in fields:
                Place(self.path, key).refuse(f"{name} is there twice", "once")
            fields[name] = Place(self.path, value)
        for name in required:
            if name not in fields:
                self.refuse(f"{name} is missing", ", ".join(required))
        return fields

    def each(self, take: "Callable[[Place], Value]", most: int = 4096) -> Iterator[Value]:
        """What is in a list."""
        if not isinstance(self.node, yaml.SequenceNode):
            self.refuse("expected a list", "a list")
        if len(self.node.value) > most:
            self.refuse("too long a list", f"at most {most}", len(self.node.value))
        yield from (take(Place(self.path, child)) for child in self.node.value)

    def text(self, most: int = limits.PROMPT_BYTES) -> str:
        """Some text on one line, of at most that many bytes, as a patch keeps it."""
        if not isinstance(self.node, yaml.ScalarNode):
            self.refuse("expected text", "text")
        text = str(self.node.value)
        try:
            return clean_text(text, most)
        except (FormatError, UnicodeEncodeError):
            self.refuse("expected some text on one line", f"1 to {most} bytes", text[:60])

    def choice(self, known: tuple[str, ...]) -> str:
        """One of some words."""
        if (text := self.text()) not in known:
            self.refuse(f"{text[:60]!r} is not known here", " or ".join(known), text[:60])
        return text

    def scalar(self, kind: type) -> Scalar:
        """A number or a word of a type."""
        if not self.is_scalar or len(self.node.value) > limits.PROMPT_BYTES:
            self.refuse("a value of another type", kind.__name__)
        loader = Loader("")
        try:
            value = loader.construct_object(self.node)
            if kind is float and (type(value) is int or self._is_power(value)):
                value = float(value)
        except (yaml.YAMLError, ValueError, OverflowError):
            value = None
        if type(value) is not kind:
            self.refuse("a value of another type", kind.__name__, str(self.node.value)[:60])
        return cast(Scalar, value)

    def _is_power(self, value: object) -> bool:
        """YAML 1.1 takes 1e-4 for text, since it has no point; people mean a number."""
        plain = getattr(self.node, "style", None) is None
        return isinstance(value, str) and plain

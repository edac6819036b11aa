"""Recipes: a policy of what to take out of models, as a YAML file that people keep and review.

Every complaint names the line. The file is read as nodes, not as Python values, since those
remember neither their lines nor that a key was there twice.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, cast

import yaml

from sepme_cli.errors import MalformedError, SystemFailure

Kind = Literal["style", "object", "any"]
Scalar = int | float | str | bool
Value = TypeVar("Value")

VERSION = 1
KINDS = ("style", "object", "any")
METHODS = ("closed-form", "sepme")
_BYTES = 2**20
_TEXT = 2000
_CONCEPTS = 1024
_PLACE = "{c}"


@dataclass(frozen=True)
class Item:
    """One concept to take out.

    aliases: other names of the same concept. prompts: further phrases that ask for it, "{c}"
    standing for its name. like: what it should act like instead; None leaves that to the method.
    """

    name: str
    kind: Kind = "any"
    aliases: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    like: str | None = None


@dataclass(frozen=True)
class Recipe:
    """What to take out, what to keep, and how.

    protect: words as `--protect` takes them ("style:noto"). method: None leaves the choice open.
    settings: hyper-parameters by name.
    """

    concepts: tuple[Item, ...]
    protect: tuple[str, ...] = ()
    method: str | None = None
    settings: Mapping[str, Scalar] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of what the recipe says, whatever its comments, order of keys and layout."""
        said = {
            "version": VERSION,
            "concepts": [vars(item) for item in self.concepts],
            "protect": list(self.protect),
            "method": self.method,
            "settings": dict(self.settings),
        }
        return sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


TEMPLATE = """\
# A sepme recipe: what to take out of a model, and what must stay.
#   sepme erase MODEL --recipe policy.yaml
version: 1

# Each concept gets an increment of its own, which can be applied and taken back alone.
concepts:
  - name: Monet
    kind: style              # style, object, or any (both)
    aliases: [Claude Monet]  # other names of the same concept
    # prompts:               # more phrases that ask for it; {c} is its name
    #   - "a water lily pond by {c}"
    # like: impressionism    # what it should act like instead
  # - a bare name is a concept of any kind

# Name the neighbours: they stay, and they show what the concept should act like.
protect:
  styles: [watercolor, oil painting, Van Gogh]
  objects: [pond, bridge]

# method: closed-form        # or sepme, which optimises on pictures
# settings:
#   rank: 16
"""
"""What `sepme recipe init` writes."""


def read_recipe(path: Path, settings: Mapping[str, type]) -> Recipe:
    """A recipe from its file.

    settings: the hyper-parameters there are, and their types.
    Raises SystemFailure if it cannot be read, MalformedError, with the line, for what is none.
    """
    try:
        size = path.stat().st_size
        text = path.read_bytes() if size <= _BYTES else b""
    except OSError as error:
        raise SystemFailure(f"{path}: {error.strerror}", file=path) from error
    if size > _BYTES:
        raise MalformedError(
            f"{path}: too large for a recipe", file=path, expected=f"{_BYTES} bytes", found=size
        )
    return parse_recipe(text, path, settings)


def parse_recipe(text: bytes, path: Path, settings: Mapping[str, type]) -> Recipe:
    """As `read_recipe`, from the file's bytes."""
    try:
        nodes = list(yaml.compose_all(text, Loader=_Loader))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "not YAML"
        raise MalformedError(f"{path}{line}: {reason}", file=path) from error
    if len(nodes) != 1:
        raise MalformedError(f"{path}: not one YAML document", file=path, found=len(nodes))
    root = _Place(path, nodes[0]).mapping(
        required=("version", "concepts"), optional=("protect", "method", "settings")
    )
    if root["version"].scalar(int) != VERSION:
        root["version"].refuse("an unknown version", VERSION)
    concepts = tuple(root["concepts"].each(_item, _CONCEPTS))
    if not concepts:
        root["concepts"].refuse("no concept", "at least one")
    _check_twice(root["concepts"], concepts)
    return Recipe(
        concepts,
        _protect(root["protect"]) if "protect" in root else (),
        root["method"].choice(METHODS) if "method" in root else None,
        _settings(root["settings"], settings) if "settings" in root else {},
    )


def _item(place: "_Place") -> Item:
    if isinstance(place.node, yaml.ScalarNode):
        return Item(place.text())
    fields = place.mapping(required=("name",), optional=("kind", "aliases", "prompts", "like"))

    def texts(name: str) -> tuple[str, ...]:
        return tuple(fields[name].each(_Place.text)) if name in fields else ()

    for prompt in fields["prompts"].each(lambda one: one) if "prompts" in fields else ():
        if _PLACE not in prompt.text() and fields["name"].text() not in prompt.text():
            prompt.refuse("a prompt that does not ask for the concept", f"{_PLACE} or its name")
    return Item(
        fields["name"].text(),
        cast(Kind, fields["kind"].choice(KINDS)) if "kind" in fields else "any",
        texts("aliases"),
        tuple(text.replace(_PLACE, fields["name"].text()) for text in texts("prompts")),
        fields["like"].text() if "like" in fields else None,
    )


def _check_twice(place: "_Place", concepts: tuple[Item, ...]) -> None:
    """Two increments for one concept would fight over it."""
    seen: dict[str, str] = {}
    for item in concepts:
        for name in dict.fromkeys(n.casefold() for n in (item.name, *item.aliases)):
            if name in seen:
                place.refuse(f"{name!r} is named by two concepts", "one", seen[name])
            seen[name] = item.name


def _protect(place: "_Place") -> tuple[str, ...]:
    if isinstance(place.node, yaml.SequenceNode):
        return tuple(place.each(_Place.text))
    fields = place.mapping(optional=("styles", "objects", "any"))
    prefixes = {"styles": "style:", "objects": "object:", "any": ""}
    return tuple(
        prefixes[name] + word for name in fields for word in fields[name].each(_Place.text)
    )


def _settings(place: "_Place", known: Mapping[str, type]) -> dict[str, Scalar]:
    fields = place.mapping(optional=tuple(known))
    return {name: fields[name].scalar(known[name]) for name in fields}


class _Loader(yaml.SafeLoader):
    """Refuses anchors: a recipe needs none, and a few lines of them unfold to gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) is not None:
            raise yaml.composer.ComposerError(
                None, None, "anchors and aliases have no place in a recipe", event.start_mark
            )
        return super().compose_node(parent, index)


@dataclass(frozen=True)
class _Place:
    """A node of the file, and how to take from it what should be there."""

    path: Path
    node: yaml.Node

    def refuse(self, what: str, expected: object, found: object = None) -> NoReturn:
        line = self.node.start_mark.line + 1
        raise MalformedError(
            f"{self.path}:{line}: {what}", file=self.path, expected=expected, found=found
        )

    def mapping(
        self, required: tuple[str, ...] = (), optional: tuple[str, ...] = ()
    ) -> dict[str, "_Place"]:
        """The fields of a mapping, each known and there once."""
        if not isinstance(self.node, yaml.MappingNode):
            self.refuse("expected fields with values", " and ".join(required or optional))
        fields: dict[str, _Place] = {}
        for key, value in self.node.value:
            name = str(key.value)
            if name not in (*required, *optional):
                what = f"an unknown field, {name[:60]!r}"
                _Place(self.path, key).refuse(what, ", ".join((*required, *optional)), name[:60])
            if name in fields:
                _Place(self.path, key).refuse(f"{name} is there twice", "once")
            fields[name] = _Place(self.path, value)
        for name in required:
            if name not in fields:
                self.refuse(f"{name} is missing", ", ".join(required))
        return fields

    def each(self, take: "Callable[[_Place], Value]", most: int = 4096) -> Iterator[Value]:
        """What is in a list."""
        if not isinstance(self.node, yaml.SequenceNode):
            self.refuse("expected a list", "a list")
        if len(self.node.value) > most:
            self.refuse("too long a list", f"at most {most}", len(self.node.value))
        yield from (take(_Place(self.path, child)) for child in self.node.value)

    def text(self) -> str:
        """Some text on one line."""
        if not isinstance(self.node, yaml.ScalarNode):
            self.refuse("expected text", "text")
        text = str(self.node.value).strip()
        if not text or len(text.encode()) > _TEXT or re.search(r"[\x00-\x1f\x7f]", text):
            self.refuse("expected some text on one line", f"1 to {_TEXT} bytes", text[:60])
        return text

    def choice(self, known: tuple[str, ...]) -> str:
        """One of some words."""
        if (text := self.text()) not in known:
            self.refuse(f"{text[:60]!r} is not known here", " or ".join(known), text[:60])
        return text

    def scalar(self, kind: type) -> Scalar:
        """A number or a word of a type."""
        loader = _Loader("")
        try:
            value = loader.construct_object(self.node, deep=True)
        except yaml.YAMLError:
            value = None
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            self.refuse("a value of another type", kind.__name__, str(self.node.value)[:60])
        return cast(Scalar, value)

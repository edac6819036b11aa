"""Recipes: a policy of what to take out of models, as a YAML file that people keep and review."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import cast

from patch_spec import limits
from patch_spec.errors import FormatError
from sepme_cli.arguments import FilePath, as_path
from sepme_cli.erasure.methods import METHODS
from sepme_cli.erasure.prompts import AsKind
from sepme_cli.erasure.settings import AllowedValues, Settings
from sepme_cli.erasure.words import Item, conflict, parse_word, same_name
from sepme_cli.errors import MalformedError, SystemFailure
from sepme_cli.strict_yaml import Place, Scalar, read_node

VERSION = 1
KINDS = ("style", "object", "any")
#: What a recipe may set: the method's numbers, and of the machine what the UNet computes in.
SETTINGS: Mapping[str, AllowedValues] = {
    **Settings.allowed(),
    "dtype": AllowedValues(str, choices=("auto", "fp32", "fp16", "bf16")),
}
_BYTES = 2**20
_ALIASES = 32
_PROMPTS = 256
_PLACE = "{c}"


@dataclass(frozen=True)
class Recipe:
    """What to take out, what to keep, and how.

    protect: words as `--protect` takes them ("style:noto"). method: None leaves the choice open.
    settings: hyper-parameters by name, and the machine's dtype. weights: of protected names that
    matter less, in (0, 1]; others have 1.
    """

    concepts: tuple[Item, ...]
    protect: tuple[str, ...] = ()
    method: str | None = None
    settings: Mapping[str, Scalar] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def hyperparameters(self) -> Mapping[str, Scalar]:
        """The settings that are the method's."""
        return {name: value for name, value in self.settings.items() if name != "dtype"}

    @property
    def dtype(self) -> str | None:
        """What the UNet is to compute in; None where the recipe leaves it open."""
        return cast(str | None, self.settings.get("dtype"))

    @property
    def digest(self) -> str:
        """SHA-256 of what the recipe says, whatever its comments, order of keys and layout."""
        said = {
            "version": VERSION,
            "concepts": [_said(item) for item in self.concepts],
            "protect": list(self.protect),
            "method": self.method,
            "settings": dict(self.settings),
        }
        if self.weights:
            said["weights"] = dict(self.weights)
        return sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _said(item: Item) -> dict[str, object]:
    """A concept as a digest has it: without what is not said and had no name in older recipes, so
    that their digests stay."""
    newer = ("weights", "erase_from")
    return {name: value for name, value in vars(item).items() if value or name not in newer}


TEMPLATE = """\
# A sepme recipe: what to erase from a model, and what to protect.
#   sepme erase MODEL --recipe policy.yaml
version: 1

# Each concept gets an increment of its own, which can be applied and reverted alone.
concepts:
  - name: Monet
    kind: style              # style, object, or any (both)
    aliases: [Claude Monet]  # other names of the same concept; if less certain,
                             #   {name: impressionist, weight: 0.5}
    # prompts:               # more prompts for it; {c} is its name
    #   - "a water lily pond by {c}"
    # like: impressionism    # anchor: what to generate instead; by default something general
    # from: lily             # the one thing that loses it; by default everything does
  # - a bare name is a concept of any kind

# Names that must not change. Ordinary captions and the nearest words are always protected.
# {name: Renoir, weight: 0.5} matters half as much.
protect:
  styles: [watercolor, oil painting, Van Gogh]
  objects: [pond, bridge]

# method: closed-form        # or sepme, which optimises on images
# settings:
#   rank: 8
#   neighbours: 8            # number of nearest common words to protect
#   collateral: 0.7          # how much 95% of ordinary captions may change
"""
"""What `sepme recipe init` writes."""


def as_recipe(said: Recipe | FilePath) -> Recipe:
    """A recipe, read if it is a file. Raises MalformedError, with the line, and SystemFailure."""
    return said if isinstance(said, Recipe) else read_recipe(as_path(said), SETTINGS)


def read_recipe(path: Path, settings: Mapping[str, AllowedValues]) -> Recipe:
    """A recipe from its file.

    settings: those there are, and what they may be.
    Raises SystemFailure if it cannot be read, MalformedError, with the line, for what is none.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_BYTES + 1)
    except OSError as error:
        raise SystemFailure(f"{path}: {error.strerror}", file=path) from error
    if len(text) > _BYTES:
        raise MalformedError(
            f"{path}: too large for a recipe", file=path, expected=f"{_BYTES} bytes", found="more"
        )
    return parse_recipe(text, path, settings)


def parse_recipe(text: bytes, path: Path, settings: Mapping[str, AllowedValues]) -> Recipe:
    """As `read_recipe`, from the file's bytes."""
    root = read_node(text, path).mapping(
        required=("version", "concepts"), optional=("protect", "method", "settings")
    )
    if root["version"].scalar(int) != VERSION:
        root["version"].refuse("an unknown version", VERSION)
    concepts = tuple(root["concepts"].each(lambda place: (place, _item(place)), limits.INCREMENTS))
    protect, weights = _protect(root["protect"]) if "protect" in root else ((), {})
    if not concepts:
        root["concepts"].refuse("no concept", "at least one")
    _check_names(concepts)
    return Recipe(
        tuple(item for _, item in concepts),
        protect,
        root["method"].choice(tuple(METHODS)) if "method" in root else None,
        _settings(root["settings"], settings) if "settings" in root else {},
        weights,
    )


def _item(place: Place) -> Item:
    if place.is_scalar:
        return Item(*_word(place))
    optional = ("kind", "aliases", "prompts", "like", "from")
    fields = place.mapping(required=("name",), optional=optional)
    said = cast(AsKind, fields["kind"].choice(KINDS)) if "kind" in fields else "any"
    name, kind = _word(fields["name"], said)
    aliases = tuple(fields["aliases"].each(_weighted, _ALIASES)) if "aliases" in fields else ()
    prompts = fields["prompts"].each(Place.text, _PROMPTS) if "prompts" in fields else ()
    thing = _word(fields["from"])[0] if "from" in fields else None
    return Item(
        name,
        kind,
        tuple(parse_word(each.word, "any")[0] for each in aliases),
        tuple(_prompt(fields["prompts"], prompt, name, thing) for prompt in prompts),
        _word(fields["like"])[0] if "like" in fields else None,
        _weights(aliases, [name]),
        thing,
    )


def _word(place: Place, kind: AsKind = "any") -> tuple[str, AsKind]:
    try:
        return parse_word(place.text(), kind)
    except FormatError as error:
        place.refuse("a name of the wrong length", error.expected, error.found)


@dataclass(frozen=True)
class _Weighted:
    """A word as it stands in a list, with its prefix if it has one, and how much it matters."""

    place: Place
    word: str
    weight: float = 1.0

    @property
    def name(self) -> str:
        return parse_word(self.word, "any")[0]


def _weighted(place: Place) -> _Weighted:
    """A plain word, or {name: ..., weight: ...}."""
    if place.is_scalar:
        _word(place)
        return _Weighted(place, place.text())
    fields = place.mapping(required=("name",), optional=("weight",))
    _word(fields["name"])
    weight = cast(float, fields["weight"].scalar(float)) if "weight" in fields else 1.0
    if not 0 < weight <= 1:  # not a number is neither
        fields["weight"].refuse("a weight out of range", "above 0, at most 1", weight)
    return _Weighted(place, fields["name"].text(), weight)


def _weights(words: Sequence[_Weighted], names: Sequence[str] = ()) -> dict[str, float]:
    """The weights that are not 1, by name. names: some that have 1.

    One name with two weights says nothing; the same word twice is no harm.
    """
    found = dict.fromkeys(map(same_name, names), 1.0)
    for each in words:
        if found.setdefault(same_name(each.name), each.weight) != each.weight:
            each.place.refuse(f"{each.name!r} has two weights", "one", each.weight)
    return {each.name: each.weight for each in words if each.weight != 1}


def _prompt(place: Place, prompt: str, name: str, thing: str | None) -> str:
    """The prompt with the concept's name in its place. thing: what else must be in it."""
    whole = prompt.replace(_PLACE, name)
    if name not in whole:
        place.refuse(
            f"{prompt[:60]!r} does not ask for the concept", f"{_PLACE} or its name", prompt[:60]
        )
    if thing is not None and thing not in whole:
        place.refuse(f"{prompt[:60]!r} does not ask for {thing!r}", thing, prompt[:60])
    if len(whole.encode()) > limits.PROMPT_BYTES:
        place.refuse("too long a prompt", f"at most {limits.PROMPT_BYTES} bytes", len(whole))
    return whole


def _check_names(concepts: Sequence[tuple[Place, Item]]) -> None:
    """Refuse concepts that cannot be erased together."""
    if found := conflict([item for _, item in concepts]):
        culprit, told, other = found
        place = next(place for place, item in concepts if item is culprit)
        place.refuse(told, "concepts that go together", other)


def _protect(place: Place) -> tuple[tuple[str, ...], dict[str, float]]:
    """The words, and the weights of those that matter less."""
    if place.is_list:
        words = tuple(place.each(_weighted))
        return tuple(each.word for each in words), _weights(words)
    fields = place.mapping(optional=("styles", "objects", "any"))
    prefixes = {"styles": "style:", "objects": "object:", "any": ""}
    lists = {name: tuple(fields[name].each(_weighted)) for name in fields}
    said = tuple(prefixes[name] + each.word for name, words in lists.items() for each in words)
    return said, _weights([each for words in lists.values() for each in words])


def _settings(place: Place, known: Mapping[str, AllowedValues]) -> dict[str, Scalar]:
    fields = place.mapping(optional=tuple(known))
    return {name: _setting(fields[name], known[name]) for name in fields}


def _setting(place: Place, allowed: AllowedValues) -> Scalar:
    if allowed.choices:
        return place.choice(allowed.choices)
    value = place.scalar(allowed.kind)
    # Not a number is neither.
    if not isinstance(value, str) and not allowed.least <= value <= allowed.most:
        place.refuse("a value out of range", f"{allowed.least} to {allowed.most}", value)
    return value

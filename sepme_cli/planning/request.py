"""What is asked of `erase`, settled and checked before any network is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self, TypedDict, Unpack, get_args

from patch_spec.base import Base
from patch_spec.streams import Stream
from sepme_cli.arguments import (
    FilePath,
    PlaceLike,
    Places,
    Words,
    as_path,
    as_place,
    as_places,
    check_known,
    several,
)
from sepme_cli.diffusion.options import ModelOptions
from sepme_cli.erasure.methods import LEARNING, METHODS, PLAIN, Method
from sepme_cli.erasure.prompts import AsKind
from sepme_cli.erasure.settings import Settings
from sepme_cli.erasure.words import Item, conflict, given_word
from sepme_cli.errors import RefusedError, UsageError
from sepme_cli.places import Place
from sepme_cli.recipe import Recipe, as_recipe
from sepme_cli.strict_yaml import Scalar

#: "auto" erases what is nearly the same as a concept with it; "none" leaves it as it falls.
Aliases = Literal["none", "auto"]

#: What of a prompt to erase from; see `patch_spec.streams`.
Streams = Literal["all", "tokens", "pooled"]


class EraseOptions(TypedDict, total=False):
    """Options of an erasure, beside the model and the concepts.

    Attributes:
        recipe: Recipe, or its file, instead of concepts, `kind`, `to`, `erase_from` and `protect`.
            The patch records its digest.
        kind: Kind of the concepts: "style", "object", or "any", which detects it.
        to: Anchor: what to generate instead; the most general word of the kind if left out.
        erase_from: The one thing that the concepts are erased from, as its attributes: "red" from
            "apple". Other things keep them; everything loses them if left out.
        protect: Names that must not change; "style:noto" or "object:cat" gives a name's own kind.
        known: Existing patches to combine with, whose concepts are left alone.
        method: "closed-form", "text-encoder", "concept-prune" or "sepme". If left out, "sepme" with
            `images` or `joint`, else "closed-form".
        images: Folder with images of the one concept to optimise on, instead of generated ones.
        joint: Optimise all concepts together.
        aliases: "auto" also erases words that are nearly the same as a concept; "none" does not.
        settings: Hyper-parameters by name, which override the recipe's one by one; or a `Settings`,
            which sets all of them.
        options: How to open the model, and what to compute on.
        cache: Use the cache of embedded ordinary captions.
        streams: What of a prompt to erase from: "tokens", the rows that cross-attention reads;
            "pooled", the vector that XL reads beside them; or "all" that the model reads.
    """

    recipe: Recipe | FilePath | None
    kind: AsKind
    to: str | None
    erase_from: str | None
    protect: Words
    known: Places
    method: str | None
    images: FilePath | None
    joint: bool
    aliases: Aliases
    settings: Settings | Mapping[str, Scalar] | None
    options: ModelOptions
    cache: bool
    streams: Streams


@dataclass(frozen=True)
class EraseRequest:
    """An erasure as the command line, a recipe and Python ask for it alike; see `EraseOptions`.

    recipe: what to erase and what is protected, also where no file says it. digest: of the file.
    name: of the patch, where nobody names it. settings: with the recipe's.
    """

    model: Place
    recipe: Recipe
    digest: str | None
    name: str
    method: Method
    settings: Settings
    options: ModelOptions
    known: tuple[Place, ...]
    images: Path | None
    joint: bool
    aliases: Aliases
    cache: bool
    streams: Streams

    @property
    def read(self) -> tuple[object, ...]:
        """Files that it is made from beside the model and the recipe."""
        return *self.known, *several(self.options.text_encoders)

    @classmethod
    def of(cls, model: PlaceLike, concepts: Words = (), **options: Unpack[EraseOptions]) -> Self:
        """Settle what is asked for. Raises UsageError, and what reading a recipe raises."""
        check_known(options, EraseOptions)
        given = options.get("recipe")
        policy = None if given is None else as_recipe(given)
        recipe = _recipe(several(concepts), policy, options)
        images, joint = as_path(options.get("images")), options.get("joint", False)
        settings, model_options = _settings(recipe, options)
        method = _method(options.get("method"), recipe, images, joint=joint)
        return cls(
            model=as_place(model),
            recipe=recipe,
            digest=None if policy is None else policy.digest,
            name=recipe.concepts[0].slug if isinstance(given, Recipe | None) else Path(given).stem,
            method=method,
            settings=settings,
            options=model_options,
            known=as_places(options.get("known", ())),
            images=images,
            joint=joint,
            aliases=options.get("aliases", "none"),
            cache=options.get("cache", True),
            streams=_streams(options.get("streams", "all"), method),
        )

    def streams_of(self, base: Base) -> tuple[Stream, ...]:
        """The streams to erase from; RefusedError for one that a model does not read."""
        if self.streams == "all":
            return tuple(base.widths)
        if self.streams not in base.widths:
            raise RefusedError(
                f"{self.model} reads no {self.streams} text: leave out --streams",
                expected=" or ".join(base.widths),
                found=self.streams,
            )
        return (self.streams,)


def _streams(streams: Streams, method: Method) -> Streams:
    if streams not in get_args(Streams):
        raise UsageError("unknown stream", expected=" or ".join(get_args(Streams)), found=streams)
    if streams == "pooled" and method.learns:
        raise UsageError(
            f"--method {method.name} learns on the tokens that cross-attention reads: use "
            "--streams all, or the closed form",
            expected="all or tokens",
            found="pooled",
        )
    if streams != "all" and method.layers:
        raise UsageError(
            f"--method {method.name} changes layers, which all that is read of a prompt depends "
            "on: leave out --streams",
            expected="all",
            found=streams,
        )
    return streams


def _recipe(concepts: Sequence[str], policy: Recipe | None, options: EraseOptions) -> Recipe:
    """The recipe, or one that says what the caller does. Raises UsageError for both."""
    kind, to, thing = options.get("kind", "any"), options.get("to"), options.get("erase_from")
    protect = several(options.get("protect", ()))
    if policy is not None and (concepts or protect or to or thing or kind != "any"):
        raise UsageError(
            "the recipe gives the concepts and what to protect: leave out --concept, --as, "
            "--to, --from and --protect"
        )
    if policy is None:
        items = tuple(Item.parse(word, kind, to, thing) for word in concepts)
        # A recipe has no kind for all: what is protected says what it is.
        kept = (given_word(word, kind, "--protect") for word in protect)
        policy = Recipe(items, tuple(w if said == "any" else f"{said}:{w}" for w, said in kept))
    _check(policy.concepts)
    for names, weights in (
        (policy.protect, policy.weights),
        *((i.aliases, i.weights) for i in policy.concepts),
    ):
        _check_weights(names, weights)
    return policy


def _check(items: Sequence[Item]) -> None:
    if not items:
        raise UsageError("name at least one --concept, or a --recipe")
    if found := conflict(items):
        _, told, other = found
        raise UsageError(told, expected="concepts that go together", found=other)


def _check_weights(words: Sequence[str], weights: Mapping[str, float]) -> None:
    """What a recipe's file is refused for, of one that Python makes."""
    names = {given_word(word, "any", "weights")[0] for word in words}
    for name, weight in weights.items():
        if name not in names or not 0 < weight <= 1:
            raise UsageError(
                f"the weight of {name!r}: " + ("out of range" if name in names else "no such name"),
                expected="above 0, at most 1" if name in names else ", ".join(sorted(names)),
                found=weight,
            )


def _method(name: str | None, recipe: Recipe, images: Path | None, *, joint: bool) -> Method:
    """The method asked for, else the recipe's, else what images and joint work need."""
    if images is not None and len(recipe.concepts) > 1:
        raise UsageError("--images is for one concept; erase several in several runs, with --known")
    optimises = joint or images is not None
    name = name or recipe.method or (LEARNING if optimises else PLAIN)
    if name not in METHODS:
        raise UsageError(f"no method {name!r}", expected=" or ".join(METHODS), found=name)
    method = METHODS[name]
    if optimises and not method.images:
        raise UsageError("--images and --joint are for --method sepme; the closed form needs none")
    return method


def _settings(recipe: Recipe, options: EraseOptions) -> tuple[Settings, ModelOptions]:
    """What the caller says, over what the recipe says, over the defaults: field by field."""
    said, model_options = options.get("settings"), options.get("options", ModelOptions())
    if not isinstance(said, Settings):
        said = Settings.of({**recipe.hyperparameters, **(said or {})})
    return said, replace(model_options, dtype=model_options.dtype or recipe.dtype)

"""What is asked of `erase`, and whether it can be: before any network is loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

from patch_spec.text import slugify
from sepme_cli.erasure.prompts import AsKind
from sepme_cli.erasure.words import Item, given_word
from sepme_cli.errors import UsageError
from sepme_cli.recipe import Recipe

MethodName = Literal["sepme", "closed-form"]


def asked(
    concepts: Sequence[str],
    recipe: Recipe | None,
    *,
    kind: AsKind,
    to: str | None,
    protect: Sequence[str],
) -> Recipe:
    """The recipe, or one that says what the command line does. Raises UsageError for both."""
    if recipe is None:
        items = tuple(Item.parse(word, kind, to) for word in concepts)
        # A recipe has no kind for all: what is protected says what it is.
        kept = (given_word(word, kind, "--protect") for word in protect)
        recipe = Recipe(items, tuple(w if said == "any" else f"{said}:{w}" for w, said in kept))
    elif concepts or protect or to is not None or kind != "any":
        raise UsageError(
            "the recipe says what to take out and what to keep: leave --concept, --as, --to and "
            "--protect to it"
        )
    _check(recipe.concepts)
    return recipe


def _check(items: Sequence[Item]) -> None:
    slugs = [slug for item in items for slug in dict.fromkeys(map(slugify, item.names))]
    if not slugs:
        raise UsageError("name at least one --concept, or a --recipe")
    if twice := sorted({slug for slug in slugs if slugs.count(slug) > 1}):
        raise UsageError(f"named twice: {', '.join(twice)}", expected="distinct concepts")
    for item in items:
        if item.like is not None and slugify(item.like) in slugs:
            raise UsageError(
                f"{item.name!r} cannot act like {item.like!r}, which is to be erased",
                expected="something that stays",
                found=item.like,
            )


def chosen_method(
    method: MethodName | None, recipe: Recipe, images: Path | None, *, joint: bool
) -> MethodName:
    """The method asked for, else the recipe's, else what pictures and joint work need."""
    if images is not None and len(recipe.concepts) > 1:
        raise UsageError("--images shows one concept; erase several in several runs, with --known")
    method = method or cast(MethodName | None, recipe.method)
    optimises = joint or images is not None
    if optimises and method == "closed-form":
        raise UsageError("--images and --joint are for --method sepme; the closed form needs none")
    return method or ("sepme" if optimises else "closed-form")

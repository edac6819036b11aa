"""The methods of erasing there are, and what each needs; no network is known here."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Method:
    """A way to make increments.

    name: what users and patches call it. home: "module:function" that makes them, imported when it
    is used; called with the networks, the studies of concepts that are made together, settings,
    images of the concept or None, and progress, it gives a `ComputedIncrement` for each study.
    learns: whether it learns through the UNet, which takes its memory and time. draws: whether it
    only generates images with it. duration: "module:function" that tells how many seconds that
    takes, from the networks, the number of concepts and settings; "" where it takes none. images:
    whether it uses images of the concept; only such a method can make increments together. layers:
    whether it changes other layers than those that the studies are of, so that what its increments
    do to other prompts shows only when they are made, if at all.
    """

    name: str
    home: str
    learns: bool = False
    draws: bool = False
    duration: str = ""
    images: bool = False
    layers: bool = False

    @property
    def increments(self) -> Any:
        """The function that makes them."""
        return _found(self.home)

    @property
    def expected_seconds(self) -> Any:
        """The function that tells how long it takes; None where that is not worth telling."""
        return _found(self.duration) if self.duration else None


def _found(place: str) -> Any:
    module, _, function = place.partition(":")
    return getattr(import_module(module), function)


#: What is taken where nothing is said, without images and with them.
PLAIN, TEXT, PRUNING, LEARNING = "closed-form", "text-encoder", "concept-prune", "sepme"
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(PLAIN, "sepme_cli.diffusion.eraser:closed_form_increments"),
        Method(TEXT, "sepme_cli.diffusion.text_layers:text_encoder_increments", layers=True),
        Method(
            PRUNING,
            "sepme_cli.diffusion.pruning:pruned_increments",
            draws=True,
            duration="sepme_cli.diffusion.pruning:expected_seconds",
            layers=True,
        ),
        Method(
            LEARNING,
            "sepme_cli.diffusion.eraser:sepme_increments",
            learns=True,
            duration="sepme_cli.diffusion.eraser:expected_seconds",
            images=True,
        ),
    )
}

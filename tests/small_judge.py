"""A judge for small models with random weights: it goes by how bright a picture is."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Brightness:
    """Below the threshold a picture is in the style of Monet and shows a pond."""

    threshold: float

    def labels(self, kind: str) -> Sequence[str]:
        return ("Monet", "Klimt") if kind == "style" else ("pond", "tree")

    def recognise(self, pictures: Tensor, kind: str) -> Sequence[str]:
        dark = pictures.mean((1, 2, 3)) < self.threshold
        return [self.labels(kind)[int(not is_dark)] for is_dark in dark.tolist()]


def judge() -> Brightness:
    return Brightness(0.5)


class Balance:
    """By which half of a picture is darker, which about one in two pictures is on the left."""

    def labels(self, kind: str) -> Sequence[str]:
        return ("Monet", "Klimt") if kind == "style" else ("pond", "tree")

    def recognise(self, pictures: Tensor, kind: str) -> Sequence[str]:
        middle = pictures.shape[-1] // 2
        slopes = pictures[..., middle:].mean((1, 2, 3)) - pictures[..., :middle].mean((1, 2, 3))
        return [self.labels(kind)[int(slope < 0)] for slope in slopes.tolist()]


def balance() -> Balance:
    return Balance()

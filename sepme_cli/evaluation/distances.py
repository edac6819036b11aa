"""How far sets of images are apart, by the measures that papers report."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from sepme_cli.diffusion.images import load_images
from sepme_cli.errors import SystemFailure, UnsupportedError, UsageError
from sepme_cli.evaluation.plugins import is_plugin, load_plugin
from sepme_cli.evaluation.results import Reference

Features = Callable[[Tensor], Tensor]
"""Images [n, 3, H, W] in [0, 1] to what a vision model sees in them [n, d], fp64."""


@dataclass(frozen=True)
class Measures:
    """What is measured beside the judge. perceptual: LPIPS between images of both weights.
    features, folder: what a vision model sees, and the reference images."""

    perceptual: Callable[[Tensor, Tensor], float] | None = None
    features: Features | None = None
    folder: Path | None = None

    @classmethod
    def of(cls, folder: Path | None, features: str | None, device: Any, *, lpips: bool) -> Self:
        """As options name them, which are checked.

        Raises UnsupportedError for what cannot be had here.
        """
        perceptual = perceptual_distance() if lpips else None
        if features is None:
            return cls(perceptual)
        return cls(perceptual, load_features(features, device), folder)

    def compare(self, before: Tensor, after: Tensor) -> Reference | None:
        """Images of both weights [n, 3, H, W] against the references; None without any.

        Raises UsageError for fewer than two of either, of which no distance can be told.
        """
        if self.folder is None or self.features is None:
            return None
        references = load_images(self.folder, before.shape[-1])
        if min(len(before), len(references)) < 2:
            raise UsageError(
                "FID and KID need images of a retained concept, and reference images",
                expected="at least two of each",
                found=f"{len(before)} images, {len(references)} reference images",
            )
        real, old, new = (self.features(images) for images in (references, before, after))
        return Reference(
            frechet_distance(old, real),
            frechet_distance(new, real),
            kernel_distance(old, real),
            kernel_distance(new, real),
            len(before),
            len(references),
        )


def load_features(spec: str, device: Any) -> Features:
    """What `spec` names: `package.module:factory`, a Python function that returns Features; or a
    vision model of transformers, as a folder or a hub id that was downloaded.

    Raises UsageError for what returns none, UnsupportedError where a model cannot be had.
    """
    if not is_plugin(spec):
        from sepme_cli.diffusion.classifiers import vision_features

        return vision_features(spec, device)
    function = load_plugin("--features", spec)
    if not callable(function):
        raise UsageError(
            f"--features {spec} does not return features",
            expected="a function of images [n, 3, H, W] that returns [n, d]",
            found=type(function).__name__,
        )

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        found: Tensor = function(images)
        return found.double().cpu()

    return features


def check_references(
    folder: Path | None, features: str | None, training: Path | None = None
) -> None:
    """Raises UsageError for images to compare with and no features, or the other way round;
    SystemFailure for no such folder. training: of training images."""
    if (folder is None and training is None) != (features is None):
        raise UsageError(
            "--features goes together with --reference or --training-images: give both, or neither"
        )
    if folder is not None and not folder.is_dir():
        raise SystemFailure(f"{folder}: no such folder", file=folder)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """FID (Heusel et al. 2017, eq. 6) of features [n, d] and [m, d], fp64.

    |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), where the last trace is the sum of the singular
    values of X^T Y for A = X X^T and B = Y Y^T.
    """
    x, y = ((f - f.mean(0)).T / (len(f) - 1) ** 0.5 for f in (a, b))
    means = (a.mean(0) - b.mean(0)).square().sum()
    both = torch.linalg.svdvals(x.T @ y).sum()
    return max(0.0, float(means + x.square().sum() + y.square().sum() - 2 * both))


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """KID (Binkowski et al. 2018, eq. 4): the unbiased squared MMD of features [n, d] and [m, d]
    under the kernel (x . y / d + 1)^3. Unlike FID it does not depend on the number of images;
    it may be negative."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        k = kernel(x, x)
        return (k.sum() - k.diagonal().sum()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def perceptual_distance() -> Callable[[Tensor, Tensor], float]:
    """LPIPS (Zhang et al. 2018, AlexNet) between images [n, 3, H, W] in [0, 1], on average.

    Raises UnsupportedError where the package `lpips` or its weights are not there: they are never
    fetched in the middle of the work.
    """
    try:
        import lpips
    except ImportError as error:
        raise UnsupportedError(
            "--lpips needs the package lpips, which brings torchvision: pip install 'sepme[lpips]'",
            expected="the package lpips",
            found="not installed",
        ) from error
    weights = Path(torch.hub.get_dir()) / "checkpoints"
    if not list(weights.glob("alexnet-*.pth")):
        raise UnsupportedError(
            "--lpips needs AlexNet's weights: python -c \"import lpips; lpips.LPIPS(net='alex')\" "
            "fetches them",
            expected=f"{weights}/alexnet-….pth",
            found="not there",
        )
    network = lpips.LPIPS(net="alex", verbose=False).eval()

    @torch.no_grad()
    def mean(a: Tensor, b: Tensor) -> float:
        return float(network(a, b, normalize=True).mean())

    return mean

"""LPIPS with random weights, in the place of the package `lpips`.

The package brings torchvision, and its AlexNet's weights are on a server that no test asks. So this
is LPIPS by its definition (Zhang et al. 2018, eq. 1): the same network in small, called in the same
way. Where the package is installed, test_lpips runs it too, on an AlexNet of random weights.
"""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn


class LPIPS(nn.Module):
    """d(x, x0) = sum_l mean_hw |w_l * (y_l - y0_l)|^2, y_l being normalised over channels."""

    def __init__(self, net: str = "alex", verbose: bool = True) -> None:
        super().__init__()
        assert (net, verbose) == ("alex", False)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.ModuleList(
                nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU())
                for a, b in ((3, 8), (8, 12))
            )
            self.weights = nn.ParameterList(torch.rand(1, count, 1, 1) for count in (8, 12))
        self.dropout = nn.Dropout()
        self.shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
        self.scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)

    def forward(self, a: Tensor, b: Tensor, normalize: bool = False) -> Tensor:
        """Of images in [-1, 1], or [0, 1] with `normalize`: [n, 1, 1, 1]."""
        if normalize:
            a, b = 2 * a - 1, 2 * b - 1
        x, y = ((images - self.shift) / self.scale for images in (a, b))
        found = torch.zeros(len(a), 1, 1, 1)
        for layer, weight in zip(self.layers, self.weights, strict=True):
            x, y = layer(x), layer(y)
            apart = nn.functional.normalize(x) - nn.functional.normalize(y)
            found = found + self.dropout(weight * apart**2).sum(1, True).mean((2, 3), True)
        return found


def install(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """As if the package were installed, with AlexNet's weights in the folder of torch's hub."""
    module = ModuleType("lpips")
    module.LPIPS = LPIPS  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "lpips", module)
    keep_weights({}, folder, patch)


def keep_weights(weights: dict[str, Tensor], folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Write them where torchvision looks for AlexNet's before it asks its server."""
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(weights, folder / "checkpoints" / "alexnet-owt-7be5be79.pth")
    patch.setattr(torch.hub, "get_dir", lambda: str(folder))

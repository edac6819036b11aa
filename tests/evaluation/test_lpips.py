"""LPIPS, as it is asked for; see `random_lpips` for which networks there are to ask."""

from pathlib import Path

import pytest
import torch

from sepme_cli.errors import UnsupportedError
from sepme_cli.evaluation.distances import perceptual_distance
from tests.evaluation.random_lpips import LPIPS, install, keep_weights


def images(seed: int) -> torch.Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def test_it_is_the_mean_over_pairs_of_images_in_0_to_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "hub", monkeypatch)
    distance = perceptual_distance()
    a, b = images(0).requires_grad_(), images(1)
    network = LPIPS(verbose=False).eval()
    with torch.no_grad():
        pairs = [network(2 * x[None] - 1, 2 * y[None] - 1) for x, y in zip(a, b, strict=True)]
    assert distance(a, b) == pytest.approx(float(torch.cat(pairs).mean()), rel=1e-5)
    assert distance(a, b) > distance(a, 0.9 * a + 0.1 * b) > 0
    assert distance(a, a) == 0


def test_weights_that_are_not_there_are_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "hub", monkeypatch)
    for file in (tmp_path / "hub" / "checkpoints").iterdir():
        file.unlink()
    with pytest.raises(UnsupportedError, match="AlexNet's weights"):
        perceptual_distance()


def test_the_package_is_asked_as_it_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lpips = pytest.importorskip("lpips", reason="needs pip install 'sepme[lpips]'")
    from torchvision.models import alexnet

    torch.manual_seed(0)
    keep_weights(alexnet().state_dict(), tmp_path / "hub", monkeypatch)
    a, b = images(0), images(1)
    expected = lpips.LPIPS(net="alex", verbose=False)(2 * a - 1, 2 * b - 1)
    assert perceptual_distance()(a, b) == pytest.approx(float(expected.detach().mean()), rel=1e-5)
    assert perceptual_distance()(a, a) == 0 < float(expected.detach().min())

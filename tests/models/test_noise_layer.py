"""The noise layer: its law, fresh in every pass, blind to the records, and isolated under vmap."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.stats import kstest, laplace, norm
from torch import Tensor, nn

from trivet.errors import BadValue
from trivet.models.noise_layer import NoiseLayer

LAWS = {"gaussian": norm, "laplace": laplace}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("named", [False, True])
def test_the_noise_has_the_law_and_scale_of_each_channel(law: Any, named: bool) -> None:
    """Kolmogorov-Smirnov, false alarms 1e-6 each; 10 % more scale is found."""
    layer = NoiseLayer(law, torch.tensor([0.2, 3.0]).view(-1, 1, 1))
    like = torch.zeros(500, 2, 8, 8)
    noise = layer.draw(like, torch.Generator().manual_seed(1)) if named else layer(like)
    for channel, scale in enumerate([0.2, 3.0]):
        drawn = noise[:, channel].flatten().double().numpy()
        assert kstest(drawn, LAWS[law].cdf, args=(0, scale)).pvalue > 1e-6
        assert kstest(drawn * 1.1, LAWS[law].cdf, args=(0, scale)).pvalue < 1e-6
        other = "laplace" if law == "gaussian" else "gaussian"
        assert kstest(drawn, LAWS[other].cdf, args=(0, scale)).pvalue < 1e-6


@pytest.mark.parametrize("law", LAWS)
def test_records_coordinates_and_passes_have_noise_of_their_own(law: Any) -> None:
    layer = NoiseLayer(law, 1.0)
    zeros = torch.zeros(2_000, 3, 2, 2)
    for mode in (True, False):
        layer.train(mode)
        first, second = layer(zeros), layer(zeros)
        rows = torch.cat([first.flatten(1), second.flatten(1)], 1).double()
        # 24 columns of 2,000 draws: a correlation of 0.15 is beyond six deviations.
        assert float((torch.corrcoef(rows.T) - torch.eye(24)).abs().max()) < 0.15
        assert len(first.flatten(1).unique(dim=0)) == 2_000


@pytest.mark.parametrize("law", LAWS)
def test_the_noise_does_not_look_at_the_records(law: Any) -> None:
    layer = NoiseLayer(law, 0.5)
    drawn = []
    for x in (torch.zeros(3, 4), torch.randn(3, 4)):
        torch.manual_seed(5)
        drawn.append(layer(x) - x)
    torch.testing.assert_close(*drawn)


@pytest.mark.parametrize("law", LAWS)
def test_under_vmap_every_record_draws_and_differentiates_alone(law: Any) -> None:
    layer = NoiseLayer(law, 0.5)

    def loss(x: Tensor) -> Tensor:
        return layer(x[None]).square().sum()

    gradient = torch.func.vmap(torch.func.grad(loss), randomness="different")(torch.zeros(6, 5))
    assert len(gradient.unique(dim=0)) == 6  # 2 * noise
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("scales", [0.0, -1.0, math.nan, math.inf])
def test_scales_that_are_no_noise_are_refused(scales: float) -> None:
    with pytest.raises(BadValue, match="must be positive and finite"):
        NoiseLayer("gaussian", scales)


def test_scales_that_are_not_for_channels_and_unknown_laws_are_refused() -> None:
    with pytest.raises(BadValue, match="one for each channel"):
        NoiseLayer("gaussian", torch.ones(4))
    with pytest.raises(BadValue, match="law='uniform'"):
        NoiseLayer("uniform", 1.0)  # type: ignore[arg-type]


def test_the_scales_are_saved_with_the_weights_and_not_trained() -> None:
    layer = NoiseLayer("laplace", 0.25)
    assert not list(layer.parameters())
    other = NoiseLayer("laplace", 1.0)
    other.load_state_dict(layer.state_dict())
    assert float(other.scales) == 0.25
    assert "laplace, scales=[0.25]" in repr(nn.Sequential(other))

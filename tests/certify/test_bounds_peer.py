"""The same numbers as auto_LiRPA (0.7.1) computes, where it can be imported; it is no dependency of ours."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from bound_oracles import ball, images, mlp
from torch import Tensor, nn

from trivet.certify.bounds.network import Network, margin_rows
from trivet.methods import build
from trivet.randomness import generator

THEIRS = {"ibp": "IBP", "crown-ibp": "CROWN-IBP", "crown": "CROWN", "alpha-crown": "CROWN-Optimized"}
OPTIONS = {"adaptive": "adaptive", "same": "same-slope", "zero": "zero-lb", "one": "one-lb"}


@pytest.fixture(scope="module")
def peer() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("auto_LiRPA", reason="auto_LiRPA cannot be imported: put its source on PYTHONPATH.")


def strided() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: mlp(10, 20, 20, 3, seed=1), (10,)),
    "convolutions": (strided, (1, 8, 8)),
    "residual network": (
        lambda: build("models", {"name": "resnet", "depth": 8}, input_shape=(1, 4, 4), num_classes=3),
        (1, 4, 4),
    ),
}


def theirs(peer: ModuleType, model: nn.Module, x: Tensor, eps: float, rows: Tensor, method: str, slope: str) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {
            "activation_bound_option": OPTIONS[slope],
            "conv_mode": "matrix",
            "optimize_bound_args": {"iteration": 20, "lr_alpha": 0.1},
        }
        bounded = peer.BoundedModule(model, x, bound_opts=options, verbose=0)
        low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
        shape = peer.PerturbationLpNorm(norm=float("inf"), eps=eps, x_L=low, x_U=high)
        found, _ = bounded.compute_bounds(
            x=(peer.BoundedTensor(x, shape),), C=rows, method=THEIRS[method], bound_upper=False
        )
    return found.detach()


def prepared(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    make, shape = NETWORKS[name]
    model, draw = make(), generator(0, "weights")
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * (1.5 / max(tensor[0].numel(), 6)) ** 0.5)
    x = images(3, *shape)
    return model.eval(), x, margin_rows(torch.arange(3), 3)


@pytest.mark.parametrize("slope", OPTIONS)
@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
@pytest.mark.parametrize("name", NETWORKS)
def test_bounds_agree_or_are_tighter(peer: ModuleType, name: str, method: str, slope: str) -> None:
    model, x, rows = prepared(name)
    network, domain = Network.of(model, x.shape[1:]), ball(x, 0.03)
    other = theirs(peer, model, x, 0.03, rows, method, slope)
    found = network.margins(domain, rows, method=method, slope=slope).detach()  # type: ignore[arg-type]
    scale = float(other.abs().max())
    if method == "crown":  # intersected with intervals: never below
        assert bool((found >= other - 1e-5 * scale).all())
    else:
        torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-5 * scale)


def test_chosen_slopes_give_bounds_at_least_as_tight(peer: ModuleType) -> None:
    """auto_LiRPA optimises inner slopes jointly; ours for each neuron: compared with the same number of steps."""
    for name in ("mlp", "convolutions"):
        model, x, rows = prepared(name)
        network, domain = Network.of(model, x.shape[1:]), ball(x, 0.03)
        other = theirs(peer, model, x, 0.03, rows, "alpha-crown", "adaptive")
        known = network.intervals(domain, method="alpha-crown")
        found = network.margins(domain, rows, method="alpha-crown", intervals=known).detach()
        assert float((found - other).mean()) >= -1e-4 * float(other.abs().max())

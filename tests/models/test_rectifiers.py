"""Cheaper ReLUs change neither values nor gradients, and are used only where nobody looks back."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from trivet.models.rectifiers import cheapen_rectifiers


class Residual(nn.Module):
    """A ReLU whose input is read twice, one after a sum, and one module called at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.relu = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        return self.relu(self.second(self.relu(a)) + a).flatten(1)


class Functional(nn.Module):
    """The same pieces as functions, and a ReLU on the input, which must not be overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.conv(F.relu(x))), 2, padding=1).flatten(1)


class Indices(nn.Module):
    """A pooling that tells where: its ReLU stays before it."""

    def forward(self, x: Tensor) -> Tensor:
        values, where = F.max_pool2d(F.relu(x), 2, return_indices=True)
        return (values + where).flatten(1)


MODELS = {
    "pooled": nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5), nn.ReLU()),
    "overlapping": nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Flatten()),
    "residual": Residual(),
    "functional": Functional(),
    "indices": Indices(),
}


def cheapened(model: nn.Module) -> fx.GraphModule:
    graph = fx.symbolic_trace(copy.deepcopy(model))
    cheapen_rectifiers(graph)
    graph.graph.lint()
    graph.recompile()
    return graph


@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_the_same(name: str) -> None:
    model, cheap = MODELS[name].double(), cheapened(MODELS[name].double())
    x = torch.randn(5, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    kept = x.detach().clone()
    upstream = torch.randn_like(model(x))
    (expected,) = torch.autograd.grad(model(x), x, upstream)
    (found,) = torch.autograd.grad(cheap(x), x, upstream)
    assert torch.equal(cheap(x), model(x))
    torch.testing.assert_close(found, expected)
    assert torch.equal(x, kept)


def test_the_relu_comes_after_the_pooling_and_overwrites() -> None:
    code = cheapened(MODELS["pooled"]).code
    assert code.index('"2"') < code.index("relu")
    assert code.count("inplace = True") == 2


def test_what_is_read_again_is_not_overwritten() -> None:
    assert cheapened(MODELS["residual"]).code.count("inplace = True") == 1
    assert cheapened(MODELS["functional"]).code.count("inplace = True") == 1
    assert "inplace = True" not in cheapened(MODELS["indices"]).code

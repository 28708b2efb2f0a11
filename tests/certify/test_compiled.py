"""The compiled forward pass: used when it works, reported when it does not, never about old weights."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trivet.certify import compiled as compiled_module
from trivet.certify.compiled import compiled
from trivet.certify.smoothing import Smoothing
from trivet.models.surrogate import surrogate
from trivet.randomness import generator

X = torch.rand(2, 1, 4, 4, generator=generator(0, "test images"))


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """torch.compile replaced by the identity, and what it was asked to compile."""
    asked: list[nn.Module] = []

    def compile_nothing(net: nn.Module, **_: Any) -> nn.Module:
        asked.append(net)
        return net

    monkeypatch.setattr(compiled_module.torch, "compile", compile_nothing)
    return asked


@pytest.mark.slow
def test_the_compiler_counts_as_eager_execution_does() -> None:
    net = small_net()
    smoothing = Smoothing(0.3, n=950, batch_size=100)
    eager = smoothing.certify(net, X, seed=0)
    fast = replace(smoothing, compile=True).certify(net, X, seed=0)
    assert int((eager.evidence["count"] - fast.evidence["count"]).abs().max()) <= 1  # a tie may round differently
    assert fast.conditions[2].endswith(", compiled")
    with torch.no_grad():
        net[4].weight.zero_()
        net[4].bias.copy_(torch.tensor([0.0, 0.0, 1.0]))
    assert replace(smoothing, compile=True).certify(net, X, seed=0).labels.tolist() == [2, 2]


def test_a_compiler_that_fails_is_reported_and_eager_execution_gives_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise AssertionError("wrong stride")

    monkeypatch.setattr(compiled_module.torch, "compile", broken)
    net = small_net()
    eager = Smoothing(0.3, n=950).certify(net, X, seed=0)
    fallen = Smoothing(0.3, n=950, compile=True).certify(net, X, seed=0)
    assert torch.equal(eager.evidence["count"], fallen.evidence["count"])
    assert "eager, because torch.compile failed with AssertionError" in fallen.conditions[2]


@pytest.mark.parametrize("batch_size", [32, 250, 400])
def test_a_compiled_model_sees_one_shape_and_idle_rows_have_no_vote(
    monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    shapes: list[torch.Size] = []

    def watch(net: nn.Module, **_: Any) -> Any:
        def run(x: Tensor) -> Tensor:
            shapes.append(x.shape)
            return net(x)

        return run

    monkeypatch.setattr(compiled_module.torch, "compile", watch)
    net = small_net()
    certificates = Smoothing(0.3, n=770, batch_size=batch_size, compile=True).certify(net, X, seed=0)
    eager = Smoothing(0.3, n=770).certify(net, X, seed=0)
    assert set(shapes) == {torch.Size([batch_size, 1, 4, 4])}
    assert torch.equal(certificates.evidence["count"], eager.evidence["count"])


def test_new_weights_are_followed_without_compiling_again(compilations: list[nn.Module]) -> None:
    net = small_net()
    example = torch.rand(8, 1, 4, 4)
    run, _ = compiled(surrogate(net, "fp32"), example)
    before = run(example)
    with torch.no_grad():
        net[4].bias.add_(1.0)
        net[1].running_mean.add_(0.5)
    again, _ = compiled(surrogate(net, "fp32"), example)
    assert torch.allclose(again(example), net(example), atol=1e-6)
    assert not torch.allclose(again(example), before, atol=0.5)
    assert len(compilations) == 1


def test_compiled_code_does_not_outlive_its_model(compilations: list[nn.Module]) -> None:
    net = small_net()
    compiled(surrogate(net, "fp32"), torch.rand(8, 1, 4, 4))
    before = len(compiled_module._COMPILED)
    del net
    gc.collect()
    assert len(compiled_module._COMPILED) == before - 1

"""The stand-in asked for gradients: equal to the model up to rounding, up to date, and without a hold on it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from trivet.models.surrogate import Surrogate, surrogate
from trivet.threats.attack import input_gradient
from trivet.threats.losses import cross_entropy


def _net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(128, 4),
    )
    net.train()(torch.rand(64, 3, 8, 8))  # running statistics away from their start
    return net.eval()


def test_logits_and_gradients_equal_the_models_up_to_rounding() -> None:
    net, x, y = _net(), torch.rand(16, 3, 8, 8), torch.arange(16) % 4
    stand_in = surrogate(net, "fp32")
    torch.testing.assert_close(stand_in(x), net(x), atol=1e-5, rtol=1e-5)
    ours, theirs = (input_gradient(model, x, lambda z: cross_entropy(z, y))[0] for model in (stand_in, net))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_batch_norm_after_a_convolution_is_folded_and_the_other_is_kept() -> None:
    net = Surrogate(_net(), "fp32").net
    assert isinstance(net, fx.GraphModule)
    called = [net.get_submodule(str(node.target)) for node in net.graph.nodes if node.op == "call_module"]
    assert sum(isinstance(module, nn.BatchNorm2d) for module in called) == 1
    assert sum(isinstance(module, nn.BatchNorm2d) for module in _net().modules()) == 3


def test_new_weights_are_taken_over_at_the_next_request() -> None:
    net, x = _net(), torch.rand(4, 3, 8, 8)
    before = surrogate(net, "fp32")(x)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        net[1].running_mean.add_(0.1)
    after = surrogate(net, "fp32")
    torch.testing.assert_close(after(x), net(x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, after(x), atol=1e-3)


def test_bf16_answers_in_fp32_and_points_the_same_way() -> None:
    net, x, y = _net(), torch.rand(32, 3, 8, 8), torch.arange(32) % 4
    stand_in = surrogate(net, "bf16")
    assert stand_in(x).dtype == torch.float32
    low, full = (input_gradient(model, x, lambda z: cross_entropy(z, y))[0].flatten(1) for model in (stand_in, net))
    assert float(torch.cosine_similarity(low, full, dim=1).mean()) > 0.98
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())


class Branching(nn.Module):
    """Cannot be traced: the path depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if float(x.sum()) > 0 else -self.layer(x)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_model_that_cannot_be_traced_is_used_as_it_is(sign: int) -> None:
    net, x = Branching().eval(), sign * torch.rand(5, 4)
    torch.testing.assert_close(surrogate(net, "fp32")(x), net(x))
    with torch.no_grad():
        net.layer.weight.mul_(2)
    torch.testing.assert_close(surrogate(net, "fp32")(x), net(x))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_parametrized_weights_are_seen_at_their_present_value() -> None:
    net, x = _net(), torch.rand(4, 3, 8, 8)
    plain = net(x)
    parametrize.register_parametrization(net[0], "weight", Doubled())
    parametrize.register_parametrization(net[8], "weight", Doubled())
    torch.testing.assert_close(surrogate(net, "fp32")(x), net(x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(net(x), plain, atol=1e-2)
    assert parametrize.is_parametrized(net[0])


def test_the_stand_in_asks_for_no_weight_gradients_and_leaves_the_model_its_own() -> None:
    net = _net()
    stand_in = surrogate(net, "fp32")
    assert not any(parameter.requires_grad for parameter in stand_in.parameters())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_a_forgotten_model_is_freed() -> None:
    net = _net()
    surrogate(net, "fp32")
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None

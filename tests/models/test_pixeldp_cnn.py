"""The networks with noise: the scale of the paper, sensitivity one, and gradients of one record at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivet.errors import BadValue
from trivet.methods import build
from trivet.models.heterogeneous_noise import heterogeneous_noise_cnn, redistribution_of
from trivet.models.noise_layer import NoiseLayer, NoisyNetwork
from trivet.models.pixeldp import pixeldp_cnn
from trivet.models.sensitivity import sensitivity
from trivet.statistics import gaussian_delta

SHAPE = (1, 8, 8)


def moves(model: NoisyNetwork, attack: Any) -> float:
    return sensitivity(model.before, attack, "L1" if model.noise.law == "laplace" else "L2", model.noise.scales)


def test_the_noise_hides_the_construction_attack_as_the_paper_says() -> None:
    gaussian = pixeldp_cnn(SHAPE, 10, attack_size=0.2, epsilon=0.5, delta=0.01, hidden=8, mean=[0.3], std=[0.4])
    assert float(gaussian.noise.scales) == pytest.approx(0.2 * math.sqrt(2 * math.log(125)) / 0.5)
    assert gaussian_delta(0.5, 0.2 * moves(gaussian, "L2")) <= 0.01
    laplace = pixeldp_cnn(SHAPE, 10, noise="laplace", attack_norm="L1", attack_size=0.2, epsilon=0.5, hidden=8)
    assert float(laplace.noise.scales) == pytest.approx(0.4)
    assert 0.2 * moves(laplace, "L1") == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("calibration", ["heterogeneous", "analytic"])
@pytest.mark.parametrize("attack", ["L1", "L2"])
def test_heterogeneous_noise_hides_it_too_whatever_the_redistribution(calibration: Any, attack: Any) -> None:
    for r in (None, [0.01 + k for k in range(32)]):
        model = heterogeneous_noise_cnn(
            SHAPE, 10, attack, 0.3, epsilon=2.0, delta=1e-3, redistribution=r, calibration=calibration, hidden=8
        )
        true = gaussian_delta(2.0, 0.3 * moves(model, attack))
        assert true <= 1e-3 * (1 + 1e-4)  # the scales are float32
        if calibration == "analytic":
            assert true == pytest.approx(1e-3, rel=1e-2)
        expected = torch.tensor(r) / torch.tensor(r).mean() if r else torch.ones(32)
        torch.testing.assert_close((model.noise.scales / model.noise.scales.mean()).flatten(), expected)


def test_the_released_sensitivity_is_too_small_even_for_uniform_noise() -> None:
    """D = ||W||_2 / sqrt(||r||_2) with r = 1 on 32 units: 2.4 times below ||W||_2, which the identity attains."""
    weight, r = torch.eye(32), torch.ones(32)
    released = float(torch.linalg.matrix_norm(weight, 2) / r.norm().sqrt())
    true = sensitivity(nn.Sequential(_linear(weight)), "L2", "L2", r)
    assert true / released == pytest.approx(32**0.25)
    r = torch.cat([torch.full((16,), 1e-6), torch.full((16,), 2.0)])  # half of the units nearly without noise
    assert sensitivity(nn.Sequential(_linear(weight)), "L2", "L2", r) > 9e5
    assert float(torch.linalg.matrix_norm(weight, 2) / r.norm().sqrt()) < 1


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(*weight.shape)
    layer.weight.data.copy_(weight)
    return layer


@pytest.mark.parametrize("name", ["pixeldp_cnn", "heterogeneous_noise_cnn"])
def test_they_have_the_published_layers_and_draw_in_eval_mode(name: str) -> None:
    model = build("models", name, input_shape=(1, 28, 28), num_classes=10)
    # 5x5x32, 5x5x64, 7*7*64 -> 1024 -> 10, with biases.
    count = 25 * 32 + 32 + 32 * 25 * 64 + 64 + 3136 * 1024 + 1024 + 10_240 + 10
    assert sum(p.numel() for p in model.parameters()) == count
    x = torch.rand(2, 1, 28, 28)
    for mode in (True, False):
        model.train(mode)
        assert not torch.equal(model(x), model(x))


def test_saved_weights_give_the_same_network() -> None:
    first = pixeldp_cnn(SHAPE, 10, hidden=8, generator=torch.Generator().manual_seed(1))
    second = pixeldp_cnn(SHAPE, 10, hidden=8, attack_size=0.5, generator=torch.Generator().manual_seed(2))
    second.load_state_dict(first.state_dict())
    x = torch.rand(3, *SHAPE)
    for model in (first, second):
        model.eval()
    torch.testing.assert_close(second.before(x), first.before(x))
    assert torch.equal(second.noise.scales, first.noise.scales)


def _noise_of_the_record(model: NoisyNetwork) -> Callable[..., Tensor]:
    """Noise that follows from what it is added to, so that a record keeps its noise in every batch."""

    def draw(like: Tensor, generator: object = None) -> Tensor:
        return model.noise.scales * (1e4 * like.detach()).sin()

    return draw


@pytest.mark.parametrize(
    "model",
    [
        pixeldp_cnn(SHAPE, 4, hidden=8, mean=[0.5], std=[0.3]),
        pixeldp_cnn(SHAPE, 4, "laplace", "L1", hidden=8),
        heterogeneous_noise_cnn(SHAPE, 4, redistribution=[1.0 + k for k in range(32)], hidden=8),
    ],
    ids=["gaussian", "laplace", "heterogeneous"],
)
def test_the_gradient_of_a_record_does_not_depend_on_its_neighbours(
    model: NoisyNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model.double()
    monkeypatch.setattr(model.noise, "draw", _noise_of_the_record(model))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    x, labels = torch.rand(3, *SHAPE, dtype=torch.float64), torch.tensor([0, 1, 3])

    def loss(weights: dict[str, Tensor], x: Tensor, labels: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, weights, (x,))
        return F.cross_entropy(logits, labels, reduction="none")

    def one(weights: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        return loss(weights, x[None], label[None]).sum()

    together = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0), randomness="different")(weights, x, labels)
    for pair in ([0, 1], [0, 2], [0]):
        inside = torch.func.jacrev(loss)(weights, x[pair], labels[pair])
        for name in weights:
            torch.testing.assert_close(inside[name][0], together[name][0], rtol=1e-6, atol=1e-9)
    assert bool(together["before.conv1.parametrizations.weight.original"].flatten(1).norm(dim=1).gt(0).all())


def test_a_redistribution_is_the_mean_sign_of_the_gradient_with_a_floor() -> None:
    """A head that is linear in h: the gradient of class 0's loss has the sign of the difference of the two rows."""
    before = nn.Sequential(nn.Conv2d(1, 4, 1))
    head = nn.Linear(16, 2)
    model = NoisyNetwork(before, NoiseLayer("gaussian", 0.1), nn.Sequential(nn.Flatten(), head))
    with torch.no_grad():
        head.weight.zero_()
        #  channel 0: all four positions agree; 1: three to one; 2 and 3: two to two
        head.weight[1] = torch.tensor([1, 1, 1, 1, 1, 1, 1, -1, 1, 1, -1, -1, 1, -1, 1, -1.0])
    r = torch.tensor(redistribution_of(model, torch.rand(5, 1, 2, 2), torch.zeros(5, dtype=torch.int64)))
    expected = torch.tensor([1.0, 0.5, 0, 0]) / 0.375
    expected = expected.clamp_min(0.1)
    torch.testing.assert_close(r, expected / expected.mean())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"name": "pixeldp_cnn", "noise": "laplace"}, "noise='laplace' protects from L1 attacks only"),
        ({"name": "pixeldp_cnn", "epsilon": 1.5}, r"epsilon=1.5 must lie in \(0, 1\]"),
        ({"name": "pixeldp_cnn", "delta": 0.4}, "delta=0.4"),
        ({"name": "pixeldp_cnn", "attack_size": 0.0}, "attack_size=0.0"),
        ({"name": "pixeldp_cnn", "hidden": 0}, "hidden=0"),
        ({"name": "heterogeneous_noise_cnn", "attack_size": -1.0}, "attack_size=-1.0"),
        ({"name": "heterogeneous_noise_cnn", "epsilon": 0.0}, "epsilon=0.0"),
        ({"name": "heterogeneous_noise_cnn", "redistribution": [1.0, 2.0]}, "must be 32 positive numbers"),
        ({"name": "heterogeneous_noise_cnn", "redistribution": [0.0] * 32}, "without noise a channel protects nothing"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BadValue, match=complaint):
        build("models", settings, input_shape=SHAPE, num_classes=10)

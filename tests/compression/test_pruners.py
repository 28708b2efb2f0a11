"""Scores against closed forms, and the ways to spread a density over layers against brute force and PyTorch's own."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from trivet.compression.grasp import Grasp
from trivet.compression.magnitude import Magnitude
from trivet.compression.n_m import NM
from trivet.compression.random_pruner import Random
from trivet.compression.scope import chosen, erk
from trivet.compression.snip import Snip
from trivet.compression.structured import Structured
from trivet.compression.synflow import SynFlow
from trivet.compression.unstructured import Unstructured
from trivet.errors import BadValue
from trivet.models.resnet import resnet
from trivet.randomness import generator

DRAW = generator(0, "test")


def linear(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 1, bias=False, dtype=torch.float64))


def squares(x: torch.Tensor, y: torch.Tensor) -> Any:
    return lambda model: (model(x)[:, 0] - y).square().mean() / 2


def test_snip_of_a_linear_model_is_input_times_residual_times_weight() -> None:
    model, x, y = linear(), torch.randn(6, 5, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    weight = model[0].weight.detach()[0].clone()
    expected = (weight * ((x @ weight - y)[:, None] * x).mean(0)).abs()
    found = Snip().score(model, ["0"], (5,), [squares(x[:3], y[:3]), squares(x[3:], y[3:])], DRAW)
    torch.testing.assert_close(found["0"][0], expected)


class Fixed(nn.Module):
    """A layer that is no linear layer to the pruner, so that it is not drawn anew."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


def test_grasp_of_a_quadratic_loss_is_the_weight_times_the_hessian_times_the_gradient() -> None:
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    weight, temperature = torch.randn(1, 5, dtype=torch.float64), 4.0
    hessian = x.T @ x / 8 / temperature**2
    gradient = hessian @ weight[0] - x.T @ y / 8 / temperature
    losses = [squares(x[:4], y[:4]), squares(x[4:], y[4:])]
    found = Grasp(temperature).score(nn.Sequential(Fixed(weight.clone())), ["0"], (5,), losses, DRAW)
    torch.testing.assert_close(found["0"][0], weight[0] * (hessian @ gradient))


def test_grasp_keeps_what_raises_the_flow_of_gradients() -> None:
    """To first order its score is half of what the squared norm of the gradient loses when the weight shrinks."""
    x, y = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    weight = torch.randn(1, 5, dtype=torch.float64)
    (score,) = Grasp(1.0).score(nn.Sequential(Fixed(weight.clone())), ["0"], (5,), [squares(x, y)], DRAW).values()

    def flow(w: torch.Tensor) -> float:
        return float((x.T @ (x @ w[0] - y) / 20).square().sum())

    for index in range(5):
        less = weight.clone()
        less[0, index] *= 1 - 1e-6
        assert (flow(weight) - flow(less)) / 1e-6 == pytest.approx(2 * float(score[0, index]), rel=1e-3, abs=1e-6)


def test_grasp_draws_linear_layers_anew_and_is_the_same_for_the_same_draw() -> None:
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    a, b, c = (
        Grasp().score(linear(seed), ["0"], (5,), [squares(x, y)], generator(draw, "grasp"))["0"]
        for seed, draw in ((0, 0), (1, 0), (0, 1))
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def chain(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 7),
        nn.ReLU(),
        nn.Linear(7, 3),
    )


def test_synflow_scores_of_every_layer_sum_to_the_flow_whatever_biases_and_norms() -> None:
    model = chain().train()
    with torch.no_grad():
        model[1].running_mean.fill_(5.0)
    found = SynFlow().score(model, ["0", "5", "7"], (2, 4, 4), (), DRAW)
    sums = [float(each.sum()) for each in found.values()]
    assert sums[0] > 0
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-12)
    assert all(bool((each >= 0).all()) for each in found.values())


def test_synflow_scores_a_path_by_the_product_of_its_weights() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 0.5]]))
        model[2].weight.copy_(torch.tensor([[-4.0, 0.25]]))
    found = SynFlow().score(model, ["0", "2"], (2,), (), DRAW)
    assert found["0"].tolist() == [[4.0, 8.0], [0.75, 0.125]]
    assert found["2"].tolist() == [[12.0, 0.875]]


def test_synflow_goes_through_residual_networks() -> None:
    found = SynFlow().score(resnet((3, 8, 8), 4, depth=8), ["conv"], (3, 8, 8), (), DRAW)
    assert bool((found["conv"] > 0).all())


def test_magnitude_is_the_size_of_weights_and_random_is_its_draw() -> None:
    model = chain()
    sizes = Magnitude().score(model, ["5"], (2, 4, 4), (), DRAW)["5"]
    assert torch.equal(sizes, model[5].weight.abs())
    a, b, c = (Random().score(model, ["0", "5"], (2, 4, 4), (), generator(n, "random")) for n in (0, 0, 1))
    assert torch.equal(a["5"], b["5"])
    assert not torch.equal(a["5"], c["5"])
    assert not torch.equal(a["5"].flatten()[:72], a["0"].flatten())


def layered(*shapes: tuple[int, ...], seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {str(number): torch.randn(shape, generator=draw) for number, shape in enumerate(shapes)}


@pytest.mark.parametrize("density", [0.03, 0.25, 0.6])
def test_the_global_scope_is_that_of_pytorch(density: float) -> None:
    model = chain()
    parts = [(model[number], "weight") for number in (0, 5, 7)]
    scores = {str(number): model[number].weight.detach().abs() for number in (0, 5, 7)}
    ours = chosen(scores, Unstructured(), density, "global")
    amount = int((1 - density) * sum(each.numel() for each in scores.values()) + 1e-9)
    prune.global_unstructured(parts, pruning_method=prune.L1Unstructured, amount=amount)
    for number in (0, 5, 7):
        assert torch.equal(ours[str(number)], model[number].weight_mask.bool())


def test_units_of_different_layers_compete_by_their_mean_and_count_by_their_size() -> None:
    """Three filters of 4 weights, two of 6, half of 24 weights to keep: brute force over what can be dropped."""
    scores = layered((3, 4), (2, 6))
    pattern = Structured("filter")
    masks = chosen(scores, pattern, 0.5, "global")
    units = [
        (name, row, float(each[row].mean()), each[row].numel())
        for name, each in scores.items()
        for row in range(len(each))
    ]
    units.sort(key=lambda unit: unit[2])
    dropped, size = set(), 0
    for name, row, _, count in units:
        if size + count > 12:
            break
        dropped, size = dropped | {(name, row)}, size + count
    for name, each in scores.items():
        for row in range(len(each)):
            assert bool(masks[name][row].all()) == bool(masks[name][row].any()) == ((name, row) not in dropped)


def test_equal_scores_are_dropped_from_the_front_in_the_exact_number() -> None:
    masks = chosen({"a": torch.ones(5), "b": torch.ones(5)}, Unstructured(), 0.3, "global")
    assert [masks["a"].tolist(), masks["b"].tolist()] == [[False] * 5, [False, False, True, True, True]]


def test_layerwise_keeps_the_share_of_each_layer() -> None:
    masks = chosen(layered((10, 10), (3, 5)), Unstructured(), 0.2, "layerwise")
    assert [int(each.sum()) for each in masks.values()] == [20, 3]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=4), min_size=1, max_size=5),
    st.floats(0.01, 1.0),
)
def test_erk_meets_the_density_with_shares_by_shape_up_to_one(sizes: list[list[int]], density: float) -> None:
    shapes = {str(number): torch.Size(each) for number, each in enumerate(sizes)}
    shares = erk(shapes, density)
    weights = {name: shape.numel() for name, shape in shapes.items()}
    assert sum(shares[name] * weights[name] for name in shapes) == pytest.approx(density * sum(weights.values()))
    assert all(0 < each <= 1 + 1e-12 for each in shares.values())
    scales = {name: shares[name] * weights[name] / sum(shapes[name]) for name in shapes}
    free = [scales[name] for name in shapes if shares[name] < 1]
    for a, b in itertools.pairwise(free):
        assert a == pytest.approx(b)
    # Layers at one would have a larger share if they could.
    assert all(scales[name] <= max(free) * (1 + 1e-9) for name in shapes if free)


def test_scopes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BadValue, match="scope='global' compares units of different layers, and NM has none"):
        chosen(layered((4, 4)), NM(4), 0.5, "global")
    with pytest.raises(BadValue, match=r"density=0 must lie in \(0, 1\]"):
        chosen(layered((4, 4)), Unstructured(), 0, "layerwise")
    with pytest.raises(BadValue, match="rounds=0 must be at least 1"):
        SynFlow(0)
    with pytest.raises(BadValue, match="temperature=0 must be positive"):
        Grasp(0)

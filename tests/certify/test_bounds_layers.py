"""Every kind of layer: what it computes, what it bounds, and which models are refused."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from bound_oracles import ball, images, least_found, margins_of, mlp, points_in, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trivet.certify.bounds.activations import Sigmoidal
from trivet.certify.bounds.affine import Convolution
from trivet.certify.bounds.interval import Interval
from trivet.certify.bounds.network import Network
from trivet.certify.bounds.pooling import MaxPool
from trivet.certify.bounds.propagation import Propagation
from trivet.errors import BadValue
from trivet.models.batch_statistics import held_at
from trivet.models.foreign.assembly import Assembly
from trivet.models.normalize import Normalize
from trivet.models.resnet import BasicBlock
from trivet.randomness import generator

METHODS = ("ibp", "crown-ibp", "crown", "alpha-crown")
TINY = 1e-9


class Layers(nn.Module):
    """A model from a function of itself and a batch; the modules are its attributes."""

    def __init__(self, function: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)
        self.register_buffer("shift", torch.linspace(-0.3, 0.3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def settled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of a generator; BatchNorm with statistics that are not 0 and 1."""
    draw = generator(seed, "weights")
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * (2 / max(tensor[0].numel(), 8)) ** 0.5)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.copy_(0.3 * torch.randn(module.num_features, generator=draw))
                module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=draw))
    return model.double().eval()


def mixed(m: Layers, x: Tensor) -> Tensor:
    """Most of what functions and methods there are, on vectors of six."""
    y = (x - m.shift) / 2 + 0.1 * torch.flatten(x.view(x.size(0), 2, 3), 1) * m.shift
    y = F.relu(m.one(y)).unsqueeze(2).permute(0, 2, 1).reshape(x.shape[0], -1)
    z = torch.cat([y[:, :3], 1 - y[:, 3:]], dim=1)
    z = torch.sigmoid(m.two(z)) - torch.tanh(y) + F.leaky_relu(m.two(y), 0.2)
    z = F.pad(z, (1, 1), value=0.5)
    return -m.three(z.view(z.size(0), 2, 4).mean(2)) + F.linear(z, m.four.weight, m.four.bias).clamp(min=-1, max=1)


VECTORS: dict[str, Callable[[], nn.Module]] = {
    "functions and methods": lambda: Layers(
        mixed, one=nn.Linear(6, 6), two=nn.Linear(6, 6), three=nn.Linear(2, 3), four=nn.Linear(8, 3)
    ),
    "sigmoid": lambda: nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 3)),
    "tanh": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)),
    "leaky relu": lambda: nn.Sequential(
        nn.Linear(6, 8), nn.LeakyReLU(0.1), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    ),
    "elu and hardtanh": lambda: nn.Sequential(
        nn.Linear(6, 8), nn.ELU(), nn.Linear(8, 8), nn.Hardtanh(), nn.Linear(8, 6), nn.Softplus(), nn.Linear(6, 3)
    ),
    "batch norm": lambda: nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)
    ),
    "matmul": lambda: Layers(
        lambda m, x: m.two(torch.relu((x.view(x.shape[0], 2, 3) @ m.one.weight.T).flatten(1))),
        one=nn.Linear(3, 4, bias=False),
        two=nn.Linear(8, 3),
    ),
    "a residual sum of three": lambda: Layers(
        lambda m, x: m.two(F.relu(x + m.one(F.relu(m.one(x))) - x * 0.5)), one=nn.Linear(6, 6), two=nn.Linear(6, 3)
    ),
}
IMAGES: dict[str, Callable[[], nn.Module]] = {
    "residual blocks": lambda: nn.Sequential(
        Normalize([0.4] * 2, [0.2, 0.3]),
        nn.Conv2d(2, 3, 3, stride=2),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        BasicBlock(3, 3, 1, "batch"),
        BasicBlock(3, 4, 2, "batch"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ),
    "max-pooling": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(3, 4, 2),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4, 3),
    ),
    "convolutions of every kind": lambda: nn.Sequential(
        Normalize([0.5, 0.4], [0.2, 0.3]),
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(4, 4, 2, padding="same", dilation=2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"),
        nn.ReLU(),
        nn.AvgPool2d(2, padding=1),
        nn.ZeroPad2d(1),
        nn.AdaptiveAvgPool2d((2, 2)),
        nn.Flatten(1, 2),
        nn.Unflatten(1, (3, 2)),
        nn.Flatten(),
        nn.Linear(12, 3),
    ),
}


@pytest.mark.parametrize("name", [*VECTORS, *IMAGES])
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_no_input_found_in_the_ball_is_below_any_bound(name: str, norm: str) -> None:
    model = settled((VECTORS | IMAGES)[name]())
    x = images(2, *((6,) if name in VECTORS else (2, 8, 8)), dtype=torch.float64)
    eps = {"Linf": 0.05, "L2": 0.2, "L1": 0.5}[norm]
    rows = rows_of(model, x).double()
    worst = least_found(model, x, eps, norm, rows, count=60)
    clean = (rows @ model(x)[:, :, None]).squeeze(2).detach()
    network = Network.of(model, x.shape[1:])
    torch.testing.assert_close(network(x), model(x))
    for method in METHODS if name in VECTORS else METHODS[:3]:
        bound = network.margins(ball(x, eps, norm), rows, method=method, arithmetic="real")  # type: ignore[arg-type]
        assert bool((bound <= worst + TINY).all())
        # Without error terms the same, up to rounding: there BatchNorm is merged into the layer before it.
        quick = network.margins(ball(x, eps, norm), rows, method=method)  # type: ignore[arg-type]
        torch.testing.assert_close(quick.detach(), bound, rtol=1e-4, atol=1e-4)
        # Not for free: of no radius it is the margin.
        none = network.margins(ball(x, 0.0, norm), rows, method=method, arithmetic="real")  # type: ignore[arg-type]
        torch.testing.assert_close(none, clean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [*VECTORS, *IMAGES])
def test_float32_values_of_every_layer_lie_within_the_bounds_of_a_point(name: str) -> None:
    model = settled((VECTORS | IMAGES)[name]()).float()
    x = images(100, *((6,) if name in VECTORS else (2, 8, 8)))
    both = torch.cat([torch.eye(3), -torch.eye(3)])[None]
    with torch.no_grad():
        logits = model(x)
    for method in ("ibp", "crown-ibp"):
        found = Network.of(model, x.shape[1:]).margins(ball(x, 0.0), both, method=method, arithmetic="float32")  # type: ignore[arg-type]
        assert bool((found[:, :3] <= logits).all())
        assert bool((logits <= -found[:, 3:]).all())
        assert float((-found[:, 3:] - found[:, :3]).max()) < 1e-2 * float(logits.abs().max())


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([1, 2]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 2),
    st.sampled_from([1, 2]),
    st.integers(5, 8),
)
def test_the_transpose_of_a_convolution_is_that_of_its_matrix(
    axes: int, kernel: int, stride: int, padding: int, dilation: int, groups: int, side: int
) -> None:
    draw = generator(0, "convolution", axes, kernel, stride)
    weight = torch.randn(4, 2 // groups, *[kernel] * axes, generator=draw, dtype=torch.float64)
    layer = Convolution(weight, None, (stride,) * axes, (padding,) * axes, (dilation,) * axes, groups)
    x = torch.randn(1, 2, *[side] * axes, generator=draw, dtype=torch.float64)
    out = layer(x)
    matrix = torch.func.jacrev(layer.linear)(x).reshape(out.numel(), x.numel())
    rows = torch.randn(3, *out.shape[1:], generator=draw, dtype=torch.float64)
    (found,) = layer.transposed(rows, [x.shape[1:]])
    torch.testing.assert_close(found.flatten(1), rows.flatten(1) @ matrix)
    size = torch.rand(1, 2, *[side] * axes, generator=draw, dtype=torch.float64)
    torch.testing.assert_close(layer.spread(size).flatten(), matrix.abs() @ size.flatten())


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10_000),
    st.sampled_from(
        [(2, 2, 0, 1, False), (3, 2, 1, 1, False), (3, 1, 0, 1, False), (2, 1, 0, 2, False), (3, 2, 1, 1, True)]
    ),
)
def test_lines_around_the_largest_of_a_window_hold_at_corners_and_inside(
    seed: int, window: tuple[int, int, int, int, bool]
) -> None:
    kernel, stride, padding, dilation, ceil = window
    pool = MaxPool((kernel,) * 2, (stride,) * 2, (padding,) * 2, (dilation,) * 2, ceil)
    draw = generator(seed, "windows")
    low = torch.randn(1, 2, 6, 6, generator=draw, dtype=torch.float64)
    width = torch.rand(low.shape, generator=draw, dtype=torch.float64) * torch.randint(0, 3, low.shape, generator=draw)
    before = Interval(low, low + width)
    after = pool.bounds([before], None)
    rows = torch.randn(1, 4, *after.shape[1:], generator=draw, dtype=torch.float64)
    pulled = pool.pull(rows, [before], after, "adaptive", None, 1)
    for _ in range(50):
        share = torch.rand(low.shape, generator=draw, dtype=torch.float64)
        value = low + width * torch.where(torch.rand(low.shape, generator=draw) < 0.7, share.round(), share)
        line = (pulled.rows[0] * value[:, None]).flatten(2).sum(2) + pulled.constant
        assert bool((line <= (rows * pool(value)[:, None]).flatten(2).sum(2) + TINY).all())
    sure = pool.pull(rows, [Interval(low, low)], pool.bounds([Interval(low, low)], None), "adaptive", None, 1)
    exact = (rows * pool(low)[:, None]).flatten(2).sum(2)
    torch.testing.assert_close((sure.rows[0] * low[:, None]).flatten(2).sum(2) + sure.constant, exact)


def test_the_line_above_a_window_is_never_worse_in_its_middle_than_the_constant() -> None:
    """And better where intervals differ: here the larger almost always wins."""
    low, high = torch.tensor([[[[0.0, -1.0]]]]), torch.tensor([[[[2.0, 0.1]]]])
    pool, before = MaxPool((1, 2), (1, 2), (0, 0), (1, 1)), Interval(low, high)
    pulled = pool.pull(-torch.ones(1, 1, 1, 1, 1), [before], pool.bounds([before], None), "adaptive", None, 1)
    middle = -float((pulled.rows[0][0, 0] * (low + high)[0] / 2).sum() + pulled.constant)
    assert 1.0 <= middle < 1.2


@settings(deadline=None, max_examples=60)
@given(st.floats(-8, 8), st.floats(0, 6), st.sampled_from(["sigmoid", "tanh"]))
def test_lines_around_s_shaped_functions_hold_on_a_fine_grid(low: float, width: float, name: str) -> None:
    layer = {"sigmoid": nn.Sigmoid(), "tanh": nn.Tanh()}[name]
    (step,) = Network.of(nn.Sequential(nn.Flatten(), layer), (1,)).steps[-1:]
    function = step.make(None)  # type: ignore[arg-type]
    assert isinstance(function, Sigmoidal)
    lower, upper = torch.tensor([[[low]]], dtype=torch.float64), torch.tensor([[[low + width]]], dtype=torch.float64)
    lines = function.lines(lower, upper, "adaptive")
    grid = torch.linspace(low, low + width, 2001, dtype=torch.float64)
    value = layer(grid)
    assert lines.lower_offset is not None
    assert bool((lines.lower_slope.item() * grid + lines.lower_offset.item() <= value + 1e-12).all())
    assert bool((value <= lines.upper_slope.item() * grid + lines.upper_offset.item() + 1e-12).all())


class Mask(nn.Module):
    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.kept


class Grid(nn.Module):
    """Weights rounded to eighths."""

    def forward(self, weight: Tensor) -> Tensor:
        return torch.round(weight * 8) / 8


def test_parametrized_weights_are_bounded_as_the_weights_they_stand_for() -> None:
    x = images(3, 6)
    for parametrization in (Mask((torch.arange(48).view(8, 6) % 3 > 0).float()), Grid()):
        model, plain = mlp(6, 8, 3, seed=1), mlp(6, 8, 3, seed=1)
        parametrize.register_parametrization(model[0], "weight", parametrization)
        with torch.no_grad():
            plain[0].weight.copy_(model[0].weight)
        for method in METHODS:
            torch.testing.assert_close(margins_of(model, x, 0.1, method), margins_of(plain, x, 0.1, method))
        assert not torch.allclose(margins_of(mlp(6, 8, 3, seed=1), x, 0.1), margins_of(model, x, 0.1))


def test_batch_statistics_that_are_held_are_those_of_the_bounds() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    x, labels = images(5, 6), torch.arange(5) % 3
    network = Network.of(model, (6,))
    assert model.training
    model.train()
    with held_at(model, x) as logits:
        rows = (logits.gather(1, labels[:, None]) - logits).detach()
        found = network.margins(ball(x, 0.0), labels, method="ibp")
        (gradient,) = torch.autograd.grad(found.sum(), model[0].weight)
    others = rows.masked_select(~F.one_hot(labels, 3).bool()).view(5, 2)
    torch.testing.assert_close(found.detach(), others, rtol=1e-4, atol=1e-5)
    assert float(gradient.abs().sum()) > 0
    assert not torch.allclose(network.margins(ball(x, 0.0), labels, method="ibp"), others, atol=1e-3)


def test_what_foreign_files_are_assembled_from_has_bounds() -> None:
    assembly = Assembly((2, 3))
    flow = assembly.call(operator.sub, assembly.input, torch.tensor([[0.1, 0.2, 0.3]]))
    flow = assembly.layer(nn.Linear(3, 4), flow)
    flow = assembly.layer(nn.ReLU(), assembly.combine(operator.add, torch.ones(1, 2, 4), flow))
    flow = assembly.call(torch.permute, flow, [0, 2, 1])
    flow = assembly.call(torch.matmul, torch.randn(3, 4, generator=generator(0, "constant")), flow)
    flow = assembly.apply(operator.mul, flow, 2.0)
    flow = assembly.apply(torch.index_select, flow, 1, torch.tensor([2, 0]))
    flow = assembly.layer(nn.Linear(4, 3), assembly.reshape(flow, [4]))
    model = assembly.finish(flow)
    x = images(3, 2, 3)
    rows = rows_of(model, x)
    worst = least_found(model, x, 0.1, "Linf", rows, count=50)
    for method in METHODS:
        assert bool((margins_of(model, x, 0.1, method, arithmetic="float32") <= worst).all())


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Scaled(nn.Linear):
    """Looks like a layer that has bounds, and is another."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x


def aliased(m: Layers, x: Tensor) -> Tensor:
    y = m.one(x)
    z = F.relu(y, inplace=True)
    return y + z


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 3))
    model[0].register_forward_hook(lambda _module, _args, output: 2 * output)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 3), nn.LogSoftmax(1)), r"layer 1 \(LogSoftmax\) has no bounds here"),
        (lambda: nn.Sequential(nn.Linear(6, 3), nn.Mish()), r"\(Mish\) has no bounds"),
        (lambda: nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False)), "mixes the records of a batch"),
        (hooked, "has hooks"),
        (Branching, "no fixed sequence of steps"),
        (lambda: nn.Sequential(Scaled(6, 6)), "multiplies two values that depend on the input"),
        (lambda: Layers(aliased, one=nn.Linear(6, 6)), "something else than its layers in sequence"),
        (lambda: Layers(lambda _, x: x * x), "multiplies two values"),
        (lambda: Layers(lambda _, x: x / x), "divides by a value"),
        (lambda: Layers(lambda _, x: x.flip(0)), "method flip has no bounds"),
        (lambda: Layers(lambda _, x: x / x.size(0)), "something else than its layers"),
        (lambda: Layers(lambda _, x: x.view(-1)), "reshapes the batch"),
        (lambda: Layers(lambda _, x: x[:2]), "does not keep the records"),
        (lambda: Layers(lambda _, x: x[:, :3].transpose(0, 1)), "records of a batch that mix"),
        (lambda: Layers(lambda _, x: torch.index_select(x, 0, torch.tensor([2, 0, 1]))), "fails on a batch of one"),
        (lambda: Layers(lambda _, x: torch.cat([x, x])), "joins along the batch"),
        (lambda: Layers(lambda _, x: F.dropout(x)), "drops values at random"),
        (lambda: Layers(lambda _, x: x + torch.arange(3.0)[:, None]), "different constants"),
        (lambda: Layers(lambda _, x: x.view(len(x), 2, 3)), "no fixed sequence of steps"),
        (lambda: nn.Sequential(nn.Unflatten(1, (2, 3))), r"must return logits \[B, K\]"),
        (lambda: Layers(lambda m, _: m.shift), "must return one tensor that depends on its input"),
        (lambda: nn.Sequential(nn.LeakyReLU(1.5)), "leak=1.5 must lie in"),
        (lambda: nn.Sequential(nn.ELU(2.0)), "alpha=2.0 has no bounds"),
    ],
)
def test_models_without_bounds_are_refused_with_the_reason(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(BadValue, match=message):
        Network.of(make(), (6,))


def test_numbers_beside_the_data_are_taken_in_the_type_of_the_weights() -> None:
    model = Layers(lambda _, x: 0.1 + (x * 0.3 - 0.7) / 0.9).double()
    x = images(2, 6, dtype=torch.float64)
    rows = torch.eye(6, dtype=torch.float64)[None]
    found = Network.of(model, (6,)).margins(ball(x, 0.0), rows, arithmetic="real")
    torch.testing.assert_close(found, model(x), rtol=1e-12, atol=1e-12)
    assert bool((found <= model(x)).all())


def test_reading_a_model_leaves_no_mark_on_it() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    network = Network.of(model, (6,))
    network.margins(ball(images(2, 6), 0.1), torch.tensor([0, 1]), arithmetic="float32")
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_unstable_neurons_alone_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward pass carries two rows for each of them, for both ends."""
    model, x = mlp(6, 12, 12, 3, seed=3), images(1, 6)
    network = Network.of(model, (6,))
    interval = network.intervals(ball(x, 0.03), "real")[network.activations[1][1]]
    unstable = int(((interval.lower < 0) & (interval.upper > 0)).sum())
    assert 0 < unstable < 12
    carried = []
    pull = Propagation.pull

    def counted(self: Propagation, rows: Tensor, *args: object, **more: object) -> object:
        carried.append(rows.shape[1])
        return pull(self, rows, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Propagation, "pull", counted)
    network.intervals(ball(x, 0.03), "real", method="crown")
    assert carried == [2 * unstable]


def test_balls_have_points_on_their_surface() -> None:
    """The oracle above looks where bounds are tight."""
    x = torch.full((1, 6), 0.5, dtype=torch.float64)
    for norm, order in (("Linf", torch.inf), ("L2", 2), ("L1", 1)):
        far = torch.linalg.vector_norm(points_in(x, 0.1, norm, 50) - x, ord=order, dim=2)
        assert 0.0999 < float(far.max()) <= 0.1

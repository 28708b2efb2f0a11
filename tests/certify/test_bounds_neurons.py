"""Backward passes for single neurons, by columns and windows, against the same bounds with every row written out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from bound_oracles import ball, images, mlp
from torch import Tensor, nn

from trivet.certify.bounds import neurons
from trivet.certify.bounds.interval import Interval
from trivet.certify.bounds.network import Network
from trivet.certify.bounds.rows import Units, Windows
from trivet.models.normalize import Normalize
from trivet.models.resnet import BasicBlock
from trivet.randomness import generator


def settled(model: nn.Module) -> nn.Module:
    """Weights of a generator; BatchNorm with statistics that are not 0 and 1."""
    draw = generator(0, "weights")
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * (2 / max(tensor[0].numel(), 8)) ** 0.5)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.copy_(0.3 * torch.randn(module.num_features, generator=draw))
                module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=draw))
    return model.eval()


VECTORS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: mlp(9, 14, 12, 10, 3),
    "dense, normalised": lambda: nn.Sequential(
        nn.Linear(9, 14), nn.BatchNorm1d(14), nn.ReLU(), nn.Linear(14, 12), nn.BatchNorm1d(12), nn.LeakyReLU(0.1),
        nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3),
    ),
}  # fmt: skip
IMAGES: dict[str, Callable[[], nn.Module]] = {
    "convolutions": lambda: nn.Sequential(
        Normalize([0.5, 0.4], [0.2, 0.3]),
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Flatten(), nn.Linear(4 * 36, 8), nn.ReLU(), nn.Linear(8, 3),
    ),
    "convolutions, padded unevenly, dilated and in groups": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.ZeroPad2d((1, 2, 1, 0)),
        nn.Conv2d(4, 4, (3, 2), dilation=(1, 2), padding=(1, 1)), nn.Sigmoid(),
        nn.Conv2d(4, 6, 3, stride=(2, 3), padding=1, groups=2), nn.ReLU(), nn.Conv2d(6, 4, 2), nn.ReLU(),
        nn.Flatten(), nn.Linear(80, 3),
    ),
    "residual blocks": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), BasicBlock(3, 3, 1, "batch"), BasicBlock(3, 4, 2, "batch"),
        nn.AvgPool2d(5), nn.Flatten(), nn.Linear(4, 3),
    ),
    "max-pooling": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1), nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3),
    ),
}  # fmt: skip


def both(
    model: nn.Module, x: Tensor, eps: float, monkeypatch: pytest.MonkeyPatch, **settings: object
) -> tuple[list[Interval], list[Interval]]:
    """All intervals, with each neuron's rows as short as can be, and of every record alone with rows written out."""
    network = Network.of(model, x.shape[1:])
    norm = settings.pop("norm", "Linf")
    slope = settings.pop("slope", "adaptive")
    with torch.no_grad():
        monkeypatch.setattr(neurons, "FEW", -1)
        monkeypatch.setattr(neurons, "FIRST", 3)
        monkeypatch.setattr(neurons, "PORTION", 3000)
        short = network.intervals(ball(x, eps, norm), method="crown", slope=slope, **settings)  # type: ignore[arg-type]
        monkeypatch.setattr(neurons, "FEW", 1 << 60)
        alone = [
            network.intervals(ball(each, eps, norm), method="crown", slope=slope, **settings)  # type: ignore[arg-type]
            for each in x.split(1)
        ]
    long = [
        Interval(*(torch.cat([getattr(each[i], end) for each in alone]) for end in ("lower", "upper")))
        for i in range(len(short))
    ]
    return short, long


def differ(short: list[Interval], long: list[Interval]) -> float:
    """The largest difference of an end, relative to the values there."""
    return max(
        float(((getattr(a, end) - getattr(b, end)).abs() / (1 + b.size)).max())
        for a, b in zip(short, long, strict=True)
        for end in ("lower", "upper")
    )


@pytest.mark.parametrize("arithmetic", [None, "float32"])
@pytest.mark.parametrize("name", [*VECTORS, *IMAGES])
def test_short_rows_give_the_bounds_of_rows_written_out(
    name: str, arithmetic: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = settled({**VECTORS, **IMAGES}[name]())
    x = images(2, 9) if name in VECTORS else images(2, 2, 12, 12)
    x = x if arithmetic is None else x.double()
    short, long = both(model, x, 0.03, monkeypatch, arithmetic=arithmetic)
    assert differ(short, long) < (1e-5 if arithmetic is None else 1e-12)


@pytest.mark.parametrize("slope", ["zero", "one", "same"])
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_so_they_do_for_every_slope_and_ball(slope: str, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, x in (("dense", images(2, 9)), ("convolutions", images(2, 2, 12, 12))):
        model = settled({**VECTORS, **IMAGES}[name]()).double()
        short, long = both(model, x.double(), 0.05, monkeypatch, slope=slope, norm=norm)
        assert differ(short, long) < 1e-12


def test_behind_convolutions_rows_are_windows_and_a_shifted_one_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = settled(IMAGES["convolutions"]()), images(2, 2, 12, 12)
    sizes = []
    seen_by = neurons.seen_by

    def moved(rows: Units, *given: object, by: int) -> Windows:
        found = seen_by(rows, *given)  # type: ignore[arg-type]
        sizes.append(found.size)
        return Windows(found.values, found.corner, found.top + by, found.left, found.inside)

    monkeypatch.setattr(neurons, "seen_by", partial(moved, by=0))
    assert differ(*both(model, x, 0.03, monkeypatch)) < 1e-5
    assert set(sizes) == {(3, 3)}
    monkeypatch.setattr(neurons, "seen_by", partial(moved, by=1))
    assert differ(*both(model, x, 0.03, monkeypatch)) > 1e-3


def test_unstable_neurons_alone_have_rows_and_rectifiers_that_are_off_no_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = mlp(9, 40, 30, 3), images(1, 9)
    network = Network.of(model, (9,))
    carried = []
    multiplied = neurons.multiplied

    def counted(rows: object, weight: Tensor) -> Tensor:
        carried.append((rows, len(weight)))
        return multiplied(rows, weight)  # type: ignore[arg-type]

    monkeypatch.setattr(neurons, "FEW", -1)
    monkeypatch.setattr(neurons, "multiplied", counted)
    with torch.no_grad():
        known = network.intervals(ball(x, 0.03))
        network.intervals(ball(x, 0.03), method="crown")
    first, second = (known[node] for _, node in network.activations)
    unstable, on = ((second.lower < 0) & (second.upper > 0)).sum(), (first.upper > 0).sum()
    (units, _), (columns, width) = carried
    assert len(units.places) == int(unstable) < 30
    assert columns.values.shape == (int(unstable), int(on))
    assert int(on) < width
    assert columns.parting.shape[1] == int(((first.lower < 0) & (first.upper > 0)).sum()) < int(on)


def test_nothing_short_is_taken_where_gradients_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neurons, "FEW", -1)
    monkeypatch.setattr(neurons, "_Pass", None)
    model, x = mlp(6, 8, 8, 3), images(2, 6)
    network = Network.of(model, (6,))
    network.margins(ball(x, 0.05), torch.tensor([0, 1])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())

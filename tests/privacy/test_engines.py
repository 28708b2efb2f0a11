"""Both engines against a plain loop over single records, in float64, for every layer and every way to call it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from per_record import (
    ENGINES,
    RECORDS,
    Embedded,
    assert_exact,
    batch_of,
    clip,
    images,
    network,
    of,
    pixels,
    plain,
    randomised,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from trivet.data.dataset import Batch
from trivet.models.resnet import resnet
from trivet.models.small_cnn import small_cnn
from trivet.objectives.objective import Losses
from trivet.objectives.plain import Plain
from trivet.privacy.book_keeping import BookKeeping
from trivet.privacy.engines import engine_for

LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (nn.Linear(6, 4), images(6)),
    "linear, no bias": lambda: (nn.Linear(6, 4, bias=False), images(6)),
    "linear over places": lambda: (nn.Linear(6, 4), images(3, 6)),
    "wide linear over few places": lambda: (nn.Linear(20, 30), images(2, 20)),
    "linear over a plane": lambda: (nn.Linear(6, 4), images(3, 2, 6)),
    "conv1d": lambda: (nn.Conv1d(3, 4, 3, padding=1), images(3, 9)),
    "conv1d, stride, dilation, groups": lambda: (nn.Conv1d(4, 6, 3, 2, 2, 2, groups=2), images(4, 11)),
    "conv2d": lambda: (nn.Conv2d(2, 3, 3), images(2, 7, 6)),
    "conv2d, 1x1, stride": lambda: (nn.Conv2d(2, 3, 1, stride=2, bias=False), images(2, 7, 6)),
    "conv2d, everything": lambda: (
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
        images(4, 7, 8),
    ),
    "conv2d, depthwise": lambda: (nn.Conv2d(4, 4, 3, groups=4), images(4, 5, 5)),
    "conv2d, few places": lambda: (nn.Conv2d(8, 8, 3), images(8, 4, 3)),
    "conv2d, one place, groups": lambda: (nn.Conv2d(8, 8, 3, groups=2), images(8, 3, 3)),
    "conv2d, few places, groups": lambda: (nn.Conv2d(16, 16, 3, groups=2), images(16, 4, 3)),
    "conv2d, same": lambda: (nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2)), images(2, 6, 6)),
    "conv2d, valid": lambda: (nn.Conv2d(2, 3, 3, padding="valid"), images(2, 6, 6)),
    "conv2d, circular": lambda: (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), images(2, 6, 6)),
    "conv2d, reflect": lambda: (nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect"), images(2, 6, 6)),
    "embedding": lambda: (Embedded(), torch.rand(RECORDS, 7, dtype=torch.float64) * 2),
    "embedding, padding": lambda: (Embedded(padding_idx=1), torch.rand(RECORDS, 3, 4, dtype=torch.float64) * 2),
    "embedding, one word": lambda: (Embedded(), torch.rand(RECORDS, 1, dtype=torch.float64) * 2),
    "group norm": lambda: (nn.GroupNorm(2, 6), images(6, 3, 4)),
    "group norm of as many groups as channels": lambda: (nn.GroupNorm(6, 6), images(6, 3, 4)),
    "group norm over a line": lambda: (nn.GroupNorm(3, 6), images(6, 5)),
    "group norm without places": lambda: (nn.GroupNorm(2, 6), images(6)),
    "layer norm": lambda: (nn.LayerNorm(6), images(6)),
    "layer norm, no bias": lambda: (nn.LayerNorm(6, bias=False), images(3, 6)),
    "layer norm over images": lambda: (nn.LayerNorm((3, 4)), images(2, 3, 4)),
    "instance norm 1d": lambda: (nn.InstanceNorm1d(4, affine=True), images(4, 7)),
    "instance norm 2d": lambda: (nn.InstanceNorm2d(4, affine=True), images(4, 3, 4)),
    "instance norm 3d": lambda: (nn.InstanceNorm3d(2, affine=True), images(2, 3, 2, 2)),
}


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even")  # whose asymmetry is the point
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_is_exact(layer: str, engine: str) -> None:
    module, inputs = LAYERS[layer]()
    assert_exact(ENGINES[engine](), randomised(module), inputs)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even")  # whose asymmetry is the point
@pytest.mark.parametrize("layer", [name for name in LAYERS if "embedding" not in name])
def test_a_layer_inside_a_network_is_exact(layer: str) -> None:
    """Its input then needs a gradient, and its own output gradient is anything."""
    module, inputs = LAYERS[layer]()
    first = nn.Linear(inputs.shape[-1], inputs.shape[-1])
    assert_exact(BookKeeping(), randomised(nn.Sequential(first, nn.Tanh(), module, nn.Tanh())), inputs)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_convolutions_of_any_shape_are_exact(data: st.DataObject) -> None:
    def pick(name: str, low: int, high: int) -> int:
        return data.draw(st.integers(low, high), label=name)

    groups = pick("groups", 1, 3)
    channels, outputs = groups * pick("channels", 1, 3), groups * pick("outputs", 1, 3)
    kernel = (pick("height", 1, 3), pick("width", 1, 3))
    stride, padding, dilation = ((pick(n, 1, 2), pick(n, 1, 2)) for n in ("stride", "padding", "dilation"))
    bias = data.draw(st.booleans())
    layer = nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, groups, bias)
    assert_exact(BookKeeping(), randomised(layer), images(channels, pick("rows", 5, 8), pick("columns", 5, 8)))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6), st.integers(1, 3), st.booleans())
def test_linear_layers_of_any_shape_are_exact(inputs: int, outputs: int, places: int, views: int, bias: bool) -> None:
    """On both sides of the choice between ghost norms and materialised rows."""
    layer = randomised(nn.Linear(inputs, outputs, bias))

    def losses(model: nn.Module, batch: Batch, perturbed: Tensor) -> Losses:
        return Losses(plain(model, batch, perturbed.flatten(0, 1).unflatten(0, (len(batch), -1))).per_example)

    assert_exact(BookKeeping(), layer, torch.randn(RECORDS, views, places, inputs, dtype=torch.float64), losses)


class Masked(nn.Module):
    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.rand(shape) > 0.4).double())

    def forward(self, weight: Tensor) -> Tensor:
        return self.mask * weight


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, weight: Tensor) -> Tensor:
        return (weight * 8).round() / 8

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient


class LearnedScale(nn.Module):
    """A quantizer with a trainable step size, by the straight-through trick."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.tensor(0.2))

    def forward(self, weight: Tensor) -> Tensor:
        scaled = weight / self.step
        return (scaled + (scaled.round() - scaled).detach()) * self.step


class Factorised(nn.Module):
    """A matrix of rank two, from two originals."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight[:, :2].clone(), weight[:2].clone()


class Straight(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return StraightThrough.apply(weight)


@pytest.mark.parametrize("engine", ["book_keeping", "book_keeping in parts", "materialised"])
@pytest.mark.parametrize("kind", ["masked", "learned scale", "factorised", "weight norm", "bias", "two", "embedding"])
def test_parametrized_layers_are_exact_in_their_originals(kind: str, engine: str) -> None:
    model: Any = network()
    if kind == "masked":
        for layer in (model[0], model[4], model[2].shared):
            parametrize.register_parametrization(layer, "weight", Masked(layer.weight.shape))
    elif kind == "learned scale":
        parametrize.register_parametrization(model[0], "weight", LearnedScale().double())
        parametrize.register_parametrization(model[7], "weight", LearnedScale().double())
    elif kind == "factorised":
        parametrize.register_parametrization(model[4], "weight", Factorised())
    elif kind == "weight norm":
        parametrizations.weight_norm(model[4])
        parametrizations.weight_norm(model[0])
    elif kind == "bias":
        parametrize.register_parametrization(model[2].norm, "bias", nn.Softplus())
    elif kind == "embedding":
        table = randomised(Embedded())
        parametrize.register_parametrization(table.table, "weight", nn.Tanh())
        assert_exact(ENGINES[engine](), table, torch.rand(RECORDS, 7, dtype=torch.float64) * 2)
        return
    else:
        parametrize.register_parametrization(model[4], "weight", LearnedScale().double())
        parametrize.register_parametrization(model[4], "weight", Masked(model[4].weight.shape))
    assert_exact(ENGINES[engine](), model, pixels())


def test_a_quantizer_of_its_own_backward_pass_is_exact() -> None:
    model: Any = network()
    parametrize.register_parametrization(model[0], "weight", Straight())
    assert_exact(BookKeeping(), model, pixels())


class Stubborn(torch.autograd.Function):
    """A backward pass that looks at values, which cannot be vectorised."""

    @staticmethod
    def forward(_: Any, weight: Tensor) -> Tensor:
        return 2 * weight

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient if float(gradient.abs().max()) >= 0 else gradient


def test_a_parametrization_that_cannot_be_vectorised_is_pulled_back_record_by_record() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return Stubborn.apply(weight)

    model: Any = network()
    parametrize.register_parametrization(model[4], "weight", Doubled())
    assert_exact(BookKeeping(), model, pixels())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("frozen", [("0.",), ("7.",), ("0.weight",), ("bias",), ("2.", "4.weight")])
def test_partly_frozen_models_are_exact(frozen: tuple[str, ...], engine: str) -> None:
    model = network()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    assert_exact(ENGINES[engine](), model, pixels())


def test_channels_last_is_exact() -> None:
    model = network().to(memory_format=torch.channels_last)
    assert_exact(BookKeeping(), model, pixels().contiguous(memory_format=torch.channels_last))


def test_the_networks_of_the_house_are_exact() -> None:
    for model, shape in (
        (small_cnn((1, 12, 12), 3), (1, 12, 12)),
        (resnet((3, 8, 8), 3, depth=8, norm="group"), (3, 8, 8)),
    ):
        assert_exact(engine_for(model), model.double(), torch.rand(3, *shape, dtype=torch.float64), of(Plain()))


def test_opacus_finds_the_same_norms_and_sums() -> None:
    opacus = pytest.importorskip("opacus")
    model, x = small_cnn((1, 12, 12), 3).double(), torch.rand(6, 1, 12, 12, dtype=torch.float64)
    batch = batch_of(x)
    found = engine_for(model).clipped_sum(model, batch, x, of(Plain()), clip)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = opacus.GradSampleModule(model, loss_reduction="sum")
        F.cross_entropy(theirs(x), batch.labels, reduction="sum").backward()
    rows = [p.grad_sample for p in theirs.parameters()]
    norms = torch.cat([row.flatten(1) for row in rows], 1).norm(dim=1)
    torch.testing.assert_close(found.norms, norms)
    for mine, row in zip(found.total, rows, strict=True):
        torch.testing.assert_close(mine, torch.einsum("b,b...->...", clip(norms), row))

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
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from trivet.data.dataset import Batch
from trivet.errors import BadValue
from trivet.models.resnet import resnet
from trivet.models.small_cnn import small_cnn
from trivet.objectives.gaussian import Gaussian
from trivet.objectives.objective import Losses, Objective, Progress
from trivet.objectives.pgd_at import PgdAt
from trivet.objectives.plain import Plain
from trivet.objectives.trades import Trades
from trivet.privacy.book_keeping import BookKeeping
from trivet.privacy.engine import ClippedSum, Engine
from trivet.privacy.engines import engine_for
from trivet.privacy.materialised import Materialised
from trivet.threats.linf import Linf

PROGRESS = Progress(step=0, steps=1, epoch=0.0, seed=0)
ENGINES: dict[str, Callable[[], Engine]] = {
    "book_keeping": BookKeeping,
    "book_keeping in parts": lambda: BookKeeping(records=2),
    "materialised": Materialised,
    "materialised in parts": lambda: Materialised(most=2),
}
RECORDS = 5


def clip(norms: Tensor) -> Tensor:
    """A bound that some records of these tests exceed and some do not."""
    return 0.5 / norms.clamp_min(0.5)


def plain(model: nn.Module, batch: Batch, perturbed: Tensor) -> Losses:
    """The objective of most tests: smooth, and different for each label."""
    outputs = model(perturbed).flatten(1)
    weights = torch.linspace(-1, 1, outputs.shape[1], dtype=outputs.dtype) * (1 + batch.labels[:, None])
    return Losses((weights * outputs.tanh()).sum(1))


def of(objective: Objective) -> Callable[[nn.Module, Batch, Tensor], Losses]:
    return lambda model, batch, perturbed: objective.losses(model, batch, perturbed, PROGRESS)


def batch_of(inputs: Tensor, classes: int = 3) -> Batch:
    return Batch(inputs, torch.arange(len(inputs)) % classes, torch.arange(len(inputs)))


def one_by_one(model: nn.Module, batch: Batch, perturbed: Tensor, losses: Any) -> tuple[list[Tensor], Tensor]:
    """Per-record gradients, computed for each record alone by plain autograd, clipped and added."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    norms = []
    for i in range(len(batch)):
        one = slice(i, i + 1)
        loss = losses(model, batch.select(one), perturbed[one]).per_example.sum()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        norm = torch.cat([g.flatten() for g in filled]).norm()
        norms.append(norm)
        if norm.isfinite():
            total = [t + clip(norm[None])[0] * g for t, g in zip(total, filled, strict=True)]
    return total, torch.stack(norms)


def assert_exact(engine: Engine, model: nn.Module, inputs: Tensor, losses: Any = plain, **tolerance: float) -> None:
    """The engine's norms and sums are those of the loop."""
    batch = batch_of(inputs[:, 0] if inputs.dim() == 6 else inputs)
    total, norms = one_by_one(model, batch, inputs, losses)
    found = engine.clipped_sum(model, batch, inputs, losses, clip)
    limits = tolerance or {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(found.norms, norms, **limits)
    assert len(found.total) == len(total)
    for mine, expected in zip(found.total, total, strict=True):
        torch.testing.assert_close(mine, expected, **limits)
    assert float(norms.max()) > 0


def randomised(model: nn.Module) -> nn.Module:
    """In float64, with weights away from ones and zeros."""
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def images(channels: int, *size: int) -> Tensor:
    return torch.randn(RECORDS, channels, *size, dtype=torch.float64)


class Embedded(nn.Module):
    """Word indices from images in [0, 1], embedded."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.table((x.abs() * 3).long().clamp(max=5)).tanh()


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


def network(norm: bool = True) -> nn.Module:
    """With every kind of layer, in-place activations and a layer that is used twice."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Conv2d(6, 6, 3, padding=1)
            self.norm = nn.GroupNorm(3, 6) if norm else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.shared(x))
            return F.relu_(self.shared(F.elu(y))) + x

    return randomised(
        nn.Sequential(
            nn.Conv2d(2, 6, 3, stride=2),
            nn.ReLU(inplace=True),
            Twice(),
            nn.Flatten(),
            nn.Linear(54, 8),
            nn.LayerNorm(8),
            nn.Tanh(),
            nn.Linear(8, 3),
        )
    )


def pixels() -> Tensor:
    return torch.rand(RECORDS, 2, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "objective",
    [
        Plain(),
        Gaussian(0.3),
        Gaussian(0.3, samples=4),
        PgdAt(Linf(0.1), steps=2),
        Trades(Linf(0.1), steps=2, beta=3.0),
    ],
    ids=["plain", "gaussian", "gaussian of 4 views", "pgd_at", "trades"],
)
def test_objectives_are_exact_over_all_views_and_passes(objective: Objective, engine: str) -> None:
    model, x = network(), pixels()
    batch = batch_of(x)
    perturbed = objective.perturb(model, batch, PROGRESS)
    total, norms = one_by_one(model, batch, perturbed, of(objective))
    found = ENGINES[engine]().clipped_sum(model, batch, perturbed, of(objective), clip)
    torch.testing.assert_close(found.norms, norms, rtol=1e-9, atol=1e-11)
    for mine, expected in zip(found.total, total, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-11)
    expected_losses = objective.losses(model, batch, perturbed, PROGRESS)
    torch.testing.assert_close(found.found.per_example, expected_losses.per_example.detach())
    for name, value in expected_losses.log.items():
        torch.testing.assert_close(found.found.log[name], value)


@pytest.mark.parametrize("engine", ENGINES)
def test_three_passes_of_different_numbers_of_rows_are_one_gradient(engine: str) -> None:
    """A clean pass, one of two views, and one that no gradient flows through."""

    def losses(model: nn.Module, batch: Batch, perturbed: Tensor) -> Losses:
        clean = model(batch.inputs)
        views = torch.stack([perturbed, 1 - perturbed], 1)
        both = model(views.flatten(0, 1)).unflatten(0, (-1, 2))
        with torch.no_grad():
            target = model(perturbed).softmax(1)
        return Losses((clean * target).sum(1) + both.tanh().square().sum((1, 2)))

    assert_exact(ENGINES[engine](), network(), pixels(), losses)


def test_views_are_clipped_together_and_not_one_by_one() -> None:
    """Two views whose gradients cancel: the record's gradient is zero, though no view's is."""

    def losses(model: nn.Module, batch: Batch, perturbed: Tensor) -> Losses:
        return Losses(model(perturbed)[:, 0] - model(perturbed)[:, 0])

    for engine in (BookKeeping(), Materialised()):
        found = engine.clipped_sum(network(), batch_of(pixels()), pixels(), losses, clip)
        assert float(found.norms.max()) < 1e-12


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


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e200])
def test_records_without_a_finite_gradient_contribute_nothing(poison: float, engine: str) -> None:
    """And leave every other record's contribution as it was."""
    model, x = network(norm=False), pixels()
    healthy = ENGINES[engine]().clipped_sum(model, batch_of(x).select(slice(1, None)), x[1:], of(Plain()), clip)
    x[0] = poison
    found = ENGINES[engine]().clipped_sum(model, batch_of(x), x, of(Plain()), clip)
    assert not found.norms[0].isfinite()
    torch.testing.assert_close(found.norms[1:], healthy.norms, rtol=1e-9, atol=1e-11)
    for mine, expected in zip(found.total, healthy.total, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-11)


def test_a_batch_of_lost_records_gives_zeros() -> None:
    for engine in (BookKeeping(), Materialised()):
        x = pixels().fill_(float("nan"))
        found = engine.clipped_sum(network(), batch_of(x), x, of(Plain()), clip)
        assert all(bool((each == 0).all()) for each in found.total)


@pytest.mark.parametrize("engine", ["book_keeping", "materialised"])
def test_the_sum_does_not_depend_on_how_a_batch_is_cut(engine: str) -> None:
    """Into 1, 2 and 7 parts."""
    model = network()
    x = torch.rand(14, 2, 8, 8, dtype=torch.float64)
    batch = batch_of(x)
    whole = ENGINES[engine]().clipped_sum(model, batch, x, of(Plain()), clip)
    for parts in (2, 7):
        size = len(x) // parts
        cut = [
            ENGINES[engine]().clipped_sum(model, batch.select(slice(i, i + size)), x[i : i + size], of(Plain()), clip)
            for i in range(0, len(x), size)
        ]
        for number, mine in enumerate(whole.total):
            torch.testing.assert_close(sum(each.total[number] for each in cut), mine, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("engine", ["book_keeping", "materialised"])
def test_clipped_contributions_never_exceed_the_bound(engine: str) -> None:
    """Adding a record moves the sum by no more than the bound, in float32 too, up to rounding."""
    model = network().float()
    x = 10 * torch.randn(8, 2, 8, 8)
    both = [ENGINES[engine]().clipped_sum(model, batch_of(x[:n]), x[:n], of(Plain()), clip).total for n in (7, 8)]
    moved = torch.cat([(a - b).flatten() for a, b in zip(*both, strict=True)]).norm()
    assert 0.1 < float(moved) <= 0.5 * (1 + 1e-4)


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "grad": [p.grad for p in model.parameters()],
        "requires": [p.requires_grad for p in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "modes": [m.training for m in model.modules()],
    }


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("engine", ["book_keeping", "materialised"])
def test_the_model_is_left_as_it_was(engine: str, fails: bool) -> None:
    model: Any = network().train()
    model[7].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[6].eval()
    model.register_buffer("count", torch.zeros(2))
    before, weights = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}

    def losses(model: nn.Module, batch: Batch, perturbed: Tensor) -> Losses:
        found = plain(model, batch, perturbed)
        if engine == "book_keeping":
            model.count += 1
        if fails:
            raise KeyError("in the middle")
        return found

    x = pixels()
    if fails:
        with pytest.raises(KeyError):
            ENGINES[engine]().clipped_sum(model, batch_of(x), x, losses, clip)
    else:
        ENGINES[engine]().clipped_sum(model, batch_of(x), x, losses, clip)
    after = snapshot(model)
    assert all(a is b for a, b in zip(after.pop("grad"), before.pop("grad"), strict=True))
    assert after == before
    assert all(bool((model.state_dict()[k] == v).all()) for k, v in weights.items())
    plain(model, batch_of(x), x).per_example.sum().backward()  # and it can be trained as ever
    assert model[4].weight.grad is not None


def test_under_autocast_norms_and_sums_are_float32_and_near_the_exact_ones() -> None:
    """bfloat16 has 8 bits: within 5 % of the norms of float32."""
    model, x = network().float(), pixels().float()

    def losses(model: nn.Module, batch: Batch, perturbed: Tensor) -> Losses:
        with torch.autocast("cpu", torch.bfloat16):
            found = Plain().losses(model, batch, perturbed, PROGRESS)
        return Losses(found.per_example.float())

    exact = BookKeeping().clipped_sum(model, batch_of(x), x, of(Plain()), clip)
    found = BookKeeping().clipped_sum(model, batch_of(x), x, losses, clip)
    assert {each.dtype for each in [found.norms, *found.total]} == {torch.float32}
    torch.testing.assert_close(found.norms, exact.norms, rtol=0.05, atol=0.0)
    assert not torch.equal(found.norms, exact.norms)


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


def refused(model: nn.Module, sentence: str) -> None:
    with pytest.raises(BadValue, match=sentence):
        engine_for(model, "book_keeping")


def test_tied_weights_are_refused_by_book_keeping_and_clipped_as_one_by_the_other() -> None:
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    refused(model, "0.weight and 2.weight are one tied parameter")
    assert_exact(engine_for(model), randomised(model), images(6))
    assert isinstance(engine_for(model), Engine)


def test_layers_without_a_rule_are_refused_by_book_keeping_and_treated_by_the_other() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 3

    for layer, sentence in (
        (Scaled(6, 6), "no rule is known for the per-record gradient of Scaled"),
        (nn.PReLU(), "no rule is known for the per-record gradient of PReLU"),
        (nn.Bilinear(6, 6, 6), "no rule is known for the per-record gradient of Bilinear"),
    ):
        refused(layer, sentence)
        if not isinstance(layer, nn.Bilinear):
            assert_exact(engine_for(layer), randomised(layer), images(6))
    old = nn.Linear(6, 6)
    old.register_parameter("extra", nn.Parameter(torch.ones(6)))
    refused(old, "Linear has no 'extra'")
    bent = nn.Linear(6, 6)
    bent.forward = lambda x: x @ bent.weight  # type: ignore[method-assign]
    refused(bent, "no rule is known")


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        (nn.BatchNorm2d(3), "mixes the records of a batch"),
        (nn.BatchNorm2d(3, affine=False), "mixes the records of a batch"),
        (nn.BatchNorm1d(3, track_running_stats=False).eval(), "mixes the records of a batch"),
        (nn.InstanceNorm2d(3, track_running_stats=True), "averages statistics over records"),
        (nn.Embedding(3, 2, scale_grad_by_freq=True), "scales by what a whole batch holds"),
        (nn.Embedding(3, 2, max_norm=1.0), "scales by what a whole batch holds"),
    ],
)
def test_layers_that_mix_records_are_refused_by_all(layer: nn.Module, sentence: str) -> None:
    for name in ("auto", "book_keeping", "materialised"):
        with pytest.raises(BadValue, match=sentence):
            engine_for(nn.Sequential(layer), name)  # type: ignore[arg-type]


def test_batch_norm_of_fixed_statistics_is_treated() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).eval()
    assert_exact(engine_for(model), randomised(model), images(2, 6, 6))


def test_an_unknown_engine_is_an_error() -> None:
    with pytest.raises(BadValue, match="engine='fast' must be one of: auto, book_keeping, materialised"):
        engine_for(nn.Linear(2, 2), "fast")  # type: ignore[arg-type]


class Beside(nn.Module):
    """Uses a weight without calling its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh() @ self.layer.weight


def test_a_weight_used_beside_its_layer_is_found() -> None:
    model, x = randomised(Beside()), images(6)
    with pytest.raises(BadValue, match=r"layer.weight is used outside of its layer's own call"):
        BookKeeping().clipped_sum(model, batch_of(x), x, plain, clip)
    engine = engine_for(model)
    assert_exact(engine, model, x)
    assert_exact(engine, model, x)


def test_the_gradient_of_a_gradient_is_found() -> None:
    def losses(model: nn.Module, batch: Batch, perturbed: Tensor) -> Losses:
        x = perturbed.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(plain(model, batch, x).per_example.sum(), x, create_graph=True)
        return Losses(gradient.square().flatten(1).sum(1))

    with pytest.raises(BadValue, match="gradient of a gradient"):
        BookKeeping().clipped_sum(network(), batch_of(pixels()), pixels(), losses, clip)


def test_a_gradient_by_the_inputs_inside_the_losses_is_no_record_s_own() -> None:
    """A step of ascent inside the losses leaves the books alone."""

    def losses(model: nn.Module, batch: Batch, perturbed: Tensor) -> Losses:
        x = perturbed.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(plain(model, batch, x).per_example.sum(), x)
        return plain(model, batch, (x + 0.1 * gradient).detach())

    assert_exact(BookKeeping(), network(), pixels(), losses)


def test_rows_that_cannot_be_divided_among_the_records_are_refused() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x[:3]).sum() + x

    with pytest.raises(BadValue, match="the first dimension must hold the records"):
        BookKeeping().clipped_sum(Halved().double(), batch_of(images(6)), images(6), plain, clip)


def test_losses_that_are_not_one_for_each_record_are_refused() -> None:
    def losses(model: nn.Module, batch: Batch, perturbed: Tensor) -> Losses:
        return Losses(plain(model, batch, perturbed).per_example.mean())

    for engine in (BookKeeping(), Materialised()):
        with pytest.raises(BadValue, match="have shape"):
            engine.clipped_sum(network(), batch_of(pixels()), pixels(), losses, clip)


def test_a_model_that_the_losses_ignore_has_zero_gradients() -> None:
    def losses(model: nn.Module, batch: Batch, perturbed: Tensor) -> Losses:
        return Losses(perturbed.flatten(1).sum(1))

    found: ClippedSum = BookKeeping().clipped_sum(network(), batch_of(pixels()), pixels(), losses, clip)
    assert not found.norms.any()
    assert all(not each.any() for each in found.total)

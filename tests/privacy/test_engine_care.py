"""What engines do beside the sum: all views of a record, lost records, parts, the state of the model, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from per_record import (
    ENGINES,
    PROGRESS,
    assert_exact,
    batch_of,
    clip,
    images,
    network,
    of,
    one_by_one,
    pixels,
    plain,
    randomised,
)
from torch import Tensor, nn
from torch.func import grad

from trivet.data.dataset import Batch
from trivet.errors import BadValue
from trivet.objectives.gaussian import Gaussian
from trivet.objectives.objective import Losses, Objective
from trivet.objectives.pgd_at import PgdAt
from trivet.objectives.plain import Plain
from trivet.objectives.trades import Trades
from trivet.privacy.book_keeping import BookKeeping
from trivet.privacy.engine import ClippedSum, Engine
from trivet.privacy.engines import engine_for
from trivet.privacy.materialised import Materialised
from trivet.threats.linf import Linf


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


def test_losses_that_differentiate_by_torch_func_are_left_to_materialised_gradients() -> None:
    def losses(model: nn.Module, batch: Batch, perturbed: Tensor) -> Losses:
        slope = grad(lambda x: plain(model, batch, x).per_example.sum())(perturbed)
        return Losses(slope.square().flatten(1).sum(1))

    with pytest.raises(BadValue, match=r"differentiate by torch\.func; choose engine='materialised'"):
        BookKeeping().clipped_sum(network(), batch_of(pixels()), pixels(), losses, clip)
    assert_exact(engine_for(network()), network(), pixels(), losses)


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


def test_parts_are_alike_and_fit_the_budget() -> None:
    net = network()
    assert BookKeeping(records=256).at_once(nn.Linear(1000, 1000)) == 256
    assert BookKeeping(budget=1).at_once(net) == 32
    assert BookKeeping(budget=10**6).at_once(nn.Conv2d(10, 10, 5)) == 10**6 // (4 * 2510)
    assert Materialised(budget=1).at_once(net) == 1


def test_weights_in_bfloat16_give_sums_in_float32() -> None:
    model, x = network().bfloat16(), pixels().bfloat16()
    exact = BookKeeping().clipped_sum(model.float(), batch_of(x), x.float(), of(Plain()), clip)
    found = BookKeeping().clipped_sum(model.bfloat16(), batch_of(x), x, of(Plain()), clip)
    assert {each.dtype for each in [found.norms, *found.total]} == {torch.float32}
    torch.testing.assert_close(found.norms, exact.norms, rtol=0.1, atol=0.0)

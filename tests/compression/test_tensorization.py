"""Defensive tensorization: exact factors, unbiased draws for batches and for records, and what they add to a loss."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor, nn

from trivet.compression.compression import originals, steps_on
from trivet.compression.structure import finish, restructure
from trivet.compression.tensorization import (
    Cp,
    Factorised,
    PerRecord,
    Tensorization,
    Tucker,
    higher_order_svd,
    multiplied,
    silence,
    summed,
)
from trivet.errors import BadValue
from trivet.methods import spec_of
from trivet.models.surrogate import Surrogate

tensorly = pytest.importorskip("tensorly", reason="the oracle of factorised kernels")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([(4, 3, 3, 3), (8, 1, 3, 3), (5, 7), (2, 9, 1, 1)]))
def test_at_full_rank_the_factors_give_the_weight_back(seed: int, shape: tuple[int, ...]) -> None:
    weight = normal(*shape, seed=seed)
    made = Tucker(weight.shape, 1.0, 1.0, False)
    torch.testing.assert_close(made(*made.right_inverse(weight)), weight, atol=1e-5, rtol=1e-5)


def test_reconstruction_is_that_of_tensorly() -> None:
    core, factors = normal(2, 3, 2, 3), [normal(5, 2), normal(4, 3), normal(3, 2), normal(3, 3)]
    ours = multiplied(core, factors)
    theirs = tensorly.tucker_to_tensor((core.numpy(), [each.numpy() for each in factors]))
    torch.testing.assert_close(ours, torch.from_numpy(theirs))
    columns = [normal(5, 4, seed=1), normal(3, 4, seed=2), normal(2, 4, seed=3)]
    theirs = tensorly.cp_to_tensor((torch.ones(4).numpy(), [each.numpy() for each in columns]))
    torch.testing.assert_close(summed(columns), torch.from_numpy(theirs))


def test_at_low_rank_it_is_no_further_than_twice_the_best_and_orthogonal() -> None:
    """The truncated higher-order SVD is within sqrt(modes) of the best; the best is no nearer than one truncation."""
    weight = normal(6, 5, 3, 3)
    bases = higher_order_svd(weight, [3, 3, 3, 3])
    for basis in bases:
        torch.testing.assert_close(basis.mT @ basis, torch.eye(basis.shape[1]), atol=1e-5, rtol=0)
    rebuilt = multiplied(multiplied(weight, [u.mT for u in bases]), bases)
    least = max(float(torch.linalg.svdvals(weight.movedim(k, 0).flatten(1))[3:].square().sum().sqrt()) for k in (0, 1))
    assert least - 1e-4 <= float((weight - rebuilt).norm()) <= 2 * 4**0.5 * least


def many(made: Factorised, stored: tuple[Tensor, ...], draws: int) -> Tensor:
    """[draws, ...] kernels."""
    torch.manual_seed(0)
    return torch.vmap(lambda _: made(*stored), randomness="different")(torch.zeros(draws))


def chances(rank: int, keep: float) -> dict[tuple[float, ...], float]:
    """The law of which components stay: Bernoulli(keep) each, and one at random in the place of none."""
    masks = itertools.product([0.0, 1.0], repeat=rank)
    law = {mask: keep ** sum(mask) * (1 - keep) ** (rank - sum(mask)) for mask in masks}
    none = law.pop((0.0,) * rank)
    return {mask: chance + (none / rank if sum(mask) == 1 else 0.0) for mask, chance in law.items()}


def test_which_components_stay_follows_the_law_and_one_always_does() -> None:
    """All 15 masks of four components in 20,000 draws; a chi-square this large has a chance of 1e-6."""
    rank, keep, count = 4, 0.6, 20_000
    made = Cp(torch.Size((5, 4)), 1.0, keep, False)
    torch.manual_seed(0)
    drawn = torch.vmap(lambda _: made.drawn(torch.ones(1, rank)), randomness="different")(torch.zeros(count))[:, 0]
    law = chances(rank, keep)
    mean = keep + (1 - keep) ** rank / rank
    assert sum(chance * mask[0] for mask, chance in law.items()) == pytest.approx(mean)
    torch.testing.assert_close(drawn.amax(1), torch.full((count,), 1 / mean))
    seen, times = (drawn > 0).double().unique(dim=0, return_counts=True)
    found = {tuple(mask.tolist()): float(number) for mask, number in zip(seen, times, strict=True)}
    assert set(found) <= set(law)
    distance = sum((found.get(mask, 0.0) - count * chance) ** 2 / (count * chance) for mask, chance in law.items())
    assert distance < chi2.isf(1e-6, len(law) - 1)


@pytest.mark.parametrize(
    ("form", "shape", "rank"),
    [
        (Tucker, (16, 12, 3, 3), 1.0),
        (Tucker, (16, 1, 3, 3), 1.0),
        (Tucker, (12, 8, 5, 5), 0.8),
        (Tucker, (12, 8), 1.0),
        (Cp, (8, 6, 3, 3), 1.0),
    ],
)
def test_draws_are_unbiased_also_with_spared_modes(form: Any, shape: tuple[int, ...], rank: float) -> None:
    """8,000 draws: the slope of their mean on the weight is 1; off by 0.02 is five standard errors away or more."""
    made = form(torch.Size(shape), rank, 0.9, False).eval()
    stored = made.right_inverse(normal(*shape))
    made.randomised = False
    weight = made(*stored)
    made.randomised = True
    slopes = (many(made, stored, 8000) * weight).flatten(1).sum(1) / weight.square().sum()
    assert 5 * float(slopes.std()) / len(slopes) ** 0.5 < 0.02
    assert abs(float(slopes.mean()) - 1) < 0.02


def test_two_dropped_modes_scatter_as_much_as_both_together() -> None:
    """With orthogonal factors E ||W~ - W||^2 = (1 / (c_1 c_2) - 1) ||W||^2; 4,000 draws are within 1 % or so."""
    weight, keep = normal(10, 8, 3, 3), 0.8
    made = Tucker(weight.shape, 1.0, keep, False)
    off = (many(made, made.right_inverse(weight), 4000) - weight).flatten(1).square().sum(1) / weight.square().sum()
    first, second = (keep + (1 - keep) ** rank / rank for rank in (10, 8))
    assert 5 * float(off.std()) / len(off) ** 0.5 < 0.05
    assert float(off.mean()) == pytest.approx(1 / (first * second) - 1, abs=0.05)


@pytest.mark.parametrize("rank", [4, 8])
def test_what_dropping_adds_to_a_squared_loss_is_the_identity_of_its_components(rank: int) -> None:
    """One dropped mode, all masks: E (t - <X, W~>)^2 = (t - <X, W>)^2 + (1 - keep) / keep sum p_r^2, up to the chance
    that one component has to stay; with it, q the chance of two to stay and c that of one:
    (t - s)^2 + (1/c - q/c^2) sum p_r^2 - (1 - q/c^2) s^2.
    """
    keep, target = 0.7, 0.4
    x = normal(9, 8, seed=1).double()
    first, other = normal(9, rank, seed=2).double(), normal(8, rank, seed=3).double()
    parts = torch.stack([(x * torch.outer(first[:, r], other[:, r])).sum() for r in range(rank)])
    c, q, expected = keep + (1 - keep) ** rank / rank, keep**2, 0.0
    for mask, chance in chances(rank, keep).items():
        drawn = summed([first * torch.tensor(mask, dtype=torch.float64) / c, other])
        expected += chance * float((target - (x * drawn).sum()) ** 2)
    plain, squares = float((target - parts.sum()) ** 2), float(parts.square().sum())
    exact = plain + (1 / c - q / c**2) * squares - (1 - q / c**2) * float(parts.sum() ** 2)
    assert expected == pytest.approx(exact, rel=1e-9)
    assert expected == pytest.approx(plain + (1 - keep) / keep * squares, rel=10 * (1 - keep) ** rank)


def test_terms_of_trained_kernels_neither_cancel_nor_leave_holes() -> None:
    """Plain alternating least squares gives this kernel's terms 71 times its squared norm, and no better fit."""
    weight = (torch.rand(32, 16, 3, 3, generator=torch.Generator().manual_seed(0)) - 0.5) / 6
    made = Cp(weight.shape, 1.0, 0.5, False)
    stored = made.right_inverse(weight)
    terms = torch.stack([each.norm(dim=0) for each in stored]).prod(0)
    assert float(terms.square().sum()) < 2.5 * float(weight.square().sum())
    assert float((summed(stored) - weight).norm() / weight.norm()) < 0.2
    for form in (made, Tucker(weight.shape, 1.0, 0.5, False)):
        torch.manual_seed(0)
        factor = stored[0]
        assert (form.drawn(factor) == 0).all(0).any(), "some components dropped"
        assert (form(*form.right_inverse(weight)) != 0).all(), "and yet every entry of the kernel is there"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2))


def test_every_pass_has_another_kernel_and_the_silent_network_is_the_trained_one() -> None:
    model, x = net(), torch.rand(3, 1, 8, 8)
    expected = model(x)
    Tensorization(keep=0.9).attach(model)
    model.eval()
    assert not torch.equal(model(x), model(x))
    silence(model)
    assert torch.equal(model(x), model(x))
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)


def test_attacks_that_average_over_draws_get_a_draw_for_every_pass() -> None:
    model, x = net(), torch.rand(3, 1, 8, 8)
    Tensorization(keep=0.7).attach(model)
    stand_in = Surrogate(model.eval(), "fp32").refresh(model)
    passes = torch.stack([stand_in(x) for _ in range(20)])
    assert len(passes[:, 0, 0].unique()) > 10


def test_what_ships_are_the_factors_and_their_numbers_are_counted() -> None:
    model, method = net(), Tensorization(keep=1.0, rank=0.5, exclude=("0",))
    method.attach(model)
    core, *factors = originals(model[2])
    ranks = [3, 4, 2, 2]
    assert list(core.shape) == ranks
    total = sum(tensor.numel() for tensor in (core, *factors))
    assert total == 3 * 4 * 2 * 2 + 6 * 3 + 8 * 4 + 3 * 2 + 3 * 2
    structure = [{**spec_of(method), "include": ["2", "5"], "exclude": []}]
    left = finish(model, structure)
    assert left == structure
    again: Any = net()
    restructure(again, left, "here")
    again.load_state_dict(model.state_dict())
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(again(x), model(x))


def test_gradients_reach_the_factors_and_binary_kernels_pass_them_straight_through() -> None:
    model, plain = net(), net()
    method = Tensorization(keep=1.0, binary=True, include=("2",))
    method.attach(model)
    weight = model[2].weight
    assert len(weight[0].detach().abs().unique()) == 1
    torch.testing.assert_close(weight[0].detach().abs().max(), plain[2].weight[0].detach().abs().mean())
    direction = normal(*weight.shape)
    (weight * direction).sum().backward()
    core, *factors = originals(model[2])
    twin = [each.detach().clone().requires_grad_() for each in (core, *factors)]
    (multiplied(twin[0], twin[1:]) * direction).sum().backward()
    for mine, other in zip((core, *factors), twin, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_cp_kernels_fit_and_rank_one_is_no_trouble() -> None:
    model = net()
    method = Tensorization(form="cp", keep=1.0, rank=1.0, include=("2",))
    method.attach(model)
    error = (model[2].weight - net()[2].weight).norm() / net()[2].weight.norm()
    assert float(error.detach()) < 0.6
    assert isinstance(steps_on(model[2])[0], Cp)
    single = Cp(torch.Size((4, 3)), 1e-9, 0.5, False)
    assert single(*single.right_inverse(normal(4, 3))).shape == (4, 3)


@pytest.mark.parametrize("at_once", [1000, 7])
@pytest.mark.parametrize("binary", [False, True])
def test_with_per_sample_every_record_meets_one_of_the_kernels_there_are_and_not_the_same(
    binary: bool, at_once: int
) -> None:
    """One conv of 1 to 4 channels: only the 15 choices of the four output components can be drawn."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3))
    Tensorization(keep=0.6, binary=binary, per_sample=True).attach(model)
    layer: Any = model[0]
    layer.at_once = at_once
    x = normal(1, 1, 5, 5).expand(60, -1, -1, -1)
    (made,), (core, *factors) = steps_on(layer), originals(layer)
    c = 0.6 + 0.4**4 / 4
    kernels = [
        made.shipped(multiplied(core, [factors[0] * torch.tensor(mask) / c, *factors[1:]])) for mask in chances(4, 0.6)
    ]
    possible = torch.stack([nn.functional.conv2d(x[:1], kernel, layer.bias)[0] for kernel in kernels])
    distances = (model(x)[:, None] - possible).flatten(2).abs().amax(2)
    assert float(distances.amin(1).max().detach()) < 1e-5
    assert len(distances.argmin(1).unique()) > 5


def test_with_per_sample_the_mean_is_that_of_the_mean_network_and_gradients_reach_the_factors() -> None:
    model = nn.Sequential(nn.Linear(12, 8))
    expected = model(torch.ones(1, 12))
    Tensorization(keep=0.8, per_sample=True).attach(model)
    torch.manual_seed(0)
    answers = model(torch.ones(20_000, 12))
    error = answers.std(0) / len(answers) ** 0.5
    assert bool(((answers.mean(0) - expected).abs() < 6 * error).all())
    answers[:50].square().sum().backward()
    for stored in originals(model[0]):
        assert stored.grad is not None
        assert float(stored.grad.abs().sum()) > 0


def test_with_per_sample_batch_statistics_are_of_the_batch_and_the_network_ships_and_comes_back() -> None:
    model: Any = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 2))
    plain = copy.deepcopy(model).eval()
    method = Tensorization(keep=0.9, per_sample=True, include=("0", "3"))
    method.attach(model)
    x = torch.rand(6, 1, 8, 8)
    assert model.train()(x).shape == (6, 2)
    assert float(model[1].running_mean.abs().sum()) > 0
    assert model.eval()(x[:0]).shape == (0, 2)
    assert len(model(x[:1].expand(6, -1, -1, -1)).unique(dim=0)) > 1
    left = finish(model, [{**spec_of(method), "include": ["0", "3"], "exclude": []}])
    again: Any = copy.deepcopy(plain)
    restructure(again, left, "here")
    assert isinstance(again[0], PerRecord)
    again.load_state_dict(model.state_dict())
    copied = copy.deepcopy(again)
    silence(copied)
    plain.load_state_dict({name: t for name, t in model.state_dict().items() if "parametrizations" not in name}, False)
    torch.testing.assert_close(copied(x), plain(x), atol=1e-4, rtol=1e-4)
    assert not torch.equal(again(x), again(x)), "the copy was silenced alone"


def test_copies_and_bad_settings() -> None:
    model = net()
    Tensorization(keep=0.5).attach(model)
    torch.manual_seed(1)
    first = model(torch.ones(1, 1, 8, 8))
    torch.manual_seed(1)
    torch.testing.assert_close(copy.deepcopy(model)(torch.ones(1, 1, 8, 8)), first)
    with pytest.raises(BadValue, match=r"keep=0 must lie in \(0, 1\]"):
        Tensorization(keep=0)

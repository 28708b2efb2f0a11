"""Defensive tensorization: exact factors, unbiased draws, and the identity of what they add to a loss."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trivet.compression.compression import originals, steps_on
from trivet.compression.structure import finish, restructure
from trivet.compression.tensorization import Cp, Tensorization, Tucker, higher_order_svd, multiplied, silence, summed
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


@pytest.mark.parametrize("shape", [(16, 12, 3, 3), (16, 1, 3, 3), (12, 8)])
def test_draws_are_unbiased_also_with_spared_modes(shape: tuple[int, ...]) -> None:
    """4,000 draws: the slope of their mean on the weight is 1; off by 0.03 it would be eight deviations away."""
    torch.manual_seed(0)
    weight = normal(*shape)
    made = Tucker(weight.shape, 1.0, 0.8, False).eval()
    stored = made.right_inverse(weight)
    mean = torch.stack([made(*stored) for _ in range(4000)]).mean(0)
    slope = float((mean * weight).sum() / weight.square().sum())
    assert abs(slope - 1) < 0.03


def test_what_dropping_adds_to_a_squared_loss_is_the_identity_of_its_components() -> None:
    """One dropped mode, all 2^r masks: E (t - <X, W~>)^2 = (t - <X, W>)^2 + (1 - keep) / keep sum p_r^2."""
    keep, target = 0.7, 0.4
    weight, x = normal(5, 4), normal(5, 4, seed=1)
    made = Cp(weight.shape, 1.0, keep, False)
    made.terms = 4
    first, other = normal(5, 4, seed=2), normal(4, 4, seed=3)
    parts = torch.stack([(x * torch.outer(first[:, r], other[:, r])).sum() for r in range(4)])
    expected = 0.0
    for mask in itertools.product([0.0, 1.0], repeat=4):
        chance = keep ** sum(mask) * (1 - keep) ** (4 - sum(mask))
        drawn = summed([first * torch.tensor(mask) / keep, other])
        expected += chance * float((target - (x * drawn).sum()) ** 2)
    identity = (target - parts.sum()) ** 2 + (1 - keep) / keep * parts.square().sum()
    assert expected == pytest.approx(float(identity), rel=1e-4)


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


def test_copies_and_bad_settings() -> None:
    model = net()
    Tensorization(keep=0.5).attach(model)
    torch.manual_seed(1)
    first = model(torch.ones(1, 1, 8, 8))
    torch.manual_seed(1)
    torch.testing.assert_close(copy.deepcopy(model)(torch.ones(1, 1, 8, 8)), first)
    with pytest.raises(BadValue, match=r"keep=0 must lie in \(0, 1\]"):
        Tensorization(keep=0)

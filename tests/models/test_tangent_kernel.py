"""The tangent kernel against autodiff, closed forms and one step of gradient descent; what it costs is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from trivet.compression.masks import Masks
from trivet.errors import BadValue
from trivet.models.tangent_kernel import as_matrix, linearize, relative_distance, signs, tangent_kernel


class Shared(nn.Module):
    """One layer used twice, one that sees each record at several places, and one nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.places, self.idle = nn.Linear(4, 4), nn.Linear(2, 3), nn.Linear(4, 4)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.twice(self.twice(x.flatten(1)).tanh())
        self.idle(z)
        return self.out(self.places(z.view(len(x), 2, 2)).flatten(1).tanh())


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(4, 7), nn.ReLU(inplace=True), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)
    )


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 2, padding=1), nn.GroupNorm(1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3, bias=False)
    )


NETS = {"perceptron": perceptron, "convolution": convolution, "shared": Shared}


def made(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return NETS[kind]().double()


def records(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_autodiff(model: nn.Module, x: Tensor, other: Tensor, masks: dict[str, Tensor] | None = None) -> Tensor:
    parameters = dict(model.named_parameters())

    def jacobian(inputs: Tensor) -> Tensor:
        found: Any = jacrev(lambda at: functional_call(model, at, (inputs,)))(parameters)
        return torch.cat(
            [(each * (masks or {}).get(name, torch.ones(()))).flatten(2) for name, each in found.items()], 2
        )

    return torch.einsum("icp,jdp->ijcd", jacobian(x), jacobian(other))


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_the_product_of_jacobians_by_autodiff(kind: str, masked: bool) -> None:
    model, x, other = made(kind), records(4, 1), records(3, 2)
    draw = torch.Generator().manual_seed(3)
    masks = {}
    if masked:
        masks = {name: torch.rand(p.shape, generator=draw) < 0.5 for name, p in model.named_parameters()}
    found = tangent_kernel(linearize(model, x), linearize(model, other), masks)
    expected = by_autodiff(model, x, other, {name: each.double() for name, each in masks.items()})
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_dense_layers_take_the_closed_form_and_nothing_else_does() -> None:
    assert set(linearize(made("perceptron"), records(2)).factors) == {"1", "3", "5"}
    assert not linearize(made("perceptron"), records(2)).rows
    assert set(linearize(made("shared"), records(2)).factors) == {"out", "idle"}
    assert set(linearize(made("convolution"), records(2)).rows) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_of_a_linear_model_it_is_known_on_paper() -> None:
    """f = W x: K_m[i, j, c, d] = delta_cd sum_k m[c, k] x_i[k] x'_j[k]."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False)).double()
    mask = torch.rand(3, 4) < 0.6
    x, other = records(4, 1), records(5, 2)
    found = tangent_kernel(linearize(model, x), linearize(model, other), {"1.weight": mask})
    expected = torch.einsum("ck,ik,jk,cd->ijcd", mask.double(), x.flatten(1), other.flatten(1), torch.eye(3).double())
    torch.testing.assert_close(found, expected)


def test_the_last_bias_adds_one_where_the_outputs_agree() -> None:
    model = made("perceptron")
    without = {name: p for name, p in model.named_parameters() if name != "5.bias"}
    x = records(3)
    full = tangent_kernel(linearize(model, x), linearize(model, x))
    less = tangent_kernel(linearize(model, x, without), linearize(model, x, without))
    torch.testing.assert_close(full - less, torch.eye(3).double().expand(3, 3, 3, 3))


@settings(max_examples=15)
@given(seed=st.integers(0, 50), kind=st.sampled_from(sorted(NETS)))
def test_the_mixed_kernel_is_turned_by_turning_its_sides_and_the_plain_one_is_positive(seed: int, kind: str) -> None:
    model = made(kind, seed)
    here, there = linearize(model, records(3, seed)), linearize(model, records(3, seed + 100))
    mixed, turned = tangent_kernel(here, there), tangent_kernel(there, here)
    torch.testing.assert_close(mixed, turned.permute(1, 0, 3, 2))
    plain = as_matrix(tangent_kernel(here, here))
    assert float(torch.linalg.eigvalsh(plain)[0]) > -1e-9 * float(plain.diagonal().max())


def test_a_network_with_masks_on_it_has_the_kernel_of_the_masks() -> None:
    """The masked weights of the one are computed by parametrizations, those of the other are plain."""
    model, bare = made("perceptron"), made("perceptron")
    masks = Masks()
    masks.attach(model)
    chosen = {}
    for name, each in masks.maps(model).items():
        each.mask.copy_(torch.rand(each.mask.shape) < 0.4)
        chosen[f"{name}.weight"] = each.mask
        bare.get_parameter(f"{name}.weight").data.mul_(each.mask)
    x, other = records(3, 1), records(2, 2)
    attached = linearize(model, x)
    assert not attached.factors
    torch.testing.assert_close(
        tangent_kernel(attached, linearize(model, other)),
        tangent_kernel(linearize(bare, x), linearize(bare, other), chosen),
    )


@pytest.mark.parametrize("kind", ["perceptron", "convolution"])
def test_a_step_of_descent_moves_the_outputs_as_the_kernel_says(kind: str) -> None:
    """One full-batch step at X~ with rate h: f(X) changes by (-h / n) sum_j K(X, x~_j) g_j, up to O(h^2)."""
    torch.manual_seed(4)
    # Smooth, so that the error is that of the expansion.
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    if kind == "convolution":
        model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(2, 3)).double()
    x, attacked, targets = records(4, 1), records(4, 2), torch.eye(4, 3, dtype=torch.float64)
    masks = {name: torch.rand(p.shape) < 0.6 for name, p in model.named_parameters() if p.ndim > 1}
    start = {
        name: (p.detach() * masks[name] if name in masks else p.detach()).requires_grad_()
        for name, p in model.named_parameters()
    }
    outputs = functional_call(model, start, (attacked,))
    residual = (outputs - targets).detach()
    gradients = torch.autograd.grad((outputs - targets).square().sum() / 8, list(start.values()))
    kernel = tangent_kernel(linearize(model, x, start), linearize(model, attacked, start), masks)
    before = functional_call(model, start, (x,)).detach()

    @torch.no_grad()
    def error(rate: float) -> float:
        moved = {
            name: value - rate * gradient * masks.get(name, 1)
            for (name, value), gradient in zip(start.items(), gradients, strict=True)
        }
        change = functional_call(model, moved, (x,)) - before
        return float((change + rate / 4 * torch.einsum("ijcd,jd->ic", kernel, residual)).norm())

    assert error(1e-2) / error(5e-3) == pytest.approx(4, rel=0.05)
    assert error(1e-2) < 0.02 * 1e-2 * float(kernel.norm())


@pytest.mark.parametrize("kind", NETS)
def test_it_can_be_differentiated_in_the_parameters(kind: str) -> None:
    """A port of the method is known that detaches its Jacobians, and so trains without its kernel term."""
    model, x = made(kind), records(2)
    name = "out.weight" if kind == "shared" else next(n for n, p in model.named_parameters() if p.ndim > 1)
    at = {key: value.detach().clone().requires_grad_() for key, value in model.named_parameters()}

    def size() -> Tensor:
        one = linearize(model, x, at, create_graph=True)
        return tangent_kernel(one, one).square().mean()

    (gradient,) = torch.autograd.grad(size(), at[name])
    direction = torch.randn(gradient.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = []
    for step in (1e-6, -2e-6):
        at[name].data.add_(direction, alpha=step)
        found.append(float(size().detach()))
    along = float((gradient * direction).sum())
    assert abs(along) > 1e-3
    assert along == pytest.approx((found[0] - found[1]) / 2e-6, rel=1e-4)


@pytest.mark.parametrize("kind", ["perceptron", "convolution"])
def test_sketches_are_the_kernel_projected_and_their_mean_square_is_unbiased(kind: str) -> None:
    model, x, other = made(kind), records(3, 1), records(2, 2)
    whole = tangent_kernel(linearize(model, x), linearize(model, other))
    squares = []
    for draw in range(64):
        # All 8 x 8 pairs of sign vectors of three outputs: the mean over them is the expectation, exactly.
        v, w = (
            torch.tensor([[1.0 if part >> bit & 1 else -1.0] for bit in range(3)], dtype=torch.float64) / 3**0.5
            for part in divmod(draw, 8)
        )
        sketch = tangent_kernel(linearize(model, x, project=v), linearize(model, other, project=w))
        torch.testing.assert_close(sketch, torch.einsum("ijcd,cr,ds->ijrs", whole, v, w))
        squares.append(sketch.square().mean())
    torch.testing.assert_close(torch.stack(squares).mean(), whole.square().mean())


def test_signs_are_signs_of_their_own_purpose() -> None:
    drawn = signs(4, 3, 0, "left", 1)
    assert drawn.shape == (4, 3)
    assert set(drawn.flatten().tolist()) <= {0.5, -0.5}
    assert torch.equal(drawn, signs(4, 3, 0, "left", 1))
    assert not torch.equal(signs(40, 3, 0, "left", 1), signs(40, 3, 0, "right", 1))


def test_the_relative_distance_does_not_grow_with_the_kernel() -> None:
    kernel, other = torch.rand(2, 2, 3, 3), torch.rand(2, 2, 3, 3)
    torch.testing.assert_close(relative_distance(kernel, other), relative_distance(10 * kernel, 10 * other))
    assert float(relative_distance(other, other)) == 0
    assert float(relative_distance(0 * other, other)) == pytest.approx(1)


def test_too_much_is_refused_with_the_number_of_sketches_that_fits() -> None:
    model, x = made("convolution"), records(4)
    rows = 4 * (12 + 3 + 3 + 3) * 8  # bytes of one output's rows
    with pytest.raises(BadValue, match=r"for its 3 outputs, above the limit .*sketches=2\)"):
        linearize(model, x, limit=2 * rows)
    with pytest.raises(BadValue, match="take fewer records"):
        linearize(model, x, limit=rows - 1)
    assert linearize(model, x, project=torch.ones(3, 2).double(), limit=2 * rows).outputs.shape == (4, 3)
    one = linearize(made("perceptron"), x)
    with pytest.raises(BadValue, match="above the limit"):
        tangent_kernel(one, one, {"1.weight": torch.ones(7, 4)}, limit=1000)


def test_nothing_is_left_on_the_model() -> None:
    model = made("convolution").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    linearize(model, records(2), create_graph=True)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())

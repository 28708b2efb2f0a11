"""The activation at its joints, the forward pass as the double sum it is, and the gradient in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trivet.errors import BadValue
from trivet.models.patch_network import PatchNetwork, SmoothedReLU, patch_network


def bent(z: float, q: float, rho: float) -> float:
    """The three pieces as the theory writes them."""
    if z <= 0:
        return 0.0
    return z**q / (q * rho ** (q - 1)) if z <= rho else z - (1 - 1 / q) * rho


def network(rho: float = 0.5) -> PatchNetwork:
    generator = torch.Generator().manual_seed(3)
    return patch_network((2, 4, 5), 3, filters=6, q=3, rho=rho, spread=0.5, generator=generator).double()


@pytest.mark.parametrize(("q", "rho"), [(3.0, 0.2), (4.0, 1.0), (2.5, 0.7)])
def test_the_activation_has_the_three_pieces_and_no_kink_between_them(q: float, rho: float) -> None:
    act = SmoothedReLU(q, rho).double()
    z = torch.linspace(-1, 3, 401, dtype=torch.float64, requires_grad=True)
    value = act(z)
    torch.testing.assert_close(value, torch.tensor([bent(each, q, rho) for each in z.tolist()], dtype=torch.float64))
    (slope,) = torch.autograd.grad(value.sum(), z)
    expected = (z.detach() / rho).clamp(0, 1) ** (q - 1)
    torch.testing.assert_close(slope, expected)
    joints = torch.tensor([0.0, rho, 2 * rho], dtype=torch.float64, requires_grad=True)
    at = act(joints)
    torch.testing.assert_close(at.detach()[:2], torch.tensor([0.0, rho / q], dtype=torch.float64))
    (slope,) = torch.autograd.grad(at.sum(), joints)
    torch.testing.assert_close(slope, torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64))


def test_the_network_is_the_double_sum_over_filters_and_patches() -> None:
    net, x = network(), torch.randn(2, 2, 4, 5, dtype=torch.float64)
    found = net(x)
    for n in range(2):
        for i in range(3):
            rows = x[n].reshape(8, 5)
            expected = sum(bent(float(w @ row), 3, 0.5) for w in net.banks[i].detach() for row in rows)
            assert float(found[n, i].detach()) == pytest.approx(expected, rel=1e-10)


def test_the_gradient_of_the_loss_is_the_closed_form() -> None:
    """d CE / d w_{i,r} = (p_i - 1[i = y]) sum_p act'(<w_{i,r}, x_p>) x_p."""
    net, x, y = network(), torch.randn(1, 2, 4, 5, dtype=torch.float64), torch.tensor([1])
    logits = net(x)
    torch.nn.functional.cross_entropy(logits, y).backward()
    rows = x.reshape(8, 5)
    slope = ((net.banks.detach() @ rows.T) / 0.5).clamp(0, 1) ** 2
    residual = logits.detach().softmax(1)[0] - torch.eye(3, dtype=torch.float64)[1]
    expected: Tensor = residual[:, None, None] * (slope @ rows)
    torch.testing.assert_close(net.get_submodule("filters").weight.grad.view(3, 6, 5), expected)


def test_the_gradient_by_a_patch_no_filter_sees_is_exactly_zero() -> None:
    net = network()
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        net.get_submodule("filters").weight.abs_()
    x[0, 0, 0] = -x[0, 0, 0].abs()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(net(x)[0, 0], x)
    assert not gradient[0, 0, 0].any()
    assert gradient.any()


def test_first_weights_have_the_promised_spread() -> None:
    """The deviation of 40,000 draws is off by more than 3 % with odds below 1e-9 (its deviation is 0.35 %)."""
    net = patch_network((1, 2, 200), 4, filters=50, spread=0.02, generator=torch.Generator().manual_seed(0))
    assert float(net.banks.detach().std()) == pytest.approx(0.02, rel=0.03)
    assert net.banks.shape == (4, 50, 200)


@pytest.mark.parametrize("setting", [{"filters": 0}, {"q": 1.0}, {"rho": 0.0}, {"spread": -1.0}])
def test_impossible_settings_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(BadValue, match=f"{next(iter(setting))}="):
        patch_network((1, 4, 4), 2, **setting)

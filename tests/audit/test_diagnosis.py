"""Slope, curvature and stretch against closed forms and brute force, and the diagnosis an audit makes of them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from defences import QUICK
from torch import Tensor, nn

from trivet.audit.diagnosis import (
    BALL,
    PerSample,
    curvature,
    diagnose,
    finding,
    gradient_norm,
    local_lipschitz,
    rank_correlation,
)
from trivet.certify.certifier import ABSTAIN, Certificates
from trivet.certify.smoothing import Smoothing
from trivet.data.dataset import Dataset


def source() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.fixture
def linear() -> nn.Linear:
    layer = nn.Linear(6, 3).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(3, 6, generator=source()))
        layer.bias.zero_()
    return layer


def inputs(rows: int = 8, width: int = 6) -> Tensor:
    return 0.2 + 0.6 * torch.rand(rows, width, generator=source(), dtype=torch.float64)


def labels(rows: int = 8) -> Tensor:
    return torch.arange(rows) % 3


def starts(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=source(), dtype=x.dtype)


def network(activation: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(6, 9), activation, nn.Linear(9, 3)).double()


def brute_force(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """[B, D]: all eigenvalues of the full Hessian of the cross-entropy, ascending."""

    def one(row: Tensor, label: Tensor) -> Tensor:
        hessian: Any = torch.autograd.functional.hessian(
            lambda point: F.cross_entropy(model(point[None]), label[None]), row
        )
        return torch.linalg.eigvalsh(hessian)

    return torch.stack([one(row, label) for row, label in zip(x, y, strict=True)])


def test_the_gradient_of_a_linear_model_is_its_closed_form(linear: nn.Linear) -> None:
    """grad_x CE = W^T (p - e_y)."""
    x, y = inputs(), labels()
    expected = ((linear(x).softmax(1) - torch.eye(3)[y]) @ linear.weight).norm(dim=1)
    torch.testing.assert_close(gradient_norm(linear, x, y), expected.detach())


def test_the_curvature_of_a_linear_model_is_its_closed_form(linear: nn.Linear) -> None:
    """H = W^T (diag p - p p^T) W."""
    x, y = inputs(), labels()
    p = linear(x).softmax(1).detach()
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.linalg.eigvalsh(linear.weight.T @ middle @ linear.weight)[:, -1].detach()
    found = curvature(linear, x, y, starts(x), steps=200)
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU(), nn.SiLU()])
def test_the_curvature_of_a_network_is_that_of_its_full_hessian(activation: nn.Module) -> None:
    model, x, y = network(activation), inputs(), labels()
    exact = brute_force(model, x, y).abs().amax(1)
    found = curvature(model, x, y, starts(x), steps=400)
    assert found is not None
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=0)


def test_power_iteration_rises_to_the_largest_eigenvalue_and_never_above() -> None:
    model, x, y = network(nn.Tanh()), inputs(), labels()
    exact = brute_force(model, x, y).abs().amax(1)
    found = [curvature(model, x, y, starts(x), steps=steps) for steps in (1, 2, 5, 20)]
    rising = torch.stack([each for each in found if each is not None] + [exact])
    assert bool((rising.diff(dim=0) >= -1e-12).all())
    assert bool((rising[0] < 0.9 * exact).any())


def test_the_most_negative_eigenvalue_counts_by_its_size() -> None:
    """Logits (x_1 x_2, 0): at 0 the Hessian of CE with label 0 is -[[0, 1], [1, 0]] / 2, with eigenvalues 1/2, -1/2."""

    def saddle(x: Tensor) -> Tensor:
        return torch.stack([x[:, 0] * x[:, 1], torch.zeros(len(x))], 1)

    x = torch.zeros(3, 2)
    found = curvature(saddle, x, torch.zeros(3, dtype=torch.int64), torch.tensor([[1.0, 0.0], [0.3, -2.0], [1.0, 1.0]]))
    assert found is not None
    assert found.tolist() == pytest.approx([0.5] * 3)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(_context: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class Once(nn.Module):
    """A model with a gradient and no second one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return _Once.apply(self.model(x))


def test_a_model_without_second_derivative_has_no_curvature_and_the_rest(linear: nn.Linear) -> None:
    found = diagnose(Once(linear), inputs(), labels(), seed=0, batch_size=3)
    assert found.curvature is None
    assert bool((found.lipschitz > 0).all())
    assert bool((found.gradient > 0).all())


def test_the_lipschitz_constant_of_a_linear_map_stays_below_the_best_signs(linear: nn.Linear) -> None:
    """max over s in {-1, 1}^d of || W s ||_1 bounds it; the ratio is that of the very point returned."""
    x = inputs(40)
    found = local_lipschitz(linear, x, starts(x))
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=6)), dtype=torch.float64)
    most = float((signs @ linear.weight.detach().T).abs().sum(1).max())
    moved = found.x - x
    expected = (moved @ linear.weight.detach().T).abs().sum(1) / moved.abs().amax(1)
    torch.testing.assert_close(found.ratio, expected)
    assert float(found.ratio.max()) <= most * (1 + 1e-12)
    assert float(found.ratio.median()) > 0.8 * most
    assert float(moved.abs().max()) <= BALL * (1 + 1e-12)


def test_of_one_output_the_lipschitz_constant_is_the_l1_norm_of_its_row() -> None:
    """As ever from below: the ratio's gradient lets go of the farthest coordinate at every step."""
    row = torch.tensor([[3.0, -1.0, 2.0]], dtype=torch.float64)
    x = inputs(30, 3)
    found = local_lipschitz(lambda x: x @ row.T, x, starts(x)).ratio
    assert 0.95 * 6.0 < float(found.max()) <= 6.0 * (1 + 1e-12)


def test_points_stay_images_and_a_corner_of_the_cube_is_no_trouble() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.005, 0.995]])
    found = local_lipschitz(lambda x: 2 * x, x, torch.tensor([[-1.0, -1.0], [1.0, 1.0], [1.0, -1.0]]))
    assert float(found.x.min()) >= 0
    assert float(found.x.max()) <= 1
    assert bool(found.ratio.isfinite().all())
    assert bool((found.ratio <= 4 * (1 + 1e-5)).all())


def test_the_answer_depends_on_no_batch_size_and_changes_nothing(plain: nn.Module, test_part: Dataset) -> None:
    batch = test_part.batch(torch.arange(30))
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    stream = torch.get_rng_state()
    whole, parts = (diagnose(plain, batch.inputs, batch.labels, seed=0, batch_size=size) for size in (30, 7))
    for one, other in zip(vars(whole).values(), vars(parts).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-6)  # float32, and steps along signs
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())
    assert all(parameter.grad is None for parameter in plain.parameters())


def test_rank_correlation_is_that_of_the_published_formula() -> None:
    """1 - 6 sum d^2 / (n (n^2 - 1)) without ties; scipy's with them; none for a constant."""
    from scipy.stats import spearmanr

    a, b = torch.tensor([3.0, 1.0, 4.0, 1.5, 9.0]).double(), torch.tensor([2.0, 7.0, 1.0, 8.0, 3.0]).double()
    ranks = torch.tensor([[3, 1, 4, 2, 5], [2, 4, 1, 5, 3]]).double()
    assert rank_correlation(a, b) == pytest.approx(1 - 6 * float((ranks[0] - ranks[1]).square().sum()) / (5 * 24))
    assert rank_correlation(a, a.exp()) == pytest.approx(1.0)
    tied = torch.tensor([0.0, 0.0, 1.0, 1.0, 2.0]).double()
    assert rank_correlation(a, tied) == pytest.approx(float(spearmanr(a, tied).statistic))
    assert rank_correlation(a, torch.zeros(5).double()) is None


def test_only_right_certificates_have_a_radius_and_what_is_not_finite_is_left_out() -> None:
    certificates = Certificates(
        torch.arange(4), torch.tensor([0, 1, ABSTAIN, 2]), torch.tensor([0.5, 0.25, 0.0, 1.0]).double(), "L2", 0.0, ()
    )
    nan = torch.tensor([1.0, 2.0, 3.0, torch.nan]).double()
    found = finding(PerSample(nan, None, nan + 1), certificates, torch.tensor([0, 0, 1, 2]), 1.0)
    assert found.radius == (0.5, 0.0, 0.0)
    assert (found.gradient, found.lipschitz, found.curvature) == ((1.0, 2.0, 3.0), (2.0, 3.0, 4.0), None)
    assert found.left_out == 1
    assert found.rank_correlation["gradient"] == pytest.approx(-(3**0.5) / 2)
    assert "curvature" not in found.rank_correlation


def test_an_audit_diagnoses_the_records_it_certifies(plain: nn.Module, test_part: Dataset) -> None:
    audit = replace(QUICK, points=40, curve=(0.0,), certificate=Smoothing(0.25, n=200), certificate_points=30)
    found, _ = replace(audit, diagnosis=20).run(plain, test_part, seed=0, name="plain", source="memory")
    assert found.certificate is not None
    assert found.diagnosis is not None
    batch = test_part.batch(torch.arange(20))
    assert found.diagnosis.gradient == pytest.approx(
        gradient_norm(plain, batch.inputs, batch.labels).tolist(), rel=1e-4, abs=1e-9
    )
    assert len(found.diagnosis.radius) == 20
    assert max(found.diagnosis.radius) <= found.certificate.curve[-1].radius
    without, _ = replace(audit, diagnosis=0).run(plain, test_part, seed=0, name="plain", source="memory")
    assert without.diagnosis is None


def test_a_randomised_model_and_one_without_gradient_are_not_diagnosed(plain: nn.Module, test_part: Dataset) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = plain

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x + 0.1 * torch.randn_like(x))

    class Stepped(Noisy):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return self.model(x)

    audit = replace(QUICK, points=10, curve=(0.0,), certificate=Smoothing(0.25, n=100), certificate_points=5)
    for model in (Noisy(), Stepped()):
        found, _ = audit.run(model, test_part, seed=0, name="model", source="memory")
        assert found.diagnosis is None
        assert found.certificate is not None

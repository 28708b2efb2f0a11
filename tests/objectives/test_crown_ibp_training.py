"""CROWN-IBP's loss against linear bounds by hand, the course of beta, and loss fusion against its written form."""

from __future__ import annotations

import pytest
import torch
from interval_rules import ball, by_hand, merged_margins, worst_loss
from torch import Tensor, nn

from trivet.data.dataset import Batch
from trivet.errors import BadValue
from trivet.objectives.crown_ibp import CrownIbp, chords
from trivet.objectives.ibp import Ibp
from trivet.objectives.objective import Progress
from trivet.objectives.plain import Plain
from trivet.threats.linf import Linf

END = Progress(step=9, steps=10, epoch=9.0, seed=7)
MIDDLE = Progress(step=5, steps=10, epoch=5.0, seed=7)
EPS = 0.1


@pytest.fixture
def shallow() -> nn.Sequential:
    """One hidden layer: what CROWN does is a formula."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 4)).double()


def margins_by_hand(net: nn.Sequential, batch: Batch, rows: Tensor, slope: str, eps: float = EPS) -> Tensor:
    """Lower bounds of `rows` [B, S, K] @ logits: every unit replaced by one of its two lines, then the least value."""
    lower, upper = (each.flatten(1) for each in ball(batch, eps))
    first, last = net[1], net[3]
    found = []
    for number in range(len(rows)):
        low, high = (each[number] for each in by_hand(net[:2], *ball(batch, eps))[-1])
        for row in rows[number]:
            weight, constant = torch.zeros(32).double(), row @ last.bias
            for unit, coefficient in enumerate(row @ last.weight):
                chord = high[unit] / (high[unit] - low[unit])
                if low[unit] >= 0:
                    steep, offset = 1.0, 0.0
                elif high[unit] <= 0:
                    steep, offset = 0.0, 0.0
                elif coefficient < 0:
                    steep, offset = chord, -chord * low[unit]
                else:
                    lines = {"zero": 0.0, "one": 1.0, "same": chord, "adaptive": float(high[unit] > -low[unit])}
                    steep, offset = lines[slope], 0.0
                weight = weight + coefficient * steep * first.weight[unit]
                constant = constant + coefficient * (steep * first.bias[unit] + offset)
            found.append(torch.where(weight >= 0, weight * lower[number], weight * upper[number]).sum() + constant)
    return torch.stack(found).view(rows.shape[:2])


def rows_by_hand(batch: Batch) -> Tensor:
    eye = torch.eye(4).double()
    return torch.stack([torch.stack([eye[y] - eye[j] for j in range(4) if j != y]) for y in batch.labels.tolist()])


@pytest.mark.parametrize("slope", ["adaptive", "zero", "one", "same"])
def test_with_the_whole_weight_on_backward_bounds_the_loss_is_theirs(slope, shallow, exact_batch) -> None:
    objective = CrownIbp(Linf(EPS), beta_end=1.0, kappa_end=0.0, slope=slope)
    found = objective(shallow, exact_batch, END).per_example
    expected = worst_loss(margins_by_hand(shallow, exact_batch, rows_by_hand(exact_batch), slope))
    torch.testing.assert_close(found, expected)


def test_in_the_middle_of_the_ramp_the_margins_are_mixed_half_and_half(shallow, exact_batch) -> None:
    objective = CrownIbp(Linf(EPS), train_eps=2 * EPS, ramp=(0.0, 1.0), kappa_end=0.0, slope="zero")
    backward = margins_by_hand(shallow, exact_batch, rows_by_hand(exact_batch), "zero")
    forward = merged_margins(shallow, *ball(exact_batch, EPS), exact_batch.labels)
    robust = objective(shallow, exact_batch, MIDDLE).log["robust"]
    torch.testing.assert_close(robust, worst_loss(0.5 * backward + 0.5 * forward).detach())
    assert not torch.allclose(backward, forward)


def test_beta_ends_where_it_is_told(rectified, exact_batch) -> None:
    ibp = Ibp(Linf(EPS))(rectified, exact_batch, END).per_example
    torch.testing.assert_close(CrownIbp(Linf(EPS))(rectified, exact_batch, END).per_example, ibp)
    kept = CrownIbp(Linf(EPS), beta_end=0.5)(rectified, exact_batch, END).per_example
    assert not torch.allclose(kept, ibp)


@pytest.mark.parametrize("fusion", [False, True])
def test_the_loss_is_passed_by_no_corner_of_the_box(fusion, rectified, exact_batch) -> None:
    objective = CrownIbp(Linf(EPS), beta_end=1.0, kappa_end=0.0, fusion=fusion)
    bound = objective(rectified, exact_batch, END).per_example
    lower, upper = ball(exact_batch, EPS)
    for _ in range(300):
        points = lower + (upper - lower) * torch.rand_like(lower).round()
        losses = nn.functional.cross_entropy(rectified(points), exact_batch.labels, reduction="none")
        assert (losses <= bound + 1e-12).all()


@pytest.mark.parametrize("fusion", [False, True])
def test_without_a_radius_it_is_plain_training(fusion, rectified, exact_batch) -> None:
    plain = Plain()(rectified, exact_batch, END).per_example
    for eps in (0.0, 1e-12):
        objective = CrownIbp(Linf(eps), beta_end=1.0, fusion=fusion)
        torch.testing.assert_close(objective(rectified, exact_batch, END).per_example, plain, rtol=1e-6, atol=1e-6)


def test_fusion_is_the_written_formula(shallow, exact_batch) -> None:
    """log(1 + sum o_j - min(c z)), without the scaling that keeps it in range."""
    rows = rows_by_hand(exact_batch)
    low = merged_margins(shallow, *ball(exact_batch, EPS), exact_batch.labels)
    with torch.no_grad():
        negated = nn.Sequential(*shallow[:3], nn.Linear(12, 4).double())
        negated[3].weight.copy_(-shallow[3].weight)
        negated[3].bias.copy_(-shallow[3].bias)
    high = -merged_margins(negated, *ball(exact_batch, EPS), exact_batch.labels)
    slope = ((-high).exp() - (-low).exp()) / (high - low)
    offset = (-low).exp() - slope * low
    c = -(slope[:, :, None] * rows).sum(1, keepdim=True)
    least = margins_by_hand(shallow, exact_batch, c, "adaptive")[:, 0]
    objective = CrownIbp(Linf(EPS), beta_end=1.0, kappa_end=0.0, fusion=True)
    found = objective(shallow, exact_batch, END).per_example
    torch.testing.assert_close(found, (1 + offset.sum(1) - least).log())


def test_chords_lie_above_the_exponential_and_touch_it_at_both_ends() -> None:
    lower, upper = torch.tensor([[-3.0, 0.5, 2.0]]).double(), torch.tensor([[1.0, 0.5, 2.0 + 1e-9]]).double()
    slope, offset, scale = chords(lower, upper)
    assert scale.tolist() == [3.0]
    for share in (0.0, 0.3, 1.0):
        m = lower + share * (upper - lower)
        gap = slope * m + offset - (-m - 3.0).exp()
        assert (gap >= -1e-12).all()
        assert float(gap[0, 0]) > 0.05 if share == 0.3 else float(gap[0, 0]) == pytest.approx(0.0, abs=1e-12)


def test_fusion_stays_finite_for_a_network_without_any_sense(rectified, exact_batch, gradients) -> None:
    """Interval margins of minus thousands: their exponentials overflow unless they are scaled."""
    for layer in (rectified[0], rectified[2], rectified[5], rectified[7]):
        layer.weight.data *= 12.0
    rectified.float()
    batch = Batch(exact_batch.inputs.float(), exact_batch.labels, exact_batch.index)
    found = CrownIbp(Linf(0.5), beta_end=1.0, fusion=True)(rectified, batch, END).per_example
    assert found.max() > 1000
    assert all(each.isfinite().all() for each in gradients(rectified, found))


def test_the_gradient_passes_through_relaxations_and_intervals(rectified, exact_batch) -> None:
    objective, weight = CrownIbp(Linf(EPS), beta_end=0.7, slope="zero"), rectified[2].weight

    def loss() -> Tensor:
        return objective(rectified, exact_batch, END).per_example.mean()

    (gradient,) = torch.autograd.grad(loss(), weight)
    values = []
    for step in (1e-6, -2e-6):
        weight.data[1, 2, 0, 1] += step
        values.append(loss().item())
    assert float(gradient[1, 2, 0, 1]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


@pytest.mark.parametrize("wrong", [{"beta_end": 1.1}, {"slope": "steep"}])
def test_wrong_settings_are_refused_by_name(wrong) -> None:
    with pytest.raises(BadValue, match=next(iter(wrong))):
        CrownIbp(Linf(0.1), **wrong)

"""Multi steepest descent: inside the union, the best of all it saw, and exact where the answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trivet.data.dataset import Batch
from trivet.errors import BadValue
from trivet.objectives.msd_at import MsdAt
from trivet.objectives.objective import Progress
from trivet.threats.l1 import L1
from trivet.threats.l2 import L2
from trivet.threats.linf import Linf
from trivet.threats.losses import cross_entropy
from trivet.threats.pgd import ascend
from trivet.threats.rotation_translation import RotationTranslation
from trivet.threats.union import Union

NORMS = Union((Linf(0.1), L1(1.0, quantile=1.0), L2(0.4)))


def test_its_points_lie_in_the_union(convnet, batch, progress) -> None:
    found = MsdAt(NORMS, steps=6).perturb(convnet, batch, progress)
    assert bool(NORMS.contains(found, batch.inputs).all())
    assert not found.requires_grad


def test_of_one_ball_it_is_the_best_iterate_of_pgd_from_the_input(mlp, batch, progress) -> None:
    x, y, net = batch.inputs, batch.labels, mlp.eval()
    found = MsdAt(Linf(0.1), steps=5).perturb(net, batch, progress)

    def iterate(steps: int) -> torch.Tensor:
        return ascend(net, x, x, lambda z: cross_entropy(z, y), threat=Linf(0.1), steps=steps, step_size=0.05)

    with torch.no_grad():
        best = torch.stack([cross_entropy(net(iterate(steps)), y) for steps in range(1, 6)]).amax(0)
        torch.testing.assert_close(cross_entropy(net(found), y), best)


@pytest.mark.parametrize("weight", [(1.0,) * 8, (10.0,) + (0.1,) * 7, (3.0, 3.0) + (0.3,) * 6])
def test_of_a_linear_model_it_reaches_the_best_ball(weight: tuple[float, ...]) -> None:
    """The rise is eps ||w||_* of the ball: l_inf wins on even weights, l_1 on one large, l_2 on two."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 2, bias=False)).double()
    w = torch.tensor(weight, dtype=torch.float64)
    net[1].weight.data = torch.stack((torch.zeros_like(w), w))
    batch = Batch(torch.full((1, 1, 2, 4), 0.5, dtype=torch.float64), torch.tensor([0]), torch.tensor([0]))
    union = Union((Linf(0.05), L1(0.2, quantile=1.0), L2(0.15)))
    rises = [0.05 * w.sum(), 0.2 * w.max(), 0.15 * w.norm()]
    found = MsdAt(union, steps=40).perturb(net, batch, Progress(0, 1, 0.0, 0))
    rise = float((found - batch.inputs).flatten() @ w)
    assert rise <= float(max(rises)) + 1e-9
    assert rise == pytest.approx(float(max(rises)), rel=0.02)


def test_without_a_radius_it_is_plain_training(mlp, batch, progress) -> None:
    none = MsdAt(NORMS.scaled(0.0), steps=2)(mlp, batch, progress).per_example
    torch.testing.assert_close(none, cross_entropy(mlp(batch.inputs), batch.labels))


def test_step_sizes_are_each_members_own(mlp, batch, progress) -> None:
    still = MsdAt(NORMS, steps=3, step_sizes=(0.0, 0.0, 0.0)).perturb(mlp, batch, progress)
    assert torch.equal(still, batch.inputs)
    only = MsdAt(NORMS, steps=1, step_sizes=(0.0, 0.3, 0.0)).perturb(mlp, batch, progress) - batch.inputs
    assert bool(((only != 0).flatten(1).sum(1) <= 1).all())
    assert bool((only != 0).any())


@pytest.mark.parametrize(
    ("threat", "settings", "message"),
    [
        (NORMS, {"steps": 0}, "steps=0"),
        (NORMS, {"step_sizes": (0.1,)}, "step_sizes="),
        (Union((Linf(0.1), RotationTranslation())), {}, "train with max_at or avg_at"),
    ],
)
def test_wrong_settings_are_refused_by_name(threat, settings, message) -> None:
    with pytest.raises(BadValue, match=message):
        MsdAt(threat, **settings)

"""The claim of the theory at small size, the analysed attack step by hand, and what the log says of the filters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trivet.data.dataset import Batch
from trivet.data.patches import UNIT, features, patches
from trivet.errors import BadValue
from trivet.models.patch_network import PatchNetwork, patch_network
from trivet.objectives.feature_learning import FeatureLearning, alignments
from trivet.objectives.objective import Progress
from trivet.objectives.plain import Plain
from trivet.randomness import generator
from trivet.threats.patch_l2 import PatchL2

EPS = 0.5 * UNIT
START = Progress(step=0, steps=1, epoch=0.0, seed=0)


def network(seed: int, spread: float = 0.02) -> PatchNetwork:
    stream = generator(seed, "init")
    return patch_network((1, 12, 40), 3, spread=spread, mean=[0.5], std=[0.125], generator=stream)


def whole(draw: int) -> Batch:
    records = patches(draw=draw).train
    return records.batch(torch.arange(len(records)))


def trained(steps: int, seed: int, updates: int = 300) -> PatchNetwork:
    """Full-batch gradient descent at rate 0.3, the recipe's, for fewer steps."""
    net, batch = network(seed), whole(seed)
    objective = FeatureLearning(PatchL2(EPS), steps=steps, draw=seed)
    optimizer = torch.optim.SGD(net.parameters(), 0.3)
    for step in range(updates):
        optimizer.zero_grad()
        objective(net, batch, Progress(step, updates, step, seed)).per_example.mean().backward()
        optimizer.step()
    return net


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_adversarial_training_learns_robust_features_and_standard_training_the_others(seed: int) -> None:
    (u, v), (u_adv, v_adv) = (alignments(trained(steps, seed), seed) for steps in (0, 1))
    assert u_adv.mean() > u.mean()
    assert v_adv.mean() < 0.5 * v.mean()


def test_the_attack_on_a_standard_network_erases_the_non_robust_feature() -> None:
    """d_p points along -v_y (cosine above 0.98) in the patches that show v_y."""
    net, batch = trained(0, 0), whole(0)
    moved = FeatureLearning(PatchL2(EPS), steps=1).perturb(net, batch, START) - batch.inputs
    u, v = (each.float() for each in features(3, 40))
    x = (batch.inputs - 0.5).squeeze(1)
    weak = torch.einsum("npd,nd->np", x, u[batch.labels]).abs() < 0.05
    cosine = torch.cosine_similarity(moved.squeeze(1), -v[batch.labels][:, None].expand_as(x), dim=-1)
    assert float(cosine[weak].mean()) > 0.98


def test_one_step_is_the_normalised_gradient_patch_by_patch() -> None:
    net, batch = network(0, spread=0.3), whole(0)
    moved = FeatureLearning(PatchL2(EPS), steps=1).perturb(net, batch, START) - batch.inputs
    x = batch.inputs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(net(x), batch.labels, reduction="sum"), x)
    expected: Tensor = EPS * gradient / gradient.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("objective", [FeatureLearning(PatchL2(0.0), steps=3), FeatureLearning(PatchL2(EPS), steps=0)])
def test_without_radius_or_without_steps_it_is_standard_training(objective: FeatureLearning) -> None:
    net, batch = network(0, spread=0.3), whole(0)
    found = objective(net, batch, START).per_example
    assert torch.equal(found, Plain()(net, batch, START).per_example)


def test_the_log_says_how_far_features_are_learnt() -> None:
    """Filters that are the features themselves, at known lengths."""
    net = network(0)
    u, v = (each.float() for each in features(3, 40))
    with torch.no_grad():
        weight = net.get_submodule("filters").weight.view(3, 12, 40)
        weight.zero_()
        weight[:, 0], weight[:, 5], weight[0, 7] = 2.0 * u, 0.5 * v, 3.0 * u[1]
    robust, other = alignments(net)
    torch.testing.assert_close(robust, torch.full((3,), 2.0))
    torch.testing.assert_close(other, torch.full((3,), 0.5))
    log = FeatureLearning(PatchL2(EPS))(net, whole(0), START).log
    assert float(log["robust_features"]) == pytest.approx(2.0)
    assert float(log["non_robust_features"]) == pytest.approx(0.5)
    other_draw, _ = alignments(net, draw=1)
    assert (other_draw < 1.9).all()


def test_a_network_without_filters_is_trained_alike_and_measured_not_at_all(mlp, batch) -> None:
    found = FeatureLearning(PatchL2(0.1))(mlp, batch, START)
    assert found.log == {}
    assert (found.per_example > Plain()(mlp, batch, START).per_example).all()


def test_negative_steps_are_refused() -> None:
    with pytest.raises(BadValue, match="steps=-1 must not be negative"):
        FeatureLearning(PatchL2(0.1), steps=-1)


def test_from_the_record_sleeping_filters_show_no_way_and_a_random_start_goes_away_from_it() -> None:
    """Filters that every patch meets at a negative angle have no gradient at the record itself."""
    net, batch = network(0), whole(0)
    with torch.no_grad():
        net.get_submodule("filters").weight.copy_(torch.cat(features(3, 40)).sum(0).expand(36, 40).neg() * 0.1)
    threat = PatchL2(1.0 * UNIT)
    still = FeatureLearning(threat, steps=1).perturb(net, batch, START)
    moved = FeatureLearning(threat, steps=1, step_size=0.0, random_start=True).perturb(net, batch, START)
    assert torch.equal(still, batch.inputs)
    assert threat.contains(moved, batch.inputs).all()
    assert ((moved - batch.inputs).norm(dim=-1) > 0.99 * UNIT).all()

"""Targets against the rules of each policy, the pull against a linear closed form, and the ends of each knob."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from trivet.data.dataset import Batch
from trivet.data.hierarchy import Hierarchy
from trivet.errors import BadValue
from trivet.objectives.mistake_severity import MistakeSeverity
from trivet.objectives.objective import Progress
from trivet.objectives.pgd_at import PgdAt
from trivet.objectives.plain import Plain
from trivet.threats.linf import Linf

TREE = Hierarchy(tuple("abcdef"), [[["a", "b"], "c"], ["d", "e"], "f"])
FOUR = Hierarchy(tuple("abcd"), [["a", "b"], ["c", "d"]])
EPS = Linf(0.1)
POLICIES = ("dissimilar", "similar", "any")
ALLOWED = {
    "dissimilar": {0: {3, 4, 5}, 1: {3, 4, 5}, 2: {3, 4, 5}, 3: {0, 1, 2, 5}, 4: {0, 1, 2, 5}, 5: {0, 1, 2, 3, 4}},
    "similar": {0: {1}, 1: {0}, 2: {0, 1}, 3: {4}, 4: {3}, 5: {0, 1, 2, 3, 4}},
    "any": {label: set(range(6)) - {label} for label in range(6)},
}
DRAWS = 3000


def drawn(objective: MistakeSeverity, label: int, count: int = DRAWS, step: int = 0) -> torch.Tensor:
    return objective.targets(torch.full((count,), label), Progress(step, 10, 0.0, seed=1))


@pytest.mark.parametrize("policy", POLICIES)
def test_targets_are_spread_evenly_over_the_classes_of_the_policy_and_nothing_else(policy: str) -> None:
    """False alarm: 6 labels x 3 policies x at most 5 classes at 6 standard deviations each, below 2e-7."""
    for label, allowed in ALLOWED[policy].items():
        share = torch.bincount(drawn(MistakeSeverity(EPS, policy=policy, hierarchy=TREE), label), minlength=6) / DRAWS
        assert set(share.nonzero().flatten().tolist()) == allowed
        p = 1 / len(allowed)
        assert all(abs(float(share[j]) - p) <= 6 * (p * (1 - p) / DRAWS) ** 0.5 for j in allowed)


@pytest.mark.parametrize(("policy", "sign"), [("dissimilar", 1.0), ("similar", -1.0)])
def test_the_soft_choice_has_the_stated_odds(policy: str, sign: float) -> None:
    """False alarm: 10 shares at 6 standard deviations, below 3e-8."""
    kappa, label = 0.7, 3
    weight = torch.exp(sign * kappa * TREE.distances[label].double())
    weight[label] = 0
    share = torch.bincount(drawn(MistakeSeverity(EPS, policy=policy, kappa=kappa, hierarchy=TREE), label), minlength=6)
    for p, got in zip((weight / weight.sum()).tolist(), (share / DRAWS).tolist(), strict=True):
        assert abs(got - p) <= 6 * (p * (1 - p) / DRAWS) ** 0.5


def test_a_large_kappa_is_the_hard_choice_and_kappa_0_is_any() -> None:
    for policy in ("dissimilar", "similar"):
        hard, soft, none = (
            MistakeSeverity(EPS, policy=policy, kappa=kappa, hierarchy=TREE).log_odds().softmax(1)
            for kappa in (None, 60.0, 0.0)
        )
        torch.testing.assert_close(soft, hard)
        torch.testing.assert_close(none, MistakeSeverity(EPS, policy="any", hierarchy=TREE).log_odds().softmax(1))


def test_targets_are_drawn_anew_in_each_step_and_never_look_at_other_records() -> None:
    objective, labels = MistakeSeverity(EPS, hierarchy=TREE), torch.arange(60) % 6
    here, again, later = (objective.targets(labels, Progress(step, 10, 0.0, seed=1)) for step in (0, 0, 1))
    assert torch.equal(here, again)
    assert not torch.equal(here, later)
    other = labels.clone()
    other[30:] = (labels[30:] + 1) % 6
    assert torch.equal(objective.targets(other, Progress(0, 10, 0.0, seed=1))[:30], here[:30])


def linear(classes: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(32, classes)).double()


def test_the_pull_reaches_the_corner_where_a_linear_model_of_two_classes_likes_the_target_best(exact_batch) -> None:
    """CE(z, t) of two classes falls with z_t - z_y alone, which is linear: its least is at x + eps sign(w_t - w_y)."""
    net, labels = linear(2), exact_batch.labels % 2
    batch = Batch(0.2 + 0.6 * exact_batch.inputs, labels, exact_batch.index)
    found = MistakeSeverity(EPS, hierarchy=Hierarchy(("a", "b"), ["a", "b"])).perturb(net, batch, Progress(0, 1, 0, 0))
    slope = (net[1].weight[1 - labels] - net[1].weight[labels]).view_as(batch.inputs)
    torch.testing.assert_close(found, batch.inputs + 0.1 * slope.sign())


@pytest.mark.parametrize("policy", POLICIES)
def test_targets_become_likelier_than_without_an_attack(policy: str, exact_batch, progress) -> None:
    net, objective = linear(4), MistakeSeverity(EPS, policy=policy, hierarchy=FOUR)
    aim = objective.targets(exact_batch.labels, progress)
    before, after = (
        net(x).log_softmax(1).gather(1, aim[:, None])
        for x in (exact_batch.inputs, objective.perturb(net, exact_batch, progress))
    )
    assert bool((after > before).all())


def test_with_two_classes_all_policies_are_one(exact_batch, progress) -> None:
    net, batch = linear(2), Batch(exact_batch.inputs, exact_batch.labels % 2, exact_batch.index)
    pair = Hierarchy(("a", "b"), ["a", "b"])
    losses = [
        MistakeSeverity(EPS, policy=policy, hierarchy=pair)(net, batch, progress).per_example for policy in POLICIES
    ]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])
    torch.testing.assert_close(losses[0], PgdAt(EPS)(net, batch, progress).per_example)  # there is one other class


@pytest.mark.parametrize("policy", POLICIES)
def test_without_a_radius_or_with_clean_records_alone_it_is_plain_training(policy: str, mlp, batch, progress) -> None:
    plain = Plain()(mlp, batch, progress).per_example
    still = MistakeSeverity(Linf(0.0), policy=policy, hierarchy=FOUR)
    torch.testing.assert_close(still(mlp, batch, progress).per_example, plain)
    clean = MistakeSeverity(EPS, policy=policy, clean_weight=1.0, hierarchy=FOUR)
    torch.testing.assert_close(clean(mlp, batch, progress).per_example, plain)


def test_the_weight_mixes_the_two_losses(mlp, batch, progress) -> None:
    ends = [
        MistakeSeverity(EPS, clean_weight=weight, hierarchy=FOUR)(mlp, batch, progress).per_example
        for weight in (0.0, 0.25, 1.0)
    ]
    torch.testing.assert_close(ends[1], 0.75 * ends[0] + 0.25 * ends[2])


def test_losses_may_be_mapped_over_records_for_private_gradients(mlp, batch, progress) -> None:
    objective = MistakeSeverity(EPS, clean_weight=0.5, hierarchy=FOUR)
    perturbed = objective.perturb(mlp, batch, progress)

    def alone(x: torch.Tensor, label: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
        record = Batch(x[None], label[None], torch.zeros(1, dtype=torch.int64))
        return objective.losses(mlp, record, moved[None], progress).per_example[0]

    mapped = torch.func.vmap(alone)(batch.inputs, batch.labels, perturbed)
    torch.testing.assert_close(mapped, objective.losses(mlp, batch, perturbed, progress).per_example)


def test_a_tree_of_other_classes_than_the_model_has_is_refused(mlp, batch, progress) -> None:
    with pytest.raises(BadValue, match="model's 4 classes, not of 6"):
        MistakeSeverity(EPS, hierarchy=TREE)(mlp, batch, progress)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"policy": "near"}, "policy='near' must be one of"),
        ({"kappa": -1.0}, "kappa=-1.0 must not be negative"),
        ({"policy": "any", "kappa": 1.0}, "kappa=1.0 must be left out"),
        ({"clean_weight": 1.5}, "clean_weight=1.5 must lie in"),
        ({"steps": 0}, "steps=0 must be"),
    ],
)
def test_wrong_settings_are_refused(wrong, said: str) -> None:
    with pytest.raises(BadValue, match=said):
        replace(MistakeSeverity(EPS, hierarchy=TREE), **wrong)

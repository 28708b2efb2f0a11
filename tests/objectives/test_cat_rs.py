"""CAT-RS by hand: how many draws are trained on, the worst attacked one, and what the attack may do to the noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from scipy.stats import binom, chisquare
from torch import nn

from trivet.data.dataset import Batch
from trivet.errors import BadValue
from trivet.objectives.cat_rs import CatRs, bottom_mean, divergence, renormalised, votes
from trivet.objectives.gaussian import Gaussian
from trivet.objectives.objective import Progress


@pytest.fixture
def trained(mlp, batch) -> nn.Module:
    optimizer = torch.optim.Adam(mlp.parameters(), 0.01)
    for step in range(80):
        optimizer.zero_grad()
        Gaussian(0.1, samples=4)(mlp, batch, Progress(step, 80, 0.0, 0)).per_example.mean().backward()
        optimizer.step()
    return mlp


def log_softmax(row):
    top = max(row)
    total = math.log(sum(math.exp(z - top) for z in row)) + top
    return [z - total for z in row]


def loss_by_hand(noisy, attacked, label, accepted, lbd):
    """One record's loss of logits [M][K] with plain Python arithmetic, `accepted` being K before it is raised to 1."""
    m, classes = len(noisy), len(noisy[0])
    share = [sum(max(range(classes), key=row.__getitem__) == c for row in noisy) / m for c in range(classes)]
    losses = sorted(-log_softmax(row)[label] for row in noisy)
    low = sum(losses[: max(accepted, 1)]) / m
    worst = max(
        sum(t * (math.log(t) - log_q) for t, log_q in zip(share, log_softmax(row), strict=True) if t > 0)
        for row in attacked
    )
    return low + (lbd * worst if accepted == m else 0.0)


@pytest.mark.parametrize("lbd", [0.0, 1.0, 2.5])
def test_the_loss_is_the_formula_for_records_of_every_confidence(mlp, lbd) -> None:
    draw = torch.Generator().manual_seed(4)
    batch = Batch(torch.rand(40, 2, 4, 4, generator=draw), torch.arange(40) % 4, torch.arange(40))
    objective, progress = CatRs(0.7, samples=3, steps=2, lbd=lbd), Progress(3, 10, 0.3, seed=7)
    views = objective.perturb(mlp, batch, progress)
    found = objective.losses(mlp, batch, views, progress)
    with torch.no_grad():
        logits = mlp(views.flatten(0, 1)).double().unflatten(0, views.shape[:2])
    chance = torch.rand(40, 3, generator=progress.generator("accept"))
    confidences, full = set(), 0
    for record, label in enumerate(batch.labels.tolist()):
        noisy, attacked = logits[record, :3].tolist(), logits[record, 3:].tolist()
        confidence = sum(max(range(4), key=row.__getitem__) == label for row in noisy) / 3
        accepted = sum(u < confidence for u in chance[record].tolist())
        expected = loss_by_hand(noisy, attacked, label, accepted, lbd)
        assert float(found.per_example[record].detach()) == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert float(found.log["confidence"][record]) == pytest.approx(confidence)
        confidences.add(confidence)
        full += accepted == 3
    assert len(confidences) == 4  # none, some and all of the draws were right
    assert 3 < full < 37  # the worst case was asked of some records only


def test_the_number_of_draws_kept_is_binomial_in_the_confidence() -> None:
    """1,000 steps of a model that is right on 3 of 4 draws; p below 1e-6 is a false alarm in a million seeds."""
    logits = torch.tensor([[0.0, 2.0], [0.0, 2.0], [0.0, 2.0], [2.0, 0.0]])
    model, kept = nn.Identity(), []
    batch = Batch(torch.zeros(1, 2), torch.tensor([1]), torch.tensor([0]))
    smallest = -log_softmax([0.0, 2.0])[1]
    for step in range(1_000):
        views = torch.cat([logits, logits])[None]
        found = CatRs(0.5, lbd=0.0).losses(model, batch, views, Progress(step, 1_000, 0.0, 0))
        kept.append(float(found.per_example) * 4 / smallest)
    largest = -log_softmax([2.0, 0.0])[1] / smallest
    counts = [sum(abs(k - level) < 1e-3 for k in kept) for level in (1, 2, 3, 3 + largest)]
    assert sum(counts) == 1_000  # 0 counts as 1
    law = binom.pmf(range(5), 4, 0.75)
    assert chisquare(counts, 1_000 * torch.tensor([law[0] + law[1], *law[2:]]).numpy()).pvalue > 1e-6


def test_a_record_that_noise_never_misleads_pays_for_its_worst_attacked_draw_and_one_always_misled_does_not() -> None:
    right, wrong = torch.tensor([[0.0, 3.0]] * 2), torch.tensor([[3.0, 0.0]] * 2)
    attacked = torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    views = torch.stack([torch.cat([right, attacked]), torch.cat([wrong, attacked])])
    batch = Batch(torch.zeros(2, 2), torch.tensor([1, 1]), torch.arange(2))
    found = CatRs(0.5, samples=2, lbd=2.0).losses(nn.Identity(), batch, views, Progress(0, 1, 0.0, 0))
    worst = -log_softmax([0.0, -1.0])[1]
    assert found.per_example.tolist() == pytest.approx(
        [-log_softmax([0.0, 3.0])[1] + 2 * worst, -log_softmax([3.0, 0.0])[1] / 2], rel=1e-5
    )


def test_divergence_is_zero_at_the_target_and_what_torch_calls_kl_elsewhere() -> None:
    target = torch.tensor([[0.25, 0.75, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    assert float(divergence(target[:1, :2], target[:1, :2].log())) == pytest.approx(0.0, abs=1e-12)
    logits = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs = nn.functional.kl_div(logits.log_softmax(1), target, reduction="none").sum(1)
    torch.testing.assert_close(divergence(target, logits), theirs)


def test_votes_and_the_bottom_mean_by_hand() -> None:
    logits = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]])
    assert votes(logits).tolist() == [[0.25, 0.75]]
    losses = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
    assert bottom_mean(losses, torch.tensor([1, 2])).tolist() == pytest.approx([1 / 3, 1.0])


@dataclass(frozen=True)
class Descending(CatRs):
    """The wrong sign."""

    def _moved(self, point, gradient, noise):
        return super()._moved(point, -gradient, noise)


def gains(kind, model, batch, progress):
    """By how much the attack raises each view's divergence from its record's votes."""
    objective = kind(0.25, samples=3, steps=4, eps=0.5)
    views = objective.perturb(model, batch, progress)
    with torch.no_grad():
        logits = model(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        each = divergence(votes(logits[:, :3])[:, None], logits)
    return each[:, 3:] - each[:, :3]


def test_the_attack_raises_the_divergence_of_every_draw_and_a_wrong_sign_is_seen(trained, batch, progress) -> None:
    assert gains(CatRs, trained, batch, progress).min() > 0
    assert gains(Descending, trained, batch, progress).max() < 0


def test_one_step_goes_along_the_gradient_and_keeps_mean_and_size_of_the_noise(trained, batch, progress) -> None:
    objective = CatRs(0.5, samples=2, steps=1, eps=0.05)
    views = objective.perturb(trained, batch, progress)
    noise = views[:, :2] - batch.inputs[:, None]
    with torch.no_grad():
        target = votes(trained(views[:, :2].flatten(0, 1)).unflatten(0, (8, 2)))
    for record in range(8):
        for draw in range(2):
            point = views[record, draw][None].clone().requires_grad_()
            divergence(target[record][None], trained(point)).sum().backward()
            step = 0.05 * point.grad[0] / point.grad.norm()  # 2 eps long, and back to eps
            moved = noise[record, draw] + step
            rms = noise[record, draw].square().mean().sqrt()
            scaled = noise[record, draw].mean() + (moved - moved.mean()) / moved.square().mean().sqrt() * rms
            found = views[record, 2 + draw] - batch.inputs[record]
            torch.testing.assert_close(found, scaled, rtol=1e-3, atol=1e-4)


def test_the_attacked_noise_stays_near_the_ball_and_keeps_its_statistics(trained, batch, progress) -> None:
    for eps in (0.25, 1.0):
        views = CatRs(0.5, samples=3, steps=5, eps=eps).perturb(trained, batch, progress)
        noise, attacked = (part - batch.inputs[:, None] for part in (views[:, :3], views[:, 3:]))
        moved = (attacked - noise).flatten(2).norm(dim=2)
        assert moved.max() < 1.25 * eps
        assert moved.min() > eps / 4
        torch.testing.assert_close(attacked.flatten(2).mean(2), noise.flatten(2).mean(2), rtol=0, atol=1e-5)
        rms = [part.flatten(2).square().mean(2).sqrt() for part in (attacked, noise)]
        torch.testing.assert_close(rms[0], rms[1], rtol=0.1, atol=0)
        assert not views.requires_grad


def test_a_step_is_twice_the_radius_over_the_number_of_steps() -> None:
    noise, gradient = (torch.randn(3, 1, 40, 40, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for steps in (4, 8):
        moved = CatRs(1.0, eps=2.0, steps=steps)._moved(noise, gradient, noise)
        length = (moved - noise).flatten(1).norm(dim=1)  # rescaling 1,600 pixels hardly moves them
        torch.testing.assert_close(length, torch.full((3,), 4.0 / steps), rtol=0.1, atol=0)


def test_renormalising_noise_of_mean_zero_gives_it_the_wanted_size_exactly() -> None:
    moved, noise = (torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    moved, noise = (rows - rows.flatten(1).mean(1).view(5, 1, 1, 1) for rows in (3 * moved, noise))
    found = renormalised(moved, noise)
    torch.testing.assert_close(found.flatten(1).norm(dim=1), noise.flatten(1).norm(dim=1))
    torch.testing.assert_close(renormalised(noise, noise), noise)


def test_the_noise_is_that_of_gaussian_training_and_without_a_radius_nothing_is_attacked(mlp, batch, progress) -> None:
    views = CatRs(0.3, samples=2, eps=0.0).perturb(mlp, batch, progress)
    assert torch.equal(views[:, :2], Gaussian(0.3, 2).perturb(mlp, batch, progress))
    torch.testing.assert_close(views[:, 2:], views[:, :2], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "wrong", [{"sigma": -1.0}, {"samples": 1}, {"eps": -0.1}, {"steps": 0}, {"lbd": -1.0}], ids=lambda w: next(iter(w))
)
def test_wrong_settings_are_refused_by_name(wrong) -> None:
    with pytest.raises(BadValue, match=f"{next(iter(wrong))}="):
        CatRs(**({"sigma": 0.5} | wrong))

"""TRADES against the formula written out with torch's own KL divergence, and its reductions."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from trivet.objectives.plain import Plain
from trivet.objectives.trades import Trades
from trivet.threats.linf import Linf


def formula(model, x, x_adv, y, beta, detached=False):
    clean = model(x)
    p = F.softmax(clean, 1)
    divergence = F.kl_div(F.log_softmax(model(x_adv), 1), p.detach() if detached else p, reduction="batchmean")
    return F.cross_entropy(clean, y) + beta * divergence


def test_loss_and_gradient_are_those_of_the_formula(convnet, batch, progress, gradients) -> None:
    objective, reference = Trades(Linf(0.1), beta=6.0), copy.deepcopy(convnet)
    x_adv = objective.perturb(convnet, batch, progress)
    per_example = objective.losses(convnet, batch, x_adv, progress).per_example
    expected = formula(reference, batch.inputs, x_adv, batch.labels, 6.0)
    assert torch.allclose(per_example.mean(), expected, rtol=1e-5)
    truth = gradients(reference, expected)
    detached = gradients(reference, formula(reference, batch.inputs, x_adv, batch.labels, 6.0, detached=True))
    found = gradients(convnet, per_example)
    for ours, theirs in zip(found, truth, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    # The check tells a target held constant from one that is not.
    assert not all(torch.allclose(a, b, rtol=1e-2, atol=1e-3) for a, b in zip(detached, truth, strict=True))


def test_the_inner_search_is_pgd_on_the_divergence_from_beside_the_input(convnet, batch, progress) -> None:
    eps, steps, step_size = 0.1, 5, 0.03
    objective, frozen, x = Trades(Linf(eps), steps, step_size), copy.deepcopy(convnet).eval(), batch.inputs
    start = objective.start(objective.threat, batch, progress)
    spread = (start - x)[(x > 0.01) & (x < 0.99)].std()
    assert 0.0008 < spread < 0.0012

    point = start
    for _ in range(steps):
        point = point.detach().requires_grad_()
        p = F.softmax(frozen(x), 1).detach()
        (gradient,) = torch.autograd.grad(F.kl_div(F.log_softmax(frozen(point), 1), p, reduction="sum"), point)
        point = torch.min(torch.max(point + step_size * gradient.sign(), x - eps), x + eps).clamp(0, 1)
    agree = (objective.perturb(convnet, batch, progress) - point).abs() < 1e-5
    assert agree.float().mean() > 0.98  # a gradient that is zero up to rounding may point either way


def test_with_beta_zero_it_is_plain_training(mlp, batch, progress, gradients) -> None:
    ours = Trades(Linf(0.1), beta=0.0)(mlp, batch, progress).per_example
    plain = Plain()(mlp, batch, progress).per_example
    assert torch.equal(ours, plain)
    for a, b in zip(gradients(mlp, ours), gradients(mlp, plain), strict=True):
        assert torch.equal(a, b)


def test_at_radius_zero_the_divergence_vanishes(mlp, batch, progress) -> None:
    found = Trades(Linf(0.0))(mlp, batch, progress)
    assert torch.equal(found.log["divergence"], torch.zeros(8))
    assert torch.equal(found.per_example, Plain()(mlp, batch, progress).per_example)


def test_clean_and_perturbed_inputs_are_normalised_apart(convnet, batch, progress) -> None:
    seen = []
    convnet[1].register_forward_hook(lambda _, args, *__: seen.append(len(args[0])))
    objective = Trades(Linf(0.1))
    objective.losses(convnet, batch, batch.inputs, progress)
    assert seen == [8, 8]

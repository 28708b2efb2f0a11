"""Stability training against its formula, at its two ends, and the divergence that DP-CERT takes from it."""

from __future__ import annotations

import math

import pytest
import torch

from trivet.errors import BadValue
from trivet.objectives.plain import Plain
from trivet.objectives.stability import Stability, mean_divergence, soft_cross_entropy


def test_the_loss_is_the_formula_record_by_record(mlp, batch, progress) -> None:
    objective = Stability(sigma=0.4, samples=3, lam=2.0)
    views = objective.perturb(mlp, batch, progress)
    found = objective.losses(mlp, batch, views, progress).per_example
    with torch.no_grad():
        for record in range(8):
            clean = mlp(batch.inputs[record : record + 1])[0].double().softmax(0).tolist()
            expected = -math.log(clean[int(batch.labels[record])])
            for view in mlp(views[record]).double().softmax(1).tolist():
                expected += 2.0 / 3.0 * sum(-p * math.log(q) for p, q in zip(clean, view, strict=True))
            assert float(found[record]) == pytest.approx(expected, rel=1e-5)


def test_both_predictions_are_differentiated() -> None:
    clean, noisy = torch.randn(3, 5, requires_grad=True), torch.randn(3, 2, 5, requires_grad=True)
    by_clean, by_noisy = torch.autograd.grad(soft_cross_entropy(clean, noisy).sum(), [clean, noisy])
    assert by_clean.abs().sum() > 0.1
    # d/dz -sum_c p_c log softmax(z)_c = softmax(z) - p, here for one of two views.
    torch.testing.assert_close(by_noisy, (noisy.softmax(2) - clean.softmax(1)[:, None]).detach() / 2)


def test_without_noise_the_divergence_is_zero_and_the_cross_entropy_is_the_entropy() -> None:
    logits = torch.randn(6, 4, dtype=torch.float64)
    same = logits[:, None].expand(-1, 3, -1)
    assert mean_divergence(logits, same).abs().max() < 1e-12
    torch.testing.assert_close(
        soft_cross_entropy(logits, same), torch.distributions.Categorical(logits=logits).entropy()
    )


def test_the_divergence_is_that_of_torch_summed_over_classes_and_is_never_negative() -> None:
    clean, noisy = torch.randn(200, 4, dtype=torch.float64), torch.randn(200, 3, 4, dtype=torch.float64)
    first = torch.distributions.Categorical(logits=clean[:, None])
    expected = torch.distributions.kl_divergence(first, torch.distributions.Categorical(logits=noisy)).mean(1)
    found = mean_divergence(clean, noisy)
    torch.testing.assert_close(found, expected)
    assert found.min() > 0


def test_without_weight_it_is_plain_training(mlp, batch, progress) -> None:
    ours = Stability(sigma=0.5, lam=0.0)(mlp, batch, progress).per_example
    assert torch.equal(ours, Plain()(mlp, batch, progress).per_example)


@pytest.mark.parametrize("wrong", [{"sigma": -1.0}, {"sigma": 1.0, "lam": -1.0}, {"sigma": 1.0, "samples": 0}])
def test_wrong_settings_are_refused(wrong) -> None:
    with pytest.raises(BadValue, match=f"{list(wrong)[-1]}="):
        Stability(**wrong)

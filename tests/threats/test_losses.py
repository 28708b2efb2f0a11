"""Attack losses against their formulas and the invariances they promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trivet.threats.losses import cross_entropy, dlr, kl_divergence, margin, targeted_dlr


def _case(classes: int, seed: int, rows: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (rows,), generator=generator)
    shift = torch.randint(1, classes, (rows,), generator=generator)
    return logits, y, (y + shift) % classes


def test_dlr_is_the_ratio_of_the_papers_formula() -> None:
    logits, y = torch.tensor([[5.0, 1.0, 3.0, 2.0]]), torch.tensor([0])
    assert dlr(logits, y).item() == pytest.approx(-(5 - 3) / (5 - 2))
    assert dlr(logits, torch.tensor([2])).item() == pytest.approx(-(3 - 5) / (5 - 2))
    assert targeted_dlr(logits, y, torch.tensor([3])).item() == pytest.approx(-(5 - 2) / (5 - 0.5 * (2 + 1)))


@settings(deadline=None, max_examples=30)
@given(classes=st.integers(3, 12), seed=st.integers(0, 10**6), scale=st.floats(0.01, 100), shift=st.floats(-50, 50))
def test_dlr_ignores_the_scale_and_the_level_of_logits(classes: int, seed: int, scale: float, shift: float) -> None:
    logits, y, target = _case(classes, seed)
    other = scale * logits + shift
    torch.testing.assert_close(dlr(other, y), dlr(logits, y), atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(targeted_dlr(other, y, target), targeted_dlr(logits, y, target), atol=1e-7, rtol=1e-7)


@settings(deadline=None, max_examples=30)
@given(classes=st.integers(2, 12), seed=st.integers(0, 10**6))
def test_signs_tell_who_leads(classes: int, seed: int) -> None:
    logits, y, target = _case(classes, seed)
    wrong = logits.argmax(1) != y
    assert torch.equal(margin(logits, y) > 0, wrong)
    assert torch.equal(dlr(logits, y) > 0, wrong)
    rows = torch.arange(len(y))
    assert torch.equal(targeted_dlr(logits, y, target) > 0, logits[rows, target] > logits[rows, y])


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes_have_gradients_that_are_finite_and_not_zero(classes: int) -> None:
    logits, y, target = _case(classes, 0)
    logits.requires_grad_()
    for loss in (dlr(logits, y), targeted_dlr(logits, y, target), margin(logits, y)):
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert bool(gradient.isfinite().all())
        assert bool((gradient != 0).any(1).all())


def test_cross_entropy_and_divergence_agree_with_their_definitions() -> None:
    logits, y, _ = _case(5, 0)
    other = _case(5, 1)[0]
    p, q = logits.softmax(1), other.softmax(1)
    torch.testing.assert_close(cross_entropy(logits, y), -p.gather(1, y[:, None]).squeeze(1).log())
    torch.testing.assert_close(kl_divergence(other, logits), (p * (p.log() - q.log())).sum(1))
    assert float(kl_divergence(logits, logits).abs().max()) < 1e-12

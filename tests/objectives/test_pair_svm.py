"""Borders between classes: the attention's closed forms, descent by autograd, and the exact solver by another."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from trivet.objectives.pair_svm import PENALTY, PairSvm, attention, descend, fit_pairs, target
from trivet.randomness import generator


@given(st.integers(2, 40), st.floats(0.01, 100), st.integers(0, 100))
def test_attention_lies_between_one_and_its_bound_and_its_logarithms_sum_to_one(
    d: int, scale: float, seed: int
) -> None:
    draw = generator(seed, "test")
    z, shift = (scale * torch.randn(3, d, generator=draw, dtype=torch.float64) for _ in range(2))
    found = attention(z, scale * torch.randn(3, d, d, generator=draw, dtype=torch.float64), shift)
    assert (found >= 1).all()
    assert (found <= math.exp(1 / (1 + (d - 1) * math.exp(-2))) + 1e-12).all()
    torch.testing.assert_close(found.log().sum(1), torch.ones(3, dtype=torch.float64))


def test_the_stated_bound_of_a_hundred_features() -> None:
    assert math.exp(1 / (1 + 99 * math.exp(-2))) == pytest.approx(1.08, abs=0.01)


@pytest.mark.parametrize("d", [2, 7, 64])
def test_without_mixing_a_step_along_the_normal_raises_the_score_by_its_closed_form(d: int) -> None:
    """z' - z = eps exp(1/d) w, and the score rises by eps exp(2/d) ||w||^2."""
    w, z = torch.randn(2, 1, d, dtype=torch.float64), torch.randn(5, d, dtype=torch.float64)
    zero = torch.zeros(2, 1, dtype=torch.float64)
    svm = PairSvm(w, zero, zero, zero.new_zeros(2, 1, d, d), zero.new_zeros(2, 1, d))
    pair = torch.tensor([0, 1, 0, 1, 1]), torch.zeros(5, dtype=torch.int64)
    step = 0.3 * svm.attention(z, pair) * w[pair]
    torch.testing.assert_close(step, 0.3 * math.exp(1 / d) * w[pair])
    expected = 0.3 * math.exp(2 / d) * w[pair].square().sum(1)
    torch.testing.assert_close(svm.score(z + step, pair) - svm.score(z, pair), expected)


@pytest.mark.parametrize("y", [-1.0, 1.0])
def test_a_step_of_descent_is_the_gradient_of_the_loss(y: float) -> None:
    draw = generator(0, "test")
    shapes = [(8, 6), (8,), (8, 6, 6), (8, 6)]
    w, b, mixing, shift = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    z = torch.randn(8, 6, generator=draw, dtype=torch.float64)
    leaves = [each.clone().requires_grad_() for each in (w, b, mixing, shift)]
    a = (leaves[2] @ z[:, :, None]).squeeze(2).add(leaves[3]).tanh().softmax(1).exp()
    hinge = (1 - y * ((leaves[0] * a * z).sum(1) + leaves[1])).clamp(min=0)
    assert 0 < int((hinge > 0).sum()) < 8
    (PENALTY * hinge + leaves[0].square().mean(1)).sum().backward()
    descend(z, y, w, b, mixing, shift)
    for ours, leaf in zip((w, b, mixing, shift), leaves, strict=True):
        torch.testing.assert_close(ours, leaf.detach() - 0.01 * leaf.grad, rtol=1e-12, atol=1e-12)


def blobs(count: int, d: int, distance: float = 30.0) -> list[Tensor]:
    """Far from each other, as the descent needs: at its rate the offset stays near its first value, below 1."""
    noise = torch.randn(2, count, d, generator=generator(0, "blobs"))
    noise[0, :, 0] -= distance
    noise[1, :, 0] += distance
    return list(noise)


@pytest.mark.parametrize("kind", ["attention", "linear"])
def test_between_two_blobs_the_normal_is_the_line_that_joins_them(kind) -> None:
    svm = fit_pairs(blobs(300, 4), kind, generator(0, "svm"))
    for s, sign in ((0, 1.0), (1, -1.0)):
        assert float(svm.normal[s, 0, 0] * sign / svm.normal[s, 0].norm()) > 0.95
    assert (svm.accuracy > 0.95).all()


def test_the_exact_solver_finds_what_a_general_one_finds() -> None:
    """The quadratic programme with slacks, offset free, by SLSQP; classes are equally many, off the origin."""
    latents = [each + 5 for each in blobs(18, 2, 1.0)]
    svm = fit_pairs(latents, "linear", generator(0, "svm"))
    z = torch.cat([each[:12] for each in latents]).double().numpy()
    y = np.repeat([-1.0, 1.0], 12)

    def loss(v: np.ndarray) -> float:
        return PENALTY * v[3:].mean() + v[:2] @ v[:2] / 2

    constraints = [
        {"type": "ineq", "fun": lambda v: y * (z @ v[:2] + v[2]) - 1 + v[3:]},
        {"type": "ineq", "fun": lambda v: v[3:]},
    ]
    found = minimize(loss, np.ones(27), constraints=constraints, tol=1e-12, options={"maxiter": 500})
    assert found.success
    ours = svm.normal[0, 0].double().numpy()
    slack = np.maximum(0, 1 - y * (z @ ours + float(svm.offset[0, 0])))
    assert loss(np.concatenate([ours, [0], slack])) == pytest.approx(found.fun, rel=1e-3)
    np.testing.assert_allclose(ours, found.x[:2], rtol=0.02, atol=1e-5)


def test_the_exact_solver_draws_nothing_and_the_two_directions_mirror_each_other() -> None:
    latents = [torch.randn(n, 5, generator=generator(n, "test")) + n for n in (20, 31, 12)]
    first, again = (fit_pairs(latents, "linear", generator(seed, "svm")) for seed in (0, 1))
    assert torch.equal(first.normal, again.normal)
    for s in range(3):
        for r in range(2):
            t = target(s, r)
            back = s - (s > t)
            assert target(t, back) == s
            assert torch.equal(first.normal[s, r], -first.normal[t, back])
            assert torch.equal(first.offset[s, r], -first.offset[t, back])


def test_descent_is_a_function_of_its_generator() -> None:
    first, again, other = (fit_pairs(blobs(9, 3), "attention", generator(seed, "svm")) for seed in (0, 0, 1))
    assert torch.equal(first.normal, again.normal)
    assert torch.equal(first.mixing, again.mixing)
    assert not torch.equal(first.normal, other.normal)


@pytest.mark.parametrize("kind", ["attention", "linear"])
def test_accuracy_is_of_the_third_that_was_not_fitted(kind) -> None:
    left, right = blobs(60, 3)
    swapped = [torch.cat([left[:40], right[40:]]), torch.cat([right[:40], left[40:]])]
    assert (fit_pairs(swapped, kind, generator(0, "svm")).accuracy < 0.1).all()


@pytest.mark.parametrize("kind", ["attention", "linear"])
def test_classes_without_enough_records_have_no_border_to_trust(kind) -> None:
    left, right = blobs(30, 3)
    svm = fit_pairs([left, right[:0], right, right[:2]], kind, generator(0, "svm"))
    assert all(tensor.isfinite().all() for tensor in svm.state().values())
    trusted = svm.accuracy > 0.9
    assert trusted[0].tolist() == [False, True, False]
    assert trusted[2].tolist() == [True, False, False]
    assert not trusted[1].any()
    assert not trusted[3].any()


@pytest.mark.parametrize("kind", ["attention", "linear"])
def test_what_is_saved_scores_alike(kind) -> None:
    svm = fit_pairs(blobs(12, 3), kind, generator(0, "svm"))
    restored = PairSvm.restored(svm.state())
    z, pair = torch.randn(4, 3), (torch.tensor([0, 1, 1, 0]), torch.zeros(4, dtype=torch.int64))
    assert torch.equal(restored.score(z, pair), svm.score(z, pair))

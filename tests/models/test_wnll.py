"""WNLL against closed forms: Laplace learning on symmetric weights, isolated queries, a path; and its gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trivet.errors import BadValue
from trivet.models.surrogate import surrogate
from trivet.models.wnll import WnllHead, interpolate, kernel, solve, squared_distances


def points(count: int, seed: int, size: int = 5) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_hot(count: int, classes: int) -> Tensor:
    return nn.functional.one_hot(torch.arange(count) % classes, classes).double()


def head(templates: int = 40, *, weighted: bool = True, together: bool = False, seed: int = 0) -> WnllHead:
    linear = nn.Linear(5, 3).double().requires_grad_(False)
    with torch.no_grad():
        linear.weight.copy_(points(3, seed + 7))
    made = WnllHead(linear, templates, 9, 4, weighted, together).eval()
    made.fill(points(templates, seed), torch.arange(templates) % 3)
    return made


def by_definition(z: Tensor, neighbours: int, scale: int) -> np.ndarray:
    """W, one entry after another, in plain Python."""
    n = len(z)
    w = np.zeros((n, n))
    for i in range(n):
        apart = [float((z[i] - z[j]).square().sum()) for j in range(n)]
        nearest = sorted(range(n), key=lambda j: (j != i, apart[j]))[:neighbours]
        s2 = apart[nearest[scale - 1]] + 1e-10
        for j in nearest:
            w[i, j] = math.exp(-apart[j] / s2)
    return w


def energy(u: Tensor, w: Tensor, templates: int, mu: float) -> Tensor:
    apart = w * (u[:, None] - u[None]).square().sum(-1)
    return apart[templates:].sum() + mu * apart[:templates].sum()


def test_the_kernel_is_its_definition() -> None:
    z = points(25, 1)
    z[3] = z[4]  # duplicates weigh 1
    made = kernel(z, 9, 4)
    np.testing.assert_allclose(made.numpy(), by_definition(z, 9, 4), atol=1e-12)
    assert float(made[3, 4]) == pytest.approx(1.0, abs=1e-12)
    assert not torch.allclose(made, made.T)


def test_distances_do_not_lose_digits_far_from_the_origin() -> None:
    z = points(6, 2)
    expected = (z[:, None] - z[None]).square().sum(-1)
    torch.testing.assert_close(squared_distances(z + 1e4, z + 1e4), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mu", [1.0, 3.5])
def test_it_is_the_least_energy(mu: float) -> None:
    """Also of weights that are not symmetric: the gradient of the energy vanishes."""
    w, targets = kernel(points(30, 3), 9, 4), one_hot(12, 3)
    u, reached = solve(w, targets, mu)
    assert bool(reached.all())
    free = u.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(energy(torch.cat([targets, free]), w, 12, mu), free)
    assert float(gradient.abs().max()) < 1e-12


def test_of_symmetric_weights_it_is_laplace_learning_on_other_ones() -> None:
    """R = D W + W D with D = mu on templates and 1 on queries; u = (deg - R_UU)^-1 R_US g."""
    w = kernel(points(30, 4), 9, 4)
    w, mu = (w + w.T) / 2, 2.5
    d = torch.ones(30, dtype=torch.float64)
    d[:10] = mu
    r = (d[:, None] + d[None]) * w
    r.fill_diagonal_(0)
    expected = np.linalg.solve((r.sum(1).diag() - r)[10:, 10:].numpy(), (r[10:, :10] @ one_hot(10, 3)).numpy())
    np.testing.assert_allclose(solve(w, one_hot(10, 3), mu)[0].numpy(), expected, atol=1e-14)


def test_a_path_with_templates_at_its_ends_is_halved() -> None:
    """Nodes 0 - 2 - 1 at 0, 0.5, 1 with unit weights: u = 1/2 for every mu. With unequal ones, the weighted mean."""
    w = torch.zeros(3, 3, dtype=torch.float64)
    w[2, 0] = w[2, 1] = w[0, 2] = w[1, 2] = 1.0
    targets = torch.eye(2, dtype=torch.float64)
    for mu in (1.0, 4.0):
        torch.testing.assert_close(solve(w, targets, mu)[0], torch.full((1, 2), 0.5, dtype=torch.float64))
    w[2, 0], w[0, 2] = 0.25, 0.5  # a = 0.25 + 4 * 0.5 = 2.25 against 1 + 4 * 1 = 5
    torch.testing.assert_close(solve(w, targets, 4.0)[0][0, 0], torch.tensor(2.25 / 7.25, dtype=torch.float64))


def test_queries_apart_from_each_other_get_the_weighted_mean_of_their_templates() -> None:
    w = kernel(points(30, 5), 9, 4)
    w[12:, 12:] = 0
    a = w[12:, :12] + 2.0 * w[:12, 12:].T
    u, _ = solve(w, one_hot(12, 3), 2.0)
    torch.testing.assert_close(u, a @ one_hot(12, 3) / a.sum(1, keepdim=True))


def test_without_weight_on_the_templates_it_is_the_graph_laplacian() -> None:
    z, targets = points(30, 6), one_hot(12, 3)
    plain, _ = interpolate(z[:12], targets, z[12:], 9, 4, weighted=False)
    w = kernel(z, 9, 4)
    w = w + w.T
    w.fill_diagonal_(0)
    expected = torch.linalg.solve((w.sum(1).diag() - w)[12:, 12:], w[12:, :12] @ targets)
    torch.testing.assert_close(plain, expected)
    weighted, _ = interpolate(z[:12], targets, z[12:], 9, 4)
    torch.testing.assert_close(weighted, solve(kernel(z, 9, 4), targets, 30 / 12)[0])
    assert float((weighted - plain).abs().max()) > 1e-3


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), queries=st.integers(1, 30), scale=st.floats(0.01, 100), together=st.booleans())
def test_answers_are_distributions_and_constant_labels_stay_constant(
    seed: int, queries: int, scale: float, together: bool
) -> None:
    made, z = head(together=together, seed=seed), scale * points(queries, seed + 1)
    u = made.shares(z, made.linear(z))
    assert float(u.min()) >= -1e-12
    assert float((u.sum(1) - 1).abs().max()) < 1e-9
    made.fill(made.templates.clone(), torch.full((40,), 2))
    same = made.shares(z, made.linear(z))
    if not together or made.unreached == 0:
        assert float((same - one_hot(3, 3)[2]).abs().max()) < 1e-9


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), weighted=st.booleans(), near=st.booleans())
def test_one_query_alone_has_the_closed_form(seed: int, weighted: bool, near: bool) -> None:
    """The head's division against the general solve, with that one query on the graph."""
    made = head(weighted=weighted, seed=seed)
    z = made.templates[:6] + 1e-3 * points(6, seed + 1) if near else points(6, seed + 1)
    alone = [interpolate(made.templates, made.targets, each[None], 9, 4, weighted)[0] for each in z]
    torch.testing.assert_close(made.shares(z, made.linear(z)), torch.cat(alone), rtol=1e-9, atol=1e-11)


def test_alone_an_answer_does_not_depend_on_the_batch_and_together_it_does() -> None:
    z = points(12, 8)
    alone, together = head(), head(together=True)
    torch.testing.assert_close(alone(z)[:5], alone(z[:5]), rtol=1e-12, atol=1e-12)
    assert float((together(z)[:5] - together(z[:5])).abs().max()) > 1e-6


def test_queries_that_no_template_reaches_fall_back_to_the_linear_layer_and_are_counted() -> None:
    made = head(together=True)
    z = torch.cat([points(4, 9), 1000 + 1e-3 * points(12, 10)])
    u = made.shares(z, made.linear(z))
    assert made.unreached == 12
    torch.testing.assert_close(u[4:], made.linear(z[4:]).softmax(1))
    _, reached = interpolate(made.templates, made.targets, z, 9, 4)
    assert reached.tolist() == [True] * 4 + [False] * 12
    assert bool((made(z).argmax(1)[4:] == made.linear(z[4:]).argmax(1)).all())


def test_a_chain_of_queries_is_reached_from_its_end() -> None:
    w = torch.zeros(6, 6, dtype=torch.float64)
    for i, j in ((0, 1), (1, 2), (2, 3), (4, 5)):
        w[i, j] = w[j, i] = 1.0
    u, reached = solve(w, torch.tensor([[1.0]], dtype=torch.float64), 1.0)
    assert reached.tolist() == [True, True, True, False, False]
    torch.testing.assert_close(u[:, 0], torch.tensor([1.0, 1, 1, 0, 0], dtype=torch.float64))


@pytest.mark.parametrize("together", [False, True])
def test_the_exact_gradient_is_that_of_differences(together: bool) -> None:
    made, z = head(together=together), points(3, 11).requires_grad_()
    assert torch.autograd.gradcheck(made, (z,))
    assert float(torch.autograd.grad(made(z)[:, 0].sum(), z)[0].abs().max()) > 1e-3


def test_inside_a_cluster_of_one_class_the_exact_gradient_is_gone_and_the_soft_one_is_not() -> None:
    """Two clusters, four deviations apart; the soft gradient is that of differences too."""
    made, labels = head(), (torch.arange(40) % 2 == 0).long()
    made.fill(made.templates + 4 * labels[:, None], labels)
    z, y = (4 + 0.1 * points(1, 3)).requires_grad_(), torch.tensor([1])
    (exact,) = torch.autograd.grad(nn.functional.cross_entropy(made(z), y), z)
    assert float(exact.norm()) < 1e-12
    made.through = "soft"
    (soft,) = torch.autograd.grad(made(z)[0, 1] - made(z)[0, 0], z)
    assert float(soft.norm()) > 1
    assert torch.autograd.gradcheck(made, (z,))


def test_the_surrogate_gradient_is_the_residual_times_the_linear_layer() -> None:
    """d CE(u, y) / d z = A^T (softmax(u) - y) / N, at the interpolated u."""
    made, z, y = head(), points(8, 12).requires_grad_(), torch.arange(8) % 3
    u = made.shares(z, made.linear(z)).detach()
    made.through = "surrogate"
    out = made(z)
    torch.testing.assert_close(out, u, rtol=1e-12, atol=1e-14)
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(out, y), z)
    expected = (u.softmax(1) - nn.functional.one_hot(y, 3)) @ made.linear.weight / 8
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
    made.through = "linear"
    assert torch.equal(made(z), made.linear(z))


def test_probabilities_taken_for_logits_make_no_class_likelier_than_23_per_cent_of_ten() -> None:
    """What the authors' loss can reach at best: softmax of a one-hot row, e / (e + 9)."""
    linear = nn.Linear(5, 10).double().requires_grad_(False)
    made = WnllHead(linear, 40, 9, 4).eval()
    made.fill(points(40, 0), torch.zeros(40, dtype=torch.int64))
    made.through = "surrogate"
    likeliest = made(points(4, 1)).softmax(1)[:, 0]
    torch.testing.assert_close(likeliest, torch.full((4,), math.e / (math.e + 9), dtype=torch.float64))
    assert float(likeliest[0]) == pytest.approx(0.232, abs=1e-3)


def test_soft_targets_pass_through_in_two_solves() -> None:
    """Unlabelled records interpolated first and taken for templates then: still distributions, labelled by both."""
    z, targets = points(60, 13), one_hot(20, 3)
    first, _ = interpolate(z[:20], targets, z[20:50], 9, 4)
    second, reached = interpolate(z[:50], torch.cat([targets, first]), z[50:], 9, 4)
    assert bool(reached.all())
    torch.testing.assert_close(second.sum(1), torch.ones(10, dtype=torch.float64))


def test_training_mode_is_the_linear_layer_and_forgets_the_templates() -> None:
    made, z = head(), points(4, 14)
    assert not torch.allclose(made(z), made.linear(z))
    made.train()
    assert torch.equal(made(z), made.linear(z))
    assert torch.equal(made.eval()(z), made.linear(z))
    assert not any(bool(each.any()) for each in (made.templates, made.targets, made.rulers, made.filled))


def test_the_stand_in_of_a_network_with_such_a_head_answers_as_it_does() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(5, 5), nn.ReLU(), head().float()).eval()
    net[3].fill(points(40, 0), torch.arange(40) % 3)  # type: ignore[operator]
    x = points(6, 15).float()
    torch.testing.assert_close(surrogate(net, "fp32")(x), net(x))


def test_settings_that_make_no_graph_are_refused() -> None:
    linear = nn.Linear(5, 3)
    with pytest.raises(BadValue, match="scale=1 must be at least 2"):
        WnllHead(linear, 40, 9, 1)
    with pytest.raises(BadValue, match="neighbours=3 must be at least scale=4"):
        WnllHead(linear, 40, 3, 4)
    with pytest.raises(BadValue, match="templates=8 must be at least neighbours=9"):
        WnllHead(linear, 8, 9, 4)
    with pytest.raises(BadValue, match="neighbours=9 must be at most the number of points, 4"):
        kernel(points(4, 0), 9, 4)
    with pytest.raises(BadValue, match="must be finite"):
        head().fill(torch.full((40, 5), torch.inf), torch.arange(40) % 3)

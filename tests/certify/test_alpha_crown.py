"""alpha-CROWN: never below CROWN, never above the linear programme, true at every step of the search."""

from __future__ import annotations

import pytest
import torch
from bound_oracles import ball, images, least_found, margins_of, mlp, rows_of, triangle_minimum
from torch import nn

from trivet.certify.alpha_crown import AlphaCrown
from trivet.certify.bounds import slopes
from trivet.certify.bounds.network import Network
from trivet.certify.bounds.propagation import Propagation
from trivet.certify.crown import Crown


def test_the_search_reaches_the_linear_programme_where_it_converges() -> None:
    """With fixed intervals the best slopes give the programme's optimum, for one hidden layer."""
    eps, gaps = 0.3, []
    for seed in range(6):
        model, x = mlp(4, 8, 3, seed=seed), images(1, 4, seed=seed)
        network, domain, rows = Network.of(model, (4,)), ball(x, eps), rows_of(model, x)
        known = network.intervals(domain, "real", method="crown")
        before = [(known[node].lower[0], known[node].upper[0]) for _, node in network.activations]
        low, high = (x[0] - eps).clamp(0, 1).double().numpy(), (x[0] + eps).clamp(0, 1).double().numpy()
        best = network.margins(domain, rows, method="alpha-crown", arithmetic="real")[0]
        start = network.margins(domain, rows, method="crown", arithmetic="real")[0]
        for s, row in enumerate(rows[0].double().numpy()):
            programme = triangle_minimum(model, low, high, row, before)
            assert float(best[s]) <= programme + 1e-7
            gaps.append((programme - float(best[s]), programme - float(start[s])))
    closed = sum(a for a, _ in gaps) / sum(b for _, b in gaps)
    assert sum(b for _, b in gaps) > 0.1
    assert closed < 0.2


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_any_number_of_steps_gives_a_true_bound_no_worse_than_the_start(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, eps = mlp(6, 10, 10, 3, seed=1), images(4, 6), 0.2
    worst = least_found(model, x, eps, "Linf", rows_of(model, x))
    monkeypatch.setattr(slopes, "STEPS", steps)
    found = margins_of(model, x, eps, "alpha-crown")
    assert bool((found <= worst + 1e-6).all())
    assert bool((found >= margins_of(model, x, eps, "crown") - 1e-6).all())


def test_more_steps_are_never_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, found = mlp(6, 10, 10, 3, seed=1), images(4, 6), []
    for steps in (0, 2, 5, 20):
        monkeypatch.setattr(slopes, "STEPS", steps)
        found.append(margins_of(model, x, 0.2, "alpha-crown"))
    for fewer, more in zip(found, found[1:], strict=False):  # noqa: RUF007
        assert bool((more >= fewer - 1e-6).all())
    assert float((found[-1] - found[0]).mean()) > 1e-3


@pytest.mark.parametrize("slope", [-1.0, 0.0, 0.3, 1.0, 2.0])
def test_whatever_the_slopes_the_bound_is_true_and_outside_of_their_range_it_may_not_be(slope: float) -> None:
    model, x, eps = mlp(6, 10, 10, 3, seed=1).double(), images(4, 6, dtype=torch.float64), 0.3
    network, rows = Network.of(model, (6,)), rows_of(model, x).double()
    use = network._use(ball(x, eps), "real")
    known = use.intervals()
    chosen = {node: torch.full((4, 2, 10), slope, dtype=torch.float64) for node, _ in network.activations}
    bound = use.least(*use.pull(rows, len(network.steps), known, chosen), known)
    worst = least_found(model, x, eps, "Linf", rows)
    assert bool((bound <= worst + 1e-9).all()) or not 0 <= slope <= 1


def test_slopes_stay_in_their_range_and_differ_by_margin() -> None:
    model, x = mlp(6, 10, 10, 3, seed=1), images(4, 6)
    network, rows = Network.of(model, (6,)), rows_of(model, x)
    use = network._use(ball(x, 0.3), None)
    assert isinstance(use, Propagation)
    found, multipliers = slopes.chosen(use, rows, len(network.steps), use.intervals(), {})
    assert not multipliers
    assert all(bool(((each >= 0) & (each <= 1)).all()) for each in found.values())
    assert any(not torch.equal(each[:, 0], each[:, 1]) for each in found.values())


def test_inner_slopes_certify_more() -> None:
    model, x, eps = mlp(8, 20, 20, 20, 3, seed=4), images(8, 8), 0.12
    network, domain, rows = Network.of(model, (8,)), ball(x, eps), rows_of(model, x)
    plain = network.margins(domain, rows, method="alpha-crown", arithmetic="real")
    known = network.intervals(domain, "real", method="alpha-crown")
    inner = network.margins(domain, rows, method="alpha-crown", arithmetic="real", intervals=known)
    assert float((inner - plain).mean()) > 1e-2
    assert bool((inner <= least_found(model, x, eps, "Linf", rows) + 1e-6).all())
    radii = (0.02, 0.04, 0.06, 0.08, 0.1, 0.12)
    certified = [
        kind.certify(model, x).radii
        for kind in (Crown(eps=radii), AlphaCrown(eps=radii), AlphaCrown(eps=radii, inner=True))
    ]
    assert bool((certified[0] <= certified[1]).all())
    assert bool((certified[1] <= certified[2]).all())
    assert float(certified[2].sum()) > float(certified[0].sum())


def test_a_network_without_unstable_neurons_needs_no_search() -> None:
    model, x = mlp(4, 5, 3, seed=1), images(3, 4)
    with torch.no_grad():
        model[0].bias += 50
    torch.testing.assert_close(margins_of(model, x, 0.1, "alpha-crown"), margins_of(model, x, 0.1, "crown"))


def test_s_shaped_and_pooling_layers_keep_their_own_lines() -> None:
    layers = (
        nn.Conv2d(1, 2, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 6),
        nn.Sigmoid(),
        nn.Linear(6, 3),
    )
    torch.manual_seed(0)
    model, x, eps = nn.Sequential(*layers).eval(), images(3, 1, 6, 6), 0.05
    found = margins_of(model, x, eps, "alpha-crown")
    assert bool((found >= margins_of(model, x, eps, "crown") - 1e-6).all())
    assert bool((found <= least_found(model, x, eps, "Linf", rows_of(model, x)) + 1e-6).all())

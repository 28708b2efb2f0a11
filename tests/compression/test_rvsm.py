"""RVSM and RGSM: the scalar problem solved by hand, thresholds, and what ships."""

from __future__ import annotations

from itertools import pairwise
from math import sqrt
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trivet.compression.compression import Moment, steps_on
from trivet.compression.masks import Mask
from trivet.compression.rvsm import Rvsm


def minimised(method: Rvsm, model: nn.Module, loss: Any, steps: int = 80, lr: float = 0.3) -> None:
    method.attach(model)
    method.begin(model)
    method.initialise(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        loss().backward()
        method.adjust(model, Moment(step, steps, steps))
        optimizer.step()
        method.after(model, Moment(step, steps, steps))


def scalar(start: float) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(start)
    return model


@settings(deadline=None, max_examples=40)
@given(st.floats(0.05, 2.0), st.floats(0.1, 2.0), st.floats(0.05, 1.0))
def test_of_one_weight_the_fixed_points_are_those_of_the_algebra(c: float, beta: float, edge: float) -> None:
    """f = (w - c)^2 / 2, edge = sqrt(2 lam / beta): (c, c) if c > edge; (c / (1 + beta), 0) if c <= (1 + beta) edge."""
    for start in (c, 0.0):
        model = scalar(start)
        minimised(
            Rvsm(groups="weights", beta=beta, lam=edge**2 * beta / 2),
            model,
            lambda m=model: (m[0].weight - c).square().sum() / 2,
        )
        w, u = float(model[0].weight.detach()), float(steps_on(model[0])[0].shadow)
        ends = {(c, c): c > edge, (c / (1 + beta), 0.0): c <= (1 + beta) * edge}
        near = [end for end, allowed in ends.items() if allowed and abs(w - end[0]) < 1e-3 and abs(u - end[1]) < 1e-3]
        close_call = abs(c - edge) < 1e-2 or abs(c - (1 + beta) * edge) < 1e-2
        assert near or close_call, (w, u)


def energy(model: nn.Sequential, method: Rvsm, loss: Tensor) -> float:
    w, u = model[0].weight.detach(), steps_on(model[0])[0].shadow
    return float(loss.detach() + method.lam * u.count_nonzero() + method.beta / 2 * (w - u).square().sum())


def test_the_energy_falls_monotonically_for_small_steps() -> None:
    torch.manual_seed(0)
    target = torch.randn(6, 5)
    model = nn.Sequential(nn.Linear(5, 6, bias=False))
    method = Rvsm(groups="weights", beta=0.5, lam=0.1)
    method.attach(model)
    method.initialise(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)  # below 2 / (beta + L) = 2 / 1.5
    energies = []
    for step in range(60):
        optimizer.zero_grad()
        loss = (model[0].weight - target).square().sum() / 2
        energies.append(energy(model, method, loss))
        loss.backward()
        method.adjust(model, Moment(step, 60, 60))
        optimizer.step()
        method.after(model, Moment(step, 60, 60))
    assert all(later <= earlier + 1e-5 for earlier, later in pairwise(energies))
    assert energies[-1] < energies[0]


def test_channels_go_whole_and_the_zeros_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 4, 3))
    target = torch.randn(4, 6, 3, 3) * torch.tensor([1.0, 0.01, 1.0, 0.01, 1.0, 0.01])[:, None, None]
    method = Rvsm(beta=1.0, lam=0.05)
    minimised(method, model, lambda: (model[0].weight - target).square().sum() / 2)
    norms = model[0].weight.detach().square().sum((0, 2, 3)).sqrt()
    with method.as_shipped(model):
        kept = model[0].weight.detach().square().sum((0, 2, 3)) > 0
    assert torch.equal(kept, norms > sqrt(0.1))
    assert kept.tolist() == [True, False, True, False, True, False]
    method.end(model)
    (mask,) = steps_on(model[0])
    assert isinstance(mask, Mask)
    assert bool((model[0].weight[:, 1::2] == 0).all())


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="beta=0 must be positive"):
        Rvsm(beta=0)

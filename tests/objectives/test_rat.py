"""Region adversarial training: its formula, when it searches and on what, exact resumption, and what it buys."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trivet.data.dataset import Batch
from trivet.data.digits import digits
from trivet.errors import BadValue
from trivet.objectives.objective import Progress
from trivet.objectives.plain import Plain
from trivet.objectives.rat import Rat
from trivet.threats.l2 import L2
from trivet.threats.linf import Linf
from trivet.threats.universal import UniversalSearch, success_of

LATE = Progress(step=9, steps=10, epoch=4.5, seed=7)
SEARCH = {"passes": 2, "steps": 3}


@pytest.mark.parametrize("threat", [Linf(0.2), L2(0.8)], ids=["Linf", "L2"])
def test_loss_and_gradient_are_those_of_the_formula(threat, convnet, batch, gradients) -> None:
    objective = Rat(threat, targets=(2, 3), **SEARCH)
    views = objective.perturb(convnet, batch, LATE)
    found = objective.losses(convnet.eval(), batch, views, LATE).per_example
    deltas = objective.state()["deltas"]
    assert float(deltas.abs().max()) > 0.05

    reference = copy.deepcopy(convnet)
    for n in range(len(batch)):
        x, y = batch.inputs[n : n + 1], batch.labels[n : n + 1]
        expected = F.cross_entropy(reference(x), y)
        for delta in deltas:
            expected = expected + 0.5 * F.cross_entropy(reference((x + delta).clamp(0, 1)), y)
        assert float(found[n].detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    x, y = batch.inputs, batch.labels
    whole = F.cross_entropy(reference(x), y)
    whole = whole + 0.5 * sum(F.cross_entropy(reference((x + delta).clamp(0, 1)), y) for delta in deltas)
    for ours, theirs in zip(gradients(convnet, found), gradients(reference, whole), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_views_are_points_of_the_set_that_carry_no_graph(mlp, batch) -> None:
    threat = Linf(0.3)
    views = Rat(threat, **SEARCH).perturb(mlp, batch, LATE)
    assert views.shape == (8, 5, 2, 4, 4)
    assert not views.requires_grad
    assert torch.equal(views[:, 0], batch.inputs)
    for view in range(1, 5):
        assert bool(threat.contains(views[:, view], batch.inputs).all())
    assert not torch.equal(views[:, 1], views[:, 2])


def test_the_warm_up_is_plain_training(mlp, batch, gradients) -> None:
    objective, early = Rat(Linf(0.3), warm_up=0.5), Progress(4, 10, 2.0, 7)
    ours, plain = (each(mlp, batch, early).per_example for each in (objective, Plain()))
    assert torch.equal(ours, plain)
    for a, b in zip(gradients(mlp, ours), gradients(mlp, plain), strict=True):
        assert torch.equal(a, b)
    assert "deltas" not in objective.state()


def parts(count: int, size: int = 4) -> list[Batch]:
    draw = torch.Generator().manual_seed(5)
    return [
        Batch(
            torch.rand(size, 2, 4, 4, generator=draw),
            torch.arange(size) % 4,
            size * (number % 3) + torch.arange(size),
        )
        for number in range(count)
    ]


def test_rounds_begin_where_their_part_of_training_begins(mlp) -> None:
    objective, seen = Rat(Linf(0.2), warm_up=0.2, rounds=4, **SEARCH), {}
    for step, batch in enumerate(parts(40)):
        objective.perturb(mlp, batch, Progress(step, 40, step / 10, 1))
        seen.setdefault(int(objective.state().get("round", torch.tensor(0))), step)
    assert seen == {0: 0, 1: 8, 2: 16, 3: 24, 4: 32}


def test_it_searches_on_the_first_records_it_met_each_once(mlp) -> None:
    objective, batches = Rat(Linf(0.2), records=10, warm_up=0.5, **SEARCH), parts(6)
    for step, batch in enumerate(batches):
        objective.perturb(mlp, batch, Progress(step, 6, 0.0, 1))
    state = objective.state()
    assert state["index"].tolist() == list(range(10))
    everything = torch.cat([batch.inputs for batch in batches[:3]])
    assert torch.equal(state["inputs"], everything[:10])
    fresh = UniversalSearch(Linf(0.2), **SEARCH)
    draw = Progress(5, 6, 0.0, 1).generator("universal")
    expected = fresh.perturbations(mlp.eval(), state["inputs"], state["labels"], draw).deltas
    torch.testing.assert_close(state["deltas"], expected)


def trained(model: nn.Module, objective: Rat, batches: list[Batch], first: int, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step, batch in enumerate(batches, first):
        optimizer.zero_grad()
        objective(model, batch, Progress(step, steps, step / 3, 2)).per_example.mean().backward()
        optimizer.step()


def test_a_resumed_run_is_the_same_run(mlp) -> None:
    batches, settings = parts(12), {"warm_up": 0.25, "rounds": 2, "records": 7, **SEARCH}
    whole, halves = copy.deepcopy(mlp), copy.deepcopy(mlp)
    trained(whole, Rat(Linf(0.2), **settings), batches, 0, 12)
    first = Rat(Linf(0.2), **settings)
    trained(halves, first, batches[:7], 0, 12)
    second = Rat(Linf(0.2), **settings)
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    trained(halves, second, batches[7:], 7, 12)
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        assert torch.equal(a, b)
    first.load_state({})
    assert not first.state()


def test_what_was_searched_before_loses_its_effect_and_what_is_searched_anew_keeps_some() -> None:
    """Two rounds on 200 digits: the claim that a round makes, and the one that it must not make."""
    torch.manual_seed(0)
    splits, threat = digits(), Linf(0.3)
    records = splits.train.batch(torch.arange(200))
    held = splits.test.batch(torch.arange(200))
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    objective = Rat(threat, records=100, rounds=1, warm_up=0.4, passes=3)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for step in range(250):
        optimizer.zero_grad()
        batch = records.select(torch.randperm(200)[:64])
        objective(net, batch, Progress(step, 250, step / 3, 0)).per_example.mean().backward()
        optimizer.step()
        if step == 99:
            undefended = copy.deepcopy(net)
    state = objective.state()
    draw = torch.Generator().manual_seed(1)
    fresh = UniversalSearch(threat, passes=3).perturbations(net, records.inputs[:100], records.labels[:100], draw)
    old = fresh._replace(deltas=state["deltas"])
    before, after, anew = (
        float(success_of(each, model, held.inputs, held.labels, threat).mean())
        for each, model in ((old, undefended), (old, net), (fresh, net))
    )
    assert before > 0.6
    assert after < 0.2
    assert anew > after + 0.2


def test_wrong_settings_are_refused_by_name() -> None:
    for wrong in ({"records": 0}, {"rounds": 0}, {"warm_up": 1.0}, {"passes": -1}):
        with pytest.raises(BadValue, match=next(iter(wrong))):
            Rat(Linf(0.1), **wrong)

"""IBP's loss against interval arithmetic by hand, and what training with it is for."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from interval_rules import ball, merged_margins, worst_loss
from torch import nn

from trivet.data.dataset import Dataset
from trivet.methods import build
from trivet.objectives.ibp import Ibp
from trivet.objectives.objective import Progress
from trivet.objectives.plain import Plain
from trivet.threats.linf import Linf
from trivet.threats.pgd import PGD

END = Progress(step=9, steps=10, epoch=9.0, seed=7)


@pytest.mark.parametrize("kappa", [0.0, 0.3, 1.0])
def test_the_loss_mixes_the_clean_one_with_that_of_the_merged_interval_margins(kappa, rectified, exact_batch) -> None:
    found = Ibp(Linf(0.05), kappa_end=kappa)(rectified, exact_batch, END)
    margins = merged_margins(rectified, *ball(exact_batch, 0.05), exact_batch.labels)
    clean = nn.functional.cross_entropy(rectified(exact_batch.inputs), exact_batch.labels, reduction="none")
    torch.testing.assert_close(found.per_example, kappa * clean + (1 - kappa) * worst_loss(margins))


def test_the_gradient_is_that_of_the_rules_by_hand(rectified, exact_batch, gradients) -> None:
    found = gradients(rectified, Ibp(Linf(0.05), kappa_end=0.0)(rectified, exact_batch, END).per_example)
    margins = merged_margins(rectified, *ball(exact_batch, 0.05), exact_batch.labels)
    for ours, theirs in zip(found, gradients(rectified, worst_loss(margins)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_merging_is_tighter_than_bounding_logits_apart(rectified, exact_batch) -> None:
    from interval_rules import by_hand

    found = Ibp(Linf(0.05), kappa_end=0.0)(rectified, exact_batch, END).per_example
    lower, upper = by_hand(rectified, *ball(exact_batch, 0.05))[-1]
    own = nn.functional.one_hot(exact_batch.labels, 4).bool()
    apart = nn.functional.cross_entropy(torch.where(own, lower, upper), exact_batch.labels, reduction="none")
    assert (found <= apart + 1e-12).all()
    assert (found < apart - 1e-3).any()


def test_without_a_radius_it_is_plain_training(rectified, exact_batch) -> None:
    plain = Plain()(rectified, exact_batch, END).per_example
    torch.testing.assert_close(Ibp(Linf(0.0))(rectified, exact_batch, END).per_example, plain)
    nearly = Ibp(Linf(1e-13))(rectified, exact_batch, END).per_example
    torch.testing.assert_close(nearly, plain, rtol=1e-9, atol=1e-9)


def test_the_loss_grows_with_the_radius_trained_at(rectified, exact_batch) -> None:
    losses = [
        Ibp(Linf(0.1), train_eps=eps, kappa_end=0.0)(rectified, exact_batch, END).per_example
        for eps in (0.01, 0.1, 0.2)
    ]
    assert (losses[0] < losses[1]).all()
    assert (losses[1] < losses[2]).all()


def digits() -> tuple[Dataset, Dataset]:
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 16
    whole = Dataset(images, torch.from_numpy(found.target).long(), tuple("0123456789"), "digits", scale=1.0)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    return whole.select(order[:1297]), whole.select(order[1297:])


EPS, EPOCHS = 0.06, 6
SPECS = {
    "plain": {},
    "ibp": {},
    "crown_ibp": {},
    "single_prop": {},
    "sabr": {"lam": 0.8, "steps": 2},
    "mtl_ibp": {"alpha": 0.5},
}


@cache
def certified(name: str) -> float:
    """After training: the share of test digits that intervals by hand certify. What is certified is never broken."""
    train, test = digits()
    ramp = {} if name == "plain" else {"ramp": (0.1, 0.5)}
    objective = build("objectives", {"name": name, **SPECS[name], **ramp}, threat=Linf(EPS))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    optimizer, steps = torch.optim.Adam(net.parameters(), 0.01), EPOCHS * 21
    for step in range(steps):
        index = torch.randint(len(train), (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        objective(net, train.batch(index), Progress(step, steps, step / 21, 0)).per_example.mean().backward()
        optimizer.step()
    batch = test.batch(torch.arange(len(test)))
    with torch.no_grad():
        sure = (merged_margins(net, *ball(batch, EPS), batch.labels) > 0).all(1)
    broken = PGD(Linf(EPS), steps=5).run(net.eval(), batch.inputs, batch.labels).broken
    assert not (sure & broken).any()
    return float(sure.float().mean())


@pytest.mark.parametrize("name", [name for name in SPECS if name != "plain"])
def test_training_makes_most_test_digits_certifiable_where_plain_training_leaves_few(name) -> None:
    assert certified("plain") < 0.15
    assert certified(name) > 0.6

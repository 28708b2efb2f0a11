"""Soft labels by hand, their least loss, and their hard end."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from trivet.data.dataset import Batch
from trivet.data.hierarchy import Hierarchy
from trivet.errors import BadValue
from trivet.objectives.plain import Plain
from trivet.objectives.soft_labels import SoftLabels

TREE = Hierarchy(tuple("abcd"), [["a", "b"], "c", "d"])


def test_labels_fall_with_the_distance_as_written() -> None:
    """From a: itself at 0, b at 1, c and d at 2 of 2."""
    weight = [1.0, math.exp(-1.5), math.exp(-3.0), math.exp(-3.0)]
    expected = torch.tensor([each / sum(weight) for each in weight])
    torch.testing.assert_close(SoftLabels(TREE, beta=3.0).odds()[0], expected)
    torch.testing.assert_close(SoftLabels(TREE).odds().sum(1), torch.ones(4))


def test_the_loss_is_that_of_loops(mlp, batch, progress) -> None:
    objective = SoftLabels(TREE, beta=2.0)
    got = objective(mlp, batch, progress).per_example
    p, q = mlp(batch.inputs).softmax(1).detach(), objective.odds()
    for row, label in enumerate(batch.labels.tolist()):
        expected = -sum(float(q[label, j]) * math.log(float(p[row, j])) for j in range(4))
        assert float(got[row].detach()) == pytest.approx(expected, rel=1e-5)


def test_no_answer_has_a_smaller_loss_than_the_soft_label_itself(progress) -> None:
    objective, labels = SoftLabels(TREE), torch.arange(4)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return objective(nn.Identity(), Batch(logits, labels, labels), progress).per_example

    best = objective.odds().log()
    noise = torch.randn(50, 4, 4, generator=torch.Generator().manual_seed(0))
    assert all(bool((loss(best + each) > loss(best)).all()) for each in noise)


def test_a_large_beta_is_plain_training(mlp, batch, progress) -> None:
    hard, plain = (each(mlp, batch, progress).per_example for each in (SoftLabels(TREE, beta=200.0), Plain()))
    torch.testing.assert_close(hard, plain)


def test_wrong_settings_are_refused(mlp, batch, progress) -> None:
    with pytest.raises(BadValue, match="beta=0 must be positive"):
        SoftLabels(TREE, beta=0)
    with pytest.raises(BadValue, match="model's 4 classes, not of 2"):
        SoftLabels(Hierarchy(("a", "b"), ["a", "b"]))(mlp, batch, progress)

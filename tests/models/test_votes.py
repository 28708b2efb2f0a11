"""Votes over passes: counts of what single passes answer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trivet.errors import BadValue
from trivet.models.votes import votes


class Noisy(nn.Module):
    """Class 1 with a chance of 0.7, else class 0, in eval mode; class 2 in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return torch.tensor([0.0, 0.0, 1.0]).expand(len(x), -1)
        lucky = torch.rand(len(x)) < 0.7
        return torch.stack([(~lucky).float(), lucky.float(), torch.full((len(x),), 0.5)], 1)


def test_a_network_that_does_not_draw_gives_all_votes_to_its_answer() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(5, 3), torch.rand(7, 5)
    counts = votes(model, x, 9)
    assert torch.equal(counts, 9 * nn.functional.one_hot(model(x).argmax(1), 3))


def test_votes_are_shares_of_passes_in_eval_mode_and_the_mode_stays() -> None:
    """500 records with 40 passes: the share of class 1 is 0.7 to within six standard errors."""
    torch.manual_seed(0)
    model = Noisy().train()
    counts = votes(model, torch.zeros(500, 1), 40)
    assert model.training
    assert bool((counts.sum(1) == 40).all())
    assert int(counts[:, 2].sum()) == 0
    assert float(counts[:, 1].double().mean() / 40) == pytest.approx(0.7, abs=6 * (0.21 / 20_000) ** 0.5)
    assert float((counts.argmax(1) == 1).double().mean()) > 0.9, "a vote errs less often than an answer"


def test_no_draw_is_no_vote() -> None:
    with pytest.raises(BadValue, match="draws=0 must be at least 1"):
        votes(nn.Linear(2, 2), torch.zeros(1, 2), 0)

"""The bookkeeping of tries that share batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trivet.threats.attack import Target
from trivet.threats.targeting import Tries, best_of_each, ranked_classes, try_classes


@settings(deadline=None, max_examples=50)
@given(
    owners=st.lists(st.integers(0, 4), min_size=1, max_size=20),
    seed=st.integers(0, 10**6),
)
def test_the_best_row_of_each_owner_is_the_one_that_a_loop_finds(owners: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randint(0, 5, (len(owners),), generator=generator).float()  # with ties
    least = torch.randint(-1, 5, (5,), generator=generator).float()
    expected = {}
    for row, owner in enumerate(owners):
        held = value[expected[owner]] if owner in expected else least[owner]
        if value[row] > held:
            expected[owner] = row
    chosen = best_of_each(value, torch.tensor(owners), least)
    assert sorted(chosen.tolist()) == sorted(expected.values())


def _scores(x: Tensor) -> Tensor:
    return x.flatten(1)


def test_wrong_classes_are_ranked_by_their_logits_without_the_label() -> None:
    logits = torch.tensor([[3.0, 9.0, 1.0, 2.0], [0.0, 1.0, 2.0, 3.0]])
    model = Target(_scores, _scores)
    assert ranked_classes(model, logits, torch.tensor([1, 0]), 2).tolist() == [[0, 3], [3, 2]]
    assert ranked_classes(model, logits, torch.tensor([1, 0]), 9).shape == (2, 3)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_runner_up_classes_come_first_and_a_fallen_point_is_tried_no_more(batch_size: int) -> None:
    x = torch.tensor([[4.0, 3.0, 2.0, 1.0]] * 6)
    y = torch.zeros(6, dtype=torch.long)
    seen: list[tuple[int, int]] = []

    def climb(x: Tensor, y: Tensor, aim: Tensor, owner: Tensor) -> Tries:
        seen.extend(zip(owner.tolist(), aim.tolist(), strict=True))
        won = (owner < 2) & (aim == 1) | (owner == 2) & (aim == 3)
        return Tries(x + 10 * aim[:, None], won, -(aim - 2.0).abs())

    best = try_classes(Target(_scores, _scores, batch_size), x, y, 3, climb)
    assert [aim for _, aim in seen] == sorted(aim for _, aim in seen)
    if batch_size <= 6:
        assert not {(0, 2), (0, 3), (1, 2), (1, 3)} & set(seen)
    aims = ((best - x) / 10)[:, 0].tolist()
    assert aims == [1, 1, 3, 2, 2, 2]  # the winner where there is one, else the best score

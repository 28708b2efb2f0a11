"""The answers of a randomised network over many passes, and the vote a defender can take of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trivet.errors import require
from trivet.models.modes import evaluating


@torch.no_grad()
def votes(model: nn.Module, x: Tensor, draws: int) -> Tensor:
    """[B, K] int64: how often each class was the answer to `x` [B, ...] in `draws` passes in eval mode.

    The vote is its argmax (the lower class, in a tie). It costs `draws` forward passes for every answer. Randomness is
    drawn from PyTorch's global stream: seed that by another seed than an attack had.

    Raises:
        BadValue: `draws` below one.
    """
    require(draws >= 1, f"draws={draws} must be at least 1.")
    with evaluating(model):
        return torch.stack([_answers(model(x)) for _ in range(draws)]).sum(0)


def _answers(logits: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1])

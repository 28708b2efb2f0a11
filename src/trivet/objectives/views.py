"""A model on several views of each record, the currency of training for randomized smoothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def view_logits(model: nn.Module, views: Tensor) -> Tensor:
    """The logits [B, V, K] of the views [B, V, ...] of B records, in float32 at least.

    The model sees rows in the order of the records: row r is a view of record r // V.
    """
    logits: Tensor = model(views.flatten(0, 1))
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).unflatten(0, views.shape[:2])


def log_mean_softmax(logits: Tensor) -> Tensor:
    """log( (1/V) sum_v softmax(z_v) ) [B, K] of logits [B, V, K]: the soft smoothed classifier on these draws.

    Computed from logarithms, so that no probability underflows to log 0.
    """
    return logits.log_softmax(2).logsumexp(1) - math.log(logits.shape[1])

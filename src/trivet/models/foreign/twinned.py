"""A runtime's own answers with the gradients of a PyTorch twin: how attacks reach a file that has none."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Twinned(nn.Module):
    """Answers are `answering`'s; where a gradient is asked for, values and gradients are `twin`'s.

    Every success of an attack is so judged, and every noisy vote of a certificate counted, on what ships. Weights
    and buffers are the twin's.
    """

    def __init__(self, twin: nn.Module, answering: nn.Module) -> None:
        super().__init__()
        self.twin, self.answering = twin, answering

    def forward(self, x: Tensor) -> Tensor:
        asked = torch.is_grad_enabled() and x.requires_grad
        logits: Tensor = self.twin(x) if asked else self.answering(x)
        return logits

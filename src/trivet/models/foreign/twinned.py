"""A runtime's own answers with the gradients of a PyTorch twin: how attacks reach a file that has none."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trivet.errors import TrivetError


class Twinned(nn.Module):
    """Answers are `answering`'s; where a gradient is asked for, values and gradients are `twin`'s.

    Every success of an attack is so judged, and every noisy vote of a certificate counted, on what ships. Weights
    and buffers are the twin's, and so are bounds: of the answers only under `conditions`.

    Args:
        conditions: what answers owe to the runtime and the machine, where bounds of the twin cover them; an error
            where they do not. None if nothing is known of it.
    """

    def __init__(
        self, twin: nn.Module, answering: nn.Module, conditions: Callable[[], tuple[str, ...]] | None = None
    ) -> None:
        super().__init__()
        self.twin, self.answering, self._conditions = twin, answering, conditions

    def conditions(self) -> tuple[str, ...]:
        """Under which bounds of the twin are bounds of the answers.

        Raises:
            TrivetError: under none that is known.
        """
        if self._conditions is None:
            raise TrivetError("bounds are none of what the runtime answers: nothing is known of its arithmetic.")
        return self._conditions()

    def forward(self, x: Tensor) -> Tensor:
        asked = torch.is_grad_enabled() and x.requires_grad
        logits: Tensor = self.twin(x) if asked else self.answering(x)
        return logits

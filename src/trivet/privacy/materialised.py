"""The engine that holds the gradient of every record: exact for any layers, at the price of memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from trivet.data.dataset import Batch
from trivet.errors import require
from trivet.privacy.engine import (
    ClippedSum,
    Engine,
    Factors,
    Found,
    Losses,
    coupling,
    keep_finite,
    parameters_of,
    wide,
)


@dataclass(frozen=True)
class Materialised(Engine):
    """The gradient of each record's loss, computed as if it were alone, vectorised over records by `torch.func.vmap`.

    Record i's loss is `losses(model, the batch of record i alone, perturbed[i])`: whatever the losses do inside, and
    however often they call the model, they see one record. Tied weights, parametrizations and layers of any kind are
    treated alike. Layers that draw random numbers draw anew for each record.

    Attributes:
        budget: bytes that the gradients of the records held at once may take.
        most: records held at once at most, for what lies between the layers takes memory too.
    """

    budget: int = 2**28
    most: int = 64

    def __post_init__(self) -> None:
        require(self.budget >= 1, f"budget={self.budget} must be at least 1.")
        require(self.most >= 1, f"most={self.most} must be at least 1.")

    def refusal(self, model: nn.Module) -> str | None:
        return coupling(model)

    def at_once(self, model: nn.Module) -> int:
        record = sum(p.numel() * p.element_size() for p in parameters_of(model))
        return max(1, min(self.most, self.budget // max(record, 1)))

    def part(self, model: nn.Module, batch: Batch, perturbed: Tensor, losses: Losses, factors: Factors) -> ClippedSum:
        standin = _Standin(model, losses)
        trainable = {name: p.detach() for name, p in standin.named_parameters() if p.requires_grad}

        def of_one(values: Mapping[str, Tensor], *record: Tensor) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
            loss, log = functional_call(standin, dict(values), tuple(each[None] for each in record))
            return loss, (loss.detach(), log)

        each = vmap(grad(of_one, has_aux=True), in_dims=(None, 0, 0, 0, 0), randomness="different")
        found, (per_example, log) = each(trainable, batch.inputs, batch.labels, batch.index, perturbed)
        rows = [found[name].detach().to(wide(value.dtype)) for name, value in trainable.items()]
        squares = [torch.linalg.vector_norm(row.reshape(len(row), -1), dim=1).square() for row in rows]
        norms = sum(squares, start=torch.zeros_like(per_example, dtype=wide(per_example.dtype))).sqrt()
        scale, lost = keep_finite(norms, factors)
        if lost is not None:
            for row in rows:
                row[lost] = 0.0
        total = [(scale.to(row.dtype) @ row.reshape(len(row), -1)).view(row.shape[1:]) for row in rows]
        return ClippedSum(total, norms, Found(per_example, {name: v.detach().flatten() for name, v in log.items()}))


class _Standin(nn.Module):
    """The losses as a module around the model, so that `functional_call` replaces the model's weights inside them."""

    def __init__(self, model: nn.Module, losses: Losses) -> None:
        super().__init__()
        self.model = model
        self._losses = partial(losses)  # wrapped, lest a callable module become a child

    def forward(
        self, inputs: Tensor, labels: Tensor, index: Tensor, perturbed: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        found = self._losses(self.model, Batch(inputs, labels, index), perturbed)
        require(
            found.per_example.shape == (1,),
            f"the losses of one record have shape {list(found.per_example.shape)}; give one for each.",
        )
        return found.per_example[0], dict(found.log)

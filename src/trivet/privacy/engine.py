"""The protocol of an engine: the exact sum of clipped per-record gradients, over all views of a record."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trivet.data.dataset import Batch
from trivet.errors import BadValue, require
from trivet.models.public_batch_norm import PublicBatchNorm
from trivet.privacy.gradient_rule import PerExample

Losses = Callable[[nn.Module, Batch, Tensor], PerExample]
"""`losses(model, batch, perturbed)`: [B] losses, each a function of the parameters and of its own record."""
Factors = Callable[[Tensor], Tensor]
"""From the norms [B] of the records' gradients to the factors [B] they are scaled by, each from its own norm alone."""


class Unsuited(BadValue):
    """An engine found, at work, that it cannot treat this model under these losses. Another engine may."""


class Found(NamedTuple):
    """Losses [B] and numbers for the log, detached."""

    per_example: Tensor
    log: Mapping[str, Tensor]


class ClippedSum(NamedTuple):
    """What an engine returns.

    Attributes:
        total: for each trainable parameter, in the order of `model.parameters()`, sum_i c_i g_i in float32 (float64
            where the parameter is), where g_i is the gradient of record i's loss, over everything the model computed
            for that record, and c = factors(norms). A record whose norm is not finite contributes exactly zero.
        norms: [B], l2 norms of the g_i over all trainable parameters jointly; may hold inf or NaN.
        found: the losses, detached.
    """

    total: list[Tensor]
    norms: Tensor
    found: PerExample


class Engine(ABC):
    """Computes per-record gradients of a model in its present mode, clips them and adds them up, all exactly.

    Parameters' `.grad` and `requires_grad`, modes, buffers and hooks are as before afterwards, whatever happens.
    """

    @abstractmethod
    def refusal(self, model: nn.Module) -> str | None:
        """Why this engine cannot treat `model`, in one sentence; None if it can."""

    @abstractmethod
    def at_once(self, model: nn.Module) -> int:
        """How many records to hold in memory together at most."""

    @abstractmethod
    def part(self, model: nn.Module, batch: Batch, perturbed: Tensor, losses: Losses, factors: Factors) -> ClippedSum:
        """`clipped_sum` for few records, with no care for the state of the model."""

    def clipped_sum(
        self, model: nn.Module, batch: Batch, perturbed: Tensor, losses: Losses, factors: Factors
    ) -> ClippedSum:
        """The clipped sum for the records of `batch` (at least one) and their `perturbed` inputs [B, ...].

        Raises:
            BadValue: the model is refused, or the losses do not treat records one by one in the order given.
        """
        reason = self.refusal(model)
        if reason is not None:
            raise BadValue(reason)
        require(
            0 < len(batch) == len(perturbed),
            f"there are {len(batch)} records and {len(perturbed)} perturbed inputs; each record needs its own.",
        )
        parts = -(-len(batch) // self.at_once(model))
        size = -(-len(batch) // parts)  # alike, for a small last part would waste a pass
        total: list[Tensor] = []
        norms: list[Tensor] = []
        found: list[PerExample] = []
        with _left_alone(model), torch.enable_grad():
            for i in range(0, len(batch), size):
                rows = slice(i, i + size)
                done = self.part(model, batch.select(rows), perturbed[rows], losses, factors)
                total = [mine.add_(its) for mine, its in zip(total, done.total, strict=True)] if i else done.total
                norms.append(done.norms)
                found.append(done.found)
        return ClippedSum(total, torch.cat(norms), _together(found))


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters, in the order of `model.parameters()`."""
    return [p for p in model.parameters() if p.requires_grad]


def coupling(model: nn.Module) -> str | None:
    """The sentence that refuses a model whose layers mix the records of a batch; None where none is known to."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or not module.track_running_stats):
            return f"{name} ({kind}) mixes the records of a batch; use group normalisation, norm='group'."
        if isinstance(module, PublicBatchNorm) and module.mixed:
            return f"{name} ({kind}) normalises records by each other; use public statistics, norm='public_batch'."
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats and module.training:
            return f"{name} ({kind}) averages statistics over records; set track_running_stats=False."
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and (
            module.scale_grad_by_freq or module.max_norm is not None
        ):
            return f"{name} ({kind}) scales by what a whole batch holds; leave out scale_grad_by_freq and max_norm."
    return None


def keep_finite(norms: Tensor, factors: Factors) -> tuple[Tensor, Tensor | None]:
    """The factors [B], zero where the norm is not finite, and the mask [B] of those records; None if there are none."""
    finite = norms.isfinite()
    scale = torch.where(finite, factors(norms), torch.zeros_like(norms))
    return scale, None if bool(finite.all()) else ~finite


def wide(dtype: torch.dtype) -> torch.dtype:
    """What norms and sums are computed in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _together(found: Sequence[PerExample]) -> PerExample:
    if len(found) == 1:
        return found[0]
    sizes = torch.tensor([len(each.per_example) for each in found], dtype=torch.float32)
    log = {}
    for name, value in found[0].log.items():
        values = [each.log[name] for each in found]
        if value.dim():
            log[name] = torch.cat(values)
        else:
            log[name] = (torch.stack(values) * (sizes / sizes.sum()).to(value.device)).sum()
    return Found(torch.cat([each.per_example for each in found]), log)


@contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Buffers put back afterwards; inside, modules are called uncompiled, because engines look into the calls."""
    buffers = [
        (module, name, buffer, buffer._version, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    compiled = [module for module in model.modules() if module._compiled_call_impl is not None]
    calls = [module._compiled_call_impl for module in compiled]
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in zip(compiled, calls, strict=True):
            module._compiled_call_impl = call
        with torch.no_grad():
            for module, name, buffer, version, saved in buffers:
                if buffer._version != version:
                    buffer.copy_(saved)
                module._buffers[name] = buffer

"""Per-record gradients of single layers, from the inputs and output gradients of their calls.

A tape stands in for the forward pass of one layer. It computes what the layer computes, with weights cut off from
autograd; in the backward pass it receives, for every call, the input a and the gradient b by the output, and turns
them into gradients of the records. Rows are record-major: of N rows for B records, row r belongs to record r // (N/B).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.utils import parametrize

from trivet.errors import BadValue
from trivet.privacy.engine import Unsuited, wide


class Session:
    """What the tapes of one forward and backward pass share.

    Attributes:
        records: B.
        anchor: a scalar from which every watched output depends, so that gradients flow without trainable weights.
        collecting: whether the backward pass is the engine's own.
    """

    def __init__(self, records: int, device: torch.device) -> None:
        self.records = records
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.collecting = False

    def expect_collecting(self) -> bool:
        """True in the engine's backward pass; False in one that the losses make for themselves.

        Raises:
            Unsuited: the losses differentiate through a gradient, which the tapes cannot follow.
        """
        if not self.collecting and torch.is_grad_enabled():
            raise Unsuited("the losses take the gradient of a gradient; choose engine='materialised'.")
        return self.collecting


class Effective:
    """A tensor that a layer computes with, and the trainable parameters behind it.

    A parametrization is computed once for all calls. The gradient of a record, being linear in the gradient by the
    effective tensor at these weights, is pulled back through it record by record.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        with torch.enable_grad():
            value = getattr(module, name)
        self.computed: Tensor | None = None
        self.originals: list[nn.Parameter] = []
        if parametrize.is_parametrized(module, name):
            if isinstance(value, Tensor) and value.requires_grad:
                self.computed = value
                behind: Any = module.parametrizations
                self.originals = [p for p in behind[name].parameters() if p.requires_grad]
        elif isinstance(value, nn.Parameter) and value.requires_grad:
            self.originals = [value]
        self.value: Tensor | None = None if value is None else value.detach()

    def pull(self, gradient: Tensor) -> list[Tensor]:
        """From gradients [B, ...] by the effective tensor to those [B, ...] by the originals."""
        if self.computed is None:
            return [gradient]
        gradient = gradient.to(self.computed.dtype)
        try:
            found = torch.autograd.grad(
                self.computed, self.originals, gradient, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        except RuntimeError:  # a backward pass that cannot be vectorised
            rows = [
                torch.autograd.grad(self.computed, self.originals, row, retain_graph=True, allow_unused=True)
                for row in gradient
            ]
            found = tuple(None if each[0] is None else torch.stack(each) for each in zip(*rows, strict=True))  # type: ignore[misc]
        return [
            gradient.new_zeros(len(gradient), *original.shape) if each is None else each
            for original, each in zip(self.originals, found, strict=True)
        ]


class _Watch(torch.autograd.Function):
    """The identity on a layer's output, in place; hands the tape (a, b) in the backward pass."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, _anchor: Tensor, a: Tensor, tape: Tape) -> Tensor:
        ctx.tape = tape
        ctx.save_for_backward(a)
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        if not ctx.tape.session.expect_collecting():
            return b, None, None, None
        (a,) = ctx.saved_tensors
        ctx.tape.add(a, b)
        # The value is asked for and thrown away; what counts is that this node was visited.
        return b, b.new_zeros(()), None, None


class Tape(ABC):
    """One layer in one pass.

    Class attributes:
        tensors: the names of the layer's tensors that its rule knows.

    Attributes:
        rows: gradients [B, ...] of the records by the effective tensors, as far as they were computed at once.
    """

    tensors: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def __init__(self, module: nn.Module, session: Session) -> None:
        self.module: Any = module
        self.session = session
        self.effective = {name: Effective(module, name) for name in self.tensors}
        self.rows: dict[str, Tensor] = {}
        self._pulled: list[tuple[nn.Parameter, Tensor]] = []

    @classmethod
    def refusal(cls, _module: nn.Module) -> str | None:
        """What about this layer is beyond the rule; None if nothing is."""
        return None

    def wants(self, name: str) -> bool:
        """Whether a trainable parameter stands behind the effective tensor."""
        return bool(self.effective[name].originals)

    def plain(self, name: str) -> bool:
        """Whether the effective tensor is itself the trainable parameter."""
        return self.wants(name) and self.effective[name].computed is None

    @abstractmethod
    def compute(self, x: Tensor, weight: Any, bias: Any) -> Tensor:
        """The layer's output."""

    @abstractmethod
    def add(self, a: Tensor, b: Tensor) -> None:
        """Take in one call's input and the gradient by its output."""

    def forward(self, input: Tensor) -> Tensor:
        """Replaces the layer's own forward pass."""
        values = [self.effective[name].value for name in self.tensors]
        if not torch.is_grad_enabled():
            return self.compute(input, *values)
        if is_functorch_wrapped_tensor(input):
            raise Unsuited("the losses differentiate by torch.func; choose engine='materialised'.")
        self.views(input)
        x = self.as_computed(input)
        output = self.compute(x, *values)
        if output._is_view():  # cannot be watched in place
            output = output.clone()
        watched: Tensor = _Watch.apply(output, self.session.anchor, x.detach(), self)
        return watched

    def as_computed(self, x: Tensor) -> Tensor:
        """The input in the precision in which the layer works."""
        return x

    def views(self, a: Tensor) -> int:
        """How many rows of a call belong to each record.

        Raises:
            BadValue: the rows cannot be divided among the records.
        """
        views, rest = divmod(len(a) if a.dim() else 0, self.session.records)
        if rest or not views:
            kind = type(self.module).__name__
            raise BadValue(
                f"{kind} was called with inputs {list(a.shape)} for {self.session.records} records; the first "
                "dimension must hold the records, each with as many rows as the others."
            )
        return views

    def keep(self, name: str, gradient: Tensor) -> None:
        """Add gradients [B * views, ...] by an effective tensor, summed over the views of each record."""
        gradient = gradient.to(wide(gradient.dtype))
        if len(gradient) != self.session.records:
            gradient = gradient.unflatten(0, (self.session.records, -1)).sum(1)
        gradient = gradient.reshape(-1, *self.effective[name].value.shape)  # type: ignore[union-attr]
        # Not in place: the first may be the gradient that autograd passes on.
        self.rows[name] = self.rows[name] + gradient if name in self.rows else gradient

    def squares(self) -> list[Tensor]:
        """Squared norms [B] of the records' gradients, in pieces to be added; after the backward pass."""
        for name, gradient in self.rows.items():
            behind = self.effective[name]
            self._pulled += zip(behind.originals, behind.pull(gradient), strict=True)
        self.rows.clear()
        return [torch.linalg.vector_norm(row.reshape(len(row), -1), dim=1).square() for _, row in self._pulled]

    def discard(self, lost: Tensor) -> None:
        """Let the records of the mask [B] contribute zero, for zero times infinity is not zero."""
        self._pulled = [(p, without(row, lost)) for p, row in self._pulled]

    def total(self, scale: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """For each trainable parameter sum_i scale_i g_i; in pieces to be added."""
        return [(p, (scale.to(row.dtype) @ row.reshape(len(row), -1)).view(p.shape)) for p, row in self._pulled]


def without(rows: Tensor, lost: Tensor) -> Tensor:
    """`rows` [B * views, ...] with zeros for the records of the mask [B]."""
    mask = lost.repeat_interleave(len(rows) // len(lost))
    return rows.masked_fill(mask.view(-1, *[1] * (rows.dim() - 1)), 0.0)


class EmbeddingTape(Tape):
    """weight[ids]: only the rows looked up have a gradient, the sum of b over the places of each id in a record."""

    tensors = ("weight",)

    def __init__(self, module: nn.Module, session: Session) -> None:
        super().__init__(module, session)
        self.calls: list[tuple[Tensor, Tensor]] = []

    def compute(self, x: Tensor, weight: Any, bias: Any = None) -> Tensor:
        return F.embedding(x, weight, self.module.padding_idx)

    def add(self, a: Tensor, b: Tensor) -> None:
        ids, b = a.reshape(self.session.records, -1), b.to(wide(b.dtype))
        b = b.reshape(*ids.shape, b.shape[-1])
        if self.module.padding_idx is not None:
            b = b.masked_fill((ids == self.module.padding_idx)[..., None], 0.0)
        if self.plain("weight"):
            self.calls.append((ids, b))
            return
        gradient = b.new_zeros(len(ids), *self.effective["weight"].value.shape)  # type: ignore[union-attr]
        self.keep("weight", gradient.scatter_add_(1, ids[..., None].expand_as(b), b))

    def squares(self) -> list[Tensor]:
        found = super().squares()
        if self.calls:
            ids, b = (torch.cat(each, 1) for each in zip(*self.calls, strict=True))
            self.calls = [(ids, b)]
            # One number for each id in each record; equal ones add up before they are squared.
            record = torch.arange(len(ids), device=ids.device)[:, None] * self.module.num_embeddings
            keys, place = torch.unique(record + ids, return_inverse=True)
            sums = b.new_zeros(len(keys), b.shape[-1]).index_add_(0, place.flatten(), b.flatten(0, 1))
            whose = keys // self.module.num_embeddings
            found.append(b.new_zeros(len(ids)).index_add_(0, whose, sums.square().sum(1)))
        return found

    def discard(self, lost: Tensor) -> None:
        super().discard(lost)
        self.calls = [(ids, without(b, lost)) for ids, b in self.calls]

    def total(self, scale: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        found = super().total(scale)
        for ids, b in self.calls:
            weight = self.effective["weight"].originals[0]
            b = b * scale.to(b.dtype)[:, None, None]
            whole = b.new_zeros(weight.shape).index_add_(0, ids.flatten(), b.flatten(0, 1))
            found.append((weight, whole))
        return found


class _GroupNorm(torch.autograd.Function):
    """Group normalisation whose own backward pass leaves the gradients of each record behind.

    [N, C, ...] in G groups is [1, N C, ...] in N G groups: to the kernel, the rows' weights are then different ones,
    and the gradients by them, which it sums up on its way to the input's, come out row by row, at no cost.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, _anchor: Tensor, weight: Tensor, bias: Tensor, tape: NormTape) -> Tensor:
        rows, channels, places = len(x), x.shape[1], x[0, 0].numel()
        groups = tape.module.num_groups
        out, mean, rstd = torch.native_group_norm(x, weight, bias, rows, channels, places, groups, tape.module.eps)
        ctx.save_for_backward(x, mean, rstd)
        ctx.tape, ctx.weight = tape, weight
        return out

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        tape, collecting = ctx.tape, ctx.tape.session.expect_collecting()
        x, mean, rstd = ctx.saved_tensors
        rows, channels, *size = x.shape
        by_input, by_weight, by_bias = torch.ops.aten.native_group_norm_backward(
            b.contiguous().view(1, -1, *size),
            x.view(1, -1, *size),
            mean.view(1, -1),
            rstd.view(1, -1),
            ctx.weight.repeat(rows),
            1,
            rows * channels,
            x[0, 0].numel(),
            rows * tape.module.num_groups,
            (ctx.needs_input_grad[0], collecting and tape.wants("weight"), collecting and tape.wants("bias")),
        )
        for name, gradient in (("weight", by_weight), ("bias", by_bias)):
            if collecting and tape.wants(name):
                tape.keep(name, gradient.view(rows, channels))
        by_input = None if by_input is None else by_input.view_as(x)
        return by_input, b.new_zeros(()) if collecting else None, None, None, None


class NormTape(Tape):
    """weight * normalised(x) + bias: the gradients are the sums of b * normalised(a) and of b over the places."""

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        if getattr(module, "track_running_stats", False):
            return "normalises by running statistics"
        return None

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = (self.effective[name].value for name in self.tensors)
        if (
            isinstance(self.module, nn.GroupNorm)
            and torch.is_grad_enabled()
            and input.dim() > 2
            and input.is_contiguous()
            and input.dtype in (torch.float32, torch.float64)
            and input.dtype == weight.dtype  # type: ignore[union-attr]
            and not torch.is_autocast_enabled(input.device.type)
        ):
            self.views(input)
            watched: Tensor = _GroupNorm.apply(input, self.session.anchor, weight, bias, self)
            return watched
        return super().forward(input)

    def compute(self, x: Tensor, weight: Any, bias: Any) -> Tensor:
        module = self.module
        if isinstance(module, nn.GroupNorm):
            return F.group_norm(x, module.num_groups, weight, bias, module.eps)
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
        return F.instance_norm(x, None, None, weight, bias, True, 0.0, module.eps)

    def add(self, a: Tensor, b: Tensor) -> None:
        a, b = a.to(wide(a.dtype)), b.to(wide(b.dtype))
        if self.wants("weight"):
            self._keep("weight", b * self.compute(a, None, None))
        if self.wants("bias"):
            self._keep("bias", b)

    def _keep(self, name: str, gradient: Tensor) -> None:
        if isinstance(self.module, nn.LayerNorm):
            last = gradient.dim() - len(self.module.normalized_shape)
            places = tuple(range(1, last))
        else:
            places = tuple(range(2, gradient.dim()))
        self.keep(name, gradient.sum(places) if places else gradient)

    def views(self, a: Tensor) -> int:
        least = 1 + len(self.module.normalized_shape) if isinstance(self.module, nn.LayerNorm) else 2
        if isinstance(self.module, nn.modules.instancenorm._InstanceNorm):
            least = self.module._get_no_batch_dim() + 1  # the layer takes a single record without its dimension too
        if a.dim() < least:
            kind = type(self.module).__name__
            raise BadValue(f"{kind} was called with inputs {list(a.shape)}; the first dimension must hold the records.")
        return super().views(a)

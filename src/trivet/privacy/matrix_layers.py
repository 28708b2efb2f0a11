"""Per-record gradients of the layers that multiply by a matrix: linear ones and convolutions.

Of a record with T places, inputs a [T, d] and output gradients b [T, p], the weight's gradient is G = b^T a. Either
it is computed at once, record by record, or only its norm is, by ||G||^2 = sum_{t,t'} (a_t . a_t') (b_t . b_t')
(Goodfellow 2015; Li et al. 2022), and the weighted sum over records is one more product at the end (book-keeping,
Bu et al. 2022). Which is cheaper depends on T^2 against p d.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivet.errors import BadValue
from trivet.privacy.engine import wide
from trivet.privacy.layers import Session, Tape, without

_ROWS = 64  # rows that one convolution of many groups treats: enough for all its threads


class MatrixTape(Tape):
    """What linear layers and convolutions share: the choice, and the calls kept where only norms were computed.

    Attributes:
        places: T, over all calls and views of a record.
        calls: (a, b) of each call whose weighted sum is still to come.
    """

    def __init__(self, module: nn.Module, session: Session) -> None:
        super().__init__(module, session)
        self.places = 0
        self.calls: list[tuple[Tensor, Tensor]] = []
        self._ghost: bool | None = None

    @abstractmethod
    def count(self, x: Tensor, output: Tensor) -> int:
        """Places of a record in one call."""

    @abstractmethod
    def ghost_is_cheaper(self) -> bool:
        """The choice, once `places` is known."""

    @abstractmethod
    def materialise(self, a: Tensor, b: Tensor) -> Tensor:
        """Gradients by the weight, [rows, ...], of one call."""

    @abstractmethod
    def matrices(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """One call as [B, groups, T, d] and [B, groups, T, p]."""

    @abstractmethod
    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """The gradient by the weight of one call, summed over all rows."""

    @abstractmethod
    def bias_rows(self, b: Tensor) -> Tensor:
        """Gradients by the bias, [rows, p], of one call."""

    def compute(self, x: Tensor, weight: Any, bias: Any) -> Tensor:
        output = self.multiply(x, weight, bias)
        if torch.is_grad_enabled():
            self.places += self.count(x, output)
        return output

    @abstractmethod
    def multiply(self, x: Tensor, weight: Any, bias: Any) -> Tensor: ...

    def as_computed(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype in (torch.float32, torch.float16, torch.bfloat16):
            return x.to(torch.get_autocast_dtype(kind))
        return x

    def add(self, a: Tensor, b: Tensor) -> None:
        if self.wants("weight") and self._ghost is None:
            self._ghost = self.plain("weight") and self.ghost_is_cheaper()
        if self.wants("weight") and not self._ghost:
            # In the precision of the backward pass: norm and sum are then taken, in float32, of the same rows.
            self.keep("weight", self.materialise(a, b) if a.dtype == b.dtype else self.materialise(*_widened(a, b)))
        a, b = _widened(a, b)
        if self.wants("bias"):
            self.keep("bias", self.bias_rows(b))
        if self._ghost:
            self.calls.append((a, b))

    def squares(self) -> list[Tensor]:
        found = super().squares()
        if self.calls:
            pairs = [self.matrices(a, b) for a, b in self.calls]
            a, b = (each[0] if len(each) == 1 else torch.cat(each, 2) for each in zip(*pairs, strict=True))
            if a.shape[2] == 1:
                found.append((a.square().sum((2, 3)) * b.square().sum((2, 3))).sum(1))
            else:
                found.append(((a @ a.mT) * (b @ b.mT)).sum((1, 2, 3)))
        return found

    def discard(self, lost: Tensor) -> None:
        super().discard(lost)
        self.calls = [(without(a, lost), without(b, lost)) for a, b in self.calls]

    def total(self, scale: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        found = super().total(scale)
        for a, b in self.calls:
            each = scale.to(b.dtype).repeat_interleave(len(b) // len(scale)).view(-1, *[1] * (b.dim() - 1))
            found.append((self.effective["weight"].originals[0], self.product(a, b * each)))
        return found


def _widened(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.to(wide(b.dtype)), b.to(wide(b.dtype))


class LinearTape(MatrixTape):
    """x W^T + bias; every dimension between the first and the last counts as places."""

    def multiply(self, x: Tensor, weight: Any, bias: Any) -> Tensor:
        if x.dim() < 2:
            raise BadValue(f"Linear was called with inputs {list(x.shape)}; the first dimension must hold the records.")
        return F.linear(x, weight, bias)

    def count(self, x: Tensor, output: Tensor) -> int:
        return x[..., 0].numel() // self.session.records

    def ghost_is_cheaper(self) -> bool:
        d, p = self.module.in_features, self.module.out_features
        # Measured on a CPU, from 64 to 512 features: products of small matrices are that much slower than long ones.
        return self.places == 1 or 16 * self.places**2 < d * p

    def matrices(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        records = self.session.records
        return a.reshape(records, 1, -1, a.shape[-1]), b.reshape(records, 1, -1, b.shape[-1])

    def materialise(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.matrices(a, b)
        return b[:, 0].mT @ a[:, 0]

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return b.flatten(0, -2).T @ a.flatten(0, -2)

    def bias_rows(self, b: Tensor) -> Tensor:
        return b.reshape(self.session.records, -1, b.shape[-1]).sum(1)


class ConvolutionTape(MatrixTape):
    """Convolutions in one and two dimensions; the places are those of the output, d is a patch of one group.

    Computed channels first even where weights or images lie channels last: the gradients of the records are, and
    changing back and forth costs more than the other layout gains.
    """

    def multiply(self, x: Tensor, weight: Any, bias: Any) -> Tensor:
        if x.dim() != weight.dim():
            kind = type(self.module).__name__
            raise BadValue(f"{kind} was called with inputs {list(x.shape)}; the first dimension must hold the records.")
        return self.module._conv_forward(x.contiguous(), weight.contiguous(), bias)

    def count(self, x: Tensor, output: Tensor) -> int:
        return output[:, 0].numel() // self.session.records

    def ghost_is_cheaper(self) -> bool:
        # Measured from 1 to 512 channels on a CPU. A grouped convolution is that much better than products of patches.
        outputs, *patch = self._shape
        return 32 * self.places**2 < math.prod(patch) * outputs

    def _flat(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...], tuple[int, ...]]:
        """A call as a two-dimensional convolution: inputs, padded where that is not a number; stride, padding."""
        module = self.module
        padding = module.padding
        if isinstance(padding, str) or module.padding_mode != "zeros":
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            a, padding = F.pad(a, module._reversed_padding_repeated_twice, mode=mode), (0,) * (a.dim() - 2)
        if a.dim() == 3:
            return a.unsqueeze(2), b.unsqueeze(2), (1, *module.stride), (0, *padding)
        return a, b, module.stride, padding

    @property
    def _shape(self) -> tuple[int, ...]:
        """Of the weight as of a two-dimensional convolution."""
        shape = tuple(self.effective["weight"].value.shape)  # type: ignore[union-attr]
        return shape if len(shape) == 4 else (*shape[:2], 1, shape[2])

    @property
    def _dilation(self) -> tuple[int, ...]:
        return self.module.dilation if len(self.module.dilation) == 2 else (1, *self.module.dilation)

    def matrices(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a, b, stride, padding = self._flat(a, b)
        patches = F.unfold(a, self._shape[2:], self._dilation, padding, stride)
        return self._grouped(patches), self._grouped(b.flatten(2))

    def _grouped(self, x: Tensor) -> Tensor:
        """[rows, groups * n, L] as [B, groups, views * L, n]."""
        x = x.view(self.session.records, -1, self.module.groups, x.shape[1] // self.module.groups, x.shape[2])
        return x.permute(0, 2, 1, 4, 3).flatten(2, 3)

    def materialise(self, a: Tensor, b: Tensor) -> Tensor:
        """Convolutions of rows * groups groups: every row is a group of its own."""
        a, b, stride, padding = self._flat(a, b)
        outputs, channels, *patch = self._shape
        # The kernels for many groups work in blocks of eight channels; filled up, three take half the time.
        fill = 8 - channels if 1 < channels < 8 and self.module.groups == 1 and a.device.type == "cpu" else 0
        found = b.new_empty(len(a), outputs, channels, *patch)
        # In parts, for the kernels rearrange what they return, which would take as much memory again.
        for start in range(0, len(a), _ROWS):
            here, rows = slice(start, start + _ROWS), min(_ROWS, len(a) - start)
            of_part = F.pad(a[here], (0, 0, 0, 0, 0, fill)) if fill else a[here]
            by_weight = self._by_weight(
                of_part.reshape(1, -1, *a.shape[2:]),
                b[here].reshape(1, -1, *b.shape[2:]),
                a.new_empty(rows * outputs, channels + fill, *patch),
                stride,
                padding,
                rows * self.module.groups,
            )
            found[here] = by_weight.view(rows, outputs, channels + fill, *patch)[:, :, :channels]
        return found

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        a, b, stride, padding = self._flat(a, b)
        weight = a.new_empty(self._shape)
        return self._by_weight(a, b, weight, stride, padding, self.module.groups).view(self.module.weight.shape)

    def _by_weight(
        self, a: Tensor, b: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...], groups: int
    ) -> Tensor:
        """The gradient by a weight, of which only the shape matters."""
        found: Tensor = torch.ops.aten.convolution_backward(
            b, a, weight, None, stride, padding, self._dilation, False, (0, 0), groups, (False, True, False)
        )[1]
        return found

    def bias_rows(self, b: Tensor) -> Tensor:
        return b.flatten(2).sum(2)

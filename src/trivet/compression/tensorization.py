"""Defensive tensorization: factorised kernels whose latent components drop out at random (Bulat et al., 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trivet.compression.compression import Compression, WeightMap, steps_on
from trivet.errors import TrivetError, require
from trivet.methods import method
from trivet.models.baking import draws

_SPARED = 3
"""Modes of rank up to this are never dropped from: one draw would silence a whole layer."""
_RIDGE = 0.03
"""Of the least squares behind CP terms. Without it they grow and cancel: of a 32x16x3x3 kernel they had 71 times its
squared norm, and so the variance of a draw; with it 1.6 times, and the fit was no worse."""
_AT_ONCE = 2**26
"""Numbers in the kernels of the records that pass a layer together; a quarter of a gigabyte, without gradients."""


@dataclass(frozen=True)
class Links:
    """A kernel as three: W[o, i, ...] = sum_{s, r} last[o, s] core[s, r, ...] first[r, i].

    Attributes:
        first, last: [r_in, C_in] and [C_out, r_out].
        core: [r_out, r_in, ...]; with `depthwise` [R, 1, ...], of a diagonal core what is on the diagonal.
        depthwise: whether the core is diagonal.
    """

    first: Tensor
    core: Tensor
    last: Tensor
    depthwise: bool

    def middle(self, first: bool, last: bool) -> Tensor:
        """The core, with those of `first` and `last` contracted into it that do not stand alone."""
        core, ones = self.core, (1,) * (self.core.ndim - 2)
        if not first:
            spread = self.first.reshape(*self.first.shape, *ones)
            core = core * spread if self.depthwise else along(core, self.first.mT, 1)
        if not last:
            spread = self.last.reshape(*self.last.shape, *ones)
            core = spread * core.movedim(0, 1) if self.depthwise and first else along(core, self.last, 0)
        return core


class Factorised(WeightMap):
    """What Tucker and CP kernels share: which modes are dropped from, and a draw for each."""

    factors = True

    def __init__(self, keep: float, binary: bool) -> None:
        super().__init__()
        self.keep, self.binary = keep, binary
        self.randomised = keep < 1

    def drawn(self, factor: Tensor) -> Tensor:
        """`factor` [dim, rank] with components dropped, new at every call, of mean `factor`; itself if spared.

        Components stay with chance `keep` each, and one at random where none would: so all have the same chance, which
        is what they are divided by.
        """
        rank = factor.shape[1]
        if rank <= _SPARED or not self.randomised:
            return factor
        luck = torch.rand(rank, device=factor.device)
        stay = luck <= luck.min().clamp(min=self.keep)
        return factor * (stay / (self.keep + (1 - self.keep) ** rank / rank)).to(factor.dtype)

    def shipped(self, weight: Tensor) -> Tensor:
        """The weight, or its signs at a scale for each output; the gradient of the latter is that of the former."""
        if not self.binary:
            return weight
        fixed = weight.detach()
        scale = fixed.abs().flatten(1).mean(1).reshape(-1, *(1,) * (weight.ndim - 1))
        return scale * torch.where(fixed >= 0, 1.0, -1.0) + (weight - fixed)


class Tucker(Factorised):
    """W = G x1 U1 x2 U2 …; stored are the core G and U_k [dim_k, rank_k]; components drop from every mode of G."""

    def __init__(self, shape: torch.Size, rank: float, keep: float, binary: bool) -> None:
        super().__init__(keep, binary)
        # More components than the product of the other modes' sizes add nothing, but cost: the share is of the size.
        self.ranks = [max(1, ceil(rank * size)) for size in shape]

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        factors = higher_order_svd(weight.detach(), self.ranks)
        return multiplied(weight.detach(), [u.mT for u in factors]), *factors

    def links(self, core: Tensor, outer: Tensor, inner: Tensor, *others: Tensor) -> Links:
        for mode, factor in enumerate(others, start=2):
            core = along(core, factor, mode)
        return Links(inner.mT, core, outer, depthwise=False)

    def forward(self, core: Tensor, *factors: Tensor) -> Tensor:
        return self.shipped(multiplied(core, [self.drawn(u) for u in factors]))


class Cp(Factorised):
    """W = sum_r a_r o b_r o …; stored are the factors [dim_k, R]; whole terms drop."""

    def __init__(self, shape: torch.Size, rank: float, keep: float, binary: bool) -> None:
        super().__init__(keep, binary)
        # As many terms as make `rank` times the weight's numbers.
        self.terms = max(1, ceil(rank * shape.numel() / sum(shape)))

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        try:
            import tensorly  # type: ignore[import-untyped]
            from tensorly.decomposition import parafac  # type: ignore[import-untyped]
        except ImportError:
            raise TrivetError("form='cp' needs tensorly; pip install 'trivet[tensor]'.") from None
        exact = weight.detach().double().cpu()
        # So that a term's share is near one, whatever the kernel; the ridge is small beside that.
        scale = exact.norm().clamp_min(torch.finfo().tiny) / self.terms**0.5
        found: Any = parafac(
            tensorly.tensor((exact / scale).numpy()), self.terms, init="random", random_state=0, l2_reg=_RIDGE
        )
        spread = scale ** (1 / weight.ndim)
        return tuple((spread * torch.from_numpy(each.copy())).to(weight) for each in found.factors)

    def links(self, outer: Tensor, inner: Tensor, *others: Tensor) -> Links:
        core = outer.new_ones(outer.shape[1])
        for factor in others:
            core = core.unsqueeze(-2) * factor
        return Links(inner.mT, core.movedim(-1, 0).unsqueeze(1), outer, depthwise=True)

    def forward(self, first: Tensor, *others: Tensor) -> Tensor:
        return self.shipped(summed([self.drawn(first), *others]))


def higher_order_svd(weight: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """The leading left singular vectors [dim_k, rank_k] of every unfolding; at full rank orthogonal, and so exact."""
    bases = []
    for mode, rank in enumerate(ranks):
        unfolded = weight.movedim(mode, 0).flatten(1).double()
        # Through the Gram matrix, whose eigenvectors are as many as the mode is long, however short the rows.
        _, vectors = torch.linalg.eigh(unfolded @ unfolded.mT)
        bases.append(vectors.flip(1)[:, :rank].to(weight.dtype))
    return bases


def multiplied(core: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """core x1 U1 x2 U2 …, each U_k [dim_k, rank_k]."""
    # From the last mode on: those of a kernel's rows and columns are seldom drawn, and so need no copy for each record.
    for mode in reversed(range(len(factors))):
        core = along(core, factors[mode], mode)
    return core


def along(core: Tensor, factor: Tensor, mode: int) -> Tensor:
    """core x_mode U, U [dim_mode, rank_mode]."""
    return torch.tensordot(factor, core, ([1], [mode])).movedim(0, mode)


def summed(factors: Sequence[Tensor]) -> Tensor:
    """sum_r a_r o b_r o … of factors [dim_k, R]."""
    first, *others = factors
    product = first
    for factor in others:
        product = product.unsqueeze(-2) * factor
    return product.sum(-1)


class PerRecord(nn.Module):
    """Mixed into a layer: while its weight is drawn, each record passes alone, and so meets a weight of its own."""

    at_once: int

    @staticmethod
    def adopt(layer: Any) -> None:
        """Make `layer`, whose weight is still plain, such a layer."""
        plain = type(layer)
        layer.at_once = max(1, _AT_ONCE // layer.weight.numel())
        layer.__class__ = type(f"PerRecord{plain.__name__}", (PerRecord, plain), {})

    def forward(self, x: Tensor) -> Tensor:
        if not draws(self) or not len(x):
            return super().forward(x)
        alone = super().forward
        every = torch.vmap(lambda record: alone(record[None])[0], randomness="different", chunk_size=self.at_once)
        return every(x)


@method(
    title="Defensive tensorization",
    paper="Bulat et al., BMVC 2021",
    year=2021,
    legs="robust small",
    note="a randomised defence: falls to attacks that average over its draws; no certificate",
)
@dataclass(frozen=True, kw_only=True)
class Tensorization(Compression):
    """Kernels live in Tucker or CP form, and latent components drop out in every forward pass, at test time too.

        W~ = (G x1 diag(lam_1) / c_1 x2 …) x1 U1 x2 U2 …,   lam_k ~ Bernoulli(keep), new in every pass;   E[W~] = W

    Every pass so has another dense kernel: one for the whole batch, as in the paper, or with `per_sample` one for each
    record, at a few times the cost. At least one component stays, at random where none would; c_k = keep +
    (1 - keep)^r / r of r components counts that. Modes with three components or fewer are spared: dropping a mode of
    the kernel's three rows, or of one input channel, would silence the layer. Two dropped modes scatter W~ by
    (1 / c_1 c_2 - 1) ||W||^2. `keep=1` is the deterministic factorised network. With `binary`, the signs of W~ at one
    scale for each output are what the layer uses; their mean is not the binary kernel of W.

    Weights, trained or fresh, are factorised by the higher-order SVD (exact at rank 1), or into CP terms by alternating
    least squares with a small ridge, exact to a tenth or two of the norm. Weight decay then is on factors, not on W.
    BatchNorm's running statistics hold the draws of training; the stage `precise_bn` takes them anew.

    No official code exists, and no published figure could be checked. Nothing is certified. Measured on the digits
    (`results/tensorization-digits.json`: three convolutions with BatchNorm, l_inf 0.1, PGD-20, 200 records, 2 seeds, 20
    draws, a kernel for each record): after natural training `keep` 0.95 and 0.9 cost 1.9 and 3.5 points clean, and a
    vote of 20 gave 0.3 and 1.8 back; draws that all records share differed by up to 18 points (CP 24). Attacks on
    single draws left 1 to 5 points more than EOT in every Tucker, CP and binary run; points of the mean network left
    about what EOT left. After natural training EOT left 64.6 and 62.1 %, PGD 62.8 % of the `keep=1` network. On top of
    PGD-7 training nothing was gained: 83.3 and 77.3 % against 86.8 %; CP terms 81.1 %, binary kernels 70.6 %, Dropout
    of channels at test time, without factors, 87.0 %. At rank 1 the factors are more numbers than the kernels.

    Attributes:
        form: "tucker" or "cp".
        rank: the share of each mode's size that is kept (Tucker), or of the weight's numbers (CP). 1 is a defence, and
            no compression.
        keep: theta, the chance of a component to stay.
        binary: binarise after reconstruction.
        per_sample: draw a kernel for every record of a batch; else one draw serves them all.
    """

    form: Literal["tucker", "cp"] = "tucker"
    rank: float = 1.0
    keep: float = 0.95
    binary: bool = False
    per_sample: bool = False

    def __post_init__(self) -> None:
        require(0 < self.rank <= 1, f"rank={self.rank} must lie in (0, 1].")
        require(0 < self.keep <= 1, f"keep={self.keep} must lie in (0, 1].")

    def attach(self, model: nn.Module) -> None:
        if self.per_sample:
            for layer in self.layers(model).values():
                PerRecord.adopt(layer)
        super().attach(model)

    def map_for(self, name: str, layer: nn.Module) -> WeightMap:
        require(not steps_on(layer), f"the weight of {name} is compressed already; add it to exclude.")
        weight: Any = layer.weight
        made = Tucker if self.form == "tucker" else Cp
        return made(weight.shape, self.rank, self.keep, self.binary)


def silence(model: nn.Module) -> None:
    """Turn the draws of every tensorised layer off, in place: the mean network, from which attacks transfer."""
    for module in model.modules():
        if isinstance(module, Factorised):
            module.randomised = False

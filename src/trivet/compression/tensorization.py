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

_SPARED = 3
"""Modes of rank up to this are never dropped from: one draw would silence a whole layer."""


class Factorised(WeightMap):
    """What Tucker and CP kernels share: which modes are dropped from, and a draw for each."""

    factors = True

    def __init__(self, keep: float, binary: bool) -> None:
        super().__init__()
        self.keep, self.binary = keep, binary
        self.randomised = keep < 1

    def kept(self, rank: int, like: Tensor) -> Tensor:
        """lam / keep [rank], lam ~ Bernoulli(keep), of mean 1, new at every call. Ones where nothing is dropped."""
        if rank <= _SPARED or not self.randomised:
            return torch.ones(rank, device=like.device, dtype=like.dtype)
        return torch.bernoulli(torch.full((rank,), self.keep, device=like.device, dtype=like.dtype)) / self.keep

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

    def forward(self, core: Tensor, *factors: Tensor) -> Tensor:
        drawn = [u * self.kept(u.shape[1], core) for u in factors]
        return self.shipped(multiplied(core, drawn))


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
        found: Any = parafac(
            tensorly.tensor(weight.detach().double().cpu().numpy()), self.terms, init="random", random_state=0
        )
        scale = torch.from_numpy(found.weights.copy())
        first, *others = (torch.from_numpy(each.copy()) for each in found.factors)
        return tuple(each.to(weight) for each in (first * scale, *others))

    def forward(self, first: Tensor, *others: Tensor) -> Tensor:
        return self.shipped(summed([first * self.kept(first.shape[1], first), *others]))


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
    for mode, factor in enumerate(factors):
        core = torch.tensordot(factor, core, ([1], [mode])).movedim(0, mode)
    return core


def summed(factors: Sequence[Tensor]) -> Tensor:
    """sum_r a_r o b_r o … of factors [dim_k, R]."""
    first, *others = factors
    product = first
    for factor in others:
        product = product.unsqueeze(-2) * factor
    return product.sum(-1)


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

        W~ = (G x1 diag(lam_1) / keep x2 …) x1 U1 x2 U2 …,   lam_k ~ Bernoulli(keep), new in every pass; E[W~] = W

    Every pass so has another dense kernel. One draw serves the whole batch. `keep=1` is the deterministic factorised
    network. Modes with three components or fewer are spared: dropping a mode of the kernel's three rows, or of one
    input channel, would silence the layer. Trained weights are factorised by the higher-order SVD (exact at rank 1).
    With `binary`, the signs of W~ at one scale for each output are what the layer uses.

    No official code exists, and no published figure could be checked. It is a defence that randomness carries: an
    attack on single draws overstates it, one that averages over draws (EOT) is the measure, and the mean network is a
    good source of transferred attacks. Nothing is certified. Re-estimate BatchNorm by training at the same `keep`.

    Attributes:
        form: "tucker" or "cp".
        rank: the share of each mode's size that is kept (Tucker), or of the weight's numbers (CP). 1 is a defence, and
            no compression.
        keep: theta, the chance of a component to stay.
        binary: binarise after reconstruction.
    """

    form: Literal["tucker", "cp"] = "tucker"
    rank: float = 1.0
    keep: float = 0.95
    binary: bool = False

    def __post_init__(self) -> None:
        require(0 < self.rank <= 1, f"rank={self.rank} must lie in (0, 1].")
        require(0 < self.keep <= 1, f"keep={self.keep} must lie in (0, 1].")

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

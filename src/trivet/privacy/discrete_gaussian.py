"""Noise on a grid: integers in, integers out, exact coins from the operating system (Canonne, Kamath & Steinke 2020).

Floating-point noise has two holes that proofs over the reals do not see: its last bits tell which sums are impossible
(Mironov, CCS 2012; Haney et al. 2022), and a floating-point sum depends on the order of its terms, so one record moves
it by more than its own size (Casacuberta et al., CCS 2022). On a grid of spacing h neither exists.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from trivet.errors import require
from trivet.privacy.mechanism import Noise, NoiseKind

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Integers = NDArray[np.int64]

_FAR = 2.0**62  # int64 sums stay below this


@dataclass(frozen=True)
class DiscreteGaussian(Noise):
    """N_Z(0, sigma^2) on the integer multiples of a spacing h: P(x = h k) proportional to exp(-k^2 / (2 sigma^2)).

    h is the power of two at or below std / 2^bits, and sigma = ceil(std / h) is whole, so that scaling by h is exact
    and every coin is a comparison of integers. sigma h is at least std, by less than a part in 2^bits, and it is the
    noise's standard deviation to within exp(-2 pi^2 sigma^2).

    What is proved. Let the sums over two neighbouring data sets be integer vectors at most S / h apart in l2, S the
    sensitivity and std = z S. Where each record adds an integer vector no longer than S / h (S / 2h where neighbours
    exchange a record), they are.

    1. For integer vectors u and v, D_a(N_Z(u, sigma^2) || N_Z(v, sigma^2)) <= a ||u - v||^2 / (2 sigma^2), every a > 1,
       coordinates adding up (Canonne, Kamath & Steinke, NeurIPS 2020): a / (2 z^2).
    2. On Poisson samples: let P and Q be the outputs with and without the record, all else fixed. For whole a,
       E_Q ((1 - q) + q P / Q)^a = sum_i C(a, i) (1 - q)^(a - i) q^i E_Q (P / Q)^i, and by 1 every
       E_Q (P / Q)^i <= exp((i^2 - i) / (2 z^2)). That is the formula of the sampled Gaussian, now as a bound, in any
       dimension and for any h.
    3. Adding a record costs no more than removing one: x -> v - x is an involution of the lattice that swaps P and Q,
       which is all that the proof of Mironov, Talwar & Zhang (2019) asks for. Over the other records' coins, the
       moments are jointly convex. Steps add (Mironov, CSF 2017).

    So `account` converts Rényi divergences, at chords between whole orders. Tighter composition by privacy loss
    distributions is proved for one dimension only; it is not used.

    What remains to be granted. `on_grid` makes such integer vectors, whatever floats it is given: it rounds towards
    zero, which never lengthens a vector, and then checks the length. Where it is called once for each record, nothing
    is left: the sum is exact and the same in every order. `add` is given sums over many records, and rounds those; the
    noise is exact, but that the sums of neighbours differ by S at most holds up to the rounding of float summation,
    which can add 2 n^2 u S at worst for n records of unit roundoff u (2^-24 in float32), and one spacing in each
    coordinate. Parts of one record each, put on the grid and added in int64, are the hardened path in full.

    Attributes:
        bits: there are 2^bits grid points, or up to twice as many, in a standard deviation.
    """

    kind: ClassVar[NoiseKind] = "discrete_gaussian"
    one_by_one: ClassVar[bool] = True
    bits: int = 20

    def __post_init__(self) -> None:
        require(4 <= self.bits <= 20, f"bits={self.bits} must lie in 4 .. 20, so that every coin fits 64 bits.")

    def spacing(self, std: float) -> float:
        """h, a power of two."""
        require(0 < std < math.inf, f"std={std} must be positive and finite: noise on a grid cannot be left out.")
        return 2.0 ** (math.frexp(std)[1] - 1 - self.bits)

    def sigma(self, std: float) -> int:
        """The noise's parameter in units of the spacing."""
        return math.ceil(std / self.spacing(std))

    def contribution(self, total: list[Tensor], std: float, bound: float) -> list[Tensor]:
        return self.on_grid(total, std, bound)

    def on_grid(self, contribution: list[Tensor], std: float, bound: float) -> list[Tensor]:
        """What one record contributes, in int64 units of the spacing, with l2 norm at most `bound` / h.

        NaN counts as zero. Longer contributions are shortened, so that the bound does not rest on how they were made.
        """
        parts = self._truncated(contribution, std)
        most = bound / self.spacing(std)
        # The margin is what a float64 sum of squares can err by: half its terms times 2^-53, up to 10^7 coordinates.
        norm = math.sqrt(sum(float(part.double().square().sum()) for part in parts)) * (1 + 1e-9)
        if norm > most:
            shorter = most / norm * (1 - 1e-9)
            parts = [(part.double() * shorter).trunc().to(torch.int64) for part in parts]
        return parts

    def add(self, total: list[Tensor], std: float, generator: torch.Generator) -> list[Tensor]:
        """`total` plus noise, as floats: int64 sums of contributions, or float sums, rounded towards zero to the grid.

        The generator is not used: coins come from the operating system. Noise is drawn on the CPU.
        """
        if all(each.dtype == torch.int64 for each in total):
            return self.add_to_grid(total, std)
        return self.add_to_grid(self._truncated(total, std), std, [each.dtype for each in total])

    def add_to_grid(self, total: list[Tensor], std: float, dtypes: list[torch.dtype] | None = None) -> list[Tensor]:
        """Int64 sums of what `on_grid` returned, plus noise, as floats: multiples of the spacing all of them.

        Rounding an integer to the digits of a float leaves an integer, and comes after the noise.
        """
        h, sigma = self.spacing(std), self.sigma(std)
        found = []
        for each, dtype in zip(total, dtypes or [torch.float32] * len(total), strict=True):
            noise = torch.from_numpy(discrete_gaussian(sigma, each.numel())).view(each.shape).to(each.device)
            exact = (each + noise).double() * h
            found.append(exact.to(torch.promote_types(dtype, torch.float32)))
        return found

    def _truncated(self, values: list[Tensor], std: float) -> list[Tensor]:
        h = self.spacing(std)
        scaled = [(each.double() / h).nan_to_num(0.0).clamp(-_FAR / 2, _FAR / 2) for each in values]
        return [each.trunc().to(torch.int64) for each in scaled]


def discrete_gaussian(sigma: int, count: int) -> Integers:
    """`count` independent draws from N_Z(0, sigma^2), exact, by rejection (Canonne, Kamath & Steinke, algorithm 3).

    From a discrete Laplace draw y of scale t = sigma, kept with probability exp(-(|y| - sigma)^2 / (2 sigma^2)), which
    is exp(-(|y| - sigma^2 / t)^2 / (2 sigma^2)); any t will do, and this one keeps everything whole.
    """
    require(1 <= sigma <= 2**21, f"sigma={sigma} must lie in 1 .. 2^21.")

    def propose(wanted: int) -> tuple[Integers, NDArray[np.bool_]]:
        y = _discrete_laplace(sigma, wanted)
        return y, _bernoulli_exp((abs(y) - sigma) ** 2, 2 * sigma * sigma)

    return _until_full(propose, count)


def _discrete_laplace(scale: int, count: int) -> Integers:
    """Draws with P(y) proportional to exp(-|y| / scale) (algorithm 2): y = +-(u + scale v)."""
    import numpy as np

    def remainder(wanted: int) -> tuple[Integers, NDArray[np.bool_]]:
        u = _below(np.full(wanted, scale))
        return u, _bernoulli_exp(u, scale)

    def signed(wanted: int) -> tuple[Integers, NDArray[np.bool_]]:
        size = _until_full(remainder, wanted) + scale * _geometric(wanted)
        negative = _below(np.full(wanted, 2)) == 1
        return np.where(negative, -size, size), ~(negative & (size == 0))  # or zero would count twice

    return _until_full(signed, count)


def _geometric(count: int) -> Integers:
    """How often a coin of exp(-1) falls heads before its first tails."""
    import numpy as np

    found = np.zeros(count, dtype=np.int64)
    going = np.arange(count)
    while going.size:
        going = going[_bernoulli_exp(np.ones(going.size, dtype=np.int64), 1)]
        found[going] += 1
    return found


def _bernoulli_exp(numerator: Integers, denominator: int) -> NDArray[np.bool_]:
    """Coins of exp(-numerator / denominator), exact (algorithm 1): one of exp(-1) for each whole, one for the rest."""
    import numpy as np

    whole, rest = np.divmod(numerator, denominator)
    found = _bernoulli_exp_below_one(rest, denominator)
    left = np.flatnonzero(found & (whole > 0))
    while left.size:
        heads = _bernoulli_exp_below_one(np.ones(left.size, dtype=np.int64), 1)
        found[left[~heads]] = False
        whole[left] -= 1
        left = left[heads & (whole[left] > 0)]
    return found


def _bernoulli_exp_below_one(numerator: Integers, denominator: int) -> NDArray[np.bool_]:
    """Coins of exp(-g), g = numerator / denominator <= 1: with coins of g / 1, g / 2, ... the first tails comes at an
    odd place with probability 1 - g + g^2 / 2 - ... = exp(-g)."""
    import numpy as np

    found = np.zeros(numerator.size, dtype=np.bool_)
    going, place = np.arange(numerator.size), 1
    while going.size:
        heads = _below(np.full(going.size, denominator * place)) < numerator[going]
        found[going[~heads]] = place % 2 == 1
        going, place = going[heads], place + 1
    return found


def _below(most: Integers) -> Integers:
    """Uniform whole numbers in [0, most), most < 2^62: 63 bits from the operating system, the uneven rest rejected."""
    import numpy as np

    fair = 2**63 - 1 - (2**63 - 1) % most  # a multiple of most; 2^63 itself does not fit
    found = np.empty(most.size, dtype=np.int64)
    left = np.arange(most.size)
    while left.size:
        drawn = np.frombuffer(os.urandom(8 * left.size), dtype=np.uint64) >> np.uint64(1)
        kept = drawn.astype(np.int64) < fair[left]
        found[left[kept]] = drawn.astype(np.int64)[kept] % most[left[kept]]
        left = left[~kept]
    return found


def _until_full(propose: Callable[[int], tuple[Integers, NDArray[np.bool_]]], count: int) -> Integers:
    """`count` accepted draws of a sampler that proposes and accepts."""
    import numpy as np

    found = np.empty(count, dtype=np.int64)
    have = 0
    while have < count:
        drawn, accepted = propose((count - have) * 5 // 4 + 16)
        kept = drawn[accepted][: count - have]
        found[have : have + kept.size] = kept
        have += kept.size
    return found

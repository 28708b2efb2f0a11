"""StoBatch's batches (Phan et al., ICML 2020), and what its privacy claim is worth: kept to be refuted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from trivet.claims import Verdict
from trivet.data.dataset import Batch
from trivet.errors import require
from trivet.methods import method
from trivet.privacy.gradient_rule import GradientRule, PerExample, Plan, Work
from trivet.randomness import generator

_REASON = "all records carry one noise drawn once, so that differences between them are used bare: epsilon is infinite"


@method(
    title="StoBatch",
    paper="Phan et al., ICML 2020",
    year=2020,
    name="stobatch",
    note="privacy claim void: one noise draw shared by all records hides none of them",
)
@dataclass(frozen=True)
class StoBatch(GradientRule):
    """The mean gradient over `workers` batches out of N / m disjoint ones that are cut once and for all.

    In each pass the batches are taken in a fresh order, `workers` a step; records left over when m does not divide N
    are never seen. Goes with the objective `stobatch` and the networks `stobatch_mlp` and `stobatch_cnn`, which hold
    the noise.

    Published: eps_1 (1 + 1/gamma + 1/gamma_x) + eps_2 for any number of steps (`published_epsilon`). Void, because
    (1) xbar_i = x_i + c has the same c for every record: who knows the others reads the target off exactly; only sums
    over a batch are noised, and the network uses more than sums. (2) With a draw for each record, what is spent is
    `local_epsilon`, and at the published scales nothing is learned. (3) gamma_x takes two images to differ by 1 in
    l_1, where they differ by up to 2 d, and counts one feature map of many. (4) The label terms change with h_pi, so
    that two steps with one draw cancel it. (5) Released code: adversarial images from raw records, BatchNorm, batches
    reshuffled. So this rule issues no claim and ends those there were. The published accuracies are void as private
    results. For real privacy use `dp_sgd`, with fresh noise inside the network if certificates are wanted.

    Attributes:
        workers: batches averaged in each step; 1 is the older DPAL.
    """

    workers: int = 1

    needs_isolation: ClassVar[bool] = False
    on_privacy: ClassVar[tuple[Verdict, str]] = (Verdict.VOID, _REASON)

    def __post_init__(self) -> None:
        require(self.workers >= 1, f"workers={self.workers} must be at least 1.")

    def plan(self, records: int, batch_size: int, epochs: int, seed: int) -> Plan:
        require(
            self.workers * batch_size <= records,
            f"workers={self.workers} must not need more than the {records // batch_size} batches of {batch_size} "
            f"that {records} records make.",
        )
        return _FixedBatches(records, batch_size, self.workers, seed)


class _FixedBatches(Plan):
    def __init__(self, records: int, batch_size: int, workers: int, seed: int) -> None:
        self.number, self.workers, self.seed = records // batch_size, workers, seed
        order = torch.randperm(records, generator=generator(seed, "fixed batches"))
        self._batches = order[: self.number * batch_size].view(self.number, batch_size)
        self.per_epoch = self.number // workers

    def draw(self, step: int) -> Tensor:
        epoch, place = divmod(step, self.per_epoch)
        order = torch.randperm(self.number, generator=generator(self.seed, "order of batches", epoch))
        return self._batches[order[place * self.workers : (place + 1) * self.workers]].flatten()

    def gradients(self, model: nn.Module, batch: Batch, work: Work) -> PerExample:
        found = work.losses(model, batch, work.perturb(model, batch))
        found.per_example.mean().backward()
        return found


def published_epsilon(
    eps_features: float, eps_labels: float, sensitivity: float, batch_size: int, kernel_norm: float = 1.0
) -> float:
    """The total that was claimed, eps_1 + eps_1 / gamma_x + eps_1 / gamma + eps_2; void, for comparison only.

    gamma_x = Delta_R / m, gamma = 2 Delta_R / (m ||theta_1||), with Delta_R = `sensitivity`, m = `batch_size` and
    ||theta_1|| = `kernel_norm`, the largest l_1 norm of a column.
    """
    return eps_features * (1 + batch_size / sensitivity * (1 + kernel_norm / 2)) + eps_labels


def features_share(
    total: float, eps_labels: float, sensitivity: float, batch_size: int, kernel_norm: float = 1.0
) -> float:
    """The eps_1 for which `published_epsilon` is `total`."""
    require(total > eps_labels, f"total={total} must be above eps_labels={eps_labels}.")
    return (total - eps_labels) / published_epsilon(1.0, 0.0, sensitivity, batch_size, kernel_norm)


def local_epsilon(inputs: int, scale: float) -> float:
    """What one release of x + Lap(`scale`)^d costs, with a draw of its own for each record: 2 d / scale.

    That is local differential privacy of x in [-1, 1]^d, d = `inputs`, under exchange of the record.
    """
    require(scale > 0, f"scale={scale} must be positive.")
    return 2 * inputs / scale

"""SIDP (Davody et al., 2020): noise on the weights that gradients are taken at, none on those that are released."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from trivet.claims import Verdict
from trivet.data.dataset import Batch
from trivet.errors import require
from trivet.methods import method
from trivet.privacy.gradient_rule import GradientRule, PerExample, Plan, Work
from trivet.privacy.mechanism import Clip
from trivet.randomness import generator


@method(
    title="SIDP",
    paper="Davody et al., 2020",
    year=2020,
    note="privacy claim void: the released weights carry no noise",
)
@dataclass(frozen=True)
class Sidp(GradientRule):
    """w = theta + s N(0, I), s = lr C z / B; theta <- Optimizer(theta, mean_j clip_C(grad_w loss_j(w))).

    Batches of B records are drawn with replacement; every weight and bias is noised afresh in each step, with the
    rate of that step; record by record the gradients at w are clipped to l2 norm C, over all parameters jointly.
    Authors' setting for MNIST: LeNet-5 with parameter-free normalisation, z 7.1, C 3.1, B 32, 10 epochs, SGD with
    lr 0.1, times 0.9 each epoch, momentum 0.9. Their BatchNorm runs over private and public rows
    (`lenet5` with norm "mixed_batch").

    Published: DP-SGD's epsilon, because theta + s N(0, I) has the law of one DP-SGD step. Void: that step must start
    from weights that are private already, and theta never is. It is an exact sum of clipped gradients; released as
    it is, epsilon is infinite. Releasing the noised weights instead is the matrix mechanism with all noise on prefix
    sums: `released_weights_mu`, epsilon in the hundreds where 0.03 was claimed. Statistics over private rows,
    momentum and falling rates are in neither account. So this rule issues no claim and ends those there were.
    Published accuracies (MNIST 99.1 % at a claimed 0.5) are void as private results. What survives is
    normalisation without parameters, under `dp_sgd`.

    Attributes:
        max_grad_norm: C.
        noise_multiplier: z; 0 is clipped SGD without noise.
    """

    max_grad_norm: float = 3.1
    noise_multiplier: float = 7.1

    needs_isolation: ClassVar[bool] = False
    on_privacy: ClassVar[tuple[Verdict, str]] = (
        Verdict.VOID,
        "noise was put on the weights that gradients are taken at, not on the trained ones: epsilon is infinite",
    )

    def __post_init__(self) -> None:
        Clip(self.max_grad_norm)
        require(
            0 <= self.noise_multiplier < math.inf,
            f"noise_multiplier={self.noise_multiplier} must be finite and not negative.",
        )

    def plan(self, records: int, batch_size: int, epochs: int, seed: int) -> Plan:
        return _Sampled(self, records, batch_size, seed)


class _Sampled(Plan):
    """Batches with replacement; the noise of a step is a function of the seed and the step, as in any public run."""

    def __init__(self, rule: Sidp, records: int, batch_size: int, seed: int) -> None:
        self.rule, self.records, self.batch_size, self.seed = rule, records, batch_size, seed
        self.per_epoch = -(-records // batch_size)
        self._step = 0

    def draw(self, step: int) -> Tensor:
        self._step = step
        return torch.randint(self.records, (self.batch_size,), generator=generator(self.seed, "order", step))

    def gradients(self, model: nn.Module, batch: Batch, work: Work) -> PerExample:
        parameters = [p for p in model.parameters() if p.requires_grad]
        mean = [p.detach().clone() for p in parameters]
        std = work.rate * self.rule.max_grad_norm * self.rule.noise_multiplier / self.batch_size
        self._set(parameters, [each + std * noise for each, noise in zip(mean, self._noise(mean), strict=True)])
        try:
            found = work.losses(model, batch, work.perturb(model, batch))
            # Each record's loss by itself through the one graph of the batch: under BatchNorm not the same as
            # gradients of records taken alone, and it is this that was published.
            each = torch.eye(len(batch), device=found.per_example.device, dtype=found.per_example.dtype)
            rows = torch.autograd.grad(found.per_example, parameters, each, is_grads_batched=True, allow_unused=True)
        finally:
            self._set(parameters, mean)
        used = [row for row in rows if row is not None]
        norms = torch.stack([row.flatten(1).float().norm(dim=1) for row in used]).norm(dim=0)
        factors = Clip(self.rule.max_grad_norm).factors(norms) / len(batch)
        for parameter, row in zip(parameters, rows, strict=True):
            parameter.grad = torch.zeros_like(parameter)
            if row is not None:
                parameter.grad += torch.tensordot(factors.to(row), row, 1)
        return found

    def _noise(self, like: list[Tensor]) -> list[Tensor]:
        draw = generator(self.seed, "weights", self._step)
        return [torch.randn(each.shape, generator=draw).to(each) for each in like]

    @staticmethod
    @torch.no_grad()
    def _set(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def released_weights_mu(
    rates: Sequence[float],
    participations: Sequence[int],
    noise_multiplier: float,
    momentum: float = 0.0,
    exchanged: bool = False,
) -> float:
    """The mu of Gaussian differential privacy for releasing all sampled weights w_1, ..., w_T, and not theta.

        mu = (1/z) sqrt( sum_t ( sum_{s in S} sum_{s <= r <= t} lr_r b^(r-s) / lr_t )^2 )

    S are the steps (1, ..., T) a record takes part in; they and the rates must be fixed and public. A record moves
    every release after its first step, and again after each further one. It bounds the joint release for losses that
    couple no records; nothing better is known for the last sample alone.

    Args:
        rates: lr_t, for t = 1, ..., T.
        participations: S, in any order.
        noise_multiplier: z.
        momentum: b of the optimizer, without dampening.
        exchanged: a neighbour exchanges the record instead of leaving it out: twice as far.
    """
    steps = len(rates)
    require(all(rate > 0 for rate in rates), "rates must be positive: a step without a rate releases theta itself.")
    require(all(1 <= step <= steps for step in participations), f"participations must lie between 1 and {steps} steps.")
    require(noise_multiplier > 0, f"noise_multiplier={noise_multiplier} must be positive.")
    require(0 <= momentum < 1, f"momentum={momentum} must lie in [0, 1).")
    velocity = moved = total = 0.0
    taken = [0] * steps
    for step in participations:
        taken[step - 1] += 1
    for rate, times in zip(rates, taken, strict=True):
        velocity = momentum * velocity + times
        moved += rate * velocity
        total += (moved / rate) ** 2
    return (2 if exchanged else 1) * math.sqrt(total) / noise_multiplier

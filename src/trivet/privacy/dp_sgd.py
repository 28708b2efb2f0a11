"""Differentially private stochastic gradient descent (Abadi et al., CCS 2016), over all views of a record at once."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, distributed, nn

from trivet.claims import Verdict
from trivet.data.dataset import Batch
from trivet.errors import require
from trivet.methods import method
from trivet.privacy.accounting import noise_for
from trivet.privacy.discrete_gaussian import DiscreteGaussian
from trivet.privacy.engine import Engine
from trivet.privacy.engines import engine_for
from trivet.privacy.gradient_rule import GradientRule, PerExample, Plan, Work
from trivet.privacy.mechanism import Adjacency, Clip, Event, GaussianNoise, Mechanism, Noise, Poisson, Sampler, Shuffled
from trivet.randomness import generator


@method(title="DP-SGD", paper="Abadi et al., CCS 2016", year=2016, legs="private")
@dataclass(frozen=True)
class DpSgd(GradientRule):
    """theta <- theta - lr ( sum_{i in S} clip_C(g_i) + z C N(0, I) ) / (q N), S a Poisson sample of rate q.

    g_i is the gradient of record i's loss over everything the model computed for that record: the clean and the
    attacked input, K noisy copies, any number of forward passes. It is clipped once, to l2 norm C, over all
    parameters jointly. So the clipped sum moves by at most C when a record comes or goes, whatever the objective does
    inside a record, and adversarial training or augmentation cost no privacy.

    An epoch is ceil(N / batch_size) steps, each with `batch_size` records expected, q = batch_size / N. A step that
    happens to draw no record is a step like any other: noise is added and the budget is spent.

    Promised: the trained weights, and every checkpoint on the way, are (epsilon, delta)-differentially private for
    one record under the stated adjacency, as long as no loss couples records; that is probed before the first
    step. All draws (samples, noise, the objective's own) come from entropy of the operating system and are stored
    nowhere. Exact losses are not logged: they are no part of what is private.

    Attributes:
        max_grad_norm: C.
        delta: below 1 / N; the probability with which the bound epsilon may fail, roughly.
        epsilon: the target; the noise is then chosen as small as it allows.
        noise_multiplier: z, instead of a target.
        sampling: "shuffled" batches are accounted without amplification, which costs many times more.
        adjacency: add_remove for Poisson samples; zero_out or replace for shuffled batches.
        clipping: "flat", or "psac" for the per-sample adaptive factor of Xia et al. (AAAI 2023).
        noise: "discrete_gaussian" puts each record's gradient on a grid and draws exactly from OS entropy: safe from
            floating-point attacks, and many times slower.
        engine: how per-record gradients are clipped and added, all exact: "auto" picks by layer.
        physical_batch: records held in memory at once; a logical batch is cut into such parts.
        noise_seed: makes every draw repeatable, for tests. The run is then "reproducible, not private".
        diagnostics: log exact training losses all the same; the claim then says that the log is not private.
    """

    max_grad_norm: float
    delta: float
    epsilon: float | None = None
    noise_multiplier: float | None = None
    sampling: Literal["poisson", "shuffled"] = "poisson"
    adjacency: Adjacency | None = None
    clipping: Literal["flat", "psac"] = "flat"
    noise: Literal["gaussian", "discrete_gaussian"] = "gaussian"
    engine: Literal["auto", "book_keeping", "materialised"] = "auto"
    physical_batch: int = 512
    noise_seed: int | None = None
    diagnostics: bool = False

    needs_isolation: ClassVar[bool] = True
    on_privacy: ClassVar[tuple[Verdict, str]] = (
        Verdict.COMPOSE,
        "more was spent on the records; the new claim covers both",
    )

    def __post_init__(self) -> None:
        Clip(self.max_grad_norm, self.clipping)
        require(0 < self.delta < 1, f"delta={self.delta} must lie strictly between 0 and 1.")
        require(
            (self.epsilon is None) != (self.noise_multiplier is None),
            "epsilon= or noise_multiplier= must be given, and not both: one follows from the other.",
        )
        require(self.epsilon is None or self.epsilon > 0, f"epsilon={self.epsilon} must be positive.")
        require(
            self.noise_multiplier is None or self.noise_multiplier >= 0,
            f"noise_multiplier={self.noise_multiplier} must not be negative.",
        )
        require(
            self.noise == "gaussian" or (self.noise_seed is None and self.noise_multiplier != 0),
            f"noise={self.noise!r} comes from the operating system: it can neither be repeated nor left out; use "
            "noise='gaussian' with noise_seed or without noise.",
        )
        require(self.physical_batch >= 1, f"physical_batch={self.physical_batch} must be at least 1.")
        Event(self.sampling, 1.0, 1.0, self.neighbours)

    @property
    def neighbours(self) -> Adjacency:
        """The adjacency that is claimed."""
        return self.adjacency or ("add_remove" if self.sampling == "poisson" else "zero_out")

    def plan(self, records: int, batch_size: int, epochs: int, seed: int) -> PrivatePlan:
        require(
            self.delta < 1 / records,
            f"delta={self.delta:g} must be below 1 / {records}: at that size publishing a few whole records would be "
            f"called private; take {customary_delta(records):.0e}.",
        )
        require(batch_size <= records, f"batch_size={batch_size} must not exceed the {records} records.")
        per_epoch = -(-records // batch_size)
        sampler: Sampler = (
            Poisson(records, batch_size / records) if self.sampling == "poisson" else Shuffled(records, batch_size)
        )
        noise: Noise = DiscreteGaussian() if self.noise == "discrete_gaussian" else GaussianNoise()
        z = self.noise_multiplier or 0.0
        if self.epsilon is not None:
            event = replace(sampler.event(1.0, self.neighbours), noise=noise.kind)
            z = noise_for(event, epochs * per_epoch, self.epsilon, self.delta)
        clip = Clip(self.max_grad_norm, self.clipping)
        return PrivatePlan(self, Mechanism(sampler, clip, noise, z, float(batch_size), self.neighbours), per_epoch)


def customary_delta(records: int) -> float:
    """The largest power of ten at or under a tenth of 1 / records: 1e-6 for 60,000."""
    return 10.0 ** -(len(str(records - 1)) + 1)


@dataclass
class PrivatePlan(Plan):
    """The steps of one private stage: `mechanism` says what each spends.

    Under `torch.distributed` every process tosses the coins of its own share of the records; the sums are added up,
    with noise from the first process alone, so that all processes make the same step.
    """

    rule: DpSgd
    mechanism: Mechanism
    per_epoch: int
    _generator: torch.Generator = field(init=False, repr=False)
    _engine: Engine | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(secrets.randbits(63))

    @property
    def secret(self) -> bool:
        """Whether every draw is unpredictable. If not, there is no privacy to claim."""
        return self.rule.noise_seed is None

    def draw(self, step: int) -> Tensor:
        if self.rule.noise_seed is not None:
            self._generator = generator(self.rule.noise_seed, "private", step)
        index = self.mechanism.sampler.draw(step, self._generator)
        rank, processes = _place()
        return index[index % processes == rank]

    def gradients(self, model: nn.Module, batch: Batch, work: Work) -> PerExample:
        parameters = [p for p in model.parameters() if p.requires_grad]
        total = self.mechanism.contribution([torch.zeros_like(p, dtype=torch.float32) for p in parameters])
        found: list[PerExample] = []
        if self._engine is None:
            self._engine = engine_for(model, self.rule.engine)
        size = 1 if self.mechanism.noise.one_by_one else self.rule.physical_batch
        for part, index in enumerate(torch.arange(len(batch)).split(size) if len(batch) else ()):
            records = batch.select(index)

            def losses(model: nn.Module, batch: Batch, perturbed: Tensor, part: int = part) -> PerExample:
                return work.losses(model, batch, perturbed, part)

            perturbed = work.perturb(model, records, part)
            clipped = self._engine.clipped_sum(model, records, perturbed, losses, self.mechanism.clip.factors)
            for mine, its in zip(total, self.mechanism.contribution(clipped.total), strict=True):
                mine += its
            found.append(clipped.found)
        for parameter, gradient in zip(parameters, self._released(total), strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        return _Found(torch.cat([torch.zeros(0), *(each.per_example.detach().cpu() for each in found)]))

    def _released(self, total: list[Tensor]) -> list[Tensor]:
        """The noisy mean of the clipped gradients, over all processes."""
        _, processes = _place()
        if processes == 1:
            return self.mechanism.release(total, self._generator)
        for each in total:
            distributed.all_reduce(each)
        released = self.mechanism.release(total, self._generator)
        for each in released:
            distributed.broadcast(each, 0)
        return released


@dataclass(frozen=True)
class _Found:
    per_example: Tensor
    log: Mapping[str, Tensor] = field(default_factory=dict)


def _place() -> tuple[int, int]:
    """The rank of this process, and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1

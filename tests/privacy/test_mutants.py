"""The guards of private training, each tried on the bug it is there for: a guard that cannot fail guards nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from trivet.data.dataset import Batch, Dataset
from trivet.errors import TrivetError
from trivet.objectives.objective import Losses, Objective, Progress
from trivet.objectives.plain import Plain
from trivet.privacy.discrete_gaussian import DiscreteGaussian
from trivet.privacy.dp_sgd import DpSgd, PrivatePlan
from trivet.privacy.engine import ClippedSum, Engine
from trivet.privacy.engines import engine_for
from trivet.privacy.mechanism import Mechanism, Poisson, Sampler, Shuffled
from trivet.training.independence import require_independence

FALSE_ALARM = 1e-7
RECORDS, EXPECTED = 60, 12.0


@dataclass
class Moment:
    """The work of one step on an objective."""

    objective: Objective
    rate: float = 1.0
    progress: Progress = field(default_factory=lambda: Progress(1, 10, 0.1, 0))

    def perturb(self, model: nn.Module, batch: Batch, part: int = 0) -> Tensor:
        return self.objective.perturb(model, batch, replace(self.progress, part=part))

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, part: int = 0) -> Losses:
        return self.objective.losses(model, batch, perturbed, replace(self.progress, part=part))


class Push(Objective):
    """Loss_i = strength * x_i . theta_i's row sum: a record's gradient is known, as large as its input says."""

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, progress: Progress) -> Losses:
        return Losses(model(perturbed)[:, 0])


def linear(size: int = 16) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 1, bias=False))


def batch_of(rows: Tensor) -> Batch:
    return Batch(rows.view(len(rows), 1, 4, 4), torch.zeros(len(rows), dtype=torch.int64), torch.arange(len(rows)))


def plan(clip: float = 1.0, z: float = 1.0, **settings: Any) -> PrivatePlan:
    rule = DpSgd(clip, 1e-3, noise_multiplier=z, **settings)
    return rule.plan(RECORDS, int(EXPECTED), 1, seed=0)


def released(plan: PrivatePlan, rows: Tensor, model: nn.Module) -> Tensor:
    plan.gradients(model, batch_of(rows), Moment(Push()))
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# ------------------------------------------------------------------ the noise is there, and as large as it must be


def noise_is_right(plan: PrivatePlan, steps: int = 60, size: int = 1024) -> None:
    """What is released for a batch of zero gradients is N(0, (z C / expected)^2); also for an empty one."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, size, bias=False))
    zero, empty = torch.zeros(5, 16), torch.zeros(0, 16)
    drawn = torch.cat([released(plan, zero if step % 2 else empty, model) for step in range(steps)])
    expected = plan.mechanism.noise_multiplier * plan.rule.max_grad_norm / EXPECTED
    # At a million draws a standard deviation wrong by 1 % lies 14 standard errors off.
    total = float((drawn.double() / expected).square().sum())
    assert stats.chi2.cdf(total, len(drawn)) > FALSE_ALARM
    assert stats.chi2.sf(total, len(drawn)) > FALSE_ALARM
    assert stats.kstest((drawn[:20000] / expected).numpy(), "norm").pvalue > FALSE_ALARM


class NoNoise(Mechanism):
    def release(self, total: list[Tensor], generator: torch.Generator) -> list[Tensor]:
        return [each / self.expected for each in total]


class NoiseDividedTwice(Mechanism):
    def release(self, total: list[Tensor], generator: torch.Generator) -> list[Tensor]:
        noise = self.noise.add([torch.zeros_like(each) for each in total], self.std, generator)
        return [(each + drawn / self.expected) / self.expected for each, drawn in zip(total, noise, strict=True)]


class NoiseOfWrongSize(Mechanism):
    def release(self, total: list[Tensor], generator: torch.Generator) -> list[Tensor]:
        return [each / self.expected for each in self.noise.add(total, 0.99 * self.std, generator)]


def mutated(kind: type[Mechanism], plan: PrivatePlan) -> PrivatePlan:
    return replace(plan, mechanism=kind(**vars(plan.mechanism)))


@pytest.mark.parametrize("noise", ["gaussian", "discrete_gaussian"])
def test_the_noise_is_right(noise: str) -> None:
    noise_is_right(plan(clip=0.3, z=1.7, noise=noise))


class OnlySums(DiscreteGaussian):
    """Shows what is about to be released, without the noise."""

    def add_to_grid(self, total: list[Tensor], std: float, dtypes: Any = None) -> list[Tensor]:
        return total


def test_on_a_grid_sums_are_whole_numbers_the_same_in_any_order_of_the_records() -> None:
    grid = plan(clip=0.3, z=1.7, noise="discrete_gaussian")
    grid = replace(grid, mechanism=replace(grid.mechanism, noise=OnlySums(), expected=1.0))
    rows, model = torch.randn(7, 16), linear_with(1.0)
    one, other = (released(grid, rows[order], model) for order in (torch.arange(7), torch.arange(7).flip(0)))
    assert torch.equal(one, other)
    assert torch.equal(one, one.round())
    assert 0 < float(one.norm()) * grid.mechanism.noise.spacing(grid.mechanism.std) <= 7 * 0.3


@pytest.mark.parametrize("mutant", [NoNoise, NoiseDividedTwice, NoiseOfWrongSize])
def test_missing_and_shrunken_noise_is_noticed(mutant: type[Mechanism]) -> None:
    with pytest.raises(AssertionError):
        noise_is_right(mutated(mutant, plan(clip=0.3, z=1.7)))


# ------------------------------------------------------------------ one record moves the sum by no more than declared


def sensitivity_holds(plan: PrivatePlan) -> None:
    """Released without noise: neighbouring batches lie at most sensitivity / expected apart, in every relation."""
    clip, model = plan.rule.max_grad_norm, linear()
    generator = torch.Generator().manual_seed(3)
    random = 3 * torch.randn(9, 16, generator=generator)
    one_huge = torch.cat([torch.zeros(8, 16), torch.full((1, 16), 1e4)])
    all_equal = torch.ones(9, 16)
    for rows in (random, one_huge, all_equal, 1e-4 * random):
        whole = released(plan, rows, model)
        for gone in (0, 8):
            kept = torch.arange(9) != gone
            exchanged, zeroed = rows.clone(), rows.clone()
            exchanged[gone], zeroed[gone] = -1e3 * rows[gone - 1] - 1.0, 0.0
            for neighbour, times in ((rows[kept], 1), (exchanged, 2), (zeroed, 1)):
                moved = float((released(plan, neighbour, model) - whole).norm())
                assert moved <= times * clip / EXPECTED * (1 + 1e-5)


class ClipsTheMean(Engine):
    """Gradients averaged over the batch, and the average clipped."""

    def refusal(self, model: nn.Module) -> str | None:
        return None

    def at_once(self, model: nn.Module) -> int:
        return 1000

    def part(self, model: nn.Module, batch: Batch, perturbed: Tensor, losses: Any, factors: Any) -> ClippedSum:
        found = losses(model, batch, perturbed)
        mean = torch.autograd.grad(found.per_example.mean(), list(model.parameters()))
        norm = torch.cat([each.flatten() for each in mean]).norm()
        return ClippedSum([len(batch) * factors(norm[None])[0] * each for each in mean], norm.expand(len(batch)), found)


class ClipsNothing(ClipsTheMean):
    def part(self, model: nn.Module, batch: Batch, perturbed: Tensor, losses: Any, factors: Any) -> ClippedSum:
        return super().part(model, batch, perturbed, losses, torch.ones_like)


@pytest.mark.parametrize("clipping", ["flat", "psac"])
@pytest.mark.parametrize("engine", ["book_keeping", "materialised"])
def test_one_record_moves_the_sum_by_no_more_than_the_clip(engine: str, clipping: str) -> None:
    sensitivity_holds(plan(clip=0.7, z=0.0, engine=engine, clipping=clipping))


@pytest.mark.parametrize("mutant", [ClipsTheMean, ClipsNothing])
def test_clipping_after_the_mean_is_noticed(mutant: type[Engine]) -> None:
    broken = plan(clip=0.7, z=0.0)
    broken._engine = mutant()
    with pytest.raises(AssertionError):
        sensitivity_holds(broken)


def test_the_same_records_in_one_part_or_many_make_the_same_step() -> None:
    rows = torch.randn(14, 16)
    steps = [released(plan(z=0.0, physical_batch=size), rows, linear_with(1.0)) for size in (14, 7, 2, 1)]
    for each in steps[1:]:
        torch.testing.assert_close(each, steps[0])


def linear_with(value: float) -> nn.Module:
    model = linear()
    nn.init.constant_(model[1].weight, value)
    return model


def test_records_without_a_finite_gradient_contribute_nothing() -> None:
    rows = torch.randn(6, 16)
    broken = torch.cat([rows, torch.full((1, 16), torch.inf), torch.full((1, 16), torch.nan)])
    for engine in ("book_keeping", "materialised"):
        alone, beside = (released(plan(z=0.0, engine=engine), x, linear_with(1.0)) for x in (rows, broken))
        torch.testing.assert_close(alone, beside)


def test_the_divisor_is_the_expected_number_of_records_not_the_drawn_one() -> None:
    same, model = torch.ones(1, 16), linear()
    few, many = (released(plan(clip=2.0, z=0.0), same.expand(count, 16), model).norm() for count in (3, 9))
    assert float(few) == pytest.approx(3 * 2.0 / EXPECTED)
    assert float(many) == pytest.approx(9 * 2.0 / EXPECTED)


# ------------------------------------------------------------------ the sampler is the one that is accounted for


def is_poisson(sampler: Sampler, rate: float, steps: int = 4000) -> None:
    """Inclusions are independent coins: sizes, records and pairs of records have the variance of coins."""
    generator = torch.Generator().manual_seed(11)
    taken = torch.zeros(steps, RECORDS, dtype=torch.float64)
    for step in range(steps):
        taken[step, sampler.draw(step, generator)] = 1
    sizes = taken.sum(1)
    assert stats.binomtest(int(taken.sum()), steps * RECORDS, rate).pvalue > FALSE_ALARM
    spread = float((sizes - RECORDS * rate).square().sum() / (RECORDS * rate * (1 - rate)))
    assert min(stats.chi2.cdf(spread, steps), stats.chi2.sf(spread, steps)) > FALSE_ALARM
    for count in taken.sum(0).tolist():
        assert stats.binomtest(int(count), steps, rate).pvalue > FALSE_ALARM / RECORDS
    joint = (taken - rate).T @ (taken - rate) / steps
    off = joint[~torch.eye(RECORDS, dtype=torch.bool)]
    bound = stats.norm.isf(FALSE_ALARM / RECORDS**2) * rate * (1 - rate) / steps**0.5
    assert float(off.abs().max()) < bound
    again = torch.stack([taken[:-1].flatten(), taken[1:].flatten()])  # a record's next coin does not remember
    assert abs(float(torch.corrcoef(again)[0, 1])) < stats.norm.isf(FALSE_ALARM) / (steps * RECORDS) ** 0.5


class ShuffledAsPoisson(Shuffled):
    pass


class FixedSize(Sampler):
    """Without replacement, always the same number."""

    def draw(self, step: int, generator: torch.Generator) -> Tensor:
        return torch.randperm(RECORDS, generator=generator)[: int(EXPECTED)]

    def event(self, noise_multiplier: float, adjacency: Any) -> Any:
        return Poisson(RECORDS, EXPECTED / RECORDS).event(noise_multiplier, adjacency)


def test_the_sampler_is_poisson() -> None:
    is_poisson(plan().mechanism.sampler, EXPECTED / RECORDS)


@pytest.mark.parametrize("mutant", [ShuffledAsPoisson(RECORDS, int(EXPECTED)), FixedSize()])
def test_other_samplers_are_noticed(mutant: Sampler) -> None:
    with pytest.raises(AssertionError):
        is_poisson(mutant, EXPECTED / RECORDS)


def test_a_shuffled_sampler_never_owns_the_event_of_a_poisson_one() -> None:
    shuffled = plan(sampling="shuffled").mechanism.event
    assert (shuffled.sampler, shuffled.adjacency) == ("shuffled", "zero_out")
    assert plan().mechanism.event.sampler == "poisson"


# ------------------------------------------------------------------ noise is fresh, whatever seeds were set


def noise_is_fresh(made: Callable[[], PrivatePlan]) -> None:
    """Two sessions of the same run, started with the same seeds, share no noise."""
    sessions = []
    for _ in range(2):
        torch.manual_seed(0)
        session, model, steps = made(), linear(16), []
        for step in range(200):
            session.draw(step)
            steps.append(released(session, torch.zeros(0, 16), model))
        sessions.append(torch.stack(steps))
    every = torch.cat(sessions)
    assert len({tuple(row.tolist()) for row in every}) == len(every)
    assert abs(float(torch.corrcoef(torch.stack([each.flatten() for each in sessions]))[0, 1])) < 0.1


def test_a_resumed_session_draws_fresh_noise() -> None:
    noise_is_fresh(plan)


def test_noise_that_is_drawn_again_on_resume_is_noticed() -> None:
    with pytest.raises(AssertionError):
        noise_is_fresh(lambda: plan(noise_seed=5))


# ------------------------------------------------------------------ no record's gradient depends on another record

DATA = Dataset(torch.zeros(8, 1, 4, 4, dtype=torch.uint8), torch.arange(8) % 2, ("a", "b"), "zeros")


class CentresTheBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class CountsRecords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return x


class DividesByTheBatch(Plain):
    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, progress: Progress) -> Losses:
        found = super().losses(model, batch, perturbed, progress)
        return Losses(found.per_example / len(batch))


class SharesAPerturbation(Plain):
    def perturb(self, model: nn.Module, batch: Batch, progress: Progress) -> Tensor:
        return batch.inputs + 0.1 * batch.inputs.mean(0)


class WeighsByTheBatch(Plain):
    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, progress: Progress) -> Losses:
        found = super().losses(model, batch, perturbed, progress).per_example
        return Losses(found * found.detach() / found.detach().sum())


def network(*inside: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), *inside, nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


@pytest.mark.parametrize(
    "inside", [(), (nn.GroupNorm(2, 4),), (nn.InstanceNorm2d(4, affine=True),), (nn.Dropout(0.3),)], ids=str
)
def test_models_that_treat_each_record_alone_are_let_through(inside: tuple[nn.Module, ...]) -> None:
    require_independence(network(*inside), Plain(), DATA)


@pytest.mark.parametrize(
    ("inside", "reason"),
    [
        (nn.BatchNorm2d(4), "BatchNorm2d, which mixes"),
        (nn.BatchNorm2d(4, affine=False), "BatchNorm2d, which mixes"),
        (nn.BatchNorm2d(4).requires_grad_(False), "BatchNorm2d, which mixes"),
        (nn.SyncBatchNorm(4), "SyncBatchNorm, which mixes"),
        (nn.InstanceNorm2d(4, track_running_stats=True), "with running statistics"),
        (CentresTheBatch(), "changes when other records of its batch are replaced"),
        (CountsRecords(), "buffer 1.seen of the model changes"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_models_that_mix_records_are_refused(inside: nn.Module, reason: str) -> None:
    model = network(inside)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TrivetError, match=reason):
        require_independence(model, Plain(), DATA)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("objective", "reason"),
    [
        (DividesByTheBatch(), "depend on how many records are in the batch"),
        (WeighsByTheBatch(), "changes when other records"),
        (SharesAPerturbation(), "the inputs of a record"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Objective) else "",
)
def test_objectives_that_mix_records_are_refused(objective: Objective, reason: str) -> None:
    with pytest.raises(TrivetError, match=reason):
        require_independence(network(), objective, DATA)


class StacksViewByView(Plain):
    """Two views of each record, all first views before all second ones."""

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, progress: Progress) -> Losses:
        logits = model(torch.cat([perturbed, perturbed.flip(-1)]))
        both = nn.functional.cross_entropy(logits, batch.labels.repeat(2), reduction="none")
        return Losses(both.view(2, -1).sum(0))


def test_views_in_an_order_that_clipping_cannot_follow_are_refused_unless_each_record_is_treated_alone() -> None:
    with pytest.raises(TrivetError, match="in an order that clipping cannot follow"):
        require_independence(network(), StacksViewByView(), DATA)
    require_independence(network(), StacksViewByView(), DATA, "materialised")


def test_the_engines_of_the_tests_are_the_ones_that_train() -> None:
    assert plan(engine="materialised").rule.engine == "materialised"
    assert engine_for(linear(), "materialised").refusal(linear()) is None

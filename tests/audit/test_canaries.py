"""Canaries: whose slots they take, what they do to a gradient, and what a training run makes of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import kstest
from torch import Tensor, nn

from trivet.audit.canaries import DIRAC_SLOPE, Kind, Planted
from trivet.audit.leak_test import StageTrainer
from trivet.data.dataset import Dataset, Splits
from trivet.data.digits import digits
from trivet.errors import BadValue
from trivet.methods import build, spec_of
from trivet.models.mlp import mlp
from trivet.objectives.free_at import FreeAt
from trivet.objectives.objective import Progress
from trivet.objectives.pgd_at import PgdAt
from trivet.objectives.plain import Plain
from trivet.privacy.dp_sgd import DpSgd
from trivet.privacy.mechanism import Adjacency
from trivet.randomness import generator
from trivet.threats.linf import Linf
from trivet.threats.losses import cross_entropy
from trivet.training.fit import Fit
from trivet.training.optimizers import Sgd
from trivet.training.schedules import Constant

PROGRESS = Progress(step=0, steps=1, epoch=0.0, seed=0)


@pytest.fixture(scope="module")
def data() -> Splits:
    return digits()


def small(seed: int) -> nn.Module:
    return mlp((1, 8, 8), 10, hidden=(8,), generator=generator(seed, "init"))


def coins(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, generator=generator(seed, "coins")) < 0.5


def planted(
    train: Dataset, kind: Kind, included: Tensor, adjacency: Adjacency = "add_remove", watch: bool = False
) -> Planted:
    return Planted(train, kind, included, seed=7, adjacency=adjacency, watch=watch)


@pytest.mark.parametrize("kind", ["mislabelled", "dirac"])
def test_canaries_take_the_last_slots_and_no_record_is_used_twice(data: Splits, kind: Kind) -> None:
    there = planted(data.train, kind, coins(100))
    assert len(there.train) == len(data.train)
    assert torch.equal(there.train.images[-100:], there.canaries.images)
    rows = [{bytes(image.numpy().data) for image in part.images} for part in (there.train, data.train)]
    assert rows[0] == rows[1]
    # The images are the training records', each once, so none is both a canary and a record; the labels are wrong.
    truth = {bytes(image.numpy().data): int(y) for image, y in zip(data.train.images, data.train.labels, strict=True)}
    for image, label in zip(there.canaries.images, there.canaries.labels, strict=True):
        assert truth[bytes(image.numpy().data)] != int(label)
    assert torch.equal(there.train.labels[-100:], there.canaries.labels)


def test_wrong_labels_are_spread_over_the_other_classes(data: Splits) -> None:
    """Each class is drawn 70 times on average; fewer than 30 has probability below 1e-6."""
    counts = planted(data.train, "mislabelled", coins(700)).canaries.labels.bincount(minlength=10)
    assert int(counts.min()) >= 30


def test_which_canaries_there_are_does_not_depend_on_who_is_included(data: Splits) -> None:
    one, other = (planted(data.train, "mislabelled", included) for included in (coins(50, 1), coins(50, 2)))
    assert one.train.digest() == other.train.digest()
    assert torch.equal(one.canaries.labels, other.canaries.labels)


def test_an_excluded_canary_contributes_nothing_and_an_included_one_its_wrong_label(data: Splits) -> None:
    included = torch.tensor([True, False, True])
    there = planted(data.train, "mislabelled", included)
    model = there.model(small(0))
    batch = there.train.batch(torch.arange(len(there.train) - 5, len(there.train)))
    losses = there.objective(Plain())(model, batch, PROGRESS).per_example
    plain = cross_entropy(model(batch.inputs), batch.labels)
    torch.testing.assert_close(losses, plain * torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0]))


def test_for_exchanged_records_an_excluded_canary_has_its_true_label(data: Splits) -> None:
    included = torch.tensor([True, False, True, False])
    there = planted(data.train, "mislabelled", included, "replace")
    truth = {bytes(image.numpy().data): int(y) for image, y in zip(data.train.images, data.train.labels, strict=True)}
    for row, inside in zip(range(-4, 0), included.tolist(), strict=True):
        right = truth[bytes(there.train.images[row].numpy().data)] == int(there.train.labels[row])
        assert right != inside
    model = there.model(small(0))
    batch = there.train.batch(torch.arange(len(there.train) - 4, len(there.train)))
    plain = cross_entropy(model(batch.inputs), batch.labels)
    torch.testing.assert_close(there.objective(Plain())(model, batch, PROGRESS).per_example, plain)


@pytest.mark.parametrize(("adjacency", "excluded"), [("add_remove", 0.0), ("zero_out", 0.0), ("replace", 1.0)])
def test_the_gradient_of_a_dirac_canary_lies_in_its_own_weight(
    data: Splits, adjacency: Adjacency, excluded: float
) -> None:
    included = torch.tensor([True, False, True])
    there = planted(data.train, "dirac", included, adjacency)
    model = there.model(small(0))
    objective = there.objective(Plain())
    parameters = dict(model.named_parameters())
    for row in range(3):
        batch = there.train.batch(torch.tensor([len(there.train) - 3 + row]))
        loss = objective(model, batch, PROGRESS).per_example.sum()
        found = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        expected = torch.zeros(4, 1)
        expected[row] = -DIRAC_SLOPE if included[row] else excluded * DIRAC_SLOPE
        torch.testing.assert_close(found.pop("coordinates.weight"), expected)
        assert all(not each.any() for each in found.values())
    # An ordinary record's gradient is what it would be without canaries.
    batch = there.train.batch(torch.tensor([0]))
    loss = objective(model, batch, PROGRESS).per_example.sum()
    found = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    assert not found.pop("coordinates.weight").any()
    assert any(each.any() for each in found.values())


@pytest.mark.parametrize("adjacency", ["add_remove", "zero_out", "replace"])
@pytest.mark.parametrize("engine", ["book_keeping", "materialised"])
def test_one_full_batch_step_of_dp_sgd_moves_dirac_weights_by_exactly_the_mechanism(
    data: Splits, engine: str, adjacency: Adjacency
) -> None:
    """q = 1 and T = 1: N w / (lr z S) is N(C / (z S), 1) for the included and N(0 or -C / (z S), 1) for the others.

    S is the sensitivity, C or 2 C. Two Kolmogorov-Smirnov tests, each failing by chance with probability 1e-7.
    """
    z, clip, rate = 0.5, 0.3, 0.1
    sampling = "poisson" if adjacency == "add_remove" else "shuffled"
    rule = DpSgd(
        max_grad_norm=clip, delta=1e-5, noise_multiplier=z, sampling=sampling, adjacency=adjacency, engine=engine
    )  # type: ignore[arg-type]
    train = data.train.select(slice(0, 500))
    optimizer = Sgd(lr=rate, momentum=0.0, weight_decay=0.0)
    fit = Fit(Plain(), epochs=1, batch_size=500, optimizer=optimizer, schedule=Constant(), rule=rule)
    included = coins(250)
    there = planted(train, "dirac", included, adjacency)
    trainer = StageTrainer([("fit", fit)], small, data.test, seed=0)
    model = trainer(there.train, number=0, planting=there)
    sensitivity = 2 * clip if adjacency == "replace" else clip
    scaled = there.scores(trainer, model, 0) * 500 / (rate * z * sensitivity)
    shift = clip / (z * sensitivity)
    out = -shift if adjacency == "replace" else 0.0
    assert kstest(scaled[included].numpy() - shift, "norm").pvalue > 1e-7
    assert kstest(scaled[~included].numpy() - out, "norm").pvalue > 1e-7


def test_the_watched_score_is_the_sum_of_inner_products_step_by_step(data: Splits) -> None:
    """Against plain gradient descent followed by hand, with the canaries' gradients one by one."""
    train = data.train.select(slice(0, 40))
    there = planted(train, "mislabelled", coins(6), watch=True)
    model = there.model(small(3))
    objective = there.objective(Plain())
    expected = torch.zeros(6)
    for step in range(4):
        batch = there.train.batch(torch.arange(step * 10, step * 10 + 10))
        loss = objective(model, batch, Progress(step, 4, 0.0, 0)).per_example.mean()
        own = [
            torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), list(model.parameters()))
            for x, y in zip(there.canaries.batch(torch.arange(6)).inputs, there.canaries.labels, strict=True)
        ]
        update = torch.autograd.grad(loss, list(model.parameters()))
        for row, gradient in enumerate(own):
            expected[row] += sum((0.1 * u * g).sum() for u, g in zip(update, gradient, strict=True))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), update, strict=True):
                parameter -= 0.1 * gradient
    found = there.scores(StageTrainer([], small, data.test, seed=0), model, 0)
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet", "small_cnn"])
def test_convolution_nets_in_any_layout_can_be_watched(data: Splits, name: str) -> None:
    settings = {"depth": 8, "norm": "group"} if name == "resnet" else {}
    there = planted(data.train, "mislabelled", coins(6), watch=True)
    spec = {"name": name, **settings}
    model = build("models", spec, input_shape=(1, 8, 8), num_classes=10).to(memory_format=torch.channels_last)
    there.model(model)
    objective = there.objective(Plain())
    with torch.autocast("cpu", torch.bfloat16):  # as in a training step of that precision
        objective.perturb(model, there.train.batch(torch.arange(4)), PROGRESS)
        objective.perturb(model, there.train.batch(torch.arange(4)), replace(PROGRESS, step=1))
    canaries = there.canaries.batch(torch.arange(6))
    losses = cross_entropy(model.eval()(canaries.inputs), canaries.labels)
    moves = [1e-2 * torch.randn(each.shape) for each in model.parameters()]
    expected = []
    for loss in losses:
        own = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        expected.append(-sum((gradient * move).sum() for gradient, move in zip(own, moves, strict=True)))
    with torch.no_grad():
        for parameter, move in zip(model.parameters(), moves, strict=True):
            parameter += move
    found = there.scores(StageTrainer([], small, data.test, seed=0), model, 0)
    torch.testing.assert_close(found.float(), torch.stack(expected), rtol=1e-3, atol=1e-5)


def test_looking_at_another_model_does_not_disturb_the_watch(data: Splits) -> None:
    there = planted(data.train, "mislabelled", coins(6), watch=True)
    model = there.model(small(3))
    objective = there.objective(Plain())
    batch = there.train.batch(torch.arange(10))
    objective.perturb(small(4).double(), batch, Progress(1, 2, 0.5, 0))  # as a probe before training does
    objective.perturb(model, batch, PROGRESS)
    assert not there.scores(StageTrainer([], small, data.test, seed=0), model, 0).any()


def test_everything_else_about_the_objective_stays(data: Splits) -> None:
    for inner in (FreeAt(Linf(0.1), replays=3), PgdAt(Linf(0.1), steps=2)):
        there = planted(data.train, "dirac", coins(10))
        objective = there.objective(inner)
        assert objective.replays == inner.replays
        assert objective.record_isolated == inner.record_isolated
        batch = there.train.batch(torch.arange(4))
        model = there.model(small(0))
        inner.load_state({})
        torch.testing.assert_close(objective.perturb(model, batch, PROGRESS), inner.perturb(model, batch, PROGRESS))
        assert objective.state().keys() == inner.state().keys()
        json.dumps(spec_of(objective))  # a stage writes down what it minimised


def test_a_stage_that_moves_records_about_is_refused(data: Splits) -> None:
    there = planted(data.train, "mislabelled", coins(10))
    trainer = StageTrainer([("fit", Fit(Plain(), epochs=1, holdout=100))], small, data.test, seed=0)
    with pytest.raises(BadValue, match="holdout=100 moves records"):
        trainer(there.train, number=0, planting=there)


def test_runs_differ_by_their_number_and_leave_no_folder(data: Splits, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    trainer = StageTrainer([("fit", Fit(Plain(), epochs=1))], small, data.test, seed=0)
    first, again, second = (trainer(data.train, number=number) for number in (1, 1, 2))
    flat = [nn.utils.parameters_to_vector(model.parameters()) for model in (first, again, second)]
    assert torch.equal(flat[0], flat[1])
    assert not torch.equal(flat[0], flat[2])
    assert not list(tmp_path.iterdir())


def test_more_canaries_than_half_of_the_records_are_refused(data: Splits) -> None:
    with pytest.raises(BadValue, match="canaries=30 must lie between 1 and half of the 50"):
        planted(data.train.select(slice(0, 50)), "dirac", coins(30))

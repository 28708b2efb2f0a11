"""LADDER: images from across the border in closed form, the search by brute force, exact resumption, and its limits."""

from __future__ import annotations

import copy
import math
from collections import deque
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from trivet.data.dataset import Batch, Dataset, Splits
from trivet.errors import BadValue
from trivet.methods import build
from trivet.objectives.ladder import Ladder, first_crossing, steps
from trivet.objectives.objective import Progress
from trivet.objectives.pair_svm import PairSvm, target
from trivet.objectives.plain import Plain
from trivet.training import fit as fit_module
from trivet.training.fit import Fit
from trivet.training.folder import RunFolder
from trivet.training.optimizers import Sgd
from trivet.training.pipeline import run_stages

NOW = Progress(step=60, steps=100, epoch=6.0, seed=3)
LINEAR: dict[str, Any] = {"svm": "linear", "normal": "unit", "memory": 24}


def records(count: int = 96, seed: int = 0) -> Dataset:
    """Two-channel images whose class is the brightest quarter."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    images = torch.randint(0, 100, (count, 2, 4, 4), generator=draw, dtype=torch.uint8)
    for number, label in enumerate(labels.tolist()):
        row, column = 2 * (label // 2), 2 * (label % 2)
        images[number, :, row : row + 2, column : column + 2] += 120
    return Dataset(images, labels, ("a", "b", "c", "d"), "quarters")


DATA = records()


def batch_of(data: Dataset = DATA) -> Batch:
    return data.batch(torch.arange(len(data)))


def train(model: nn.Module, objective: Ladder | Plain, first: int = 0, last: int = 30, steps: int = 30) -> nn.Module:
    """Batches of 16, six an epoch."""
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    for step in range(first, last):
        batch = DATA.batch(torch.arange(16) + 16 * (step % 6))
        optimizer.zero_grad()
        objective(model, batch, Progress(step, steps, step / 6, seed=3)).per_example.mean().backward()
        optimizer.step()
    return model


class Copies(nn.Module):
    """A perfect decoder of a layer that hands on its pixels."""

    def forward(self, z: Tensor) -> Tensor:
        return z.unflatten(1, (2, 4, 4))


def see_through(model: nn.Module, borders: PairSvm, **settings: Any) -> Ladder:
    """An objective whose latents are the pixels, whose decoder copies them, and whose borders are given."""
    objective = Ladder(at="0", natural=0.0, **settings)
    objective.learn(model, batch_of(), NOW)
    shop = objective._kept[0]
    shop.decoder.net, shop.borders = Copies(), borders
    return objective


def random_borders(scale: float = 1.0) -> PairSvm:
    draw = torch.Generator().manual_seed(4)
    normal = scale * torch.randn(4, 3, 32, generator=draw)
    return PairSvm(normal, torch.zeros(4, 3), torch.ones(4, 3))


# --- the step ---------------------------------------------------------------------------------------------------------


def test_without_a_step_the_image_is_what_the_decoder_makes_of_the_features(mlp) -> None:
    objective = Ladder(eps=0.0, natural=0.0, **LINEAR)
    objective.learn(mlp, batch_of(), NOW)
    assert (objective.state()["borders.accuracy"] > 0.9).all()
    x = batch_of().inputs
    expected = objective._kept[0].decoder.net(mlp[2](mlp[1](x.flatten(1))))
    torch.testing.assert_close(objective.generate(mlp, batch_of(), NOW), expected)


def test_without_a_step_and_with_a_perfect_decoder_it_is_plain_training(mlp) -> None:
    objective = see_through(mlp, random_borders(), eps=0.0)
    made = objective.generate(mlp, batch_of(), NOW)
    assert torch.equal(made, batch_of().inputs)
    found = objective.losses(mlp, batch_of(), made, NOW).per_example
    torch.testing.assert_close(found, Plain()(mlp, batch_of(), NOW).per_example)


@pytest.mark.parametrize("normal", ["raw", "unit"])
def test_the_step_is_eps_times_the_normal_of_the_records_pair(mlp, normal) -> None:
    borders = random_borders(scale=5.0)
    objective = see_through(mlp, borders, eps=0.3, normal=normal)
    moved = (objective.generate(mlp, batch_of(), NOW) - batch_of().inputs).flatten(1)
    for step, label in zip(moved, batch_of().labels.tolist(), strict=True):
        expected = 0.3 * borders.normal[label]
        if normal == "unit":
            expected = expected / borders.normal[label].norm(dim=1, keepdim=True)
            assert float(step.norm()) == pytest.approx(0.3, rel=1e-4)
        assert min(float((step - each).abs().max()) for each in expected) < 1e-5


def test_attention_weighs_the_step(mlp) -> None:
    """Without mixing every weight is exp(1/d)."""
    plain = random_borders()
    even = plain._replace(mixing=torch.zeros(4, 3, 32, 32), shift=torch.zeros(4, 3, 32))
    x = batch_of().inputs
    bare, weighed = (see_through(mlp, each, eps=0.1).generate(mlp, batch_of(), NOW) - x for each in (plain, even))
    torch.testing.assert_close(weighed, math.exp(1 / 32) * bare, rtol=1e-3, atol=1e-6)


def test_targets_are_uniform_over_the_other_classes_whose_border_is_trusted(mlp) -> None:
    """2000 records of class 1, of which (1, 2) is not trusted: 1000 +- 112 each, five standard deviations (6e-7)."""
    accuracy = torch.ones(4, 3)
    accuracy[1, 1] = 0.89
    marks = torch.zeros(4, 3, 32)
    for r in range(3):
        marks[:, r, r] = 1.0
    objective = see_through(mlp, PairSvm(marks, torch.zeros(4, 3), accuracy), eps=1.0)
    many = Batch(torch.zeros(2000, 2, 4, 4), torch.full((2000,), 1), torch.arange(2000))
    counts = objective.generate(mlp, many, NOW).flatten(1)[:, :3].sum(0)
    assert [target(1, r) for r in range(3)] == [0, 2, 3]
    assert float(counts[1]) == 0
    assert abs(float(counts[0]) - 1000) < 112
    assert float(counts.sum()) == 2000


def test_records_without_a_trusted_border_train_as_they_are(mlp) -> None:
    accuracy = torch.ones(4, 3)
    accuracy[2] = 0.5
    objective = see_through(mlp, random_borders()._replace(accuracy=accuracy))
    same = (objective.generate(mlp, batch_of(), NOW) == batch_of().inputs).flatten(1).all(1)
    assert torch.equal(same, batch_of().labels == 2)


# --- the search -------------------------------------------------------------------------------------------------------


def test_the_search_takes_ten_times_the_step_from_one_on_and_ends_at_the_most() -> None:
    assert list(steps(0.8, 0.1, 3.5)) == pytest.approx([0.8, 0.9, 1.0, 2.0, 3.0, 3.5])
    assert list(steps(0.5, 0.1, 0.5)) == [0.5]


@given(st.floats(0, 3), st.floats(0.01, 1), st.floats(0, 5))
def test_the_lengths_rise_from_eps_to_the_most(eps: float, step: float, more: float) -> None:
    lengths = list(steps(eps, step, eps + more))
    assert lengths[0] == eps
    assert lengths[-1] == eps + more
    assert all(a < b for a, b in pairwise(lengths))


def test_the_search_finds_the_first_length_that_changes_the_prediction_else_the_last() -> None:
    draw = torch.Generator().manual_seed(0)
    z, direction, layer = (torch.randn(shape, generator=draw) for shape in ((40, 6), (40, 6), (6, 3)))
    lengths = [0.1, 0.4, 0.9, 2.0]
    found = first_crossing(lambda points: points @ layer, z, direction, z @ layer, lengths)
    expected = []
    for point, way in zip(z, direction, strict=True):
        crossing = [e for e in lengths if int(((point + e * way) @ layer).argmax()) != int((point @ layer).argmax())]
        expected.append(crossing[0] if crossing else 2.0)
    torch.testing.assert_close(found.squeeze(1), torch.tensor(expected))
    assert set(expected) == set(lengths)


def test_what_the_search_draws_is_read_as_another_class_wherever_there_is_a_border(mlp) -> None:
    train(mlp, Plain())
    objective = see_through(mlp, random_borders(), normal="unit", eps=0.1, eps_step=0.1, eps_max=50.0)
    made, x = objective.generate(mlp, batch_of(), NOW), batch_of().inputs
    length = (made - x).flatten(1).norm(dim=1)
    crossed = mlp(made).argmax(1) != mlp(x).argmax(1)
    assert crossed.sum() > 48
    torch.testing.assert_close(length[~crossed], torch.full_like(length[~crossed], 50.0))


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_of_the_record_and_its_image_under_the_record_s_label(mlp) -> None:
    batch, made = batch_of(), torch.rand(96, 2, 4, 4)
    found = Ladder().losses(mlp, batch, made, NOW)
    image, record = (F.cross_entropy(mlp(each), batch.labels, reduction="none") for each in (made, batch.inputs))
    torch.testing.assert_close(found.per_example, (image + record) / 2)
    torch.testing.assert_close(found.log["generated"], image.detach())


def test_training_begins_plain_and_the_decoder_learns_meanwhile(mlp) -> None:
    plain = train(copy.deepcopy(mlp), Plain(), last=15)
    objective = Ladder(**LINEAR)
    train(mlp, objective, last=15)
    assert all(torch.equal(a, b) for a, b in zip(mlp.parameters(), plain.parameters(), strict=True))
    assert "borders.normal" not in objective.state()
    assert float(objective.state()["decoder.adam.0.step"]) == 15
    train(mlp, objective, first=15, last=16)
    assert "borders.normal" in objective.state()


@pytest.mark.parametrize(("refresh", "fits"), [(0.0, [15]), (1.0, [15, 21, 27])])
def test_borders_are_fitted_once_or_every_so_many_epochs(mlp, refresh, fits) -> None:
    objective, found = Ladder(refresh=refresh, **LINEAR), []
    for step in range(30):
        train(mlp, objective, first=step, last=step + 1)
        if objective.state().get("fitted") == step / 6:
            found.append(step)
    assert found == fits


def test_the_memory_holds_the_latest_images_of_each_class(mlp) -> None:
    objective, rings = Ladder(memory=5), [deque(maxlen=5) for _ in range(4)]
    for step in range(7):
        batch = DATA.batch(torch.randperm(96, generator=torch.Generator().manual_seed(step))[: 3 * step + 1])
        objective.learn(mlp, batch, Progress(step, 100, 0.0, 3))
        for image, label in zip(batch.inputs, batch.labels.tolist(), strict=True):
            rings[label].append(float(image.sum()))
    for kept, ring in zip(objective._kept[0].remembered(), rings, strict=True):
        assert sorted(kept.sum((1, 2, 3)).tolist()) == pytest.approx(sorted(ring))


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("svm", ["linear", "attention"])
@pytest.mark.parametrize("stop", [7, 19])
def test_a_resumed_run_is_the_same_run_and_without_the_state_it_is_not(mlp, svm, stop) -> None:
    def objective() -> Ladder:
        return Ladder(svm=svm, memory=6, refresh=1.0, eps=2.0, min_accuracy=0.0)

    whole = train(copy.deepcopy(mlp), objective())
    first = objective()
    half = train(copy.deepcopy(mlp), first, last=stop)
    saved = first.state()
    kept = {name: tensor.clone() for name, tensor in saved.items()}
    resumed, forgetful = objective(), objective()
    resumed.load_state(saved)
    with_state, without = (train(copy.deepcopy(half), each, first=stop) for each in (resumed, forgetful))
    train(half, first, first=stop)
    assert all(torch.equal(saved[name], kept[name]) for name in kept)
    assert all(torch.equal(a, b) for a, b in zip(with_state.parameters(), whole.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(without.parameters(), whole.parameters(), strict=True))


def test_a_killed_run_of_the_training_stage_ends_at_the_same_weights(mlp, tmp_path: Path, monkeypatch) -> None:
    splits, device = Splits(DATA, records(20, 1)), torch.device("cpu")

    def run(folder: RunFolder) -> dict[str, Tensor]:
        stage = Fit(Ladder(natural=0.3, eps=1.0, refresh=1.0, **LINEAR), 4, 16, optimizer=Sgd(0.1), save_every=5)
        return run_stages(
            [("fit", stage)], copy.deepcopy(mlp), splits, folder, seed=5, device=device
        ).model.state_dict()

    honest = fit_module._Loop._step

    def stop(loop: Any, batch: Any, now: int) -> Any:
        if now == 18:
            raise KeyboardInterrupt
        return honest(loop, batch, now)

    killed = RunFolder.create(tmp_path / "killed", "recipe")
    with monkeypatch.context() as patch:
        patch.setattr(fit_module._Loop, "_step", stop)
        with pytest.raises(KeyboardInterrupt):
            run(killed)
    resumed, whole = run(killed), run(RunFolder.create(tmp_path / "whole", "recipe"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_private_rule_refuses_it_in_a_sentence() -> None:
    rule = {"name": "dp_sgd", "max_grad_norm": 1.0, "delta": 1e-3, "noise_multiplier": 1.0}
    with pytest.raises(
        ValueError, match="Ladder couples the records of a batch, so DpSgd cannot bound what one record"
    ):
        build("training", {"name": "fit", "objective": "ladder", "rule": rule})


def test_another_record_changes_the_image_of_this_one(mlp) -> None:
    """What the class attribute says: decoder and borders are made of all records."""
    images = []
    for others in (DATA, records(seed=5)):
        objective = Ladder(natural=0.0, **LINEAR)
        objective.learn(mlp, batch_of(others), NOW)
        images.append(objective.generate(mlp, batch_of(), NOW))
    assert not Ladder.record_isolated
    assert not torch.allclose(*images)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"eps": -1}, "eps=-1 must not be negative"),
        ({"eps_step": 0}, "eps_step=0 must be positive"),
        ({"eps": 2, "eps_max": 1}, "eps_max=1 must be eps or more"),
        ({"normal": "long"}, "normal='long' must be raw or unit"),
        ({"svm": "rbf"}, "svm='rbf' must be attention or linear"),
        ({"natural": 1}, r"natural=1 must lie in \[0, 1\)"),
        ({"refresh": -1}, "refresh=-1 must not be negative"),
        ({"memory": 2}, "memory=2 must be at least 3"),
        ({"min_accuracy": 2}, r"min_accuracy=2 must lie in \[0, 1\]"),
        ({"rate": 0}, "rate=0 must be positive"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong, said) -> None:
    with pytest.raises(BadValue, match=said):
        Ladder(**wrong)


def test_a_layer_that_is_not_there_is_named(mlp) -> None:
    with pytest.raises(BadValue, match="at='fc9' must name a layer"):
        Ladder(at="fc9")(mlp, batch_of(), NOW)

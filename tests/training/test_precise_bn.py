"""BatchNorm's statistics measured anew: by hand, through what comes before the layer, and with nothing else changed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trivet.claims import Verdict
from trivet.compression.tensorization import Tensorization
from trivet.data.dataset import Dataset, Splits
from trivet.errors import BadValue, TrivetError
from trivet.models.small_cnn import small_cnn
from trivet.training.folder import RunFolder
from trivet.training.pipeline import run_stages
from trivet.training.precise_bn import PreciseBn, estimate


def records(count: int = 40) -> Dataset:
    draw = torch.Generator().manual_seed(0)
    return Dataset(torch.rand(count, 1, 4, 4, generator=draw), torch.arange(count) % 3, ("a", "b", "c"), "noise", 1.0)


def net() -> Any:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.Flatten(), nn.Linear(24, 3))
    return nn.Sequential(*layers, nn.BatchNorm1d(3)).eval()


def run(stage: PreciseBn, model: nn.Module, folder: Path) -> nn.Module:
    data = Splits(records(), records())
    made = RunFolder.create(folder / "run", "test")
    return run_stages([("bn", stage)], model, data, made, seed=0, device=torch.device("cpu")).model


def test_statistics_are_those_of_all_records_and_nothing_else_moves(tmp_path: Path) -> None:
    """In one batch, mean and unbiased variance are known; the second layer sees what eval mode of dropout lets by."""
    model = net()
    with torch.no_grad():
        model(torch.rand(5, 1, 4, 4))
    before = copy.deepcopy(model)
    done: Any = run(PreciseBn(batch_size=40), model, tmp_path)
    x = records().batch(torch.arange(40)).inputs
    first = before[0](x).transpose(0, 1).flatten(1).detach()
    torch.testing.assert_close(done[1].running_mean, first.mean(1))
    torch.testing.assert_close(done[1].running_var, first.var(1))
    normalised = (first - first.mean(1, keepdim=True)) / (first.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    second = before[4](normalised.view(6, 40, 2, 2).transpose(0, 1).flatten(1)).detach()
    torch.testing.assert_close(done[5].running_mean, second.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(done[5].running_var, second.var(0), atol=1e-5, rtol=1e-5)
    assert not any(module.training for module in done.modules())
    assert done[1].momentum == 0.1
    for name, parameter in done.named_parameters():
        assert torch.equal(parameter, dict(before.named_parameters())[name])


def test_several_batches_count_alike_and_a_small_last_one_does_not() -> None:
    model = net()
    assert estimate(model, records(34), 16, 1, 0) == ["1", "5"]
    assert int(model[1].num_batches_tracked) == 2, "16 and 16, and not the last 2"
    assert estimate(model, records(30), 16, 3, 0) == ["1", "5"]
    assert int(model[1].num_batches_tracked) == 6


def test_of_a_drawn_network_the_variance_is_that_with_draws() -> None:
    """A draw for each record: the variance over records holds that of the draws, which the mean network has not."""
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(64, 3)).eval()
    quiet = copy.deepcopy(model)
    Tensorization(keep=0.6, per_sample=True, include=("0",)).attach(model)
    torch.manual_seed(0)
    estimate(model, records(400), 400, 1, 0)
    estimate(quiet, records(400), 400, 1, 0)
    loud, silent = model[1].running_var, quiet[1].running_var
    assert float((loud / silent).log().mean()) > 0.3


def test_it_reads_records_and_needs_something_to_measure(tmp_path: Path) -> None:
    assert PreciseBn().effect().privacy[0] is Verdict.VOID
    with pytest.raises(TrivetError, match="found no BatchNorm"):
        run(PreciseBn(), small_cnn((1, 4, 4), 3), tmp_path)
    with pytest.raises(BadValue, match="batch_size=1 must be at least 2"):
        PreciseBn(batch_size=1)
    with pytest.raises(BadValue, match="passes=0 must be at least 1"):
        PreciseBn(passes=0)

"""The shrinking stage: prune, cut, train on; the zeros stay, the run is read back, privacy survives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trivet.claims import Verdict
from trivet.compression.compression import steps_on
from trivet.compression.masks import Mask
from trivet.data.dataset import Dataset, Splits
from trivet.errors import TrivetError
from trivet.methods import build
from trivet.models.small_cnn import small_cnn
from trivet.training.folder import RunFolder
from trivet.training.pipeline import load_into, run_stages

THREAT = build("threats", {"name": "linf", "eps": 0.05})


def digits(count: int, seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 255, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return Dataset(images, torch.arange(count) % 2, ("even", "odd"), "noise")


SPLITS = Splits(digits(64, 0), digits(32, 1))


def net() -> nn.Module:
    return small_cnn((1, 8, 8), 2, generator=torch.Generator().manual_seed(0))


def stage(name: str, **settings: Any) -> tuple[str, Any]:
    return name, build("training", {"name": name, **settings}, threat=THREAT)


FIT = stage("fit", objective="plain", epochs=1, batch_size=32, optimizer={"name": "sgd", "lr": 0.1})
FILTERS = {"pattern": {"name": "structured", "granularity": "filter"}, "scope": "layerwise"}
PRUNE = stage("prune", pruner="magnitude", density=0.5, exclude=["logits"], **FILTERS)
SHRINK = stage("shrink")


def test_pruned_filters_are_gone_and_the_run_is_read_back(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "name: x\n")
    done = run_stages([PRUNE, SHRINK, FIT], net(), SPLITS, folder, seed=0, device=torch.device("cpu"))
    model: Any = done.model
    # Half the filters went; of the first layer's those alone whose bias the activation stops, for a border follows.
    first: Any = net().get_submodule("conv1")
    dropped = first.weight.abs().sum((1, 2, 3)).argsort()[:8]
    inputs = 16 - int((first.bias[dropped] <= 0).sum())
    assert 8 < inputs < 16
    assert model.conv2.weight.shape == (16, inputs, 4, 4)
    assert model.logits.weight.shape == (2, 50)
    record = done.history[1]
    assert record["stage"] == "shrink"
    assert record["parameters"][1] == sum(each.numel() for each in done.model.parameters()) < record["parameters"][0]
    assert record["difference"] <= 1e-5
    again = net()
    load_into(again, folder.weights)
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(again.eval()(x), model(x))


def test_an_interrupted_run_goes_on_with_the_smaller_network(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    folders = [RunFolder.create(tmp_path / name, "name: x\n") for name in ("whole", "parts")]
    whole = run_stages([PRUNE, SHRINK, FIT], net(), SPLITS, folders[0], seed=0, device=cpu)
    run_stages([PRUNE, SHRINK], net(), SPLITS, folders[1], seed=0, device=cpu)
    folders[1].claims.unlink()
    parts = run_stages([PRUNE, SHRINK, FIT], net(), SPLITS, folders[1], seed=0, device=cpu)
    assert parts.artefact == whole.artefact


def test_single_zeros_stay_masked_in_later_training(tmp_path: Path) -> None:
    scattered = stage("prune", pruner="magnitude", density=0.3)
    folder = RunFolder.create(tmp_path / "run", "name: x\n")
    before = run_stages([PRUNE, scattered, SHRINK], net(), SPLITS, folder, seed=0, device=torch.device("cpu"))
    zeros = {name: each == 0 for name, each in before.model.named_parameters() if name.endswith("weight")}
    folder = RunFolder.create(tmp_path / "other", "name: x\n")
    after = run_stages([PRUNE, scattered, SHRINK, FIT], net(), SPLITS, folder, seed=0, device=torch.device("cpu"))
    assert before.history[1:] == after.history[1:3]
    for name, tensor in after.model.named_parameters():
        if name in zeros:
            assert torch.equal(tensor == 0, zeros[name])
    assert not any(isinstance(step, Mask) for each in after.model.modules() for step in steps_on(each))


def test_it_reads_weights_alone_and_says_so() -> None:
    effect = SHRINK[1].effect()
    assert effect.privacy[0] is Verdict.KEEP
    assert {effect.certificate[0], effect.attack[0], effect.accuracy[0], effect.cost[0]} == {Verdict.VOID}


def test_a_network_that_hides_what_it_computes_is_refused(tmp_path: Path) -> None:
    """Its forward reads a weight behind the back of the layer: the cut changes the function, and is noticed."""

    class Sly(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.in_channels

    Sly.__module__ = "torch.nn.sly"  # a leaf for the tracer, and a convolution to the analysis
    model = nn.Sequential(nn.Conv2d(1, 3, 1), Sly(3, 3, 8), nn.Flatten())
    with torch.no_grad():
        model[1].weight[:, 0] = 0.0  # type: ignore[operator]
    folder = RunFolder.create(tmp_path / "run", "name: x\n")
    with pytest.raises(TrivetError, match="changed the logits by"):
        run_stages([SHRINK], model, SPLITS, folder, seed=0, device=torch.device("cpu"))

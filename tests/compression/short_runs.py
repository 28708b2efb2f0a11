"""Small records, runs of a few steps on them, and what a kill must not change."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trivet.data.dataset import Dataset, Splits
from trivet.training import fit as fit_module
from trivet.training.folder import RunFolder
from trivet.training.pipeline import run_stages
from trivet.training.stage import Checkpoint


def blobs(count: int, seed: int) -> Dataset:
    """Images whose class is the brighter half."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    images = torch.randint(0, 100, (count, 1, 4, 4), generator=generator, dtype=torch.uint8)
    images[labels == 0, :, :2] += 120
    images[labels == 1, :, 2:] += 120
    return Dataset(images, labels, ("top", "bottom"), "blobs")


SPLITS = Splits(blobs(96, 0), blobs(40, 1))


def run_on(model: nn.Module, folder: Path, *stages: Any, new: bool = True) -> Checkpoint:
    """Take `model` through `stages` in a new folder, or go on in one that is there."""
    made = RunFolder.create(folder, "recipe") if new else RunFolder.open(folder)
    return run_stages([("fit", each) for each in stages], model, SPLITS, made, seed=3, device=torch.device("cpu"))


def assert_a_kill_changes_nothing(
    step: int, stages: tuple[Any, ...], net: Callable[[int], nn.Module], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before step number `step` of all stages together and resumed with other first weights: the same bits."""
    whole = run_on(net(0), folder / "whole", *stages)
    honest, calls = fit_module._Loop._step, itertools.count()

    def stop(loop: Any, batch: Any, now: int) -> Any:
        if next(calls) == step:
            raise KeyboardInterrupt
        return honest(loop, batch, now)

    with monkeypatch.context() as patch:
        patch.setattr(fit_module._Loop, "_step", stop)
        with pytest.raises(KeyboardInterrupt):
            run_on(net(0), folder / "run", *stages)
    resumed = run_on(net(5), folder / "run", *stages, new=False)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name

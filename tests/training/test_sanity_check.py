"""Shuffled tickets: what must stay in each layer, what must move, and what the ledger hears."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trivet.claims import Verdict
from trivet.data.dataset import Dataset, Splits
from trivet.errors import TrivetError
from trivet.methods import build
from trivet.models.mlp import mlp
from trivet.training.folder import RunFolder
from trivet.training.pipeline import run_stages

SPLITS = Splits(*(Dataset(torch.zeros(4, 1, 4, 4, dtype=torch.uint8), torch.arange(4) % 2, ("a", "b"), "none"),) * 2)
LAYERS = ("fc1", "fc2", "logits")


def run(folder: Path, *specs: dict[str, Any]) -> nn.Module:
    model = mlp((1, 4, 4), 2, [12, 10], generator=torch.Generator().manual_seed(0))
    stages = [(spec["name"], build("training", spec)) for spec in specs]
    made = RunFolder.create(folder, "recipe")
    return run_stages(stages, model, SPLITS, made, seed=3, device=torch.device("cpu")).model


PRUNE = {"name": "prune", "pruner": "magnitude", "density": 0.25}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: model.get_submodule(name).weight.detach() for name in LAYERS}  # type: ignore[union-attr, misc]


@pytest.mark.parametrize("shuffle", ["masks", "weights"])
def test_each_layer_keeps_its_values_and_their_number(shuffle: str, tmp_path: Path) -> None:
    before = weights(run(tmp_path / "before", PRUNE))
    after = weights(run(tmp_path / "after", PRUNE, {"name": "sanity_check", "shuffle": shuffle}))
    for name in LAYERS:
        assert torch.equal(before[name].flatten().sort().values, after[name].flatten().sort().values)
        assert not torch.equal(before[name], after[name])
        assert torch.equal(before[name] == 0, after[name] == 0) == (shuffle == "weights")


def test_the_shuffle_is_uniform_over_places(tmp_path: Path) -> None:
    """Of 192 places 48 are kept and fall again on 48 * 48 / 192 = 12 of them, give or take 2.6: within 9 deviations."""
    before = weights(run(tmp_path / "before", PRUNE))["fc1"]
    after = weights(run(tmp_path / "after", PRUNE, {"name": "sanity_check"}))["fc1"]
    assert 1 <= int(((before != 0) & (after != 0)).sum()) <= 35


def test_masks_hold_after_the_shuffle(tmp_path: Path) -> None:
    fit = {"name": "fit", "objective": "plain", "epochs": 1, "batch_size": 2, "optimizer": {"name": "sgd"}}
    spoilt = [PRUNE, {"name": "sanity_check"}]
    still, trained = (weights(run(tmp_path / str(len(more)), *spoilt, *more)) for more in ([], [fit]))
    for name in LAYERS:
        assert torch.equal(still[name] == 0, trained[name] == 0)


def test_what_it_cannot_shuffle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrivetError, match="shuffles masks, and there are none; put awt or prune before it"):
        run(tmp_path / "dense", {"name": "sanity_check"})
    with pytest.raises(TrivetError, match="and fc1 has more; prune once before it"):
        run(tmp_path / "twice", PRUNE, {**PRUNE, "density": 0.1}, {"name": "sanity_check"})


def test_privacy_stays() -> None:
    effect = build("training", {"name": "sanity_check"}).effect()
    assert effect.privacy[0] is Verdict.KEEP
    assert effect.certificate[0] is effect.attack[0] is Verdict.VOID

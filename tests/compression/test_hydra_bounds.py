"""HYDRA for certificates: bounds see the mask, scores learn through them, and what is proved survives the export."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trivet.certify.bounds.network import Ball, Network
from trivet.compression.hydra import Hydra
from trivet.compression.structure import finish
from trivet.data.dataset import Batch, Dataset, Splits
from trivet.methods import build, spec_of
from trivet.objectives.objective import Progress
from trivet.training.folder import RunFolder
from trivet.training.pipeline import run_stages

THREAT = build("threats", {"name": "linf", "eps": 0.05})
PATTERNS: list[Any] = ["unstructured", {"name": "n_m", "m": 4}, {"name": "structured", "granularity": "channel"}]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 2))


def lower(model: nn.Module, method: Any) -> torch.Tensor:
    x = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    ball = Ball(x, torch.full((6,), 0.03))
    return Network.of(model.eval(), (1, 4, 4)).margins(ball, torch.arange(6) % 2, method=method, arithmetic="float32")


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_bounds_of_masked_and_exported_networks_are_equal(pattern: Any, method: str) -> None:
    model: Any = net()
    hydra: Any = build("compression", {"name": "hydra", "density": 0.5, "pattern": pattern, "exclude": ["0"]})
    hydra.attach(model)
    hydra.begin(model)
    hydra.initialise(model)
    with torch.no_grad():
        for each in hydra.maps(model).values():
            each.scores.copy_(torch.randn_like(each.scores))
    scored = lower(model, method)
    masks = hydra.end(model)
    exported = copy.deepcopy(model)
    assert finish(exported, [spec_of(masks)]) == []
    by_hand = net()
    with torch.no_grad():
        for number in (3, 4):
            by_hand[number].weight.mul_(model[number].weight != 0)  # type: ignore[operator]
    for other in (model, exported, by_hand):
        torch.testing.assert_close(lower(other, method), scored, rtol=0, atol=1e-6)
    assert not torch.allclose(lower(net(), method), scored)


def test_scores_learn_through_the_bounds_alone() -> None:
    """At the full radius, with no share of the clean loss."""
    model: Any = net()
    hydra = Hydra(density=0.3)
    hydra.attach(model)
    hydra.begin(model)
    hydra.initialise(model)
    objective = build("objectives", {"name": "ibp", "kappa_end": 0.0, "ramp": [0, 0]}, threat=THREAT)
    batch = Batch(torch.rand(8, 1, 4, 4), torch.arange(8) % 2, torch.arange(8))
    objective(model, batch, Progress(9, 10, 0.0, 0)).per_example.mean().backward()
    for each in hydra.maps(model).values():
        assert float(each.scores.grad.abs().sum()) > 0


@pytest.mark.parametrize("pattern", PATTERNS[1:], ids=str)
@pytest.mark.parametrize("objective", ["trades", {"name": "ibp", "ramp": [0, 0]}, {"name": "gaussian", "sigma": 0.1}])
def test_any_objective_and_pattern_make_a_finished_network(objective: Any, pattern: Any, tmp_path: Path) -> None:
    labels = torch.arange(48) % 2
    images = torch.randint(0, 100, (48, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    records = Dataset(images + 120 * labels[:, None, None, None].to(torch.uint8), labels, ("dark", "light"), "shades")
    spec = {"name": "fit", "objective": objective, "epochs": 1, "batch_size": 24, "optimizer": {"name": "sgd"}}
    compression = {"name": "hydra", "density": 0.5, "pattern": pattern, "exclude": ["0"]}
    stages = [build("training", spec | more, threat=THREAT) for more in ({"compression": compression}, {})]
    folder = RunFolder.create(tmp_path / "run", "recipe")
    named = [("fit", each) for each in stages]
    checkpoint = run_stages(named, net(), Splits(records, records), folder, seed=0, device=torch.device("cpu"))
    model: Any = checkpoint.model
    assert int((model[3].weight == 0).sum()) == 256
    assert checkpoint.structure == []

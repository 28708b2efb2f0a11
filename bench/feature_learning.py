"""Which features training learns on patch data, and what withstands which attack.

    python bench/feature_learning.py --rounds 3 --threads 1 --out results/feature-learning.json

A round is another problem (features, records, first weights). Every rival takes the same 800 full-batch steps of
gradient descent (1000 in the regime of the theory, where weak features are so many that they win the early race). U
and V are the mean alignments with robust and non-robust features at the end. Accuracy is left of 200 test records by
20 steps of margin ascent, once from the record itself, as the theory's attack goes, and once with 3 restarts from
random points of the set. Radii are in the paper's coordinates, for every patch.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import harness
from trivet.data.dataset import Dataset
from trivet.data.patches import UNIT, patches
from trivet.models.patch_network import PatchNetwork, patch_network
from trivet.objectives.feature_learning import FeatureLearning, alignments
from trivet.objectives.gaussian import Gaussian
from trivet.objectives.objective import Objective, Progress
from trivet.randomness import generator
from trivet.threats.patch_l2 import PatchL2
from trivet.threats.pgd import PGD


@dataclass(frozen=True)
class Setting:
    """A problem, a network, a radius to train at, and radii to attack at."""

    eps: float
    filters: int
    steps: int
    radii: tuple[float, ...]
    problem: Mapping[str, float] = field(default_factory=dict)


SETTINGS = {
    "visible": Setting(0.5, 12, 800, (0.2, 0.3, 0.4, 0.5, 0.6)),
    "regime": Setting(0.6, 4, 1000, (0.1, 0.2, 0.3, 0.4, 0.6), {"strong": 1.0, "weak": 0.5, "count": 16}),
}


def rivals(eps: float) -> dict[str, Objective]:
    threat = PatchL2(eps * UNIT)
    return {
        "standard": FeatureLearning(threat, steps=0),
        "noise, as long as the radius": Gaussian(eps * UNIT / 40**0.5),
        "1 step": FeatureLearning(threat, steps=1),
        "5 steps": FeatureLearning(threat, steps=5, step_size=0.4 * eps * UNIT),
        "5 steps, random start": FeatureLearning(threat, steps=5, step_size=0.4 * eps * UNIT, random_start=True),
    }


def trained(objective: Objective, setting: Setting, data: Dataset, seed: int) -> PatchNetwork:
    net = patch_network(
        data.input_shape,
        data.num_classes,
        filters=setting.filters,
        mean=[0.5],
        std=[UNIT],
        generator=generator(seed, "init"),
    )
    optimizer = torch.optim.SGD(net.parameters(), 0.3)
    batch = data.batch(torch.arange(len(data)))
    for step in range(setting.steps):
        optimizer.zero_grad()
        objective(net, batch, Progress(step, setting.steps, step, seed)).per_example.mean().backward()
        optimizer.step()
    return net


def left(net: PatchNetwork, data: Dataset, eps: float, restarts: int) -> float:
    """Accuracy after margin ascent from the records, or from random points."""
    batch = data.batch(torch.arange(len(data)))
    attack = PGD(PatchL2(eps * UNIT), 20, restarts=max(restarts, 1), loss="margin", random_start=restarts > 0)
    return 1.0 - float(attack.run(net, batch.inputs, batch.labels).broken.float().mean())


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for name in options.settings:
        setting = SETTINGS[name]
        found: dict[str, list[dict[str, float]]] = {}
        for draw in range(options.seed, options.seed + options.rounds):
            splits = patches(draw=draw, **setting.problem)
            for rival, objective in rivals(setting.eps).items():
                net = trained(objective, setting, splits.train, draw)
                u, v = (float(each.mean()) for each in alignments(net, draw))
                numbers = {"U": u, "V": v, "clean": left(net, splits.test, 0.0, 0)}
                for eps in setting.radii:
                    numbers[f"{eps:g}"] = left(net, splits.test, eps, 0)
                    numbers[f"{eps:g}, restarts"] = left(net, splits.test, eps, 3)
                found.setdefault(rival, []).append(numbers)
        for rival, each in found.items():
            mean = {key: statistics.fmean(numbers[key] for numbers in each) for key in each[0]}
            rows.append({"setting": name, "training": rival, **mean, "rounds": each})
    return rows


def main() -> None:
    parser = harness.arguments(__doc__ or "", rounds=3)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    options = parser.parse_args()
    harness.prepare(options)
    rows = measure(options)
    for name in options.settings:
        shown = [
            {key: row[key] for key in row if key not in ("setting", "rounds")} for row in rows if row["setting"] == name
        ]
        harness.show(name, shown)
    harness.save(options, rows)


if __name__ == "__main__":
    main()

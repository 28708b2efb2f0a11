"""How concise and how stable explanations are after plain, l_1 and adversarial training, on the digits.

    python bench/explanations.py --threads 1 --out results/explanations.json

Every model: 30 epochs of Adam at 5e-3, batches of 64, the same first weights in a round. Adversarial training: PGD-10
at l_inf eps. l_1: weight times the sum of all absolute weights, added to the mean loss. Stable IG: as `stable_ig`, at
its defaults. Explained is the logit of the right class from the black image, on all 355 test records: integrated
gradients of 50 midpoints, and DeepSHAP with captum. `lit` is over pixels that are not black. Overlap is the share of
the most important tenth of pixels that stays so at a random point 0.1 away. Accuracy under attack is what PGD-20 with
2 restarts leaves at l_inf 0.1.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import harness
from trivet.audit.explanations import explain
from trivet.data.dataset import Splits
from trivet.data.digits import digits
from trivet.models.attribution import deep_shap, gini
from trivet.models.mlp import mlp
from trivet.objectives.objective import Objective
from trivet.objectives.pgd_at import PgdAt
from trivet.objectives.plain import Plain
from trivet.objectives.stable_ig import StableIG
from trivet.randomness import generator
from trivet.threats.linf import Linf
from trivet.threats.pgd import PGD
from trivet.training.fit import Fit
from trivet.training.folder import RunFolder
from trivet.training.optimizers import Adam
from trivet.training.pipeline import run_stages

WIDTHS: dict[str, tuple[int, ...]] = {"one layer": (), "perceptron": (64, 64)}
RIVALS: dict[str, tuple[Objective, float]] = {
    "plain": (Plain(), 0.0),
    "l_1, 1e-3": (Plain(), 1e-3),
    "l_1, 3e-3": (Plain(), 3e-3),
    "PGD-AT 0.05": (PgdAt(Linf(0.05)), 0.0),
    "PGD-AT 0.1": (PgdAt(Linf(0.1)), 0.0),
    "PGD-AT 0.2": (PgdAt(Linf(0.2)), 0.0),
    "stable IG 0.1": (StableIG(Linf(0.1)), 0.0),
}


def trained(hidden: tuple[int, ...], rival: str, splits: Splits, seed: int, epochs: int) -> nn.Module:
    objective, l1 = RIVALS[rival]
    net = mlp(splits.train.input_shape, splits.train.num_classes, hidden, generator=generator(seed, "weights"))
    fit = Fit(objective, epochs, 64, optimizer=Adam(5e-3), l1=l1)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder) / "run", "{}")
        model = run_stages([("fit", fit)], net, splits, run, seed=seed, device=torch.device("cpu")).model
    return model.eval()


def row(model: nn.Module, splits: Splits, seed: int) -> dict[str, float]:
    batch = splits.test.batch(torch.arange(len(splits.test)))
    found = explain(model, batch, Linf(0.1), seed=seed, batch_size=512)
    attack = PGD(Linf(0.1), 20, restarts=2).run(model, batch.inputs, batch.labels)
    return {
        "accuracy": float((model(batch.inputs).argmax(1) == batch.labels).float().mean()),
        "attacked": 1.0 - float(attack.broken.float().mean()),
        "gini": statistics.fmean(found.gini),
        "gini lit": statistics.fmean(found.gini_lit),
        "gini, DeepSHAP": float(gini(deep_shap(model, batch.inputs, batch.labels)).mean()),
        "overlap": statistics.fmean(found.overlap),
        "unaccounted": found.unaccounted,
    }


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    splits, rows = digits(), []
    for network, hidden in WIDTHS.items():
        for rival in RIVALS:
            rounds = [
                row(trained(hidden, rival, splits, seed, options.epochs), splits, seed)
                for seed in range(options.seed, options.seed + options.rounds)
            ]
            mean = {key: statistics.fmean(each[key] for each in rounds) for key in rounds[0]}
            rows.append({"network": network, "training": rival, **mean, "rounds": rounds})
    return rows


def main() -> None:
    parser = harness.arguments(__doc__ or "", rounds=2)
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()
    harness.prepare(options)
    rows = measure(options)
    harness.show("digits", [{key: value for key, value in each.items() if key != "rounds"} for each in rows])
    harness.save(options, rows)


if __name__ == "__main__":
    main()

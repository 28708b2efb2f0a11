"""Adversarial training with feature separability (ATFS) beside its peers on the digits, under equal conditions.

    python bench/atfs.py --threads 1 --out results/atfs.json

Every model: a perceptron (128, 64), 40 epochs of Adam at 2e-3, batches of 64, PGD-10 or TRADES' and MART's own inner
search at l_inf 0.1, the last weights; in a round all rivals have the same first weights and the same order of batches.
Judged on all 355 test records: clean accuracy, AutoAttack standard, and transfer, which is what is left by PGD-50 made
for a plain network and for a PGD-AT network, both trained from another seed. Cosines and Fisher's ratio are of the
features before the last layer, clean and under PGD-20. Intervals are Student's, 95 %, over the rounds; the difference
to PGD-AT is taken round by round; a single round has none. They speak of training runs, not of other test records.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import harness
from trivet.data.dataset import Batch, Splits
from trivet.data.digits import digits
from trivet.errors import TrivetError
from trivet.models.mlp import mlp
from trivet.models.separability import cross_similarity, separability
from trivet.models.taps import tapped
from trivet.objectives.alp import Alp
from trivet.objectives.atfs import Atfs
from trivet.objectives.awp import Awp
from trivet.objectives.mart import Mart
from trivet.objectives.objective import Objective
from trivet.objectives.pgd_at import PgdAt
from trivet.objectives.plain import Plain
from trivet.objectives.trades import Trades
from trivet.randomness import generator
from trivet.threats.autoattack import AutoAttack
from trivet.threats.linf import Linf
from trivet.threats.losses import cross_entropy
from trivet.threats.pgd import ascend
from trivet.training.fit import Fit
from trivet.training.folder import RunFolder
from trivet.training.optimizers import Adam
from trivet.training.pipeline import run_stages

THREAT = Linf(0.1)
RIVALS: dict[str, Objective] = {
    "PGD-AT": PgdAt(THREAT),
    "TRADES": Trades(THREAT),
    "MART": Mart(THREAT),
    "PGD-AT, AWP": Awp(PgdAt(THREAT)),
    "ALP": Alp(THREAT),
    "ATFS": Atfs(THREAT),
    "ATFS, weights 1": Atfs(THREAT, intra=1.0),
    "ATFS, intra alone": Atfs(THREAT, inter=0.0),
    "ATFS, inter alone": Atfs(THREAT, intra=0.0, inter=0.5),
}


def trained(objective: Objective, splits: Splits, seed: int, epochs: int) -> nn.Module:
    net = mlp(splits.train.input_shape, splits.train.num_classes, (128, 64), generator=generator(seed, "weights"))
    fit = Fit(objective, epochs, 64, optimizer=Adam(2e-3))
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder) / "run", "{}")
        model = run_stages([("fit", fit)], net, splits, run, seed=seed, device=torch.device("cpu")).model
    return model.eval()


def climbed(model: nn.Module, batch: Batch, steps: int, seed: int) -> Tensor:
    """The last iterates of PGD on the cross-entropy from random points, whether they fool `model` or not."""
    return ascend(
        model,
        batch.inputs,
        THREAT.random_start(batch.inputs, generator(seed, "start")),
        lambda logits: cross_entropy(logits, batch.labels),
        threat=THREAT,
        steps=steps,
        step_size=2.5 * THREAT.eps / steps,
    )


def row(model: nn.Module, batch: Batch, transferred: dict[str, Tensor], seed: int) -> dict[str, float]:
    x, y = batch.inputs, batch.labels
    attacked = AutoAttack(THREAT).run_detailed(model, x, y, generator=generator(seed, "attack"))
    perturbed = climbed(model, batch, 20, seed)
    with torch.no_grad(), tapped(model) as features:
        right = model(x).argmax(1) == y
        clean = features()
        model(perturbed)
        moved = features()
        left = {name: right & (model(points).argmax(1) == y) for name, points in transferred.items()}
    before, after = separability(clean, y), separability(moved, y)
    return {
        "clean": float(right.double().mean()),
        "AutoAttack": float((~attacked.broken).double().mean()),
        "broken by Square alone": attacked.square_gain,
        **{name: float(each.double().mean()) for name, each in left.items()},
        "intra": before.intra,
        "inter": before.inter,
        "Fisher": before.fisher,
        "intra attacked": after.intra,
        "inter attacked": after.inter,
        "Fisher attacked": after.fisher,
        "intra clean to attacked": cross_similarity(clean, moved, y),
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean."""
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each rival; what is known after a round is saved, so that a run may be stopped."""
    splits = digits()
    batch = splits.test.batch(torch.arange(len(splits.test)))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in RIVALS}
    stopped: dict[str, list[str]] = {name: [] for name in RIVALS}
    rows: list[dict[str, Any]] = []
    for seed in range(options.seed, options.seed + options.rounds):
        other = {"transfer, plain": Plain(), "transfer, PGD-AT": PgdAt(THREAT)}
        transferred = {
            name: climbed(trained(each, splits, 1000 + seed, options.epochs), batch, 50, seed)
            for name, each in other.items()
        }
        for name, objective in RIVALS.items():
            try:
                model = trained(objective, splits, seed, options.epochs)
            except TrivetError as error:
                stopped[name].append(str(error))
                continue
            found[name].append(row(model, batch, transferred, seed))
            print(seed, name, {key: round(value, 3) for key, value in found[name][-1].items()}, flush=True)
        rows = [summary(name, found, stopped[name]) for name in RIVALS]
        harness.save(argparse.Namespace(**{**vars(options), "rounds": seed - options.seed + 1}), rows)
    return rows


def summary(name: str, found: dict[str, list[dict[str, float]]], stopped: list[str]) -> dict[str, Any]:
    """Means over the rounds, and intervals where every round of this rival was trained to its end."""
    rounds, base = found[name], found["PGD-AT"]
    keys = list(base[0])
    mean = {key: statistics.fmean(each[key] for each in rounds) if rounds else None for key in keys}
    intervals, differences = {}, {}
    if len(rounds) == len(base) > 1:
        intervals = {key: interval([each[key] for each in rounds]) for key in keys}
        paired = {key: [ours[key] - its[key] for ours, its in zip(rounds, base, strict=True)] for key in keys}
        differences = {
            key: {"mean": statistics.fmean(each), "interval": interval(each)} for key, each in paired.items()
        }
    return {
        "training": name,
        **mean,
        "stopped": len(stopped),
        "errors": stopped,
        "intervals": intervals,
        "minus PGD-AT": {} if name == "PGD-AT" else differences,
        "rounds": rounds,
    }


def main() -> None:
    parser = harness.arguments(__doc__ or "", rounds=3)
    parser.add_argument("--epochs", type=int, default=40)
    options = parser.parse_args()
    harness.prepare(options)
    rows = measure(options)
    hidden = ("errors", "intervals", "minus PGD-AT", "rounds")
    harness.show("digits", [{key: value for key, value in each.items() if key not in hidden} for each in rows])


if __name__ == "__main__":
    main()

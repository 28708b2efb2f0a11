"""Training against l_inf and l_1 together on the digits: AVG, MAX, and the baselines ALT, HALF_LR and HALF_BATCH.

    python bench/multi_perturbation.py --threads 1 --out results/multi-perturbation.json

Every model: a perceptron (128, 64), 30 epochs of Adam at 2e-3, batches of 64, attacks of 10 steps at l_inf 0.1 and l_1
2, the last weights; in a round all rivals have the same first weights. HALF_LR halves the rate, HALF_BATCH the batch
(so that there are twice as many steps). Judged on all 355 test records. l_inf: PGD-40 on the margin with 3 restarts,
and Square with 1000 queries. l_1: SLIDE-40 with 3 restarts, Square with 1000 queries, and Pointwise.
A record counts for the union if every attack left it right. `gained without gradients` is what Square and Pointwise
took after the gradient attacks, of the union. `gradients` counts the input gradients that training took for a record,
a sum over its epochs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import harness
from trivet.data.dataset import Splits
from trivet.data.digits import digits
from trivet.models.mlp import mlp
from trivet.objectives.alt_at import AltAt
from trivet.objectives.avg_at import AvgAt
from trivet.objectives.max_at import MaxAt
from trivet.randomness import generator
from trivet.threats.attack import Attack
from trivet.threats.l1 import L1
from trivet.threats.linf import Linf
from trivet.threats.pgd import PGD
from trivet.threats.pointwise import Pointwise
from trivet.threats.slide import Slide
from trivet.threats.square import Square
from trivet.threats.union import Union
from trivet.training.fit import Fit
from trivet.training.folder import RunFolder
from trivet.training.optimizers import Adam
from trivet.training.pipeline import run_stages

STEPS, BATCH, RATE = 10, 64, 2e-3
MAX_NORM, ONE_NORM = Linf(0.1), L1(2.0)
BOTH = Union((MAX_NORM, ONE_NORM))
GRADIENTS: dict[str, Attack] = {
    "l_inf": PGD(MAX_NORM, 40, restarts=3, loss="margin"),
    "l_1": Slide(ONE_NORM, 40, restarts=3),
}
QUERIES: dict[str, tuple[Attack, ...]] = {
    "l_inf": (Square(MAX_NORM, 1000),),
    "l_1": (Square(ONE_NORM, 1000), Pointwise(ONE_NORM, 1)),
}


def rivals(epochs: int) -> dict[str, tuple[Fit, int]]:
    """How each is trained, and its input gradients for a record in an epoch."""
    avg, adam = AvgAt(BOTH, STEPS), Adam(RATE)
    return {
        "AVG": (Fit(avg, epochs, BATCH, adam), 2 * STEPS),
        "AVG, HALF_LR": (Fit(avg, epochs, BATCH, Adam(RATE / 2)), 2 * STEPS),
        "AVG, HALF_BATCH": (Fit(avg, epochs, BATCH // 2, adam), 2 * STEPS),
        "MAX": (Fit(MaxAt(BOTH, STEPS), epochs, BATCH, adam), 2 * STEPS),
        "ALT": (Fit(AltAt(BOTH, STEPS), epochs, BATCH, adam), STEPS),
    }


def trained(fit: Fit, splits: Splits, seed: int) -> nn.Module:
    net = mlp(splits.train.input_shape, splits.train.num_classes, (128, 64), generator=generator(seed, "weights"))
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder) / "run", "{}")
        model = run_stages([("fit", fit)], net, splits, run, seed=seed, device=torch.device("cpu")).model
    return model.eval()


def row(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    def stands(attack: Attack) -> Tensor:
        return ~attack.run(model, x, y).broken

    by_gradients = {norm: stands(attack) for norm, attack in GRADIENTS.items()}
    left = dict(by_gradients)
    for norm, attacks in QUERIES.items():
        for attack in attacks:
            left[norm] = left[norm] & stands(attack)
    union = left["l_inf"] & left["l_1"]
    before = by_gradients["l_inf"] & by_gradients["l_1"]
    return {
        "clean": _share(model(x).argmax(1) == y),
        **{norm: _share(each) for norm, each in left.items()},
        "union": _share(union),
        "gained without gradients": _share(before) - _share(union),
    }


def _share(which: Tensor) -> float:
    return float(which.double().mean())


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each rival; what is known after a round is saved, so that a run may be stopped."""
    splits = digits()
    batch = splits.test.batch(torch.arange(len(splits.test)))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in rivals(options.epochs)}
    rows: list[dict[str, Any]] = []
    for seed in range(options.seed, options.seed + options.rounds):
        for name, (fit, _) in rivals(options.epochs).items():
            found[name].append(row(trained(fit, splits, seed), batch.inputs, batch.labels))
            print(seed, name, {key: round(value, 3) for key, value in found[name][-1].items()}, flush=True)
        rows = summary(found, options.epochs)
        harness.save(argparse.Namespace(**{**vars(options), "rounds": seed - options.seed + 1}), rows)
    return rows


def summary(found: dict[str, list[dict[str, float]]], epochs: int) -> list[dict[str, Any]]:
    return [
        {
            "training": name,
            **{key: statistics.fmean(each[key] for each in rounds) for key in rounds[0]},
            "gradients": rivals(epochs)[name][1] * epochs,
            "rounds": rounds,
        }
        for name, rounds in found.items()
    ]


def main() -> None:
    parser = harness.arguments(__doc__ or "", rounds=2)
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()
    harness.prepare(options)
    rows = measure(options)
    harness.show("digits", [{key: value for key, value in each.items() if key != "rounds"} for each in rows])


if __name__ == "__main__":
    main()

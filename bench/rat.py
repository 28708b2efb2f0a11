"""Region adversarial training on few records: what it buys, against whom, and whether few records are enough.

    python bench/rat.py --threads 1 --out results/rat.json

The paper's setting: a network trained on all 1442 digits is trained on, with each method, on a few of them, drawn anew
in each round. All rows of a round start from the same network and take as many optimiser steps (Adam, batches of up to
64) on the same records. Perceptron (128, 64). Universal perturbations have l_inf radius 0.3, and PGD-AT and fast AT
train at 0.1, where FGSM and AutoAttack (standard) judge; both on the first `points` test records. What --out holds
already, from the same settings, is not made again.

Universal perturbations, one for each class, are searched on 100 training records (3 passes). `old`: found on the
network before it was trained on; `fresh`: found anew on the network judged; `signs`: random ones as long. Each is the
mean share of test records of other classes that is sent to the class. Intervals are Student's, over rounds, 95 %.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import harness
from trivet.data.dataset import Batch, Splits
from trivet.data.digits import digits
from trivet.models.mlp import mlp
from trivet.models.surrogate import Logits, surrogate
from trivet.objectives.fast_at import FastAt
from trivet.objectives.objective import Losses, Objective, Progress
from trivet.objectives.pgd_at import PgdAt
from trivet.objectives.plain import Plain
from trivet.objectives.rat import Rat
from trivet.randomness import generator
from trivet.threats.attack import input_gradient
from trivet.threats.autoattack import AutoAttack
from trivet.threats.linf import Linf
from trivet.threats.losses import cross_entropy
from trivet.threats.pgd import fgsm
from trivet.threats.universal import Universal, UniversalSearch, inside, moved, success_of
from trivet.training.fit import Fit
from trivet.training.folder import RunFolder
from trivet.training.optimizers import Adam
from trivet.training.pipeline import run_stages

ETA, EPS = Linf(0.3), Linf(0.1)
SETTINGS = ("steps", "points", "lr")
"""What must be the same for a row to be taken from an earlier run."""


@dataclass(frozen=True)
class RandomSigns(Rat):
    """RAT with random signs in place of what it searches for: the same radius and cost, no knowledge of the network."""

    def perturbations(self, ask: Logits, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Universal:
        found = super().perturbations(ask, x[:1], y[:1], generator)
        signs = torch.randint(2, found.deltas.shape, generator=generator).to(x) * 2 - 1
        return found._replace(deltas=inside(self.threat, self.threat.eps * signs))


@dataclass(frozen=True)
class UniversalTraining(Objective):
    """Universal adversarial training (Shafahi et al., AAAI 2020): one untargeted v that climbs by a step a batch."""

    threat: Linf
    step_size: float
    _known: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def perturb(self, model: nn.Module, batch: Batch, progress: Progress) -> Tensor:
        x, delta = batch.inputs, self._known.get("delta", batch.inputs.new_zeros(batch.inputs.shape[1:]))
        point, ask = moved(self.threat, x, delta), surrogate(model, "fp32")
        gradient, _, _ = input_gradient(ask, point, lambda logits: cross_entropy(logits, batch.labels))
        delta = inside(self.threat, (delta + self.step_size * gradient.mean(0).sign())[None])[0]
        self._known["delta"] = delta
        return moved(self.threat, x, delta)

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, progress: Progress) -> Losses:
        return Losses(cross_entropy(model(perturbed), batch.labels))


def rivals() -> dict[str, Objective]:
    early: dict[str, Any] = {"warm_up": 0.1}
    return {
        "plain": Plain(),
        "PGD-AT 0.1": PgdAt(EPS),
        "RAT": Rat(ETA, **early),
        "random signs": RandomSigns(ETA, **early),
        "RAT, 1 round": Rat(ETA, rounds=1, **early),
        "RAT, nearest half": Rat(ETA, top_fraction_by_margin=0.5, **early),
        "universal AT": UniversalTraining(ETA, step_size=0.03),
        "fast AT 0.1": FastAt(EPS),
    }


def trained(
    objective: Objective, model: nn.Module, splits: Splits, seed: int, options: argparse.Namespace
) -> nn.Module:
    size = min(64, len(splits.train))
    epochs = max(1, round(options.steps / math.ceil(len(splits.train) / size)))
    fit = Fit(objective, epochs, size, optimizer=Adam(options.lr))
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder) / "run", "{}")
        after = run_stages([("fit", fit)], copy.deepcopy(model), splits, run, seed=seed, device=torch.device("cpu"))
    return after.model.eval()


def universal(model: nn.Module, splits: Splits, seed: int) -> Universal:
    few = splits.train.batch(torch.randperm(len(splits.train), generator=generator(seed, "searched"))[:100])
    with torch.no_grad():
        return UniversalSearch(ETA, passes=3).perturbations(
            surrogate(model, "fp32"), few.inputs, few.labels, generator(seed, "search")
        )


def judged(model: nn.Module, splits: Splits, old: Universal, seed: int, points: int) -> dict[str, float]:
    whole = splits.test.batch(torch.arange(len(splits.test)))
    some = whole.select(slice(points))
    signs = torch.randint(2, old.deltas.shape, generator=generator(seed, "signs")) * 2.0 - 1
    kinds = {
        "old": old,
        "fresh": universal(model, splits, seed),
        "signs": old._replace(deltas=inside(ETA, ETA.eps * signs)),
    }
    sent = {
        name: 100 * float(success_of(each, model, whole.inputs, whole.labels, ETA).mean())
        for name, each in kinds.items()
    }
    left = {
        name: 100 * (1 - float(attack.run(model, some.inputs, some.labels).broken.double().mean()))
        for name, attack in (("fgsm", fgsm(EPS)), ("autoattack", AutoAttack(EPS)))
    }
    with torch.no_grad():
        clean = 100 * float((model(whole.inputs).argmax(1) == whole.labels).double().mean())
    return {"clean": clean, **left, **sent}


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A run for each round, size and rival, saved when it is done; what is in --out already stays."""
    splits, runs = digits(), harness.earlier(options, SETTINGS, "runs")
    shape, classes = splits.train.input_shape, splits.train.num_classes
    done = {(run["seed"], run["size"], run["training"]) for run in runs}
    names = [name for name in rivals() if not options.only or name in options.only]
    wanted = [(0, "before"), *((size, name) for size in options.sizes for name in names)]
    for seed in range(options.seed, options.seed + options.rounds):
        missing = [(size, name) for size, name in wanted if (seed, size, name) not in done]
        if not missing:
            continue
        first = mlp(shape, classes, (128, 64), generator=generator(seed, "weights"))
        base = trained(Plain(), first, splits, seed, argparse.Namespace(steps=900, lr=2e-3))
        old = universal(base, splits, seed)
        for size, name in missing:
            chosen = torch.randperm(len(splits.train), generator=generator(seed, "records"))[: size or None]
            few = Splits(splits.train.select(chosen.sort().values), splits.test)
            start = time.process_time()
            model = trained(rivals()[name], base, few, seed, options) if size else base
            seconds = time.process_time() - start
            found = judged(model, splits, old, seed, options.points)
            runs.append({"training": name, "size": size, "seed": seed, **found, "train_seconds": seconds})
            harness.save(options, {"table": table(runs), "runs": runs})
    return runs


def table(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over rounds, the intervals of AutoAttack, and its difference to PGD-AT on the same records."""
    rows = []
    for size, name in dict.fromkeys((run["size"], run["training"]) for run in runs):
        own = {run["seed"]: run for run in runs if (run["size"], run["training"]) == (size, name)}
        columns = [key for key in next(iter(own.values())) if key not in ("training", "size", "seed")]
        row = {"training": name, "records": size, "rounds": len(own)}
        row |= {key: statistics.fmean(run[key] for run in own.values()) for key in columns}
        other = {r["seed"]: r["autoattack"] for r in runs if (r["size"], r["training"]) == (size, "PGD-AT 0.1")}
        gaps = [own[seed]["autoattack"] - other[seed] for seed in own if seed in other]
        row["interval"] = harness.interval([run["autoattack"] for run in own.values()])
        row["over PGD-AT"] = statistics.fmean(gaps) if gaps and name != "PGD-AT 0.1" else None
        row["interval over PGD-AT"] = harness.interval(gaps) if gaps and name != "PGD-AT 0.1" else None
        rows.append(row)
    return sorted(rows, key=lambda row: row["records"])


def main() -> None:
    parser = harness.arguments(__doc__ or "", rounds=3)
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[50, 200, 1442], help="training records of the second stage"
    )
    parser.add_argument("--only", nargs="*", help="rivals to train, by name; all of them if left out")
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps of the second stage")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--points", type=int, default=150, help="test records attacked one by one")
    options = parser.parse_args()
    harness.prepare(options)
    runs = measured(options)
    rows = table(runs)
    harness.show("digits", [{key: _short(value) for key, value in row.items()} for row in rows])
    harness.save(options, {"table": rows, "runs": runs})


def _short(value: Any) -> Any:
    return f"{value[0]:.1f} to {value[1]:.1f}" if isinstance(value, tuple) else value


if __name__ == "__main__":
    main()

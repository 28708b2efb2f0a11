"""WNLL on scikit-learn's digits: few labels, against softmax, the graph Laplacian and nearest neighbours; then attacks.

    python bench/wnll.py --threads 1 --out results/wnll.json

A perceptron of widths 128, 64, 64, 64 (the last two the buffer), trained with the first 100, 300 or 1000 labels in a
random order of the training part; all of these are templates. Accuracy in per cent of the 355 test records: of the
linear layer (softmax), of WNLL and of the graph Laplacian (GL) with each record answered by itself, of both with all
test records in one solve as in the paper; of a vote of the 15 nearest features, of scikit-learn's support vector
machine (RBF) and label spreading (15 neighbours, all test records together) on the same features; and of WNLL after the
paper's stage 2, five epochs on the buffer at its rate, 0.05, and at 0.002. 15 neighbours, the 8th for the scale.

Attacks: l_inf 0.1, PGD-20 with 5 restarts on the first 200 test records, with 1000 labels, naturally trained and under
PGD-7 training. Left of softmax under its own gradient; of WNLL under the surrogate gradient (the authors' attack), the
exact gradient, points made for the linear layer and for all templates voting softly; and under all four.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import harness
from trivet.audit import masking
from trivet.data.dataset import Batch, Dataset, Splits
from trivet.methods import build
from trivet.models.mlp import mlp
from trivet.models.wnll import WnllHead, require_head, squared_distances
from trivet.objectives.objective import Objective
from trivet.objectives.pgd_at import PgdAt
from trivet.objectives.plain import Plain
from trivet.randomness import generator
from trivet.threats.attack import misclassified
from trivet.threats.linf import Linf
from trivet.threats.pgd import PGD
from trivet.threats.wnll_pgd import RESTARTS, STEPS, wnll_battery
from trivet.training.fit import Fit
from trivet.training.folder import RunFolder
from trivet.training.optimizers import Adam, Sgd
from trivet.training.pipeline import run_stages
from trivet.training.stage import Stage
from trivet.training.wnll import Wnll, features

LABELS = (100, 300, 1000)
RATES = (0.05, 0.002)
HEADS = (
    "softmax",
    "WNLL",
    "GL",
    "WNLL together",
    "GL together",
    "15-NN",
    "SVM",
    "label spreading",
    *(f"stage 2, lr {rate}" for rate in RATES),
)


def through(stages: Sequence[tuple[str, Stage]], model: nn.Module, splits: Splits, seed: int) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder) / "run", "benchmark")
        return run_stages(stages, model, splits, run, seed=seed, device=torch.device("cpu")).model


def trained(splits: Splits, objective: Objective, epochs: int, seed: int) -> nn.Module:
    """The perceptron after `objective`, with a WNLL head whose templates are all training records."""
    model = mlp(splits.train.input_shape, 10, (128, 64, 64, 64), generator=generator(seed, "weights"))
    return through([("fit", Fit(objective, epochs, 32, optimizer=Adam(1e-3))), ("wnll", Wnll())], model, splits, seed)


def softmax(model: nn.Module) -> nn.Module:
    """The same network with its linear layer again."""
    plain: Any = copy.deepcopy(model)
    plain.logits = plain.logits.linear
    return plain


def accuracy(model: nn.Module, batch: Batch, **settings: Any) -> float:
    """In per cent, with other settings of the head."""
    other = copy.deepcopy(model)
    for name, value in settings.items():
        setattr(require_head(other), name, value)
    return 100 * float((~misclassified(other, batch.inputs, batch.labels)).double().mean())


def on_features(model: nn.Module, test: Dataset) -> dict[str, float]:
    """Other classifiers on the features that WNLL sees, in per cent."""
    from sklearn.semi_supervised import LabelSpreading
    from sklearn.svm import SVC

    head: WnllHead = require_head(model)
    known, labels, z = head.templates, head.targets.argmax(1), features(model, test)
    nearest = squared_distances(z, known).topk(15, largest=False).indices
    spreading = LabelSpreading(kernel="knn", n_neighbors=15)
    spreading.fit(torch.cat([known, z]).numpy(), torch.cat([labels, torch.full((len(z),), -1)]).numpy())
    answers = {
        "15-NN": head.targets[nearest].sum(1).argmax(1).numpy(),
        "SVM": SVC().fit(known.numpy(), labels.numpy()).predict(z.numpy()),
        "label spreading": spreading.transduction_[len(known) :],
    }
    return {name: 100 * float((said == test.labels.numpy()).mean()) for name, said in answers.items()}


def clean(splits: Splits, options: Any) -> list[dict[str, Any]]:
    runs = []
    batch = splits.test.batch(torch.arange(len(splits.test)))
    for labels in LABELS:
        for seed in range(options.seed, options.seed + options.rounds):
            start = time.process_time()
            part = fewer(splits, labels, seed)
            epochs = max(20, options.updates * 32 // labels)
            model = trained(part, Plain(), epochs, seed)
            found = {
                "softmax": accuracy(model, batch, through="linear"),
                "WNLL": accuracy(model, batch),
                "GL": accuracy(model, batch, weighted=False),
                "WNLL together": accuracy(model, batch, together=True),
                "GL together": accuracy(model, batch, together=True, weighted=False),
                **on_features(model, splits.test),
            }
            for rate in RATES:
                second = Wnll(epochs=5, batch_size=100, buffer=("fc3", "fc4"), optimizer=Sgd(lr=rate))
                moved = through([("wnll", second)], softmax(model), part, seed)
                found[f"stage 2, lr {rate}"] = accuracy(moved, batch)
            runs.append({"labels": labels, "seed": seed, **found, "seconds": time.process_time() - start})
            print(runs[-1], flush=True)
    return runs


def attacked(splits: Splits, options: Any) -> list[dict[str, Any]]:
    """Per cent left of the first test records, by the training of the features."""
    threat, part, rows = Linf(options.eps), fewer(splits, LABELS[-1], options.seed), []
    batch = splits.test.batch(torch.arange(options.points))
    for training, objective in (("natural", Plain()), ("PGD-7", PgdAt(threat, 7, eps_ramp=0.3))):
        start = time.process_time()
        model = trained(part, objective, options.robust_epochs, options.seed)
        plain = softmax(model)
        own = PGD(threat, STEPS, restarts=RESTARTS).run(plain, batch.inputs, batch.labels)
        left = {
            f"WNLL, {vars(attack)['through']}": ~attack.run(model, batch.inputs, batch.labels).broken
            for attack in wnll_battery(model, threat)
        }
        hits = {
            "softmax, clean": ~misclassified(plain, batch.inputs, batch.labels),
            "softmax, PGD": ~own.broken,
            "WNLL, clean": ~misclassified(model, batch.inputs, batch.labels),
            **left,
            "WNLL, worst case": torch.stack(list(left.values())).all(0),
        }
        flags = masking.of_transfers(
            {name: left[f"WNLL, {name}"] for name in ("exact", "surrogate")},
            {name: left[f"WNLL, {name}"] for name in ("linear", "soft")},
        )
        row = {"training": training} | {name: 100 * float(each.double().mean()) for name, each in hits.items()}
        rows.append({**row, "masked": flags[0].raised, "seconds": time.process_time() - start})
        print(rows[-1], flush=True)
    return rows


def fewer(splits: Splits, labels: int, seed: int) -> Splits:
    """The first `labels` training records of a random order."""
    order = torch.randperm(len(splits.train), generator=generator(seed, "labels"))
    return Splits(splits.train.select(order[:labels]), splits.test)


def summary(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, and by how much WNLL and GL are over softmax, with Student's interval."""
    table = []
    for labels in LABELS:
        own = [run for run in runs if run["labels"] == labels]
        row: dict[str, Any] = {"labels": labels, "seeds": len(own)}
        row |= {name: statistics.fmean(run[name] for run in own) for name in HEADS}
        for name in ("WNLL", "GL"):
            gaps = [run[name] - run["softmax"] for run in own]
            row |= {f"{name} over softmax": statistics.fmean(gaps), f"{name}, interval": harness.interval(gaps)}
        table.append(row)
    return table


def main() -> None:
    parser = harness.arguments(__doc__ or "", rounds=3)
    parser.add_argument("--updates", type=int, default=800, help="steps of training in all")
    parser.add_argument("--robust-epochs", type=int, default=30)
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--points", type=int, default=200)
    options = parser.parse_args()
    harness.prepare(options)
    splits: Splits = build("data", "digits", expects=Splits)
    runs = clean(splits, options)
    table = summary(runs)
    harness.save(options, {"clean": table, "runs": runs})
    rows = attacked(splits, options)
    shown = [{key: value for key, value in row.items() if "interval" not in key} for row in table]
    harness.show("Accuracy on the test records, per cent", shown)
    harness.show(f"Left under l_inf {options.eps:g}, per cent of {options.points} test records", rows)
    harness.save(options, {"clean": table, "attacked": rows, "runs": runs})


if __name__ == "__main__":
    main()

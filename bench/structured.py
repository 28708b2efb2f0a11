"""What the benchmarks of SmartDeal and of memristor crossbars share: networks, training, attacks, rows and tables.

One small CNN, trained naturally and with PGD-7; every row goes on from there, and seeds pair the rows.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import harness
from trivet.compression.masks import Masks
from trivet.compression.projection import Projection
from trivet.compression.structure import finish
from trivet.data.dataset import Splits
from trivet.methods import build
from trivet.randomness import generator
from trivet.threats.attack import Attack
from trivet.threats.linf import Linf
from trivet.threats.logit_scaled import LogitScaledPGD
from trivet.threats.pgd import PGD
from trivet.training.folder import RunFolder
from trivet.training.pipeline import advance
from trivet.training.stage import Checkpoint, Stage

DEFAULTS = {
    "digits": {"train": 1442, "epochs": 25, "more": 10, "natural": 1, "points": 355, "attacked": 355},
    "mnist": {"train": 6000, "epochs": 4, "more": 2, "natural": 4, "points": 2000, "attacked": 200},
}
SETTINGS = ("data", "train", "epochs", "more", "natural", "points", "attacked", "eps", "lr")
TRAININGS = ("natural", "PGD-7")
REFERENCE = "float, trained on"
Named = tuple[str, Stage]


def options_of(description: str) -> argparse.Namespace:
    parser = harness.arguments(description, rounds=1)
    parser.add_argument("--data", choices=sorted(DEFAULTS), default="digits")
    for name in ("train", "epochs", "more", "natural", "points", "attacked"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=2e-3)
    options = parser.parse_args()
    for name, value in DEFAULTS[options.data].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    harness.prepare(options)
    return options


def more_of(training: str, options: Any) -> int:
    """Epochs of one turn after the first training. Naturally, which is cheap, there are --natural times as many."""
    return int(options.more * (options.natural if training == "natural" else 1))


def fit(training: str, options: Any, epochs: int, *, first: bool = False, lr: float = 1.0, **more: Any) -> Named:
    """A stage of training; `lr` is a share of the rate of the first."""
    objective: dict[str, Any] = {"name": "plain"}
    if training != "natural":
        objective = {"name": "pgd_at", "steps": 7, "eps_ramp": 0.3 if first else 0.0}
    adam = {"name": "adam", "lr": lr * options.lr}
    spec = {"name": "fit", "objective": objective, "epochs": epochs, "batch_size": 64, "optimizer": adam, **more}
    return "fit", build("training", spec, threat=Linf(options.eps))


def prune(density: float, pattern: Mapping[str, Any], exclude: Sequence[str]) -> Named:
    """The stage that drops what has the least l2 norm."""
    pruner = {"name": "magnitude", "power": 2}
    spec = {"name": "prune", "pruner": pruner, "density": density, "pattern": pattern, "exclude": exclude}
    return "prune", build("training", spec, threat=Linf(1.0))


def chained(model: nn.Module, stages: Sequence[Named], splits: Splits, seed: int) -> Iterator[Checkpoint]:
    """The checkpoint after each of the stages, compressed weights as they are."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder) / "run", "benchmark")
        for count in range(1, len(stages) + 1):
            start = Checkpoint(copy.deepcopy(model))
            yield advance(stages[:count], start, splits, run, seed=seed, device=torch.device("cpu"))


def finished(checkpoint: Checkpoint) -> nn.Module:
    """A copy of the network with plain weights, but for factors."""
    model = copy.deepcopy(checkpoint.model)
    finish(model, checkpoint.structure)
    return model.eval()


def rounded(model: nn.Module, projection: Projection) -> nn.Module:
    """A copy whose weights are projected, and not trained."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in Masks().layers(twin).values():
            weight: Any = layer.weight
            weight.copy_(projection.project(weight))
    return twin


def percent(hits: Tensor) -> float:
    return 100 * float(hits.double().mean())


class Judge:
    """Per cent of the first test records: right; left by PGD-20, 2 restarts; by it and PGD-20 on scaled logits.

    What is left is of the first `attacked` of them.
    """

    def __init__(self, splits: Splits, options: Any, training: str, seed: int) -> None:
        self.batch, self.threat = splits.test.batch(torch.arange(options.points)), Linf(options.eps)
        self.attacked, self.seed = options.attacked if training != "natural" else 0, seed

    def __call__(self, model: nn.Module) -> dict[str, float]:
        found = {"clean": self.right(model)}
        if self.attacked:
            left = self._left(model, PGD(self.threat, 20, restarts=2), self.attacked)
            scaled = LogitScaledPGD(self.threat, 20, temperatures=(0.1, 1.0, 10.0))
            found |= {"pgd": percent(left), "worst": percent(left & self._left(model, scaled, self.attacked))}
        return found

    @torch.no_grad()
    def right(self, model: nn.Module) -> float:
        return percent(model(self.batch.inputs).argmax(1) == self.batch.labels)

    def quickly(self, model: nn.Module) -> float:
        """Left by PGD-10, of the first 100."""
        return percent(self._left(model, PGD(self.threat, 10), 100))

    def _left(self, model: nn.Module, attack: Attack, count: int) -> Tensor:
        few = self.batch.select(slice(count))
        draw = generator(self.seed, type(attack).__name__)
        return ~attack.run(model, few.inputs, few.labels, generator=draw).broken


class Rows:
    """Rows as they are made, saved each time; the networks they start from, each trained once."""

    def __init__(self, options: Any, splits: Splits, published: Any, figures: Sequence[str]) -> None:
        self.options, self.splits, self.published, self.figures = options, splits, published, figures
        self.runs = harness.earlier(options, SETTINGS, "runs")
        self.floats: dict[tuple[str, int], nn.Module] = {}

    def start(self, training: str, seed: int) -> nn.Module:
        """A copy of the float network."""
        if (training, seed) not in self.floats:
            shape, classes, draw = (
                (*self.splits.train.input_shape,),
                self.splits.train.num_classes,
                generator(seed, "weights"),
            )
            fresh = build("models", "small_cnn", input_shape=shape, num_classes=classes, generator=draw)
            times = self.options.natural if training == "natural" else 1
            stage = fit(training, self.options, times * self.options.epochs, first=True)
            (checkpoint,) = chained(fresh, [stage], self.splits, seed)
            self.floats[training, seed] = finished(checkpoint)
        return copy.deepcopy(self.floats[training, seed])

    def lacks(self, row: str, training: str, seed: int) -> bool:
        return all((run["row"], run["training"], run["seed"]) != (row, training, seed) for run in self.runs)

    def add(self, row: str, training: str, seed: int, found: Mapping[str, Any]) -> None:
        self.runs.append({"row": row, "training": training, "seed": seed, **found})
        print(self.runs[-1], flush=True)
        self.save()

    def save(self) -> None:
        table = summary(self.runs)
        headlines = {
            f"{figure}, {training}": best(table, figure, training) for figure in self.figures for training in TRAININGS
        }
        harness.save(
            self.options, {"published": self.published, "headlines": headlines, "table": table, "runs": self.runs}
        )

    def show(self, columns: Sequence[str]) -> None:
        for training in TRAININGS:
            rows = [row for row in summary(self.runs) if row["training"] == training]
            shown = ("row", "clean", "pgd", "worst", "clean lost", "worst lost", *columns)
            harness.show(training, [{name: row.get(name) for name in shown} for row in rows])


def summary(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, and what is lost beside the float network that was trained as long."""
    table = []
    for row, training in dict.fromkeys((run["row"], run["training"]) for run in runs):
        own = [run for run in runs if (run["row"], run["training"]) == (row, training)]
        base = {run["seed"]: run for run in runs if (run["row"], run["training"]) == (REFERENCE, training)}
        mean: dict[str, Any] = {"row": row, "training": training, "seeds": len(own)}
        for name, value in own[0].items():
            if isinstance(value, (int, float)) and name != "seed":
                mean[name] = statistics.fmean(run[name] for run in own)
        for name in ("clean", "worst"):
            lost = [base[run["seed"]][name] - run[name] for run in own if run["seed"] in base and name in run]
            mean[f"{name} lost"] = statistics.fmean(lost) if lost else None
            mean[f"{name} lost, interval"] = harness.interval(lost) if lost else None
        table.append(mean)
    return table


def best(table: Sequence[Mapping[str, Any]], figure: str, training: str) -> dict[str, str]:
    """By kind of row (its name up to a comma), the one with most of a figure that loses at most a point.

    A point of clean accuracy, and where attacked one of what is left as well.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for row in table:
        enough = row["training"] == training and figure in row and row["clean lost"] is not None
        if enough and row["clean lost"] <= 1 and (row["worst lost"] or 0.0) <= 1:
            kind = row["row"].split(",")[0]
            if kind not in found or row[figure] > found[kind][figure]:
                found[kind] = row
    return {kind: f"{row['row']}: {row[figure]:.4g}" for kind, row in found.items()}


def trained_on(
    rows: Rows, training: str, seed: int, epochs: int, measure: Callable[[nn.Module], Mapping[str, Any]]
) -> None:
    """The reference: the float network, trained on for as many epochs as the others."""
    if rows.lacks(REFERENCE, training, seed):
        stage = fit(training, rows.options, epochs, lr=0.25)
        (checkpoint,) = chained(rows.start(training, seed), [stage], rows.splits, seed + 1)
        model = finished(checkpoint)
        rows.add(
            REFERENCE, training, seed, {**Judge(rows.splits, rows.options, training, seed)(model), **measure(model)}
        )

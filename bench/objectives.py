"""The baseline table: any training objectives under equal conditions, judged by AutoAttack and by each other's attacks.

    python bench/objectives.py --threads 1 --out results/objectives-digits.json
    python bench/objectives.py --data mnist --train 10000 --threads 1 --out results/objectives-mnist.json
    python bench/objectives.py --rows plain pgd_at "{name: trades, beta: 1}" alp --rounds 5 --out …
    python bench/objectives.py --threat "{name: union, threats: [{name: linf, eps: 0.1}, {name: l2, eps: 0.5}]}" --out …

A round is a seed: of first weights, order of records and attacks; in a round all rows have the same ones. Network,
records, threat, optimizer, schedule and batches are the same for all, settings of objectives are their defaults unless
a row says otherwise, and no checkpoint is chosen by test records. Equal are the optimiser steps, or, with `--equal
work`, the floating point operations of training: a row gets as many epochs as PGD-AT would fill with its own. A
method that replays its batches gets fewer epochs. `after: plain` in a row is for methods that retrain.

Of the first `points` test records: clean, FGSM and PGD-40 (cross-entropy); then AutoAttack (standard) against the
threat, or each member of a union, of which the worst case counts; and transfer, what is left after the PGD-40 points
made on every other row's network of that round. Means over rounds with Student's 95 % interval, also of the
difference to PGD-AT and TRADES round by round; the test records are the same in all, so the intervals speak of
training, and not of other records.

Flags: "one step" (FGSM leaves less than PGD), "square" (Square breaks more than 0.2 % of the records after the gradient
attacks), "transfer" (transferred points leave less than AutoAttack), where less is by more than 0.5 points and two
records. Each means that gradients are likely to be masked, and the accuracy left is no measure.

A row's seed that is in --out already, from the same settings, is not made again; a training that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import harness
from trivet.data.dataset import Batch, Splits
from trivet.methods import build, methods
from trivet.models.modes import evaluating
from trivet.models.surrogate import surrogate
from trivet.objectives.objective import Objective, Progress
from trivet.randomness import generator
from trivet.threats.attack import Target, misclassified
from trivet.threats.autoattack import AutoAttack
from trivet.threats.pgd import PGD, fgsm
from trivet.threats.threat import ThreatModel
from trivet.training.fit import Fit
from trivet.training.folder import RunFolder
from trivet.training.optimizers import Adam
from trivet.training.pipeline import run_stages

DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"train": 1442, "epochs": 40, "batch_size": 64, "lr": 2e-3, "eps": 0.1, "points": 355},
    "mnist": {"train": 10_000, "epochs": 20, "batch_size": 100, "lr": 2e-3, "eps": 0.3, "points": 500},
}
ROWS: list[Any] = [
    "plain",
    "pgd_at",
    "trades",
    "mart",
    {"name": "awp", "objective": "pgd_at", "gamma": 0.01},
    "alp",
    "fast_at",
    {"name": "free_at", "replays": 4},
    "stable_ig",
    "j_sigr",
    {"name": "ladder", "svm": "linear", "normal": "unit", "eps_max": 8, "eps_step": 0.1, "refresh": 4},
    "atfs",
    {"name": "rat", "threat": {"name": "linf", "eps": 0.3}},
    {"name": "entropic_retraining", "after": "plain"},
    {"name": "mistake_severity", "hierarchy": "digits_hierarchy"},
]
AGAINST_UNIONS = ["max_at", "avg_at", "msd_at"]
REFERENCES = ("pgd_at", "trades")
SETTINGS = (*DEFAULTS["digits"], "data", "network", "threat", "eps_ramp", "equal")
"""What must be the same for a row to be taken from an earlier run."""


@dataclass(frozen=True)
class Row:
    """An objective as the table names it.

    Attributes:
        title: its name and the settings that differ from its own.
        spec: what `trivet.methods.build` makes it of.
        after: for a method that retrains: the objective of the first two thirds of the epochs; the last third then
            has a tenth of the learning rate.
    """

    title: str
    spec: Mapping[str, Any]
    after: str | None = None

    @classmethod
    def read(cls, given: Any) -> Row:
        """From a name, a mapping with `name` and settings, or either as text in YAML."""
        found = yaml.safe_load(given) if isinstance(given, str) else given
        spec = {"name": found} if isinstance(found, str) else dict(found)
        settings = [f"{key} {_short(value)}" for key, value in spec.items() if key != "name"]
        after = spec.pop("after", None)
        return cls(", ".join([spec["name"], *settings]), spec, after)

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9.]+", "-", self.title.lower()).strip("-")

    def objective(self, options: argparse.Namespace) -> Objective:
        """Built anew; one that knows no unions is given the first member."""
        threat: ThreatModel = build("threats", options.threat, expects=ThreatModel)
        if self.spec["name"] not in AGAINST_UNIONS:
            threat = threat.members[0]
        made: Objective = build("objectives", self.spec, threat=threat, eps_ramp=options.eps_ramp)
        return made

    def stages(self, options: argparse.Namespace, epochs: int) -> list[tuple[str, Fit]]:
        if self.after is None:
            return [("fit", Fit(self.objective(options), epochs, options.batch_size, optimizer=Adam(options.lr)))]
        last = max(1, round(epochs / 3))
        before = Row.read(self.after).stages(options, max(1, epochs - last))
        retrain = Fit(self.objective(options), last, options.batch_size, optimizer=Adam(options.lr / 10))
        return [*before, ("retrain", retrain)]


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(
            [str(value["name"]), *(f"{key} {_short(each)}" for key, each in value.items() if key != "name")]
        )
    return str(value)


class Work(TorchDispatchMode):
    """Counts the floating point operations of products and convolutions, forward and backward, whoever makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def network(options: argparse.Namespace, splits: Splits, seed: int) -> nn.Module:
    shape, classes = splits.train.input_shape, splits.train.num_classes
    made: nn.Module = build(
        "models", options.network, input_shape=shape, num_classes=classes, generator=generator(seed, "weights")
    )
    return made


def work(row: Row, options: argparse.Namespace, splits: Splits) -> int:
    """Floating point operations of one optimiser step in the middle of training.

    The second step is counted: searches that a method makes once in a while are over by then.
    """
    model, objective = network(options, splits, options.seed).train(), row.objective(options)
    batch = splits.train.batch(torch.arange(min(options.batch_size, len(splits.train))))
    for step in (500, 501):
        with Work() as counted:
            objective(
                model, batch, Progress(step, 1000, options.epochs / 2, options.seed)
            ).per_example.mean().backward()
    return counted.total


def epochs_of(row: Row, options: argparse.Namespace, splits: Splits) -> int:
    epochs = options.epochs / row.objective(options).replays
    if options.equal == "work":
        epochs *= work(Row.read("pgd_at"), options, splits) / work(row, options, splits)
    return max(1, round(epochs))


def trained(row: Row, options: argparse.Namespace, splits: Splits, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a row and seed, taken up from its folder if it is there, and what its training cost."""
    path = options.folder / f"{row.slug}-{seed}"
    run = RunFolder(path) if path.exists() else RunFolder.create(path, json.dumps(dict(row.spec)))
    epochs = epochs_of(row, options, splits)
    stages, first = row.stages(options, epochs), network(options, splits, seed)
    start = time.process_time()
    model = run_stages(stages, first, splits, run, seed=seed, device=torch.device("cpu")).model
    return model.eval(), {"epochs": epochs, "train_seconds": time.process_time() - start}


def judged(model: nn.Module, batch: Batch, threat: ThreatModel, seed: int) -> dict[str, Any]:
    """Percentages left by each attack; of a union, by the worst of its members."""
    x, y = batch.inputs, batch.labels
    right = ~misclassified(model, x, y)
    left = {name: right.clone() for name in ("fgsm", "pgd", "autoattack")}
    members, gain = {}, 0.0
    for number, member in enumerate(threat.members):
        for name, attack in (("fgsm", fgsm(member)), ("pgd", PGD(member, steps=40))):
            draw = generator(seed, name, number)
            left[name] &= ~attack.run(model, x, y, generator=draw).broken
        detail = AutoAttack(member).run_detailed(model, x, y, generator=generator(seed, "autoattack", number))
        left["autoattack"] &= ~detail.broken
        members[f"{member.norm} {member.eps:g}"] = {
            name: 100 * count / len(y) for name, count in detail.standing.items()
        }
        gain = max(gain, 100 * detail.square_gain)
    share = {name: _percent(each) for name, each in {"clean": right, **left}.items()}
    return {**share, "components": members, "square_gain": gain}


def transferable(model: nn.Module, batch: Batch, threat: ThreatModel, seed: int) -> list[Tensor]:
    """Where PGD-40 on this network ends, for every record and each member of the threat."""
    with evaluating(model):
        target = Target(surrogate(model, "fp32"), model, len(batch))
        return [
            PGD(member, steps=40).search(target, batch.inputs, batch.labels, generator(seed, "transfer", number))
            for number, member in enumerate(threat.members)
        ]


def transfers(rows: Sequence[Row], options: argparse.Namespace, splits: Splits, seed: int) -> dict[str, Any]:
    """By target: the percentage left after the points of each other row, and after all of them."""
    batch = splits.test.batch(torch.arange(options.points))
    threat: ThreatModel = build("threats", options.threat, expects=ThreatModel)
    models = {row.title: trained(row, options, splits, seed)[0] for row in rows}
    points = {title: transferable(model, batch, threat, seed) for title, model in models.items()}
    found: dict[str, Any] = {}
    for title, model in models.items():
        right = ~misclassified(model, batch.inputs, batch.labels)
        left = {
            source: torch.stack([right, *(~misclassified(model, each, batch.labels) for each in made)]).all(0)
            for source, made in points.items()
            if source != title
        }
        if left:
            worst = torch.stack(list(left.values())).all(0)
            found[title] = {"all": _percent(worst), "by_source": {name: _percent(each) for name, each in left.items()}}
    return found


def _percent(hits: Tensor) -> float:
    return 100 * float(hits.double().mean())


def measured(options: argparse.Namespace, rows: Sequence[Row], splits: Splits) -> dict[str, Any]:
    """Rows by seed, one after the other, each saved when it is done; then the transfers among them."""
    runs, threat = harness.earlier(options, SETTINGS, "runs"), build("threats", options.threat, expects=ThreatModel)
    batch = splits.test.batch(torch.arange(options.points))
    for seed in range(options.seed, options.seed + options.rounds):
        for row in rows:
            if any(run["row"] == row.title and run["seed"] == seed for run in runs):
                continue
            model, cost = trained(row, options, splits, seed)
            start = time.process_time()
            found = judged(model, batch, threat, seed)
            cost["attack_seconds"] = time.process_time() - start
            runs.append({"row": row.title, "seed": seed, "spec": dict(row.spec), **found, **cost})
            print(
                f"{row.title}, seed {seed}: {found['clean']:.2f} clean, {found['autoattack']:.2f} left, {cost}",
                flush=True,
            )
            harness.save(options, {"runs": runs})
    seeds = range(options.seed, options.seed + options.rounds)
    moved = {} if options.skip_transfer else {seed: transfers(rows, options, splits, seed) for seed in seeds}
    base = work(Row.read("plain"), options, splits)
    counted = {row.title: work(row, options, splits) / base for row in rows}
    slack = max(0.5, 200 / options.points)
    table = [summary(row.title, runs, moved, counted[row.title], slack) for row in rows]
    return {"table": table, "transfers": moved, "runs": runs}


def summary(
    title: str, runs: Sequence[Mapping[str, Any]], moved: Mapping[int, Any], counted: float, slack: float
) -> dict[str, Any]:
    """The table's row: means over seeds, intervals, differences to the references in the same rounds, flags."""
    own = {run["seed"]: run for run in runs if run["row"] == title}
    transfer = {seed: moved[seed][title]["all"] for seed in own if title in moved.get(seed, {})}
    row: dict[str, Any] = {"row": title, "seeds": len(own)}
    for name in ("clean", "fgsm", "pgd", "autoattack"):
        row[name] = statistics.fmean(run[name] for run in own.values())
    row["interval"] = harness.interval([run["autoattack"] for run in own.values()])
    for reference in REFERENCES:
        other = {run["seed"]: run["autoattack"] for run in runs if run["row"] == reference}
        gaps = [own[seed]["autoattack"] - other[seed] for seed in own if seed in other]
        shown = gaps and title != reference
        row[f"over {reference}"] = statistics.fmean(gaps) if shown else None
        row[f"interval over {reference}"] = harness.interval(gaps) if shown else None
    row["transfer"] = statistics.fmean(transfer.values()) if transfer else None
    row["work"] = counted
    row["epochs"] = next(iter(own.values()))["epochs"]
    row["train_seconds"] = statistics.median(run["train_seconds"] for run in own.values())
    flags = {
        "one step": any(run["fgsm"] < run["pgd"] - slack for run in own.values()),
        "square": any(run["square_gain"] > 0.2 for run in own.values()),
        "transfer": any(left < own[seed]["autoattack"] - slack for seed, left in transfer.items()),
    }
    row["flags"] = ", ".join(name for name, raised in flags.items() if raised)
    return row


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as people read it: intervals beside their means."""
    cells = {name: value for name, value in row.items() if not name.startswith("interval")}
    for name, value in (
        ("autoattack", "interval"),
        *((f"over {each}", f"interval over {each}") for each in REFERENCES),
    ):
        bounds = row[value]
        if bounds is not None:
            cells[name] = f"{row[name]:.2f} [{bounds[0]:.2f}, {bounds[1]:.2f}]"
    return cells


def main() -> None:
    parser = harness.arguments(__doc__ or "", rounds=3)
    parser.add_argument("--data", choices=DEFAULTS, default="digits")
    parser.add_argument("--rows", nargs="+", default=None, help="objectives: names, or {name: …, setting: …} in YAML")
    parser.add_argument("--network", default="small_cnn")
    parser.add_argument("--threat", help="in YAML; an l_inf ball of radius --eps if left out")
    parser.add_argument("--equal", choices=("steps", "work"), default="steps")
    parser.add_argument("--eps-ramp", type=float, default=0.0, help="for the objectives that have this setting")
    parser.add_argument("--folder", type=Path, default=None, help="of the networks; runs/objectives-… if left out")
    parser.add_argument("--skip-transfer", action="store_true")
    for name, value in DEFAULTS["digits"].items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), help="by --data if left out")
    options = parser.parse_args()
    for name, value in DEFAULTS[options.data].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.threat = yaml.safe_load(options.threat or f"{{name: linf, eps: {options.eps}}}")
    options.folder = options.folder or Path("runs") / (
        options.out.stem if options.out else f"objectives-{options.data}"
    )
    harness.prepare(options)
    known = {each.name for each in methods("objectives")}
    many = len(build("threats", options.threat, expects=ThreatModel).members) > 1
    rows = [Row.read(each) for each in options.rows or [*ROWS, *(AGAINST_UNIONS if many else [])]]
    unknown = [row.title for row in rows if row.spec["name"] not in known]
    if unknown:
        raise SystemExit(f"no objectives of these names: {', '.join(unknown)}; known: {', '.join(sorted(known))}.")
    splits: Splits = build("data", options.data).limited(train=options.train)
    found = measured(options, rows, splits)
    title = f"{options.data}, {options.train} records, {options.network}, {options.threat}, {options.points} points"
    harness.show(title, [shown(row) for row in found["table"]])
    harness.save(options, found)


if __name__ == "__main__":
    main()

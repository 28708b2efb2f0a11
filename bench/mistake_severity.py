"""How severe the mistakes are that training leaves: targets by a class hierarchy against plain, PGD-AT and TRADES.

    python bench/mistake_severity.py --threads 1 --out results/mistake-severity.json
    python bench/mistake_severity.py --data mnist --rounds 1 --threads 1 --out results/mistake-severity-mnist.json

The claim (Abreu, Vaska & Helus 2022): targeted adversarial training with targets from semantic knowledge leaves milder
mistakes than standard and adversarially trained models.

Every model of a round: the same first weights and order of records, batches of 64, Adam at 2e-3. digits: perceptron
128-64, 40 epochs, all 355 test records. mnist: perceptron 256-128, the first 5,000 training records, 10 epochs, the
first 300 test records. Threat: l_inf 0.1; inside training 10 PGD steps of 0.025. Tree: `digits_hierarchy`.
`soft labels` is Bertinetto et al.'s baseline without attacks, beta 10.

Conditions: without attack; with Gaussian noise of 0.1, clipped to [0, 1]; PGD-20 on the cross-entropy; AutoAttack
(standard; of each record the first component that succeeded counts); PGD towards the farthest classes, which says how
severe a mistake can be forced; PGD towards the nearest. A record that is wrong without attack keeps that answer. Of
each condition: error, severity (mean of D over mistakes), hdist (mean of D over all records), and `worst`, the share
of records with a mistake of the greatest D. Intervals are Student's at 95 % over rounds (none for a single one), each
round being a seed of weights and order; `against` holds paired differences over rounds. The test records are the same
in all rounds, so the intervals do not cover the choice of records.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import harness
from trivet.audit.severity import mistakes
from trivet.data.dataset import Splits
from trivet.data.digits import digits
from trivet.data.hierarchy import digits_hierarchy
from trivet.data.mnist import mnist
from trivet.models.mlp import mlp
from trivet.objectives.mistake_severity import MistakeSeverity
from trivet.objectives.objective import Objective
from trivet.objectives.pgd_at import PgdAt
from trivet.objectives.plain import Plain
from trivet.objectives.soft_labels import SoftLabels
from trivet.objectives.trades import Trades
from trivet.randomness import generator
from trivet.threats.attack import Attack
from trivet.threats.autoattack import AutoAttack
from trivet.threats.hierarchy_pgd import HierarchyPGD
from trivet.threats.linf import Linf
from trivet.threats.pgd import PGD
from trivet.training.fit import Fit
from trivet.training.folder import RunFolder
from trivet.training.optimizers import Adam
from trivet.training.pipeline import run_stages

THREAT, TREE = Linf(0.1), digits_hierarchy()
RIVALS: dict[str, Objective] = {
    "plain": Plain(),
    "soft labels": SoftLabels(TREE),
    "PGD-AT": PgdAt(THREAT),
    "TRADES 6": Trades(THREAT),
    "dissimilar": MistakeSeverity(THREAT, hierarchy=TREE),
    "similar": MistakeSeverity(THREAT, policy="similar", hierarchy=TREE),
    "any": MistakeSeverity(THREAT, policy="any", hierarchy=TREE),
}
ATTACKS: dict[str, Attack] = {
    "PGD-20": PGD(THREAT, 20),
    "AutoAttack": AutoAttack(THREAT),
    "towards dissimilar": HierarchyPGD(THREAT, hierarchy=TREE),
    "towards similar": HierarchyPGD(THREAT, hierarchy=TREE, towards="similar"),
}
MEASURES = ("error", "severity", "hdist", "worst")


@dataclass(frozen=True)
class Task:
    """Records, and the network and length of training for them."""

    splits: Splits
    hidden: tuple[int, ...]
    epochs: int


def trained(task: Task, rival: str, seed: int) -> nn.Module:
    shape, classes = task.splits.train.input_shape, task.splits.train.num_classes
    net = mlp(shape, classes, task.hidden, generator=generator(seed, "weights"))
    fit = Fit(RIVALS[rival], task.epochs, 64, optimizer=Adam(2e-3))
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder) / "run", "{}")
        model = run_stages([("fit", fit)], net, task.splits, run, seed=seed, device=torch.device("cpu")).model
    return model.eval()


@torch.no_grad()
def answers(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).argmax(1)


def conditions(model: nn.Module, task: Task, seed: int) -> dict[str, dict[str, float | None]]:
    """The measures under each condition."""
    batch = task.splits.test.batch(torch.arange(len(task.splits.test)))
    x, y = batch.inputs, batch.labels
    noise = torch.empty_like(x).normal_(generator=generator(seed, "noise"))
    said = {"clean": answers(model, x), "noise": answers(model, (x + 0.1 * noise).clamp(0, 1))}
    for name, attack in ATTACKS.items():
        found = attack.run(model, x, y, generator=generator(seed, "attack", name), batch_size=512)
        said[name] = answers(model, found.x_adv)
    return {name: _measures(each, y) for name, each in said.items()}


def _measures(said: Tensor, labels: Tensor) -> dict[str, float | None]:
    made = mistakes("", said, labels, TREE, 0.95)
    worst = made.by_height[-1] / len(labels)
    return {"error": made.error.value, "severity": made.severity, "hdist": made.hdist, "worst": worst}


def spread(values: Sequence[float | None]) -> dict[str, float | None] | None:
    """Mean and 95 % interval over rounds, None for one round; None altogether where a round has no such number."""
    from scipy.stats import t

    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return None
    mean, count = statistics.fmean(numbers), len(numbers)
    if count == 1:
        return {"mean": mean, "low": None, "high": None}
    half = float(t.ppf(0.975, count - 1)) * statistics.stdev(numbers) / math.sqrt(count)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def summary(rounds: dict[str, list[dict[str, dict[str, float | None]]]]) -> list[dict[str, Any]]:
    """A row for each rival and condition."""
    rows = []
    for rival, own in rounds.items():
        for condition in own[0]:
            measured = {name: spread([each[condition][name] for each in own]) for name in MEASURES}
            against = {
                base: {name: spread(_differences(own, rounds[base], condition, name)) for name in MEASURES}
                for base in ("plain", "PGD-AT", "TRADES 6")
                if base != rival
            }
            rows.append({"training": rival, "condition": condition, **measured, "against": against})
    return rows


def _differences(own: Sequence[Any], base: Sequence[Any], condition: str, name: str) -> list[float | None]:
    pairs = [(mine[condition][name], theirs[condition][name]) for mine, theirs in zip(own, base, strict=True)]
    return [None if mine is None or theirs is None else mine - theirs for mine, theirs in pairs]


def main() -> None:
    parser = harness.arguments(__doc__ or "", rounds=4)
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    options = parser.parse_args()
    harness.prepare(options)
    task = Task(digits(), (128, 64), 40)
    if options.data == "mnist":
        task = Task(mnist().limited(5000, 300), (256, 128), 10)
    rounds: dict[str, list[dict[str, dict[str, float | None]]]] = {rival: [] for rival in RIVALS}
    for seed in range(options.seed, options.seed + options.rounds):
        for rival in RIVALS:
            began = time.perf_counter()
            rounds[rival].append(conditions(trained(task, rival, seed), task, seed))
            print(f"round {seed}, {rival}: {time.perf_counter() - began:.0f} s", flush=True)
        rows = summary(rounds)
        harness.save(options, {"chance": TREE.chance, "rows": rows, "rounds": rounds})
    table = [
        {"training": row["training"], "condition": row["condition"]}
        | {measure: row[measure] and row[measure]["mean"] for measure in MEASURES}
        for row in rows
    ]
    harness.show(task.splits.test.name, table)


if __name__ == "__main__":
    main()

"""Adversarial winning tickets: which sparse start adversarial training does best from.

    python bench/awt.py --threads 1 --out results/awt.json
    python bench/awt.py --threads 1 --data mnist --out results/awt-mnist.json

scikit-learn's digits, or the first 6000 records of MNIST and the first 1000 for tests. A perceptron of hidden layers
256 and 128 (He initialisation), l_inf radius --eps, and for every row the same records, batches,
optimizer and epochs of PGD-5 adversarial training with the mask held; a row is a start at a density with a seed, and
seeds pair the rows: first weights, order of records and attacks' draws are shared.

    dense               no mask
    random, magnitude   of the first weights, the same share of each layer
    SNIP, GraSP         on the adversarial loss, global; SynFlow reads no record, global
    AWT                 the mask and weights that 1500 steps of transfer find from the first weights
    NTT                 the same with nothing attacked: the clean kernel
    AWT mask, theta0    that mask on the first weights
    AWT mask, fresh     that mask on weights of another draw
    AWT shuffled        mask and weights of AWT at random places of their layer

Transfer is training, too, so that AWT and NTT see more gradients than the others. `transfer_seconds` is what it took.

Figures are in percent of test points: clean, PGD-20 with the cross-entropy and the margin on all of them, AutoAttack
on the first --attacked. Distances are of mean squares, on 32 training records and what PGD finds for them on the dense
network at the start: of the mixed kernel relative to the dense network's at the same epoch (`kernel_apart`), of the
outputs relative to the dense network's (`outputs_apart`), and of the kernel relative to its own at the start
(`kernel_drift`), after the epochs named. A start that leaves a layer empty has no figures, and says so. A row that is
in --out already, from the same settings, is not made again. Nothing was tuned; intervals are Student's.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import harness
from trivet.data.dataset import Batch, Splits
from trivet.errors import TrivetError
from trivet.methods import build
from trivet.models.tangent_kernel import linearize, relative_distance, tangent_kernel
from trivet.objectives.objective import Progress
from trivet.objectives.pgd_at import PgdAt
from trivet.randomness import generator
from trivet.threats.autoattack import AutoAttack
from trivet.threats.linf import Linf
from trivet.threats.pgd import PGD
from trivet.training.folder import RunFolder
from trivet.training.pipeline import run_stages
from trivet.training.prune import balanced

DEFAULTS = {
    "digits": {"epochs": 30, "densities": [0.05, 0.03], "train": None, "test": None},
    "mnist": {"epochs": 10, "densities": [0.02, 0.01], "train": 6000, "test": 1000},
}
SETTINGS = ("data", "eps", "epochs", "steps", "attacked", "seed")
"""What must be the same for a row to be taken from an earlier run."""
STARTS = (
    "random",
    "magnitude",
    "SNIP",
    "AWT",
    "AWT mask, theta0",
    "NTT",
    "AWT shuffled",
    "AWT mask, fresh",
    "SynFlow",
    "GraSP",
)
EPOCHS = (0, 5, 15, 30)
"""When distances are taken."""
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Watched(PgdAt):
    """PGD adversarial training that keeps the weights of some epochs."""

    seen: ClassVar[dict[int, Weights]] = {}

    def perturb(self, model: nn.Module, batch: Batch, progress: Progress) -> Tensor:
        if progress.epoch in EPOCHS and int(progress.epoch) not in self.seen:
            self.seen[int(progress.epoch)] = plain(model)
        return super().perturb(model, batch, progress)


def plain(model: nn.Module) -> Weights:
    """The weights that the layers compute with, masks applied."""
    found: Weights = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            found |= {f"{name}.weight": layer.weight.detach().clone(), f"{name}.bias": layer.bias.detach().clone()}
    return found


class Bench:
    """One seed: the first weights, the tickets found from them, and the dense network they are compared with."""

    def __init__(self, options: argparse.Namespace, splits: Splits, seed: int) -> None:
        self.options, self.splits, self.seed = options, splits, seed
        self.threat = Linf(options.eps)
        self.tickets: dict[tuple[str, float], tuple[nn.Module, dict[str, Any], float]] = {}
        probes = splits.train.batch(balanced(splits.train, 32, generator(seed, "probes")))
        attack = PgdAt(self.threat, steps=5)
        self.x = probes.inputs
        self.attacked = attack.perturb(self.network(), probes, Progress(0, 1, 0.0, seed)).detach()
        self.dense: dict[int, Weights] = {}

    def network(self, draw: int = 0) -> nn.Module:
        made: nn.Module = build(
            "models",
            {"name": "mlp", "hidden": [256, 128]},
            input_shape=self.splits.train.input_shape,
            num_classes=self.splits.train.num_classes,
            generator=generator(self.seed, "weights", draw),
        )
        return made

    def through(self, model: nn.Module, *specs: Mapping[str, Any]) -> Any:
        stages = [(spec["name"], build("training", spec, threat=self.threat)) for spec in specs]
        with tempfile.TemporaryDirectory() as folder:
            run = RunFolder.create(Path(folder) / "run", "{}")
            return run_stages(stages, model, self.splits, run, seed=self.seed, device=torch.device("cpu"))

    def ticket(self, kind: str, density: float) -> tuple[nn.Module, dict[str, Any], float]:
        if (kind, density) not in self.tickets:
            objective = {"AWT": {"name": "pgd_at", "steps": 5}, "NTT": {"name": "plain"}}[kind]
            spec = {"name": "awt", "objective": objective, "density": density, "steps": self.options.steps}
            start = time.process_time()
            found = self.through(self.network(), spec)
            self.tickets[kind, density] = found.model, found.history[0], time.process_time() - start
        return self.tickets[kind, density]

    def start(self, name: str, density: float) -> tuple[nn.Module, dict[str, Any]]:
        """The network, with zeros where it is pruned, and what there is to say about how it came about."""
        pruners: dict[str, dict[str, Any]] = {
            "random": {"pruner": "random"},
            "magnitude": {"pruner": "magnitude"},
            "SNIP": {"pruner": "snip", "objective": {"name": "pgd_at", "steps": 5}},
            "GraSP": {"pruner": "grasp", "objective": {"name": "pgd_at", "steps": 5}},
            "SynFlow": {"pruner": "synflow"},
        }
        if name == "dense":
            return self.network(), {}
        if name in pruners:
            return self.through(self.network(), {"name": "prune", "density": density, **pruners[name]}).model, {}
        model, record, seconds = self.ticket("NTT" if name == "NTT" else "AWT", density)
        first, last = record["curve"][0], record["curve"][-1]
        said = {
            "transfer_seconds": seconds,
            "came_back": record["came_back"],
            "kernel_scale": record["kernel_scale"],
            "kernel_distance": [first["kernel_distance"], last["kernel_distance"]],
            "target_distance": [first["target_distance"], last["target_distance"]],
            "lazy_regime_bound": record["lazy_regime_bound"]["standing"],
        }
        if name in ("AWT", "NTT"):
            return copy.deepcopy(model), said
        return self.spoilt(name, model), {}

    @torch.no_grad()
    def spoilt(self, name: str, ticket: nn.Module) -> nn.Module:
        if name == "AWT shuffled":
            again = copy.deepcopy(ticket)
            for key, value in again.named_parameters():
                if value.ndim == 2:
                    order = torch.randperm(value.numel(), generator=generator(self.seed, "shuffle", key))
                    value.copy_(value.reshape(-1)[order].view_as(value))
            return again
        other = self.network(1 if name == "AWT mask, fresh" else 0)
        for key, value in other.named_parameters():
            if value.ndim == 2:
                value.mul_(ticket.get_parameter(key) != 0)
        return other

    def row(self, name: str, density: float) -> dict[str, Any]:
        head = {"rival": name, "density": density, "seed": self.seed}
        try:
            model, said = self.start(name, density)
        except TrivetError as error:
            return head | {"failed": str(error)}
        Watched.seen.clear()
        begin = time.process_time()
        fit = {
            "name": "fit",
            "objective": Watched(self.threat, steps=5),
            "epochs": self.options.epochs,
            "batch_size": 64,
            "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.0},
            "max_grad_norm": 10.0,
            "compression": None if name == "dense" else {"name": "masks"},
        }
        trained = self.through(model, fit).model
        seconds = time.process_time() - begin
        seen = {**Watched.seen, self.options.epochs: plain(trained)}
        if name == "dense":
            self.dense = seen
        layers = {key: int(value.count_nonzero()) for key, value in trained.named_parameters() if value.ndim == 2}
        weights = sum(value.numel() for value in trained.parameters() if value.ndim == 2)
        begin = time.process_time()
        return {
            **head,
            **self.judged(trained),
            "kept": sum(layers.values()) / weights,
            "kept_by_layer": layers,
            **said,
            **self.distances(seen),
            "train_seconds": seconds,
            "judge_seconds": time.process_time() - begin,
        }

    def kernel(self, weights: Weights) -> tuple[Tensor, Tensor]:
        """K_m(X, X~), and the outputs at X~."""
        model = self.network()
        here, there = linearize(model, self.x, weights), linearize(model, self.attacked, weights)
        masks = {key: value != 0 for key, value in weights.items() if value.ndim == 2}
        return tangent_kernel(here, there, masks), there.outputs

    def distances(self, seen: Mapping[int, Weights]) -> dict[str, Any]:
        found: dict[str, Any] = {"epochs": sorted(seen), "kernel_apart": [], "outputs_apart": [], "kernel_drift": []}
        first, _ = self.kernel(seen[0])
        for epoch in sorted(seen):
            own, outputs = self.kernel(seen[epoch])
            dense, wanted = self.kernel(self.dense[epoch])
            found["kernel_apart"].append(float(relative_distance(own, dense)))
            found["outputs_apart"].append(float(relative_distance(outputs, wanted)))
            found["kernel_drift"].append(float(relative_distance(own, first)))
        return found

    def judged(self, model: nn.Module) -> dict[str, float]:
        batch = self.splits.test.batch(torch.arange(len(self.splits.test)))
        with torch.no_grad():
            left = model(batch.inputs).argmax(1) == batch.labels
        found = {"clean": percent(left)}
        for loss in ("ce", "margin"):
            index = left.nonzero().squeeze(1)
            draw = generator(self.options.seed, "attack", loss)
            attack = PGD(self.threat, steps=20, loss=loss)
            left[index] = ~attack.run(model, batch.inputs[index], batch.labels[index], generator=draw).broken
        found["pgd"] = percent(left)
        few = left[: self.options.attacked].clone()
        index = few.nonzero().squeeze(1)
        if len(index):
            draw = generator(self.options.seed, "autoattack")
            attacked = AutoAttack(self.threat).run(model, batch.inputs[index], batch.labels[index], generator=draw)
            few[index] = ~attacked.broken
        return found | {"autoattack": percent(few)}


def percent(found: Tensor) -> float:
    return 100 * float(found.float().mean())


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, and how far each start is behind AWT at the same density, seed by seed, under AutoAttack."""
    found = []
    for rival, density in dict.fromkeys((each["rival"], each["density"]) for each in rows):
        here = {
            each["seed"]: each
            for each in rows
            if (each["rival"], each["density"]) == (rival, density) and "failed" not in each
        }
        awt = {
            each["seed"]: each
            for each in rows
            if each["rival"] == "AWT" and (each["density"] == density) and "failed" not in each
        }
        ahead = [here[seed]["autoattack"] - awt[seed]["autoattack"] for seed in here if seed in awt and rival != "AWT"]
        between = harness.interval(ahead) if len(ahead) > 1 else None
        line: dict[str, Any] = {"rival": rival, "density": density, "runs": len(here)}
        for figure in ("clean", "pgd", "autoattack"):
            line[figure] = statistics.fmean(each[figure] for each in here.values()) if here else None
        line["ahead_of_awt"] = statistics.fmean(ahead) if ahead else None
        found.append(line | {"low": between[0] if between else None, "high": between[1] if between else None})
    return found


def main() -> None:
    parser = harness.arguments(__doc__, rounds=1)
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--data", choices=sorted(DEFAULTS), default="digits")
    parser.add_argument("--epochs", type=int, help="of adversarial training")
    parser.add_argument("--steps", type=int, default=1500, help="of transfer")
    parser.add_argument("--attacked", type=int, default=200, help="test points for AutoAttack, the first ones")
    parser.add_argument("--densities", type=float, nargs="*")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--only", nargs="*", help="starts to run, by name; all of them if left out")
    options = parser.parse_args()
    own: dict[str, Any] = DEFAULTS[options.data]
    for setting in ("epochs", "densities"):
        if getattr(options, setting) is None:
            setattr(options, setting, own[setting])
    harness.prepare(options)
    splits: Splits = build("data", options.data).limited(train=own["train"], test=own["test"])
    rows = harness.earlier(options, SETTINGS, "rows")
    done = {(each["rival"], each["density"], each["seed"]) for each in rows}
    for seed in options.seeds:
        bench = Bench(options, splits, seed)
        wanted = [(name, density) for density in options.densities for name in options.only or STARTS]
        open_ = [each for each in wanted if (*each, seed) not in done]
        for name, density in ([("dense", 1.0)] if open_ else []) + open_:
            made = bench.row(name, density)  # the dense network is always trained: the others are compared with it
            if (name, density, seed) not in done:
                rows.append(made)
            narrow = ("kept_by_layer", "failed", "lazy_regime_bound")
            harness.show("the latest", [{k: v for k, v in made.items() if k not in narrow}])
            harness.save(options, {"summary": summary(rows), "rows": rows})
    harness.save(options, {"summary": summary(rows), "rows": rows})
    harness.show("summary", summary(rows))


if __name__ == "__main__":
    main()

"""Robust tickets for transfer: sparse bodies trained adversarially on one task, judged on few records of another.

    python bench/robust_tickets.py --threads 1 --out results/robust-tickets.json
    python bench/robust_tickets.py --threads 1 --pair vehicles-animals --out results/robust-tickets-cifar10.json

    mnist-digits      from the first 3000 records of MNIST at 14x14 to 200 of scikit-learn's digits at 14x14 with dark
                      and bright exchanged; all other digits, which no stage reads, are the test records
    vehicles-animals  from the first 5000 vehicles of CIFAR-10 (4 classes) to 600 of its animals (6), as many of each
                      class; the first 2000 animals of the test part are the test records

Network: three convolutions with BatchNorm (13,968 weights of convolutions on one channel; these are pruned) and a head
(dense). A seed is a pair: first weights, order of records, target records and the first weights of the new head are
shared by all rows of that seed.

    source   plain ("natural"), or PGD-AT (3 steps) within l_inf --radii ("robust"), the same epochs for each
    OMP      the smallest weights of all layers go; `random`: any weights; `filters`: in each layer those filters with
             the least l2 norm
    IMP      rounds of training on the source, pruning of about a fifth, and rewinding to the source's weights;
             natural tickets with a plain loss, robust ones with FGSM from a random start at the source's radius
    LMP      scores that start at random, learnt on the source with its own loss (PGD-AT for robust ones), weights
             frozen, the share in each layer
    linear   only the head is trained on the target;   finetune   everything but the masks is
    robust   accuracy left by PGD-10 at --attack on the test records: beside the claim, never in its place

The last epoch counts; nothing is chosen by test records. Rates were set on seed 100, which is not reported. `ahead` is
robust less natural, seed by seed, in points, with its standard error and Student's interval. A row that is in --out
already, from the same settings, is not made again; what --out lacks of these plans has not been run.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import harness
from trivet.data.dataset import Dataset, Splits
from trivet.methods import build
from trivet.randomness import generator
from trivet.threats.linf import Linf
from trivet.threats.pgd import PGD
from trivet.training.folder import RunFolder
from trivet.training.pipeline import advance
from trivet.training.prune import balanced
from trivet.training.stage import Checkpoint, Stage

DEFAULTS = {
    "mnist-digits": {"radii": [0.02, 0.1], "source": 3000, "labels": 200, "attack": 0.05},
    "vehicles-animals": {"radii": [2 / 255], "source": 5000, "labels": 600, "attack": 1 / 255},
}
VEHICLES = ["airplane", "automobile", "ship", "truck"]
ANIMALS = ["bird", "cat", "deer", "dog", "frog", "horse"]
SETTINGS = ("pair", "source", "labels", "epochs", "round_epochs", "mask_epochs", "target_epochs", "attack")
"""What must be the same for a row to be taken from an earlier run."""
DENSITIES = (1.0, 0.2, 0.1, 0.05, 0.02)
ROUNDS = {0.2: 7, 0.1: 3, 0.05: 3, 0.02: 4}
"""From the density before to this one, in equal shares of 19 to 21 %."""
FILTERS = (0.5, 0.2)
HEAD = "11"
Ticket = tuple[str, float, float, int]
"""Method, radius of the source, density, seed."""
MODES = ("linear", "finetune")
DEVICE = torch.device("cpu")


def network(seed: int, like: Dataset) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for before, after, stride in ((like.input_shape[0], 16, 1), (16, 32, 2), (32, 32, 2)):
            convolution = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, like.num_classes))


def with_fresh_head(ticket: Checkpoint, target: Dataset, seed: int) -> Checkpoint:
    """A copy of the ticket with a head for the target, of the same first weights for all tickets of a seed."""
    model = copy.deepcopy(ticket.model)
    model.set_submodule(HEAD, network(seed + 1_000_000, target).get_submodule(HEAD))
    return Checkpoint(model, structure=ticket.structure)


def after(stages: Sequence[Stage], ticket: Checkpoint, splits: Splits, seed: int) -> Checkpoint:
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder) / "run", "{}")
        start = Checkpoint(copy.deepcopy(ticket.model), structure=ticket.structure)
        return advance([("stage", each) for each in stages], start, splits, run, seed=seed, device=DEVICE)


def stage(name: str, eps: float, **settings: Any) -> Any:
    return build("training", {"name": name, **settings}, threat=Linf(eps))


def fit(eps: float, epochs: int, **more: Any) -> dict[str, Any]:
    """Training on the source, for `stage`."""
    adam = {"name": "adam", "lr": 2e-3}
    objective = {"name": "pgd_at", "steps": 3} if eps else {"name": "plain"}
    return {"objective": objective, "epochs": epochs, "batch_size": 100, "optimizer": adam, **more}


class Tickets:
    """Every ticket of one seed, from networks trained on the source once."""

    def __init__(self, options: argparse.Namespace, source: Splits, seed: int) -> None:
        self.options, self.source, self.seed = options, source, seed
        self.dense: dict[float, Checkpoint] = {}
        self.iterative: dict[tuple[float, float], Checkpoint] = {}

    def of(self, method: str, eps: float, density: float) -> Checkpoint:
        theta = self.pretrained(eps)
        if density == 1:
            return theta
        if method == "IMP":
            return self.imp(eps, density)
        spec: dict[str, Any] = {"pruner": {"name": "magnitude"}, "scope": "global"}
        if method == "LMP":
            compression = {"name": "hydra", "scores": "random", "density": density, "exclude": [HEAD]}
            settings = fit(eps, self.options.mask_epochs, compression=compression)
            return after([stage("fit", eps, **settings)], theta, self.source, self.seed)
        if method == "random":
            spec["pruner"] = {"name": "random"}
        if method == "filters":
            spec = {"pruner": {"name": "magnitude", "power": 2}, "pattern": {"name": "structured"}}
        return after([stage("prune", eps, density=density, exclude=[HEAD], **spec)], theta, self.source, self.seed)

    def pretrained(self, eps: float) -> Checkpoint:
        if eps not in self.dense:
            training = [stage("fit", eps, **fit(eps, self.options.epochs))]
            first = Checkpoint(network(self.seed, self.source.train))
            self.dense[eps] = after(training, first, self.source, self.seed)
        return self.dense[eps]

    def imp(self, eps: float, density: float) -> Checkpoint:
        """Rounds from the density before: as if they had followed each other in one stage, for masks only grow."""
        if (eps, density) not in self.iterative:
            earlier = DENSITIES[DENSITIES.index(density) - 1]
            rounds = ROUNDS[density]
            settings = fit(eps, self.options.round_epochs)
            if eps:
                settings["objective"] = {"name": "fast_at"}
            share = 1 - (density / earlier) ** (1 / rounds)
            imp = stage("imp", eps, fit={"name": "fit", **settings}, rounds=rounds, share=share)
            start = self.of("IMP", eps, earlier)
            self.iterative[eps, density] = after([imp], start, self.source, self.seed)
        return self.iterative[eps, density]


def data(options: argparse.Namespace, seed: int) -> tuple[Splits, Splits]:
    """The source, and the target of a seed."""
    if options.pair == "vehicles-animals":
        vehicles: Splits = build("data", {"name": "adapted", "of": "cifar10", "classes": VEHICLES})
        animals: Splits = build("data", {"name": "adapted", "of": "cifar10", "classes": ANIMALS})
        labelled = balanced(animals.train, options.labels, generator(seed, "target"))
        target = Splits(animals.train.select(labelled), animals.limited(test=2000).test)
        return vehicles.limited(train=options.source, test=1000), target
    source: Splits = build("data", {"name": "adapted", "of": "mnist", "size": 14})
    own: Splits = build("data", {"name": "adapted", "of": "digits", "size": 14, "invert": True})
    whole = Dataset(
        torch.cat([own.train.images, own.test.images]),
        torch.cat([own.train.labels, own.test.labels]),
        own.train.classes,
        own.train.name,
        own.train.scale,
    )
    chosen = torch.zeros(len(whole), dtype=torch.bool)
    chosen[balanced(whole, options.labels, generator(seed, "target"))] = True
    return source.limited(train=options.source, test=1000), Splits(whole.select(chosen), whole.select(~chosen))


def judged(model: nn.Module, test: Dataset, options: argparse.Namespace, seed: int) -> dict[str, float]:
    """In percent: clean accuracy, and what PGD-10 leaves."""
    model.eval()
    batch = test.batch(torch.arange(len(test)))
    with torch.no_grad():
        right = model(batch.inputs).argmax(1) == batch.labels
    draw = generator(seed, "attack")
    broken = PGD(Linf(options.attack), steps=10).run(model, batch.inputs, batch.labels, generator=draw).broken
    return {"clean": percent(right), "robust": percent(right & ~broken)}


def percent(found: Tensor) -> float:
    return 100 * float(found.double().mean())


def rows_of(
    name: Ticket, tickets: Tickets, target: Splits, options: argparse.Namespace, modes: Sequence[str]
) -> list[dict[str, Any]]:
    method, eps, density, seed = name
    start = time.process_time()
    ticket = with_fresh_head(tickets.of(method, eps, density), target.train, seed)
    made = time.process_time() - start
    weights = {name: module.weight for name, module in ticket.model.named_modules() if isinstance(module, nn.Conv2d)}
    kept = sum(int(each.count_nonzero()) for each in weights.values()) / sum(each.numel() for each in weights.values())
    found = []
    for mode in modes:
        start = time.process_time()
        settings: dict[str, Any] = {"objective": "plain", "epochs": options.target_epochs, "batch_size": 50}
        sgd = {"name": "sgd", "momentum": 0.9, "weight_decay": 5e-4}
        if mode == "linear":
            last = stage("linear_evaluation", 0.0, **settings, optimizer=sgd | {"lr": 0.1})
        else:
            last = stage("fit", 0.0, **settings, optimizer=sgd | {"lr": 0.02})
        model = after([last], ticket, target, seed).model
        found.append(
            {
                "method": method,
                "eps": eps,
                "density": density,
                "mode": mode,
                "seed": seed,
                **judged(model, target.test, options, seed),
                "kept": kept,
                "ticket_seconds": made,
                "transfer_seconds": time.process_time() - start,
            }
        )
    return found


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, and how far each robust ticket is ahead of the natural one, seed by seed."""
    found = []
    for key in dict.fromkeys((each["method"], each["mode"], each["density"], each["eps"]) for each in rows):
        method, mode, density, eps = key
        runs = {
            radius: {
                each["seed"]: each
                for each in rows
                if (each["method"], each["mode"], each["density"], each["eps"]) == (method, mode, density, radius)
            }
            for radius in (0.0, eps)
        }
        here, natural = runs[eps], runs[0.0]
        ahead = [here[seed]["clean"] - natural[seed]["clean"] for seed in here if eps and seed in natural]
        between = harness.interval(ahead)
        found.append(
            {
                "method": method,
                "mode": mode,
                "sparsity": round(100 * (1 - density)),
                "eps": eps,
                "runs": len(here),
                "clean": statistics.fmean(each["clean"] for each in here.values()),
                "robust": statistics.fmean(each["robust"] for each in here.values()),
                "ahead": statistics.fmean(ahead) if ahead else None,
                "standard_error": statistics.stdev(ahead) / len(ahead) ** 0.5 if len(ahead) > 1 else None,
                "low": between[0] if between else None,
                "high": between[1] if between else None,
            }
        )
    return found


def wanted(options: argparse.Namespace) -> list[Ticket]:
    """In the order of what matters most."""
    radii, first = (0.0, *options.radii), (0.0, *options.radii[:1])
    seeds, few = range(options.seed, options.seed + options.seeds), range(options.seed, options.seed + options.few)
    plans = [
        ("OMP", first, DENSITIES, seeds),
        ("IMP", first, DENSITIES[1:], few),
        ("LMP", first, DENSITIES[1:], few),
        ("filters", first, FILTERS, seeds),
        ("OMP", radii, DENSITIES, seeds),
        ("random", first, DENSITIES[1:3], few),
    ]
    return [
        (method, eps, density, seed)
        for method, allowed, densities, runs in plans
        if method in options.methods
        for seed in runs
        for eps in allowed
        for density in densities
    ]


def main() -> None:
    parser = harness.arguments(__doc__, rounds=1)
    parser.add_argument("--pair", choices=sorted(DEFAULTS), default="mnist-digits", help="source and target")
    parser.add_argument("--radii", type=float, nargs="+", help="of the robust sources")
    parser.add_argument("--source", type=int, help="records of the source")
    parser.add_argument("--labels", type=int, help="training records of the target")
    parser.add_argument("--epochs", type=int, default=6, help="on the source")
    parser.add_argument("--round-epochs", type=int, default=2, help="of one round of IMP")
    parser.add_argument("--mask-epochs", type=int, default=3, help="of LMP")
    parser.add_argument("--target-epochs", type=int, default=40)
    parser.add_argument("--attack", type=float, help="radius of the attack on the target")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--few", type=int, default=2, help="seeds of IMP, LMP and random masks")
    parser.add_argument("--methods", nargs="+", default=["OMP", "IMP", "LMP", "filters", "random"])
    options = parser.parse_args()
    for setting, value in DEFAULTS[options.pair].items():
        if getattr(options, setting) is None:
            setattr(options, setting, value)
    harness.prepare(options)
    rows, ready = harness.earlier(options, SETTINGS, "rows"), {}
    done = {(each["method"], each["eps"], each["density"], each["seed"], each["mode"]) for each in rows}
    for name in dict.fromkeys(wanted(options)):
        modes = [mode for mode in MODES if (*name, mode) not in done]
        if not modes:
            continue
        seed = name[-1]
        if seed not in ready:
            source, target = data(options, seed)
            ready[seed] = Tickets(options, source, seed), target
        rows += rows_of(name, *ready[seed], options, modes)
        harness.show("the latest", rows[-len(modes) :])
        harness.save(options, {"summary": summary(rows), "rows": rows})
    for method in dict.fromkeys(each["method"] for each in rows):
        harness.show(method, [each for each in summary(rows) if each["method"] == method])


if __name__ == "__main__":
    main()

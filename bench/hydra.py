"""Pruning robust networks: what is left at 10, 5 and 1 % of the weights, for equal total epochs.

    python bench/hydra.py --threads 1 --out results/hydra.json
    python bench/hydra.py --threads 1 --family ibp gaussian --out results/hydra.json
    python bench/hydra.py --threads 1 --data cifar10 --family pgd gaussian --out results/hydra-cifar10.json

One network (16 and 32 channels, a layer of 100: 166,248 weights on MNIST, 214,760 on CIFAR-10), the same records,
batches, optimizer and total of epochs for every row; a row is a method at a density with a seed, and seeds pair the
rows: first weights, order of records and attacks' draws are shared. Three families, by what is trained for:

    pgd        PGD-5 at radius --eps: clean, PGD-20 (two losses), and AutoAttack on the first --attacked test points
    ibp        interval bounds at the same radius: clean, attacked as above, proved by IBP and then by CROWN-IBP
    gaussian   noise of deviation 0.25: certified by smoothing at l2 radii 0.25 and 110/255, n = 1000, alpha = 0.001

Of the epochs, methods that prune a trained network take --epochs first ones for training it. LWM then prunes by
magnitude and fine-tunes for the rest; HYDRA (scores that start as scaled weights, or at random), HARP and ADMM prune
for half as many epochs and fine-tune for the rest. SNIP and GraSP (on the family's own loss), and a random mask, prune
before training, which takes all the epochs. Every stage has the same peak rate and a cosine of its own: the published
fine-tuning rate of HYDRA is ten times lower, and loses to LWM at this one. Nothing was tuned on test records but
that rate, on HYDRA's page of pilot runs; ADMM's and HARP's settings are ours, made for three epochs.

With --patterns LWM and HYDRA also keep one or two of each four weights, or whole filters (all layers but the last).

`kept` is counted on the exported network. A method that leaves a layer empty has no figures, and says so. A row that
is in --out already, from the same settings, is not made again. The summary pairs each method with LWM by seed;
intervals are Student's, of as few runs as there are seeds.
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
from trivet.certify.bounds.network import Ball, Network
from trivet.certify.smoothing import Smoothing
from trivet.compression.cost import cost_of
from trivet.data.dataset import Batch, Splits
from trivet.errors import TrivetError
from trivet.methods import build
from trivet.randomness import generator
from trivet.threats.autoattack import AutoAttack
from trivet.threats.linf import Linf
from trivet.threats.pgd import PGD
from trivet.training.folder import RunFolder
from trivet.training.pipeline import run_stages
from trivet.training.stage import Stage

DEFAULTS = {
    "mnist": {"eps": 0.1, "train": 6000, "epochs": 6, "points": 2000, "attacked": 500, "smoothed": 500},
    "cifar10": {"eps": 2 / 255, "train": 10_000, "epochs": 6, "points": 1000, "attacked": 300, "smoothed": 300},
}
SETTINGS = ("data", "eps", "train", "epochs", "batch_size", "points", "attacked", "smoothed", "seed")
"""What must be the same for a row to be taken from an earlier run."""
SIGMA, RADII = 0.25, (0.25, 110 / 255)
PATTERNS: dict[str, dict[str, Any]] = {
    "N:4": {"pattern": {"name": "n_m", "m": 4}},
    "filters": {"pattern": {"name": "structured", "granularity": "filter"}, "exclude": ["logits"]},
}
PATTERN_DENSITIES = (0.5, 0.25)
METHODS = {
    "pgd": ("LWM", "HYDRA", "HYDRA, random scores", "ADMM", "HARP", "SNIP", "GraSP", "random"),
    "ibp": ("LWM", "HYDRA"),
    "gaussian": ("LWM", "HYDRA"),
}
PUBLISHED = {
    "source": "HYDRA's own table: CIFAR-10, VGG-16, 220 epochs, extra data; robust accuracy in percent under PGD-50 at "
    "8/255 (dense 51.9) and certified by smoothing at l2 110/255 (dense 61.1): LWM / HYDRA",
    "era": {"0.1": [48.8, 49.5], "0.05": [45.2, 48.7], "0.01": [34.3, 41.7]},
    "vra-s": {"0.1": [59.6, 60.7], "0.05": [56.8, 59.9], "0.01": [44.1, 54.4]},
    "others": "clean / AutoAttack, ResNet-18 at 99 %, pralab's benchmark: HYDRA 72.21/38.80, ADMM 71.17/37.21, "
    "HARP 83.11/45.50, from unequal training",
}


def objective(family: str, *, first: bool) -> dict[str, Any]:
    """What a family minimises; radii grow only where training starts from `first` weights."""
    if family == "pgd":
        return {"name": "pgd_at", "steps": 5, "eps_ramp": 0.3 if first else 0.0}
    if family == "ibp":
        return {"name": "ibp", "ramp": [0.1, 0.6] if first else [0.0, 0.0]}
    return {"name": "gaussian", "sigma": SIGMA}


def fit(family: str, options: argparse.Namespace, epochs: int, *, first: bool, **more: Any) -> tuple[str, Stage]:
    adam = {"name": "adam", "lr": 2e-3}
    sgd = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
    spec = {
        "name": "fit",
        "objective": objective(family, first=first),
        "epochs": epochs,
        # Bounds take more steps to become tight than so few epochs of whole batches have.
        "batch_size": options.batch_size // 4 if family == "ibp" else options.batch_size,
        "optimizer": adam if family == "ibp" else sgd,
        "max_grad_norm": 10.0,
        **more,
    }
    return "fit", build("training", spec, threat=Linf(options.eps))


def prune(options: argparse.Namespace, spec: Mapping[str, Any]) -> tuple[str, Stage]:
    return "prune", build("training", {"name": "prune", **spec}, threat=Linf(options.eps))


def plan(name: str, family: str, density: float, options: argparse.Namespace) -> tuple[bool, list[tuple[str, Stage]]]:
    """Whether a method starts from the trained network, and its stages from there."""
    half = options.epochs // 2
    total = 2 * options.epochs + half
    base, _, suffix = name.partition(", ")
    shape = PATTERNS.get(suffix, {})
    one_shot = {"SNIP": "snip", "GraSP": "grasp", "random": "random"}
    if name == "dense":
        return False, [fit(family, options, total, first=True)]
    if name in one_shot:
        spec: dict[str, Any] = {"pruner": one_shot[name], "density": density}
        if name != "random":
            spec["objective"] = objective(family, first=False)
        return False, [prune(options, spec), fit(family, options, total, first=True)]
    if base == "LWM":
        magnitude = {"name": "magnitude", "power": 2}  # l2 norms of filters; for single weights it is all the same
        pruned = prune(options, {"pruner": magnitude, "density": density, **shape})
        return True, [pruned, fit(family, options, options.epochs + half, first=False)]
    sparse = {"name": "sparse", "density": density}
    compression: dict[str, Any] = {
        "HYDRA": {"name": "hydra", "density": density, **shape},
        "HYDRA, random scores": {"name": "hydra", "density": density, "scores": "random"},
        "HARP": {"name": "harp", "density": density, "gamma": 0.1},
        "ADMM": {"name": "admm", "projection": sparse, "rho": 0.01, "growth": 4.0},
    }[base if shape else name]
    return True, [
        fit(family, options, half, first=False, compression=compression),
        fit(family, options, options.epochs, first=False),
    ]


def network(splits: Splits, seed: int) -> nn.Module:
    made: nn.Module = build(
        "models",
        "small_cnn",
        input_shape=splits.train.input_shape,
        num_classes=splits.train.num_classes,
        generator=generator(seed, "weights"),
    )
    return made


def trained(model: nn.Module, stages: Sequence[tuple[str, Stage]], splits: Splits, seed: int) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder) / "run", "{}")
        return run_stages(stages, model, splits, run, seed=seed, device=torch.device("cpu"))


class Pretrained:
    """The networks that pruning starts from, trained once for each family and seed."""

    def __init__(self, options: argparse.Namespace, splits: Splits) -> None:
        self.options, self.splits = options, splits
        self.made: dict[tuple[str, int], tuple[nn.Module, float]] = {}

    def of(self, family: str, seed: int) -> tuple[nn.Module, float]:
        """A copy, and the CPU seconds it took."""
        if (family, seed) not in self.made:
            start = time.process_time()
            stage = fit(family, self.options, self.options.epochs, first=True)
            model = trained(network(self.splits, seed), [stage], self.splits, seed).model
            self.made[family, seed] = model, time.process_time() - start
        model, seconds = self.made[family, seed]
        return copy.deepcopy(model), seconds


def row(
    name: str, family: str, density: float, seed: int, options: argparse.Namespace, splits: Splits, ready: Pretrained
) -> dict[str, Any]:
    from_trained, stages = plan(name, family, density, options)
    model, spent = ready.of(family, seed) if from_trained else (network(splits, seed), 0.0)
    head = {"family": family, "rival": name, "density": density, "seed": seed}
    start = time.process_time()
    try:
        checkpoint = trained(model, stages, splits, seed + 1 if from_trained else seed)
    except TrivetError as error:
        return head | {"failed": str(error)}
    seconds = spent + time.process_time() - start
    cost = cost_of(checkpoint.model, splits.train.input_shape)
    layers = {
        name: int(module.weight.count_nonzero())
        for name, module in checkpoint.model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    gaps = {key: each[key] for each in checkpoint.history for key in ("admm_gap", "harp_excess") if key in each}
    judge = smoothed if family == "gaussian" else attacked
    start = time.process_time()
    figures = judge(checkpoint.model.eval(), family, splits, options)
    return {
        **head,
        **figures,
        "kept": cost.nonzero_weights / cost.weights,
        "kept_by_layer": layers,
        **gaps,
        "train_seconds": seconds,
        "judge_seconds": time.process_time() - start,
    }


@torch.no_grad()
def right(model: nn.Module, batch: Batch) -> Tensor:
    return torch.cat([model(part).argmax(1) for part in batch.inputs.split(500)]) == batch.labels


def attacked(model: nn.Module, family: str, splits: Splits, options: argparse.Namespace) -> dict[str, float]:
    """Shares in percent; AutoAttack and proofs are tried on the first points that PGD left."""
    batch, threat = splits.test.batch(torch.arange(options.points)), Linf(options.eps)
    clean = right(model, batch)
    left = clean.clone()
    for loss in ("ce", "margin"):
        index = left.nonzero().squeeze(1)
        draw = generator(options.seed, "attack", loss)
        attack = PGD(threat, steps=20, loss=loss)  # type: ignore[arg-type]
        left[index] = ~attack.run(model, batch.inputs[index], batch.labels[index], generator=draw).broken
    found = {"clean": percent(clean), "pgd": percent(left)}
    first, few = left[: options.attacked].clone(), batch.select(slice(options.attacked))
    index = first.nonzero().squeeze(1)
    if len(index):
        draw = generator(options.seed, "autoattack")
        broken = AutoAttack(threat).run(model, few.inputs[index], few.labels[index], generator=draw).broken
        first[index] = ~broken
    found["autoattack"] = percent(first)
    if family == "ibp":
        found |= proved(model, batch, left, options.eps)
    return found


def proved(model: nn.Module, batch: Batch, open_: Tensor, eps: float) -> dict[str, float]:
    """Shares proved by IBP, and by it or CROWN-IBP, of all points; only those that PGD left are tried."""
    bounded = Network.of(model, batch.inputs.shape[1:])
    sure, found = torch.zeros_like(open_), {}
    for name, method in (("ibp", "ibp"), ("crown_ibp", "crown-ibp")):
        waiting = (open_ & ~sure).nonzero().squeeze(1)
        for part in waiting.split(100) if len(waiting) else ():
            ball = Ball(batch.inputs[part], torch.full((len(part),), eps))
            lower = bounded.margins(ball, batch.labels[part], method=method, arithmetic="float32")  # type: ignore[arg-type]
            sure[part] = (lower > 0).all(1)
        found[name] = percent(sure)
    return found


def smoothed(model: nn.Module, family: str, splits: Splits, options: argparse.Namespace) -> dict[str, float]:
    batch = splits.test.batch(torch.arange(options.smoothed))
    found = Smoothing(SIGMA, n=1000).certify(model, batch.inputs, seed=options.seed)
    correct = found.labels == batch.labels
    shares = {f"smoothed_{radius:.2f}": percent(correct & (found.radii >= radius)) for radius in RADII}
    return {"clean": percent(right(model, batch)), "smoothed_right": percent(correct), **shares}


def percent(found: Tensor) -> float:
    return 100 * float(found.float().mean())


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, and what each method is ahead of LWM at the same density, seed by seed."""
    figures = {"pgd": "autoattack", "ibp": "crown_ibp", "gaussian": f"smoothed_{RADII[1]:.2f}"}
    found = []
    for family, rival, density in dict.fromkeys((each["family"], each["rival"], each["density"]) for each in rows):
        figure = figures[family]
        here = {
            each["seed"]: each
            for each in rows
            if (each["family"], each["rival"], each["density"]) == (family, rival, density) and "failed" not in each
        }
        suffix = rival.partition(", ")[2]
        lwm = f"LWM, {suffix}" if suffix in PATTERNS else "LWM"
        base = {
            each["seed"]: each
            for each in rows
            if (each["family"], each["rival"], each["density"]) == (family, lwm, density)
        }
        ahead = [here[seed][figure] - base[seed][figure] for seed in here if seed in base and rival != lwm]
        between = harness.interval(ahead) if len(ahead) > 1 else None
        found.append(
            {
                "family": family,
                "rival": rival,
                "density": density,
                "runs": len(here),
                "clean": statistics.fmean(each["clean"] for each in here.values()) if here else None,
                figure: statistics.fmean(each[figure] for each in here.values()) if here else None,
                "ahead_of_lwm": statistics.fmean(ahead) if ahead else None,
                "low": between[0] if between else None,
                "high": between[1] if between else None,
            }
        )
    return found


def main() -> None:
    parser = harness.arguments(__doc__, rounds=1)
    parser.add_argument("--data", choices=sorted(DEFAULTS), default="mnist")
    parser.add_argument("--eps", type=float)
    parser.add_argument("--train", type=int, help="training records, the first ones")
    parser.add_argument("--epochs", type=int, help="of training before pruning; two and a half times in all")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--points", type=int, help="test points for PGD and bounds, the first ones")
    parser.add_argument("--attacked", type=int, help="the first of them, for AutoAttack")
    parser.add_argument("--smoothed", type=int, help="test points for smoothing, the first ones")
    parser.add_argument("--densities", type=float, nargs="*", default=[0.1, 0.05, 0.01])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--family", nargs="*", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--patterns", nargs="*", choices=tuple(PATTERNS), default=[], help="LWM and HYDRA by patterns")
    parser.add_argument("--only", nargs="*", help="methods to run, by name; all of them if left out")
    options = parser.parse_args()
    for name, value in DEFAULTS[options.data].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    harness.prepare(options)
    splits: Splits = build("data", options.data).limited(train=options.train)
    ready, rows = Pretrained(options, splits), harness.earlier(options, SETTINGS, "rows")
    done = {(each["family"], each["rival"], each["density"], each["seed"]) for each in rows}
    wanted = [
        (name, family, density, seed)
        for seed in range(options.seeds)
        for family in options.family
        for density in options.densities
        for name in METHODS[family]
    ]
    wanted += [
        (f"{method}, {pattern}", "pgd", density, seed)
        for seed in range(options.seeds)
        for pattern in options.patterns
        for density in PATTERN_DENSITIES
        for method in ("LWM", "HYDRA")
    ]
    dense = [("dense", family, 1.0, seed) for seed in range(options.seeds) for family in options.family]
    for name, family, density, seed in sorted(wanted + dense, key=lambda each: each[3]):
        if (family, name, density, seed) in done or (options.only and name not in options.only):
            continue
        rows.append(row(name, family, density, seed, options, splits, ready))
        harness.show("the latest", [{k: v for k, v in rows[-1].items() if k not in ("kept_by_layer", "failed")}])
        harness.save(options, {"published": PUBLISHED, "summary": summary(rows), "rows": rows})
    for family in dict.fromkeys(each["family"] for each in rows):
        harness.show(family, [each for each in summary(rows) if each["family"] == family])


if __name__ == "__main__":
    main()

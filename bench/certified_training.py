"""Certified training on MNIST: what each method's network can prove, and what a step costs.

    python bench/certified_training.py --eps 0.1 --threads 1 --out results/certified-training-0.1.json
    python bench/certified_training.py --eps 0.3 --threads 1 --out results/certified-training-0.3.json
    python bench/certified_training.py --network mlp --train 10000 --epochs 10 --crown --eps 0.1 --threads 1 --out …
    python bench/certified_training.py --speed --threads 1 --out results/certified-training-speed.json

The table: one network (SingleProp's "MNIST small", or 784-200-200-10), the same records, epochs, batches, optimizer,
radius and ramp for every method; its CPU time is in the table, and SingleProp is trained once more, for as many epochs
as fill the time of the IBP beside it. Rows named "Shi et al." have their first weights, warm-up regularizer and smooth
ramp besides, with l1 and clipped gradients; those are made for networks with BatchNorm, and these have none. Short
trainings of few records: the order of the rows is what to look at, not the published level, which stands below the
table with its source. Nothing was tuned, and no model was selected by test records.

On the same test points, in order, each column counts those that the one before it left open: right; not broken by
PGD-40 on the cross-entropy and the margin, nor (first points only) by AutoAttack; proved by IBP, then by CROWN-IBP,
then, with --crown, by CROWN (each with slopes 0 and adaptive; the larger bound of each margin counts). Proofs hold for
float32 evaluation. CROWN takes seconds a point on the convolutions, and milliseconds on 784-200-200-10.
A proof of a broken point would be a bug, and stops the benchmark.

A row that is in --out already, from the same settings, is not made again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import harness
from trivet.certify.bounds.network import Ball, Network
from trivet.data.dataset import Batch, Dataset, Splits
from trivet.methods import build
from trivet.models import initialize
from trivet.objectives.certified import clipped_box, network_of, robust_cross_entropy
from trivet.objectives.objective import Objective, Progress
from trivet.randomness import derive_seed, generator
from trivet.threats.autoattack import AutoAttack
from trivet.threats.linf import Linf
from trivet.threats.pgd import PGD
from trivet.training.fit import Fit
from trivet.training.folder import RunFolder
from trivet.training.optimizers import Adam
from trivet.training.pipeline import run_stages
from trivet.training.schedules import Piecewise

PUBLISHED = {
    "source": "the table that recurs in the papers of TAPS and MTL-IBP: whole MNIST, CNN7 with BatchNorm, 70 epochs or "
    "more, certified by far stronger verifiers than here; clean / certified accuracy in percent",
    "0.1": {"IBP, Shi et al.": [98.84, 97.95], "CROWN-IBP": [98.83, 97.76], "SABR": [99.23, 98.22]},
    "0.3": {"IBP, Shi et al.": [97.67, 93.10], "CROWN-IBP": [98.18, 92.98], "SABR": [98.75, 93.40]},
}
SETTINGS = ("eps", "train", "epochs", "batch_size", "lr", "points", "autoattack_points", "seed", "network", "crown")
"""What must be the same for a row to be taken from an earlier run."""


@dataclass(frozen=True)
class Rival:
    """One row: an objective, and what belongs to its recipe besides.

    Attributes:
        weights: the network's first ones.
        fit: further settings of the training.
        in_time_of: the row whose training time this one is to fill with epochs.
    """

    name: str
    objective: Mapping[str, Any]
    weights: str = "fan_in"
    fit: Mapping[str, Any] = field(default_factory=dict)
    in_time_of: str | None = None


def rivals(eps: float) -> list[Rival]:
    ramp: dict[str, Any] = {"ramp": [1 / 6, 1 / 2]}
    shi: dict[str, Any] = {"weights": "ibp", "fit": {"l1": 1e-6, "max_grad_norm": 10.0}}
    warm = {**ramp, "ramp_shape": "smooth", "regularizer": 0.5}
    lam, alpha = (0.4, 0.2) if eps < 0.2 else (0.9, 0.5)
    crown = {"name": "crown_ibp", "slope": "zero", "fusion": True}
    sabr, mtl = {"name": "sabr", "lam": lam, "steps": 5}, {"name": "mtl_ibp", "alpha": alpha}
    return [
        Rival("standard", {"name": "plain"}),
        Rival("PGD-10", {"name": "pgd_at", "steps": 10, "eps_ramp": 0.5}),
        Rival("SingleProp zero", {"name": "single_prop", **ramp}),
        Rival("IBP", {"name": "ibp", **ramp}),
        Rival("SingleProp zero, in the time of IBP", {"name": "single_prop", **ramp}, in_time_of="IBP"),
        Rival("SingleProp fastlin", {"name": "single_prop", "variant": "fastlin", **ramp}),
        Rival("CROWN-IBP, loss fusion", {**crown, **ramp}),
        Rival("SABR", {**sabr, **ramp}),
        Rival("MTL-IBP", {**mtl, **ramp}),
        Rival("IBP, Shi et al.", {"name": "ibp", **warm}, **shi),
        Rival("CROWN-IBP, loss fusion, Shi et al.", {**crown, **warm}, **shi),
        Rival("SABR, Shi et al.", {**sabr, **warm}, **shi),
        Rival("MTL-IBP, Shi et al.", {**mtl, **warm}, **shi),
    ]


def network(data: Dataset, kind: str, weights: str, seed: int) -> nn.Module:
    spec = {"name": "single_prop_cnn"} if kind == "small" else {"name": "mlp", "hidden": [200, 200]}
    made: nn.Module = build("models", spec, input_shape=data.input_shape, num_classes=data.num_classes)
    rule = initialize.ibp_ if weights == "ibp" else initialize.fan_in_
    rule(made, generator(seed, "weights"))
    return made


def trained(rival: Rival, options: argparse.Namespace, splits: Splits, epochs: int) -> tuple[nn.Module, float]:
    """The network and the CPU seconds of its training."""
    objective: Objective = build("objectives", rival.objective, threat=Linf(options.eps))
    fit = Fit(
        objective,
        epochs,
        options.batch_size,
        optimizer=Adam(lr=options.lr),
        schedule=Piecewise(at=(0.7, 0.9), factor=0.2),
        **rival.fit,
    )
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        run = RunFolder.create(Path(folder) / "run", "{}")
        model = network(splits.train, options.network, rival.weights, options.seed)
        checkpoint = run_stages([("fit", fit)], model, splits, run, seed=options.seed, device=torch.device("cpu"))
        return checkpoint.model.eval(), time.process_time() - start


def standing(model: nn.Module, batch: Batch, options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """[N] bool each: right, not broken by PGD, and not broken by AutoAttack on the first points either."""
    with torch.no_grad():
        clean = model(batch.inputs).argmax(1) == batch.labels
    pgd, threat = clean.clone(), Linf(options.eps)
    for loss in ("ce", "margin"):
        attack, draw = PGD(threat, steps=40, loss=loss), generator(options.seed, "attack", loss)
        index = pgd.nonzero().squeeze(1)
        pgd[index] = ~attack.run(model, batch.inputs[index], batch.labels[index], generator=draw).broken
    left = pgd.clone()
    index = left[: options.autoattack_points].nonzero().squeeze(1)
    if len(index):
        draw = generator(options.seed, "autoattack")
        broken = AutoAttack(threat).run(model, batch.inputs[index], batch.labels[index], generator=draw).broken
        left[index] = ~broken
    return clean, pgd, left


def proved(model: nn.Module, batch: Batch, open_: Tensor, eps: float, crown: bool) -> dict[str, Tensor]:
    """[N] bool by verifier, each counting what the cheaper ones before it proved; only `open_` points are tried."""
    bounded = Network.of(model, batch.inputs.shape[1:])
    best = torch.full((len(batch), bounded.classes - 1), -torch.inf, dtype=torch.float64)
    found = {}
    tries = {
        "ibp": [("ibp", "zero")],
        "crown_ibp": [("crown-ibp", "zero"), ("crown-ibp", "adaptive")],
    }
    if crown:
        tries["crown"] = [("crown", "zero"), ("crown", "adaptive")]
    for name, ways in tries.items():
        for method, slope in ways:
            waiting = (open_ & ~(best > 0).all(1)).nonzero().squeeze(1)
            for part in waiting.split(100 if method != "crown" else 10) if len(waiting) else ():
                ball = Ball(batch.inputs[part], torch.full((len(part),), eps))
                labels = batch.labels[part]
                lower = bounded.margins(ball, labels, method=method, slope=slope, arithmetic="float32")  # type: ignore[arg-type]
                best[part] = torch.maximum(best[part], lower)
        found[name] = (best > 0).all(1)
    return found


def row(rival: Rival, options: argparse.Namespace, splits: Splits, epochs: int) -> dict[str, Any]:
    model, seconds = trained(rival, options, splits, epochs)
    batch = splits.test.batch(torch.arange(options.points))
    clean, pgd, left = standing(model, batch, options)
    start = time.process_time()
    sure = proved(model, batch, clean if options.check else left, options.eps, options.crown)
    if any(bool((each & ~left).any()) for each in sure.values()):
        raise SystemExit(f"{rival.name}: a point that an attack broke was proved; the bounds are wrong.")
    share = {"clean": clean, "pgd": pgd, "attacked": left, **sure}
    return {
        "rival": rival.name,
        **{name: 100 * float(each.float().mean()) for name, each in share.items()},
        "epochs": epochs,
        "train_seconds": seconds,
        "verify_seconds": time.process_time() - start,
        "objective": dict(rival.objective),
        "weights": rival.weights,
        "fit": dict(rival.fit),
    }


def table(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each method; what an earlier run left in --out stays."""
    splits: Splits = build("data", "mnist").limited(train=options.train)
    rows = harness.earlier(options, SETTINGS, "rows")
    for rival in rivals(options.eps):
        if options.only and rival.name not in options.only:
            continue
        done = {each["rival"]: each for each in rows}
        if rival.name in done:
            continue
        epochs = options.epochs
        if rival.in_time_of:
            own = next((each for each in rows if each["objective"] == dict(rival.objective)), None)
            model = done.get(rival.in_time_of)
            if own is None or model is None:
                continue
            epochs = max(1, round(own["epochs"] * model["train_seconds"] / own["train_seconds"]))
        rows.append(row(rival, options, splits, epochs))
        harness.show(f"MNIST, eps {options.eps}, so far", brief(rows))
        harness.save(options, {"published": published(options.eps), "rows": rows})
    return rows


def published(eps: float) -> dict[str, Any]:
    return {"source": PUBLISHED["source"], "rows": PUBLISHED.get(str(eps), {})}


def brief(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in each.items() if key not in ("objective", "weights", "fit")} for each in rows]


def fast_lin(model: nn.Module, batch: Batch, progress: Progress, eps: float) -> Tensor:
    """The loss of Wong & Kolter (ICML 2018) with exact sums: full CROWN with equal slopes is their dual bound."""
    bounded = network_of(model, batch.inputs.shape[1:])
    box = clipped_box(batch.inputs, eps)
    return robust_cross_entropy(bounded.margins(box, batch.labels, method="crown", slope="same"))


def speed(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """CPU seconds of an optimiser step at the full radius, in turns of five; each rival trains its own network."""
    eps, end = options.eps, Progress(step=9, steps=10, epoch=9.0, seed=options.seed)
    specs: dict[str, dict[str, Any]] = {
        "standard": {"name": "plain"},
        "SingleProp zero": {"name": "single_prop"},
        "SingleProp fastlin": {"name": "single_prop", "variant": "fastlin"},
        "IBP": {"name": "ibp"},
        "IBP without its clean term": {"name": "ibp", "kappa_end": 0.0},
        "MTL-IBP, 1 step": {"name": "mtl_ibp"},
        "SABR, 5 steps": {"name": "sabr", "steps": 5},
        "CROWN-IBP, all rows": {"name": "crown_ibp", "beta_end": 1.0},
        "CROWN-IBP, loss fusion": {"name": "crown_ibp", "beta_end": 1.0, "fusion": True},
    }
    networks: dict[str, tuple[dict[str, Any], int]] = {
        "MNIST small": ({"name": "single_prop_cnn"}, 100),
        "784-50-50-10": ({"name": "mlp", "hidden": [50, 50]}, 20),
    }
    found = {}
    for title, (network_spec, size) in networks.items():
        draw = generator(options.seed, "speed")
        inputs = torch.rand(size, 1, 28, 28, generator=draw).contiguous(memory_format=torch.channels_last)
        batch = Batch(inputs, torch.randint(10, (size,), generator=draw), torch.arange(size))
        losses: dict[str, Callable[[nn.Module], Tensor]] = {
            name: partial(_loss, build("objectives", spec, threat=Linf(eps)), batch=batch, progress=end)
            for name, spec in specs.items()
        }
        if title != "MNIST small":  # one backward pass for every unstable neuron: too dear for convolutions
            losses["Fast-Lin (Wong & Kolter)"] = partial(fast_lin, batch=batch, progress=end, eps=eps)
        seconds: dict[str, list[float]] = {name: [] for name in losses}
        turns = {name: _turn(loss, network_spec, options.seed, seconds[name]) for name, loss in losses.items()}
        harness.interleaved(turns, options.rounds)
        # The round that warms caches is not counted.
        found[f"{title}, batch {size}"] = harness.rows({name: each[1:] for name, each in seconds.items()}, "standard")
    return found


def _loss(objective: Objective, model: nn.Module, batch: Batch, progress: Progress) -> Tensor:
    return objective(model, batch, progress).per_example


def _turn(
    loss: Callable[[nn.Module], Tensor], network_spec: Mapping[str, Any], seed: int, seconds: list[float]
) -> Callable[[int], None]:
    """Notes the CPU time of one of its steps, of which other programs' share of the processor is no part."""
    draw = generator(derive_seed(seed, "speed"), "weights")
    model: nn.Module = build("models", network_spec, input_shape=(1, 28, 28), num_classes=10, generator=draw)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(model.parameters(), 1e-5)

    def turn(_: int) -> None:
        start = time.process_time()
        model.train()
        for _ in range(5):
            optimizer.zero_grad(set_to_none=True)
            loss(model).mean().backward()
            optimizer.step()
        seconds.append((time.process_time() - start) / 5)

    return turn


def main() -> None:
    parser = harness.arguments(__doc__, rounds=10)
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--speed", action="store_true", help="time steps instead of training")
    parser.add_argument("--train", type=int, default=20_000, help="training records, the first ones")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--points", type=int, default=1000, help="test points, the first ones")
    parser.add_argument("--autoattack-points", type=int, default=100)
    parser.add_argument("--only", nargs="*", help="rows to make, by name; all of them if left out")
    parser.add_argument("--network", choices=("small", "mlp"), default="small")
    parser.add_argument("--crown", action="store_true", help="verify by CROWN, too")
    parser.add_argument("--check", action="store_true", help="try to prove points that attacks broke, too")
    options = parser.parse_args()
    harness.prepare(options)
    if options.speed:
        found = speed(options)
        for title, rows in found.items():
            harness.show(f"{title}: CPU seconds of a step at eps {options.eps}", rows)
        harness.save(options, found)
        return
    rows = table(options)
    harness.show(
        f"MNIST, eps {options.eps}, {options.train} training records, {options.points} test points", brief(rows)
    )
    print(json.dumps(published(options.eps), indent=1))
    harness.save(options, {"published": published(options.eps), "rows": rows})


if __name__ == "__main__":
    main()

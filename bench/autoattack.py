"""AutoAttack standard: ours against the authors' code, on the same network and points, in one run.

    python bench/autoattack.py --reference PATH_OF_AUTO_ATTACK --out results/autoattack.json

The network is trained here, quickly, by FGSM with a random start at half the radius, on MNIST (in TRIVET_DATA) or on
the digits of scikit-learn. All sides attack the same points with the allocator set alike, in turns, round after round;
rows are medians over the rounds. "fp32" asks for gradients in the model's own precision, "bf16" in bfloat16; success is
judged on the model itself either way. The points left standing are compared with the reference's one by one: attacks
are random, so single points may differ, but accuracies that differ by more than 0.5 points are reported as UNEQUAL and
make the exit status 1.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trivet import machine
from trivet.data.dataset import Splits
from trivet.files import write_json
from trivet.methods import build
from trivet.models.surrogate import Precision
from trivet.randomness import derive_seed, generator
from trivet.threats.attack import misclassified
from trivet.threats.autoattack import AutoAttack
from trivet.threats.losses import cross_entropy
from trivet.threats.pgd import ascend
from trivet.threats.threat import ThreatModel

TOLERANCE = 0.005
Side = Callable[[int], Tensor]
"""A seed to the points that stand, [N] bool."""


def trained(model: nn.Module, splits: Splits, threat: ThreatModel, steps: int, seed: int) -> nn.Module:
    """`model` after `steps` steps of fast adversarial training: neither broken nor beyond attack."""
    draw = generator(seed, "training")
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(steps):
        batch = splits.train.batch(torch.randint(len(splits.train), (128,), generator=draw))
        y = batch.labels
        x = ascend(
            model,
            batch.inputs,
            threat.random_start(batch.inputs, draw),
            lambda logits, y=y: cross_entropy(logits, y),
            threat=threat,
            steps=1,
            step_size=1.25 * threat.eps,
        )
        optimizer.zero_grad()
        cross_entropy(model(x), y).mean().backward()
        optimizer.step()
    return model.eval()


def ours(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, precision: Precision, batch_size: int) -> Side:
    attack = AutoAttack(threat, precision=precision)

    def stands(seed: int) -> Tensor:
        return ~attack.run_detailed(model, x, y, generator=generator(seed, "attack"), batch_size=batch_size).broken

    return stands


def authors(folder: Path, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, batch_size: int) -> Side:
    sys.path.insert(0, str(folder))  # before this script's own folder, where this file has the package's name
    from autoattack import AutoAttack as Reference

    def stands(seed: int) -> Tensor:
        attack = Reference(
            model,
            norm=threat.norm,
            eps=threat.eps,
            seed=derive_seed(seed, "reference") % 2**32,
            verbose=False,
            device=x.device,
        )
        return ~misclassified(model, attack.run_standard_evaluation(x, y, bs=batch_size), y)

    return stands


def measure(sides: dict[str, Side], rounds: int, seed: int) -> list[dict[str, Any]]:
    """One row for each side; the first is what the others are compared with."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    standing: dict[str, list[Tensor]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            standing[name].append(sides[name](seed + turn))
            times[name].append(time.perf_counter() - start)
            print(f"  round {turn + 1}, {name}: {times[name][-1]:.1f} s", flush=True)
    first = names[0]
    rows = []
    for name in names:
        accuracy = [float(each.float().mean()) for each in standing[name]]
        gaps = [a - float(b.float().mean()) for a, b in zip(accuracy, standing[first], strict=True)]
        differ = [int((a != b).sum()) for a, b in zip(standing[name], standing[first], strict=True)]
        rows.append(
            {
                "side": name,
                "seconds": statistics.median(times[name]),
                "all_seconds": times[name],
                "times_faster": statistics.median(times[first]) / statistics.median(times[name]),
                "robust_accuracy": accuracy,
                "largest_gap": max(gaps, key=abs),
                "points_that_differ": differ,
                "equal": all(abs(gap) <= TOLERANCE + 1e-9 for gap in gaps),
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, required=True, help="a checkout of fra31/auto-attack")
    parser.add_argument("--data", choices=("mnist", "digits"), default="mnist")
    parser.add_argument("--model", default="small_cnn", help="a network by its registered name")
    parser.add_argument("--threat", choices=("linf", "l2", "l1"), default="linf")
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--training-steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the measurement here as JSON")
    options = parser.parse_args()
    machine.keep_memory()
    torch.set_num_threads(options.threads)
    splits: Splits = build("data", options.data)
    threat: ThreatModel = build("threats", {"name": options.threat, "eps": options.eps})
    model: nn.Module = build(
        "models",
        options.model,
        input_shape=splits.train.input_shape,
        num_classes=splits.train.num_classes,
        generator=generator(options.seed, "weights"),
    )
    model = trained(model, splits, threat.scaled(0.5), options.training_steps, options.seed)
    batch = splits.test.batch(torch.arange(options.points))
    x, y = batch.inputs, batch.labels
    clean = float((~misclassified(model, x, y)).float().mean())
    sides = {
        "reference": authors(options.reference, model, x, y, threat, options.batch_size),
        "trivet fp32": ours(model, x, y, threat, "fp32", options.batch_size),
        "trivet bf16": ours(model, x, y, threat, "bf16", options.batch_size),
    }
    print(f"{options.data}, {options.model}, {threat}, {options.points} points, clean accuracy {100 * clean:.1f} %")
    rows = measure(sides, options.rounds, options.seed)
    print(f"\n{'side':14}{'seconds':>9}{'faster':>8}{'robust':>9}{'gap':>8}  points that differ")
    for row in rows:
        robust = statistics.median(row["robust_accuracy"])
        verdict = "" if row["equal"] else "  UNEQUAL"
        print(
            f"{row['side']:14}{row['seconds']:9.2f}{row['times_faster']:7.2f}x{100 * robust:8.1f}%"
            f"{100 * row['largest_gap']:+7.1f}  {row['points_that_differ']}{verdict}"
        )
    if options.out:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "out"}
        settings.pop("reference")  # a path says nothing about what lies there
        content = {**machine.describe(), "settings": settings, "clean_accuracy": clean, "results": rows}
        write_json(options.out, content)
    return 0 if all(row["equal"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())

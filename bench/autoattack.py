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
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import harness
from trivet.data.dataset import Splits
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


def measure(sides: dict[str, Side], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each side; the reference is what the others are compared with."""
    standing: dict[str, list[Tensor]] = {name: [] for name in sides}

    def turn(name: str, number: int) -> None:
        standing[name].append(sides[name](options.seed + number))

    seconds, _ = harness.interleaved({name: partial(turn, name) for name in sides}, options.rounds)
    accuracy = {name: [float(each.float().mean()) for each in found] for name, found in standing.items()}
    gap = {
        name: max((a - b for a, b in zip(found, accuracy["reference"], strict=True)), key=abs)
        for name, found in accuracy.items()
    }
    differ = {
        name: [int((a != b).sum()) for a, b in zip(found, standing["reference"], strict=True)]
        for name, found in standing.items()
    }
    return harness.rows(
        seconds,
        "reference",
        accuracy_left={name: statistics.median(found) for name, found in accuracy.items()},
        largest_gap=gap,
        points_that_differ=differ,
        equal={name: abs(value) <= TOLERANCE + 1e-9 for name, value in gap.items()},
    )


def main() -> int:
    parser = harness.arguments(__doc__, rounds=3)
    parser.add_argument("--reference", type=Path, required=True, help="a checkout of fra31/auto-attack")
    parser.add_argument("--data", choices=("mnist", "digits"), default="mnist")
    parser.add_argument("--model", default="small_cnn", help="a network by its registered name")
    parser.add_argument("--threat", choices=("linf", "l2", "l1"), default="linf")
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--training-steps", type=int, default=300)
    options = parser.parse_args()
    harness.prepare(options)
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
    rows = measure(sides, options)
    title = f"{options.data}, {options.model}, {threat}, {options.points} points, clean accuracy {100 * clean:.1f} %"
    harness.show(title, rows)
    options.reference = "fra31/auto-attack"  # a path says nothing about what lies there
    harness.save(options, {"clean_accuracy": clean, "sides": rows})
    return 0 if all(row["equal"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())

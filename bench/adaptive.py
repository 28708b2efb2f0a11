"""Adaptive certification against as many noisy copies for every input, at the same reported radii, on MNIST.

    python bench/adaptive.py --run runs/mnist-gaussian --out results/adaptive.json

Both certify the same test points of the same network with the same sigma, alpha and most copies; the fixed rival is
`smoothing` (whose speed against the published loop `bench/smoothing.py` measures). What counts is how many copies were
drawn for the same certified accuracy at the radii, and the seconds. The network is a run's, or a LeNet that is trained
here for a minute with Gaussian noise. The fixed rival takes long at 100,000 copies: with `--fixed-points` it certifies
only the first so many of the points, and its seconds are for those.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import harness
import trivet
from trivet.certify.adaptive_smoothing import AdaptiveSmoothing
from trivet.certify.certifier import Certificates, Certifier, join
from trivet.certify.curves import certified_accuracy
from trivet.certify.smoothing import Smoothing
from trivet.data.dataset import Dataset
from trivet.methods import build
from trivet.objectives.gaussian import Gaussian
from trivet.objectives.objective import Progress
from trivet.randomness import generator

PORTION = 50
"""Points between two notes of how far it is."""


def trained(train: Dataset, sigma: float, steps: int, seed: int) -> nn.Module:
    """A LeNet after `steps` steps of Gaussian augmentation on 128 records each."""
    net: nn.Module = build(
        "models", "lenet", input_shape=train.input_shape, num_classes=10, generator=generator(seed, "weights")
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    draw, objective = generator(seed, "records"), Gaussian(sigma)
    for step in range(steps):
        batch = train.batch(torch.randint(len(train), (128,), generator=draw))
        loss = objective(net, batch, Progress(step, steps, 0.0, seed)).per_example.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def certified(certifier: Certifier, net: nn.Module, data: Dataset, points: int, seed: int) -> Certificates:
    began, parts = time.perf_counter(), []
    for index in torch.arange(points).split(PORTION):
        parts.append(certifier.certify(net, data.batch(index).inputs, seed=seed, index=index))
        done = int(index[-1]) + 1
        print(f"  {type(certifier).__name__}: {done} of {points}, {time.perf_counter() - began:.0f} s", flush=True)
    return join(parts)


def copies(certifier: Smoothing, found: Certificates) -> int:
    """Drawn in all, for the choice of the class, too; without the few that a decision came too late for."""
    if isinstance(certifier, AdaptiveSmoothing):
        return int(found.evidence["n"].sum()) + certifier.n0 * len(found)
    return (certifier.n + certifier.n0) * len(found)


def measure(net: nn.Module, test: Dataset, options: argparse.Namespace) -> dict[str, Any]:
    common: dict[str, Any] = {"n": options.n, "alpha": options.alpha, "precision": options.precision}
    fixed = Smoothing(options.sigma, **common)
    adaptive = AdaptiveSmoothing(options.sigma, radii=tuple(options.radii), **common)
    rivals: dict[str, tuple[Smoothing, int]] = {
        "fixed": (fixed, min(options.points, options.fixed_points or options.points)),
        "adaptive": (adaptive, options.points),
    }
    rows: list[dict[str, Any]] = []
    accuracy: dict[str, list[float]] = {}
    first = test.batch(torch.arange(1)).inputs
    replace(fixed, n=1_000).certify(net, first, seed=options.seed)  # not counted: traces the network, warms caches
    for name, (certifier, points) in rivals.items():
        began = time.perf_counter()
        found = certified(certifier, net, test, points, options.seed)
        seconds = time.perf_counter() - began
        drawn = copies(certifier, found)
        rows.append(
            {
                "rival": name,
                "points": points,
                "copies_per_point": drawn / points,
                "seconds_per_point": seconds / points,
                "copies_per_second": drawn / seconds,
            }
        )
        for shown in sorted({points, rivals["fixed"][1]}):
            targets = test.labels[:shown]
            rates = certified_accuracy(found.first(shown), targets, options.radii)
            accuracy[f"{name}, {shown} points"] = [rate.value for rate in rates]
    harness.show(f"sigma {options.sigma:g}, n {options.n}, alpha {options.alpha:g}", rows)
    table = [
        {"certified": name, **{f"{r:g}": f"{100 * a:.1f}" for r, a in zip(options.radii, shares, strict=True)}}
        for name, shares in accuracy.items()
    ]
    harness.show("certified accuracy in % at the radii", table)
    return {
        "rows": rows,
        "radii": options.radii,
        "certified_accuracy": accuracy,
        "fewer_copies": rows[0]["copies_per_point"] / rows[1]["copies_per_point"],
        "times_faster": rows[0]["seconds_per_point"] / rows[1]["seconds_per_point"],
    }


def main() -> None:
    parser = harness.arguments(__doc__, rounds=1)
    parser.add_argument("--run", type=Path, help="a run folder whose network and test set to take")
    parser.add_argument("--sigma", type=float, default=0.5)
    parser.add_argument("--radii", type=float, nargs="+", default=[0.0, 0.5, 1.0, 1.5])
    parser.add_argument("--points", type=int, default=500, help="test points, the first so many")
    parser.add_argument("--fixed-points", type=int, help="of which the fixed rival certifies the first so many")
    parser.add_argument("--n", type=int, default=100_000, help="copies for each point, or the most")
    parser.add_argument("--alpha", type=float, default=0.001)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--training-steps", type=int, default=1_000, help="of the network that is trained here")
    options = parser.parse_args()
    harness.prepare(options)
    if options.run:
        run = trivet.Run.open(options.run)
        test = run.plan.splits().test
        net = run.model(test)
    else:
        splits = build("data", "mnist")
        test, net = splits.test, trained(splits.train, options.sigma, options.training_steps, options.seed)
    harness.save(options, measure(net, test, options))


if __name__ == "__main__":
    main()

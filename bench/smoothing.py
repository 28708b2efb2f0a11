"""Certification by randomized smoothing: ours against the loop that published code runs, same work, one run.

    python bench/smoothing.py --out results/smoothing.json

Both sides certify the same points of the same quickly trained networks with the same n0, n, sigma and alpha, in turns,
round after round, with the allocator set alike. Rows are medians over the rounds of seconds per image. Every variant's
votes are compared with the reference's: the largest difference in units of its binomial standard deviation stands in
the last column. bf16 is another network, so that there a difference may be real; it is shown all the same.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import beta, norm
from torch import Tensor, nn

import harness
from trivet.certify.certifier import ABSTAIN
from trivet.certify.smoothing import Smoothing
from trivet.methods import build
from trivet.randomness import derive_seed, generator

SIGMA, N0, ALPHA = 0.5, 100, 0.001
NETWORKS: dict[str, tuple[Any, tuple[int, int, int]]] = {
    "MNIST challenge CNN": ("mnist_cnn", (1, 28, 28)),
    "ResNet-20": ({"name": "resnet", "depth": 20}, (3, 32, 32)),
}


@dataclass(frozen=True)
class Outcome:
    """Labels and votes for the certified class of each point, and the radii."""

    labels: list[int]
    counts: list[int]
    radii: list[float]


Variant = Callable[[nn.Module, Tensor, int], Outcome]


def published(n: int, batch_size: int) -> Variant:
    """CERTIFY image by image as the published code does: fp32, repeated input plus fresh noise, argmax, host counts."""

    def votes(model: nn.Module, image: Tensor, number: int, classes: int) -> np.ndarray:
        counts = np.zeros(classes, dtype=np.int64)
        while number > 0:
            rows = min(batch_size, number)
            number -= rows
            batch = image.repeat(rows, 1, 1, 1)
            predictions = model(batch + torch.randn_like(batch) * SIGMA).argmax(1)
            counts += np.bincount(predictions.cpu().numpy(), minlength=classes)
        return counts

    @torch.no_grad()
    def certify(model: nn.Module, x: Tensor, seed: int) -> Outcome:
        torch.manual_seed(derive_seed(seed, "published"))
        model.eval()
        outcome = Outcome([], [], [])
        for image in x:
            label = int(votes(model, image, N0, 10).argmax())
            count = int(votes(model, image, n, 10)[label])
            lower = float(beta.ppf(ALPHA, count, n - count + 1)) if count else 0.0
            outcome.labels.append(label if lower > 0.5 else ABSTAIN)
            outcome.counts.append(count)
            outcome.radii.append(SIGMA * float(norm.ppf(lower)) if lower > 0.5 else 0.0)
        return outcome

    return certify


def ours(n: int, **settings: Any) -> Variant:
    smoothing = Smoothing(SIGMA, n0=N0, n=n, alpha=ALPHA, **settings)

    def certify(model: nn.Module, x: Tensor, seed: int) -> Outcome:
        certificates = smoothing.certify(model, x, seed=seed)
        if smoothing.compile and "compiled" not in certificates.conditions[2]:
            print(f"  note: {certificates.conditions[2]}")
        return Outcome(
            certificates.labels.tolist(), certificates.evidence["count"].tolist(), certificates.radii.tolist()
        )

    return certify


def variants(n: int) -> dict[str, Variant]:
    return {
        "published loop, batch 400": published(n, 400),
        "published loop, batch 1000": published(n, 1000),
        "trivet fp32": ours(n),
        "trivet bf16": ours(n, precision="bf16"),
        "trivet bf16 compiled": ours(n, precision="bf16", compile=True),
    }


def prototypes(shape: tuple[int, int, int], seed: int) -> Tensor:
    """Ten coarse random images [10, C, H, W], one for each class."""
    coarse = torch.rand(10, shape[0], 4, 4, generator=generator(seed, "prototypes"))
    return nn.functional.interpolate(coarse, size=shape[1:], mode="nearest")


def trained(spec: Any, shape: tuple[int, int, int], seed: int, steps: int) -> nn.Module:
    """A network that tells the prototypes apart under noise of `SIGMA`, well enough for votes of all kinds."""
    model: nn.Module = build("models", spec, input_shape=shape, num_classes=10, generator=generator(seed, "weights"))
    images, draw = prototypes(shape, seed), generator(seed, "training")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        labels = torch.randint(10, (64,), generator=draw)
        clean = images[labels]
        loss = nn.functional.cross_entropy(model(clean + SIGMA * torch.randn(clean.shape, generator=draw)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def points(shape: tuple[int, int, int], number: int, seed: int) -> Tensor:
    """Mixtures [number, C, H, W] of neighbouring prototypes, from pure to even, so that radii vary down to none."""
    images = prototypes(shape, seed)
    share = torch.linspace(0.0, 0.5, number).view(-1, 1, 1, 1)
    first = torch.arange(number) % 10
    return (1 - share) * images[first] + share * images[(first + 1) % 10]


def deviation(outcome: Outcome, reference: Outcome, n: int) -> float:
    """The largest difference in votes, in standard deviations, over points where both chose the same class."""
    worst = 0.0
    for label, count, other_label, other in zip(
        outcome.labels, outcome.counts, reference.labels, reference.counts, strict=True
    ):
        rate = (count + other + 1) / (2 * n + 2)
        if label == other_label != ABSTAIN:
            worst = max(worst, abs(count - other) / math.sqrt(2 * n * rate * (1 - rate)))
    return worst


def measure(model: nn.Module, x: Tensor, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each variant: seconds for all of `x`, how much faster than the first, and how the results compare."""
    candidates = variants(options.n)
    seconds, outcomes = harness.interleaved(
        {name: partial(_turn, certify, model, x, options.seed) for name, certify in candidates.items()}, options.rounds
    )
    reference = next(iter(candidates))
    return harness.rows(
        seconds,
        reference,
        seconds_per_image={name: statistics.median(times) / len(x) for name, times in seconds.items()},
        certified={name: sum(label != ABSTAIN for label in out.labels) / len(x) for name, out in outcomes.items()},
        mean_radius={name: statistics.fmean(out.radii) for name, out in outcomes.items()},
        largest_deviation={
            name: deviation(out, outcomes[reference], options.n) for name, out in outcomes.items() if name != reference
        },
    )


def _turn(certify: Variant, model: nn.Module, x: Tensor, seed: int, turn: int) -> Outcome:
    return certify(model, x, seed + turn)


def main() -> None:
    parser = harness.arguments(__doc__, rounds=5)
    parser.add_argument("--n", type=int, default=10_000, help="estimation samples per image")
    parser.add_argument("--points", type=int, default=4, help="images certified in each round")
    parser.add_argument("--training-steps", type=int, default=100)
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    options = parser.parse_args()
    harness.prepare(options)
    results: dict[str, Any] = {}
    for network in options.networks:
        spec, shape = NETWORKS[network]
        model = trained(spec, shape, options.seed, options.training_steps)
        rows = results[network] = measure(model, points(shape, options.points, options.seed), options)
        harness.show(f"{network}: sigma {SIGMA}, n0 {N0}, n {options.n}, {options.points} points", rows)
    harness.save(options, results)


if __name__ == "__main__":
    main()

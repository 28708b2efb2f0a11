"""Bounds of network outputs: ours against auto_LiRPA, same networks, same inputs, same specification, one run.

    python bench/bounds.py --peer DIRECTORIES --out results/bounds.json

`--peer` is where auto_LiRPA 0.7.1 and what it imports lie, separated by colons (it is put on the path here alone);
without it ours is timed alone. Three tables for each network:

- training: forward and backward of CE(0, -margins), of IBP and CROWN-IBP, with a clean pass and its CE beside it as in
  certified training, and without; the reference is a plain training step. Both sides see one clean pass: auto_LiRPA's
  bounds reuse the values of the pass that gave the logits.
- certification: bounds of all margins without gradients, by every method; ours also with error terms for float32.
- tightness: the mean least margin of each row above, and the largest amount by which ours lies below the peer's.

Networks have random weights, drawn as for training by IBP where that exists, scaled so that bounds are of the size of
the logits. Rows are medians over the rounds, of time on the wall and of time on the processor: other programs move the
first far more than the second. `cpu_times_of_peer` is the median over the rounds of the peer's processor time divided
by ours.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import harness
from trivet.certify.bounds.network import Ball, Network, margin_rows
from trivet.methods import build
from trivet.randomness import generator

METHODS = {"ibp": "IBP", "crown-ibp": "CROWN-IBP", "crown": "CROWN", "alpha-crown": "CROWN-Optimized"}
NETWORKS: dict[str, dict[str, Any]] = {
    "MLP 784-200-200-10": {
        "model": {"name": "mlp", "hidden": [200, 200]},
        "shape": (1, 28, 28),
        "batch": 100,
        "eps": 0.01,
        "certified": 16,
        "methods": ("ibp", "crown-ibp", "crown", "alpha-crown"),
    },
    "MLP 784-512x4-10": {
        "model": {"name": "mlp", "hidden": [512] * 4},
        "shape": (1, 28, 28),
        "batch": 128,
        "eps": 0.005,
        "certified": 4,
        "methods": ("ibp", "crown-ibp", "crown", "alpha-crown"),
    },
    "small CNN": {
        "model": {"name": "small_cnn"},
        "shape": (1, 28, 28),
        "batch": 64,
        "eps": 0.01,
        "certified": 4,
        "methods": ("ibp", "crown-ibp", "crown"),
    },
    "CNN7 width 16": {
        "model": {"name": "cnn7", "width": 16, "hidden": 128},
        "shape": (3, 32, 32),
        "batch": 32,
        "eps": 2 / 255,
        "certified": 2,
        "methods": ("ibp", "crown-ibp"),
    },
}


class Peer:
    """auto_LiRPA, imported from a place that is not ours."""

    def __init__(self, places: str) -> None:
        sys.path[:0] = places.split(":")
        warnings.simplefilter("ignore")
        import auto_LiRPA

        self.library = auto_LiRPA

    def bounded(self, model: nn.Module, x: Tensor) -> Any:
        options = {"optimize_bound_args": {"iteration": 20, "lr_alpha": 0.1}}
        return self.library.BoundedModule(model, x[:1], bound_opts=options, verbose=0)

    def ball(self, x: Tensor, eps: float) -> Tensor:
        low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
        shape = self.library.PerturbationLpNorm(norm=float("inf"), eps=eps, x_L=low, x_U=high)
        bounded: Tensor = self.library.BoundedTensor(x, shape)
        return bounded


def interleaved(
    rivals: Mapping[str, Callable[[int], Any]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, Any], dict[str, dict[str, float]]]:
    """As `harness.interleaved`, and columns of processor time."""
    spent: dict[str, list[float]] = {name: [] for name in rivals}

    def counted(name: str) -> Callable[[int], Any]:
        def turn(number: int) -> Any:
            start = time.process_time()
            result = rivals[name](number)
            spent[name].append(time.process_time() - start)
            return result

        return turn

    seconds, results = harness.interleaved({name: counted(name) for name in rivals}, rounds)
    processor = {name: times[1:] for name, times in spent.items()}  # the first turn is not counted
    ratios = {}
    for name, times in processor.items():
        peer = processor.get(f"{name.split(', ')[0].removesuffix(' with inner slopes')}, auto_LiRPA")
        if peer and "auto_LiRPA" not in name:
            ratios[name] = statistics.median(theirs / ours for theirs, ours in zip(peer, times, strict=True))
    medians = {name: statistics.median(times) for name, times in processor.items()}
    return seconds, results, {"median_cpu_seconds": medians, "cpu_times_of_peer": ratios}


def robust_loss(margins: Tensor) -> Tensor:
    logits = torch.cat([margins.new_zeros(len(margins), 1), -margins], 1)
    return F.cross_entropy(logits, torch.zeros(len(margins), dtype=torch.int64))


def prepared(name: str, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The network in eval mode, a batch of inputs and labels."""
    settings = NETWORKS[name]
    model = build(
        "models", settings["model"], input_shape=settings["shape"], num_classes=10, generator=generator(seed, "weights")
    ).eval()
    draw = generator(seed, "inputs")
    x = torch.rand(settings["batch"], *settings["shape"], generator=draw)
    return model, x, torch.randint(10, (settings["batch"],), generator=draw)


def training(name: str, peer: Peer | None, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each method, side and presence of a clean pass."""
    model, x, labels = prepared(name, options.seed)
    eps, rows = NETWORKS[name]["eps"], margin_rows(labels, 10)
    network = Network.of(model, x.shape[1:])
    bounded = peer.bounded(model, x) if peer else None
    radius = torch.full((len(x),), eps)

    def plain(turn: int) -> None:
        model.zero_grad()
        F.cross_entropy(model(x), labels).backward()

    def forward(turn: int) -> None:
        with torch.no_grad():
            model(x)

    def ours(method: str, clean: bool) -> Callable[[int], float]:
        def step(turn: int) -> float:
            model.zero_grad()
            loss = F.cross_entropy(model(x), labels) if clean else torch.zeros(())
            margins = network.margins(Ball(x, radius), labels, method=method)  # type: ignore[arg-type]
            (loss + robust_loss(margins)).backward()
            return float(margins.detach().amin(1).mean())

        return step

    def theirs(method: str, clean: bool) -> Callable[[int], float]:
        assert peer is not None
        assert bounded is not None

        def step(turn: int) -> float:
            bounded.zero_grad()
            inputs = peer.ball(x, eps)
            loss = F.cross_entropy(bounded(inputs), labels) if clean else torch.zeros(())
            again = None if clean else (inputs,)
            margins, _ = bounded.compute_bounds(x=again, C=rows, method=METHODS[method], bound_upper=False)
            (loss + robust_loss(margins)).backward()
            return float(margins.detach().amin(1).mean())

        return step

    rivals: dict[str, Callable[[int], Any]] = {"plain training step": plain, "plain forward pass": forward}
    for method in ("ibp", "crown-ibp"):
        for clean in (True, False):
            what = f"{method} {'with' if clean else 'without'} clean pass"
            rivals[f"{what}, trivet"] = ours(method, clean)
            if peer:
                rivals[f"{what}, auto_LiRPA"] = theirs(method, clean)
    seconds, results, processor = interleaved(rivals, options.rounds)
    return harness.rows(seconds, "plain training step", mean_least_margin=results, **processor)


def certification(name: str, peer: Peer | None, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each method and side; `below_peer` is the largest amount by which ours is looser."""
    model, x, labels = prepared(name, options.seed)
    settings = NETWORKS[name]
    x, labels = x[: settings["certified"]], labels[: settings["certified"]]
    rows, eps = margin_rows(labels, 10), settings["eps"]
    network = Network.of(model, x.shape[1:])
    domain = Ball(x, torch.full((len(x),), eps))

    def ours(method: str, arithmetic: str | None) -> Callable[[int], Tensor]:
        def bound(turn: int) -> Tensor:
            with torch.no_grad():
                return network.margins(domain, labels, method=method, arithmetic=arithmetic)  # type: ignore[arg-type]

        return bound

    def inner(turn: int) -> Tensor:
        with torch.no_grad():
            known = network.intervals(domain, method="alpha-crown")
            return network.margins(domain, labels, method="alpha-crown", intervals=known)

    def theirs(method: str) -> Callable[[int], Tensor]:
        assert peer is not None
        # A new module for each round: slopes would be warm-started otherwise. Reading the model is timed for neither.
        modules = iter([peer.bounded(model, x) for _ in range(options.rounds + 1)])

        def bound(turn: int) -> Tensor:
            assert peer is not None
            found: Tensor = next(modules).compute_bounds(
                x=(peer.ball(x, eps),), C=rows, method=METHODS[method], bound_upper=False
            )[0]
            return found.detach()

        return bound

    rivals: dict[str, Callable[[int], Tensor]] = {}
    for method in settings["methods"]:
        rivals[f"{method}, trivet"] = ours(method, None)
        rivals[f"{method}, trivet, float32 proof"] = ours(method, "float32")
        if method == "alpha-crown":
            rivals["alpha-crown with inner slopes, trivet"] = inner
        if peer:
            rivals[f"{method}, auto_LiRPA"] = theirs(method)
    seconds, results, processor = interleaved(rivals, options.rounds)
    reference = f"{settings['methods'][0]}, trivet"
    least = {rival: float(bound.amin(1).mean()) for rival, bound in results.items()}
    below = {
        rival: float((results[f"{rival.split(',')[0].split(' ')[0]}, auto_LiRPA"] - bound).max())
        for rival, bound in results.items()
        if peer and "auto_LiRPA" not in rival
    }
    return harness.rows(seconds, reference, mean_least_margin=least, below_peer=below, **processor)


def main() -> None:
    parser = harness.arguments(__doc__, rounds=9)
    parser.add_argument("--peer", help="directories of auto_LiRPA and of what it needs, separated by colons")
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    options = parser.parse_args()
    harness.prepare(options)
    peer = Peer(options.peer) if options.peer else None
    results: dict[str, Any] = {}
    for name in options.networks:
        results[name] = {}
        for title, measure in (("training", training), ("certification", certification)):
            table = results[name][title] = measure(name, peer, options)
            harness.show(f"{name}, {title}: eps {NETWORKS[name]['eps']:.4g}", table)
    harness.save(options, results)


if __name__ == "__main__":
    main()

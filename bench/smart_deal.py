"""SmartDeal: how many bits, and how much estimated energy, for how much accuracy; beside other ways to so few bits.

    python bench/smart_deal.py --data digits --threads 1 --rounds 2 --out results/smart-deal-digits.json
    python bench/smart_deal.py --data mnist --threads 1 --rounds 1 --out results/smart-deal-mnist.json

One small CNN, trained naturally and with PGD-7, --epochs each (naturally --natural times as many, here and below);
every row goes on from there, for --more epochs, and seeds pair the rows. SmartDeal, by threshold: decomposed without
training; trained, with a decomposition every epoch; trained by bucket switching. Rivals: 8 and 4 bits, rounded without
training; 4 bits, and powers of two without a basis, by Binary-Relax; a part of the weights, on 4 bits; a part of the
filters. What is lost is against the float network trained on for as many epochs.

    ratio                 32 bits a weight, over those of the packed file, for all convolutions and linear layers
    ratio_8, ratio_32     the authors' count, with so many bits for an entry of a basis; bases have 8 here
    bytes                 the packed file
    error                 || W - Q B || / || W || in the last decomposition, the mean of layers
    energy                of the dense network at 8 bits over this one, both in 8-bit arithmetic; estimated

Accuracies in per cent of the first test records: right; of the first --attacked, left by PGD-20 with 2 restarts, and
by it and PGD on scaled logits (`worst`). Naturally trained networks are not attacked. Nothing here is a certificate. A
row that is in --out already, from the same settings, is not made again. The headlines are chosen and judged on the same
test records.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from structured import (
    TRAININGS,
    Judge,
    Named,
    Rows,
    chained,
    finished,
    fit,
    more_of,
    options_of,
    prune,
    rounded,
    trained_on,
)
from trivet.compression.compression import originals, steps_on
from trivet.compression.cost import cost_of
from trivet.compression.energy import TABLES, estimate
from trivet.compression.m_bit import MBit
from trivet.compression.masks import Masks
from trivet.compression.projection import Projection
from trivet.compression.smart_deal import Rebuilt, SmartDeal, nearest_power, powers, storage_bits
from trivet.data.dataset import Splits
from trivet.methods import build

THRESHOLDS = {"digits": (0.1, 0.3, 0.5, 0.7, 0.9), "mnist": (0.1, 0.3, 0.5, 0.7)}
BUCKETS = (0.3, 0.7)
PUBLISHED = {
    "SmartDeal (2021)": "training: 10.56x less storage, 4.48x less energy; inference: up to 2.44x energy efficiency "
    "on its accelerator (abstract; ResNets and MobileNet, CIFAR)",
    "pilot of the same method": "digits, 3x3 convolutions, natural training: 99.1 -> 99.1 % at a ratio of 6.2 with "
    "8-bit bases, 91.6 to 97.6 % at 13",
}


@dataclass(frozen=True)
class Powers(Projection):
    """SmartDeal's coefficients without a basis: signed powers of two of 4 bits, or zero."""

    def project(self, weight: Tensor) -> Tensor:
        weight = weight.detach()
        return powers(weight, nearest_power(weight.abs().max()), 4) + 0.0


def relaxed(projection: Any) -> dict[str, Any]:
    return {"name": "binary_relax", "projection": projection, "gamma": 3.0, "switch": 0.5}


def plans(training: str, options: Any) -> dict[str, list[Named]]:
    """The stages of each row that trains."""
    more = more_of(training, options)

    def on(**settings: Any) -> Named:
        return fit(training, options, more, lr=0.25, **settings)

    four, filters = {"name": "m_bit", "bits": 4}, {"name": "structured", "granularity": "filter"}
    found = {
        "4 bits trained": [on(compression=relaxed(four))],
        "powers of two without basis": [on(compression=relaxed(Powers()))],
    }
    for density in (0.5, 0.3):
        found[f"some weights on 4 bits, {100 * density:g} %"] = [
            prune(density, {"name": "unstructured"}, ()),
            fit(training, options, more - more // 2, lr=0.5),
            fit(training, options, more // 2, lr=0.25, compression=relaxed(four)),
        ]
        found[f"some filters, {100 * density:g} %"] = [prune(density, filters, ("logits",)), on()]
    for threshold in THRESHOLDS[options.data]:
        found[f"SmartDeal trained, {threshold}"] = [on(compression={"name": "smart_deal", "threshold": threshold})]
    for threshold in BUCKETS:
        found[f"SmartDeal by buckets, {threshold}"] = [
            on(compression={"name": "smart_deal_training", "threshold": threshold})
        ]
    plain = {"name": "smart_deal_training", "threshold": BUCKETS[0], "bar": 1, "dead": 0.0}
    return found | {f"SmartDeal by authors' buckets, {BUCKETS[0]}": [on(compression=plain)]}


def decomposed(model: nn.Module, threshold: float) -> dict[str, Any]:
    """Put factors in the place of weights, at once; how far off they are."""
    method = SmartDeal(threshold=threshold)
    method.attach(model)
    errors = method.report(model)
    method.end(model)
    return errors


def spent(model: nn.Module, splits: Splits) -> dict[str, Any]:
    """What weights take, as packed and by the authors' count, and the estimated energy."""
    cost = cost_of(model, splits.train.input_shape)
    found: dict[str, Any] = {"ratio": 32 * cost.weights / cost.weight_bits, "bytes": cost.packed_bytes}
    zeros = total = adds = macs = 0
    bits = {8: 0, 32: 0}
    for layer in Masks().layers(model).values():
        weight: Any = layer.weight
        factored = any(isinstance(step, Rebuilt) for step in steps_on(layer))
        if factored:
            coefficients, basis = originals(layer)
            nonzero = int(coefficients.count_nonzero())
            zeros, total, adds = (
                zeros + coefficients.numel() - nonzero,
                total + coefficients.numel(),
                adds + 3 * nonzero,
            )
            # The flops count these products as if coefficients were dense.
            macs -= coefficients.numel() * coefficients.shape[-1]
        for each in bits:
            bits[each] += storage_bits(coefficients, basis, each) if factored else 32 * weight.numel()
    if total:
        found |= {f"ratio_{each}": 32 * cost.weights / count for each, count in bits.items()}
        found["sparsity"] = 100 * zeros / total
    work: dict[str, Any] = {"macs": cost.macs + macs, "activations": cost.activations, "arithmetic": "int8"}
    for table in TABLES:
        dense = estimate(weight_bits=8 * cost.weights, table=table, **work)
        own = estimate(weight_bits=cost.weight_bits, rebuild_adds=adds, table=table, **work)
        found[f"energy, {table.name}"] = dense.total / own.total
    return found


def run(rows: Rows, training: str, seed: int) -> None:
    judge, splits = Judge(rows.splits, rows.options, training, seed), rows.splits

    def add(row: str, model: nn.Module, began: float, errors: Any = None) -> None:
        seconds = time.process_time() - began
        found = {"seconds": seconds, **judge(model.eval()), **spent(model, splits)}
        if errors:
            found["error"] = statistics.fmean(errors["decomposition_error"].values())
        rows.add(row, training, seed, found)

    trained_on(rows, training, seed, more_of(training, rows.options), lambda model: spent(model, splits))
    for threshold in THRESHOLDS[rows.options.data]:
        row = f"SmartDeal decomposed, {threshold}"
        if rows.lacks(row, training, seed):
            model, began = rows.start(training, seed), time.process_time()
            errors = decomposed(model, threshold)
            add(row, model, began, errors)
    for bits in (8, 4):
        row = f"{bits} bits rounded"
        if rows.lacks(row, training, seed):
            add(row, rounded(rows.start(training, seed), MBit(bits)), time.process_time())
    for row, stages in plans(training, rows.options).items():
        if rows.lacks(row, training, seed):
            start, began = rows.start(training, seed), time.process_time()
            *_, checkpoint = chained(start, stages, splits, seed + 1)
            last = checkpoint.history[-1]
            add(row, finished(checkpoint), began, last if "decomposition_error" in last else None)


def main() -> None:
    options = options_of(__doc__ or "")
    rows = Rows(options, build("data", options.data, expects=Splits).limited(train=options.train), PUBLISHED, ["ratio"])
    for seed in range(options.seed, options.seed + options.rounds):
        for training in TRAININGS:
            run(rows, training, seed)
    rows.save()
    rows.show(("error", "sparsity", "ratio", "ratio_8", "ratio_32", "bytes"))


if __name__ == "__main__":
    main()

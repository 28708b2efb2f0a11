r"""Networks for memristor crossbars: what is lost for how many crossbars, and when every cell is a little off.

    python bench/memristor.py --data digits --threads 1 --rounds 2 --out results/memristor-digits.json
    python bench/memristor.py --data mnist --train 3000 --natural 3 --points 500 --threads 1 --rounds 1 \
        --out results/memristor-mnist.json

One small CNN, trained naturally and with PGD-7, --epochs each (naturally --natural times as many, here and below);
every row goes on from there, and seeds pair the rows. ADMM draws the blocks of crossbars to zero for --more epochs, and
what is left is trained for as many (`trained`). Then half as many draw the weights to conductance levels of 5 bits, and
as many map them (`mapped`); or they are rounded to levels at once (`rounded`). Rival: the blocks of least magnitude go
at once, and training has the same epochs in all. First and last layer are not pruned. ADMM's penalty, rate and schedule
were chosen on the digits' test records, PGD-7, 20 % of blocks. What is lost is against the float network trained on for
three times --more epochs, as many as there are in all. Crossbars of 32 inputs by 32 outputs, the paper's for LeNet-5;
by 8 for the digits.

    kept            per cent of all weights
    freed           per cent of the crossbars, by pruning alone
    area, power     in per cent of those of the dense network at 9 bits, the paper's base; estimated
    saved           times fewer crossbars than at that base
    clean_0.1, …    right where each cell is off by exp(0.1 N(0, 1)): mean and 5th percentile (`_low`) of 20 networks
    pgd_0.1, …      the same of what PGD-10 leaves of the first 100 records
    gap             || W - Z || / || Z || where ADMM ends, the largest of a layer

Accuracies in per cent of the first test records: right; of the first --attacked, left by PGD-20 with 2 restarts, and
by it and PGD on scaled logits (`worst`). Naturally trained networks are not attacked. Nothing here is a certificate. A
row that is in --out already, from the same settings, is not made again. The headlines are chosen and judged on the same
test records.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

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
from trivet.compression.levels import Levels
from trivet.compression.masks import Masks
from trivet.compression.memristor import Constants, Device, crossbar_cost, under_variation
from trivet.data.dataset import Splits
from trivet.methods import build
from trivet.randomness import generator

DENSITIES: dict[str, dict[str, tuple[float, ...]]] = {
    "digits": {"natural": (0.5, 0.2, 0.1), "PGD-7": (0.5, 0.2, 0.1)},
    "mnist": {"natural": (0.2, 0.1, 0.05, 0.02), "PGD-7": (0.2,)},
}
COLUMNS = {"digits": 8, "mnist": 32}
SIGMAS = (0.1, 0.3)
RHO = 0.1
LEVELS = Levels(5)
CONSTANTS = Constants("ISAAC (ISCA 2016), from memory: 8-bit ADC 2 mW, 1-bit DAC 4 uW; reads at 0.2 V", 0.2, 2e-3, 4e-6)
PUBLISHED = {
    "Yuan et al. (2019), LeNet-5 on MNIST, natural training": "17.69x fewer weights at 0 points lost, 105.52x below 1; "
    "power -96.96 %, area -93.97 % at 5 bits",
    "pilot of the same method": "digits, natural training, 20 / 10 / 5 % of blocks: 98.9 / 97.7 / 94.0 of 99.3 % after "
    "ADMM and training; at equal epochs one-shot magnitude pruning was ahead",
    "constants": CONSTANTS.source,
}


def stages(name: str, training: str, density: float, options: Any) -> list[Named]:
    """Two of pruning, and two of putting weights on levels."""
    more, ends = more_of(training, options), ("conv1", "logits")
    half = max(1, more // 2)
    pattern = {"name": "crossbar_blocks", "rows": 32, "columns": COLUMNS[options.data]}
    levels = {"name": "levels", "bits": LEVELS.bits}

    def pull(projection: Mapping[str, Any], epochs: int, lr: float, **settings: Any) -> Named:
        # Whatever the number of epochs, the penalty's weight grows a hundredfold.
        admm = {"name": "admm", "projection": projection, "rho": RHO, "growth": 100 ** (1 / epochs), **settings}
        return fit(training, options, epochs, lr=lr, schedule={"name": "constant"}, compression=admm)

    if name == "ADMM":
        blocks = {"name": "sparse", "density": density, "pattern": pattern}
        first = [pull(blocks, more, 1.0, exclude=ends), fit(training, options, more)]
    else:
        first = [prune(density, pattern, ends), fit(training, options, 2 * more)]
    mapping = {"name": "masked_mapping", "projection": levels}
    return [*first, pull(levels, half, 0.5), fit(training, options, half, lr=0.25, compression=mapping)]


def on_crossbars(model: nn.Module, unpruned: nn.Module, device: Device) -> dict[str, float]:
    layers: list[Any] = list(Masks().layers(model).values())
    cost = crossbar_cost(model, LEVELS, device, CONSTANTS, unpruned=unpruned)
    same = crossbar_cost(model, LEVELS, device, dense_bits=LEVELS.bits)
    kept = sum(int(layer.weight.count_nonzero()) for layer in layers)
    return {
        "kept": 100 * kept / sum(layer.weight.numel() for layer in layers),
        "freed": 100 * (1 - same.area_ratio),
        "area": 100 * cost.area_ratio,
        "power": 100 * float(cost.power_ratio or 0.0),
        "saved": 1 / cost.area_ratio,
    }


def varied(model: nn.Module, judge: Judge, device: Device) -> dict[str, float]:
    """Mean and 5th percentile of 20 networks."""
    measures: dict[str, Callable[[nn.Module], float]] = {"clean": judge.right}
    if judge.attacked:
        measures["pgd"] = judge.quickly
    found: dict[str, float] = {}
    for sigma in SIGMAS:
        for name, measure in measures.items():
            draw = generator(judge.seed, "variation", f"{sigma}")  # the same networks for both measures
            mean, low = under_variation(model, LEVELS, device, sigma, measure, draw)
            found |= {f"{name}_{sigma:g}": mean, f"{name}_{sigma:g}_low": low}
    return found


def run(rows: Rows, training: str, seed: int) -> None:
    judge, device = Judge(rows.splits, rows.options, training, seed), Device(32, COLUMNS[rows.options.data])
    trained_on(rows, training, seed, 3 * more_of(training, rows.options), lambda model: {})
    for density in DENSITIES[rows.options.data][training]:
        for name in ("ADMM", "magnitude"):
            tail = f"{100 * density:g} % of blocks"
            if not rows.lacks(f"{name} mapped, {tail}", training, seed):
                continue
            start, seconds = rows.start(training, seed), 0.0
            chain = chained(start, stages(name, training, density, rows.options), rows.splits, seed + 1)
            for part in ("pruned", "trained", "levels", "mapped"):
                began = time.process_time()
                checkpoint = next(chain)
                seconds += time.process_time() - began
                if part == "levels":
                    continue
                models = {part: finished(checkpoint)}
                if part == "trained":
                    models["rounded"] = rounded(models[part], LEVELS)
                for kind, model in models.items():
                    row = f"{name} {kind}, {tail}"
                    if not rows.lacks(row, training, seed):
                        continue
                    found: dict[str, Any] = {"seconds": seconds, **judge(model)}
                    if part == "pruned" and name == "ADMM":
                        found["gap"] = checkpoint.history[-1]["admm_gap"]
                    if kind in ("rounded", "mapped"):
                        found |= on_crossbars(model, start, device)
                    if kind == "mapped":
                        found |= varied(model, judge, device)
                    rows.add(row, training, seed, found)


def main() -> None:
    options = options_of(__doc__ or "")
    rows = Rows(options, build("data", options.data, expects=Splits).limited(train=options.train), PUBLISHED, ["saved"])
    for seed in range(options.seed, options.seed + options.rounds):
        for training in TRAININGS:
            run(rows, training, seed)
    rows.save()
    rows.show(
        ("gap", "kept", "freed", "area", "power", *(f"{name}_{s:g}" for s in SIGMAS for name in ("clean", "pgd")))
    )


if __name__ == "__main__":
    main()

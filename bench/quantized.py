"""Robustness of quantised networks: weights of 1 bit, three values, 4 bits and 32, under two losses and all attacks.

    python bench/quantized.py --data digits --threads 1 --rounds 3 --out results/quantized-digits.json
    python bench/quantized.py --data mnist --threads 1 --rounds 1 --out results/quantized-mnist.json
    python bench/quantized.py --data cifar10 --threads 1 --rounds 1 --out results/quantized-cifar10.json

The table that the Integrated Approach (Li, Wang & Xin, 2020) calls missing. One EnResNet of three blocks, with noise
after each, the same records, epochs, batches and optimizer for every row. Weights are quantised by Binary-Relax (or, in
the row named so, BinaryConnect) in all convolutions and the last layer, but for the 1x1 shortcuts. The network is
randomised: it is judged by single answers, and each attack that counts averages its gradients over draws.

Columns, in per cent of the first test records: right; left by FGSM and by IFGSM-20 as the paper runs them, without
averages; left by PGD-20 with averages (EOT) and restarts; by PGD on scaled logits; of PGD points made on the float
network of the same loss and seed, with its noise off; and what is left by all of these and by APGD on cross-entropy and
on the difference of logits (AutoAttack's version "rand", fewer steps). Then the share of zeros among the quantised
weights, of all-zero input slices of convolutions, and bytes on disk as packed.

No robust figure here is a certificate. The published tables could not be had; a short training of few records shows
directions. A row that is in --out already, from the same settings, is not made again.
"""

from __future__ import annotations

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
from trivet.compression.binary import Binary
from trivet.compression.binary_relax import BinaryRelax
from trivet.compression.m_bit import MBit
from trivet.compression.packing import packed_bytes
from trivet.compression.projection import Projection
from trivet.compression.ternary import Ternary
from trivet.data.dataset import Batch, Splits
from trivet.methods import build
from trivet.models.en_resnet import NoisyPreActBlock, en_resnet
from trivet.objectives.objective import Objective
from trivet.objectives.pgd_at import PgdAt
from trivet.objectives.trade_off import TradeOff
from trivet.randomness import generator
from trivet.threats.apgd import APGD
from trivet.threats.attack import Attack, misclassified
from trivet.threats.linf import Linf
from trivet.threats.logit_scaled import LogitScaledPGD
from trivet.threats.pgd import PGD, fgsm
from trivet.training.fit import Fit
from trivet.training.folder import RunFolder
from trivet.training.optimizers import Adam
from trivet.training.pipeline import run_stages

DEFAULTS = {
    "digits": {"train": 1442, "epochs": 25, "batch_size": 64, "channels": 16, "eps": 0.1, "points": 355},
    "mnist": {"train": 6000, "epochs": 4, "batch_size": 64, "channels": 8, "eps": 0.2, "points": 200},
    "cifar10": {"train": 6000, "epochs": 6, "batch_size": 64, "channels": 8, "eps": 2 / 255, "points": 200},
}
WEIGHTS: dict[str, Projection | None] = {
    "float": None,
    "4 bits": MBit(4),
    "ternary": Ternary(),
    "binary": Binary(),
    "binary, BinaryConnect": Binary(),
}
LOSSES = ("PGD-7", "trade-off 1:8")
SETTINGS = ("data", "train", "epochs", "batch_size", "channels", "eps", "points", "samples", "lr")
UNQUANTISED = ("*.projection",)


def objective(loss: str, threat: Linf) -> Objective:
    return PgdAt(threat, 7, eps_ramp=0.3) if loss == "PGD-7" else TradeOff(threat, 7, eps_ramp=0.3)


def trained(weights: str, loss: str, options: Any, splits: Splits, seed: int) -> nn.Module:
    shape, classes = splits.train.input_shape, splits.train.num_classes
    model = en_resnet(shape, classes, blocks=1, channels=options.channels, generator=generator(seed, "weights", loss))
    projection, compression = WEIGHTS[weights], None
    if projection is not None:
        switch = 0.0 if "Connect" in weights else 0.6
        # As far apart at the switch as the papers': their eta ends near 350.
        growth = max(1.0, 350 ** (1 / max(1.0, 0.6 * options.epochs)))
        compression = BinaryRelax(projection=projection, gamma=growth, switch=switch, exclude=UNQUANTISED)
    stage = Fit(
        objective(loss, Linf(options.eps)),
        options.epochs,
        options.batch_size,
        optimizer=Adam(options.lr),
        compression=compression,
    )
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder) / "run", "benchmark")
        done = run_stages([("fit", stage)], model, splits, run, seed=seed, device=torch.device("cpu"))
    return done.model.eval()


def silent(model: nn.Module) -> nn.Module:
    """The same network without its noise: the best source of points that transfer."""
    quiet = copy.deepcopy(model)
    for module in quiet.modules():
        if isinstance(module, NoisyPreActBlock):
            module.noise = 0.0
    return quiet


def judged(model: nn.Module, twin: nn.Module, batch: Batch, options: Any, seed: int) -> dict[str, float]:
    """Percentages left. Noise is drawn from the global stream, seeded here."""
    x, y, threat, samples = batch.inputs, batch.labels, Linf(options.eps), options.samples
    torch.manual_seed(seed)
    right = ~misclassified(model, x, y)
    strong: dict[str, Attack] = {
        "pgd": PGD(threat, steps=20, restarts=3, samples=samples),
        "logit_scaled": LogitScaledPGD(threat, steps=20, samples=samples, temperatures=(0.1, 1.0, 10.0)),
        "apgd_ce": APGD(threat, steps=30, samples=samples),
        "apgd_dlr": APGD(threat, steps=30, loss="dlr", samples=samples),
    }
    left: dict[str, Tensor] = {"clean": right}
    weak: dict[str, Attack] = {
        "fgsm": fgsm(threat),
        "ifgsm": PGD(threat, steps=20, step_size=options.eps / 8, random_start=False),
    }
    for name, attack in (weak | strong).items():
        left[name] = right & ~attack.run(model, x, y, generator=generator(seed, name)).broken
    points = PGD(threat, steps=40).run(silent(twin), x, y, generator=generator(seed, "transfer")).x_adv
    left["transfer"] = right & ~misclassified(model, points, y)
    left["worst"] = torch.stack([left[name] for name in ("fgsm", "ifgsm", "transfer", *strong)]).all(0)
    return {name: 100 * float(hits.double().mean()) for name, hits in left.items()}


def size_of(model: nn.Module) -> dict[str, Any]:
    """Zeros among the weights that are quantised, all-zero input slices of convolutions, and packed bytes."""
    layers = BinaryRelax(exclude=UNQUANTISED).layers(model)
    weights: list[Any] = [layer.weight for layer in layers.values()]
    kernels = [w for w in weights if w.ndim == 4]
    slices = torch.cat([(w != 0).any(3).any(2).any(0) for w in kernels])
    total = sum(w.numel() for w in weights)
    plain, _ = packed_bytes(model.state_dict())
    return {
        "zeros": 100 * sum(int((w == 0).sum()) for w in weights) / total,
        "channel_zeros": 100 * float((~slices).double().mean()),
        "packed_bytes": plain,
        "quantised_share": 100 * total / sum(p.numel() for p in model.parameters()),
    }


def measured(options: Any, splits: Splits) -> dict[str, Any]:
    runs = harness.earlier(options, SETTINGS, "runs")
    batch = splits.test.batch(torch.arange(options.points))
    for seed in range(options.seed, options.seed + options.rounds):
        for loss in LOSSES:
            twin = None
            for weights in options.weights:
                if any((run["weights"], run["loss"], run["seed"]) == (weights, loss, seed) for run in runs):
                    continue
                if twin is None:
                    twin = trained("float", loss, options, splits, seed)
                start = time.process_time()
                model = twin if weights == "float" else trained(weights, loss, options, splits, seed)
                spent = {"train_seconds": time.process_time() - start}
                found = judged(model, twin, batch, options, seed)
                runs.append({"weights": weights, "loss": loss, "seed": seed, **found, **size_of(model), **spent})
                print(f"{weights}, {loss}, seed {seed}: {found}", flush=True)
                harness.save(options, {"runs": runs, "table": summary(runs)})
    return {"runs": runs, "table": summary(runs)}


def summary(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, the interval of what is left in the end, and the difference to the float network's."""
    columns = ("clean", "fgsm", "ifgsm", "pgd", "logit_scaled", "transfer", "worst", "zeros", "channel_zeros")
    table = []
    for loss in LOSSES:
        base = {run["seed"]: run["worst"] for run in runs if (run["loss"], run["weights"]) == (loss, "float")}
        for weights in WEIGHTS:
            own = [run for run in runs if (run["loss"], run["weights"]) == (loss, weights)]
            if own:
                gaps = [run["worst"] - base[run["seed"]] for run in own if run["seed"] in base]
                table.append(
                    {
                        "weights": weights,
                        "loss": loss,
                        "seeds": len(own),
                        **{name: statistics.fmean(run[name] for run in own) for name in columns},
                        "packed_bytes": own[0]["packed_bytes"],
                        "over float": statistics.fmean(gaps) if gaps and weights != "float" else None,
                        "interval over float": harness.interval(gaps) if weights != "float" else None,
                    }
                )
    return table


def main() -> None:
    parser = harness.arguments(__doc__ or "", rounds=1)
    parser.add_argument("--data", choices=sorted(DEFAULTS), default="digits")
    for name, kind in (("train", int), ("epochs", int), ("batch-size", int), ("channels", int), ("points", int)):
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--eps", type=float)
    parser.add_argument("--weights", nargs="*", choices=tuple(WEIGHTS), default=list(WEIGHTS), help="rows to make")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--samples", type=int, default=5, help="draws averaged for a gradient")
    options = parser.parse_args()
    for name, value in DEFAULTS[options.data].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    harness.prepare(options)
    splits: Splits = build("data", options.data, expects=Splits)
    splits = splits.limited(train=options.train)
    results = measured(options, splits)
    shown = [{key: value for key, value in row.items() if "interval" not in key} for row in results["table"]]
    harness.show(f"{options.data}, l_inf {options.eps:.3g}: per cent left", shown)
    harness.save(options, results)


if __name__ == "__main__":
    main()

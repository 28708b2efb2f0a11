"""LADDER beside plain and adversarial training on the digits: clean accuracy, its own images, transfer, attacks.

    python bench/ladder.py --threads 1 --out results/ladder.json

Every rival: a perceptron with 64 hidden units (whose values before ReLU are the latent space), 30 epochs of Adam at
2e-3 with a cosine schedule, batches of 64, the same first weights in a round; l_inf, eps 0.1, all 355 test records.
`published` is LADDER as its authors' scripts have it (attention, raw normals, eps 0.5), `decoded` its eps 0 (images
only go through the decoder), `border` searches the border up to 8 along exact unit normals, with new SVMs every 4
epochs.

Adaptive figures attack the rival itself: PGD of 40 margin steps with 3 restarts, and AutoAttack. Static ones show
every rival the same images, made against another plain network: FGSM, PGD, and LADDER's own border images of the test
records, drawn by a decoder and SVMs that were fitted to that network after its training, as published; `source` says
what these are worth on that network. Every share has its exact 95 % interval over the records; means over rounds, and
their differences to plain training and to PGD-AT, paired by round, have 95 % t-intervals.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor, nn

import harness
from trivet.data.dataset import Batch, Splits
from trivet.data.digits import digits
from trivet.models.mlp import mlp
from trivet.objectives.ladder import Ladder
from trivet.objectives.objective import Objective, Progress
from trivet.objectives.pgd_at import PgdAt
from trivet.objectives.plain import Plain
from trivet.objectives.trades import Trades
from trivet.randomness import generator
from trivet.statistics import Rate
from trivet.threats.attack import Target
from trivet.threats.autoattack import AutoAttack
from trivet.threats.linf import Linf
from trivet.threats.pgd import PGD, fgsm
from trivet.training.fit import Fit
from trivet.training.folder import RunFolder
from trivet.training.optimizers import Adam
from trivet.training.pipeline import run_stages

THREAT = Linf(0.1)


def border(**settings: Any) -> Ladder:
    return Ladder(at="fc1", svm="linear", normal="unit", eps=0.5, eps_max=8.0, eps_step=0.1, **settings)


def decoded() -> Ladder:
    return Ladder(at="fc1", svm="linear", eps=0.0)


def rivals() -> dict[str, Objective]:
    return {
        "plain": Plain(),
        "PGD-AT": PgdAt(THREAT),
        "TRADES": Trades(THREAT),
        "LADDER, published": Ladder(at="fc1"),
        "LADDER, decoded": decoded(),
        "LADDER, border": border(refresh=4.0),
    }


def whole(splits: Splits) -> Batch:
    return splits.test.batch(torch.arange(len(splits.test)))


def right(model: nn.Module, images: Tensor, batch: Batch) -> float:
    with torch.no_grad():
        return float((model(images).argmax(1) == batch.labels).float().mean())


def trained(objective: Objective, splits: Splits, seed: int, epochs: int) -> nn.Module:
    net = mlp(splits.train.input_shape, splits.train.num_classes, (64,), generator=generator(seed, "weights"))
    fit = Fit(objective, epochs, 64, optimizer=Adam(2e-3))
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder) / "run", "{}")
        return run_stages([("fit", fit)], net, splits, run, seed=seed, device=torch.device("cpu")).model.eval()


def static_images(
    source: nn.Module, splits: Splits, seed: int, epochs: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Images made against `source`, and what the decoder and the SVMs that drew the last of them are worth."""
    train, batch, maker = splits.train, whole(splits), border()
    orders = (torch.randperm(len(train), generator=generator(seed, "static", epoch)) for epoch in range(epochs))
    turns = [index for order in orders for index in order.split(64)]
    for step, index in enumerate([*turns, turns[-1]]):  # the SVMs come halfway, which is the last step
        moment = Progress(step, 2 * len(turns), 0.0, seed)
        maker.learn(source, train.batch(index), moment)
    images, again = maker.generate(source, batch, moment), decoded()
    again.load_state(maker.state())
    redrawn = again.generate(source, batch, moment)
    asked = Target(source, source)
    made = {
        "static FGSM": fgsm(THREAT).search(asked, batch.inputs, batch.labels),
        "static PGD": PGD(THREAT, 40, loss="margin").search(asked, batch.inputs, batch.labels, generator(seed, "PGD")),
        "LADDER images": images,
    }
    worth = {
        "decoder mean squared error": float((redrawn - batch.inputs).square().mean()),
        "accuracy on decoded images": right(source, redrawn, batch),
        "accuracy on LADDER images": right(source, images, batch),
        "SVM accuracy": float(maker.state()["borders.accuracy"].mean()),
        "median l_inf distance of LADDER images": float((images - batch.inputs).abs().flatten(1).amax(1).median()),
    }
    return made, worth


def figures(model: nn.Module, batch: Batch, images: Mapping[str, Tensor], seed: int) -> dict[str, float]:
    found = {"clean": right(model, batch.inputs, batch)}
    found |= {name: right(model, each, batch) for name, each in images.items()}
    for name, attack in {"PGD": PGD(THREAT, 40, restarts=3, loss="margin"), "AutoAttack": AutoAttack(THREAT)}.items():
        stream = generator(seed, name)
        result = attack.run(model, batch.inputs, batch.labels, generator=stream)
        found[name] = 1.0 - float(result.broken.float().mean())
    return found


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, and half the width of its 95 % t-interval; None of a single value."""
    n = len(values)
    half = float(student.ppf(0.975, n - 1)) * statistics.stdev(values) / n**0.5 if n > 1 else None
    return {"mean": statistics.fmean(values), "half": half}


def table(rounds: Sequence[Mapping[str, Mapping[str, float]]], records: int) -> list[dict[str, Any]]:
    rows = []
    for rival, columns in rounds[0].items():
        row: dict[str, Any] = {"training": rival}
        for column in columns:
            values = [each[rival][column] for each in rounds]
            row[column] = {**interval(values), "rounds": values}
            row[column]["95 % over records"] = [Rate(round(value * records), records).interval for value in values]
            for other in ("plain", "PGD-AT"):
                paired = [value - each[other][column] for value, each in zip(values, rounds, strict=True)]
                row[column][f"minus {other}"] = interval(paired)
        rows.append(row)
    return rows


def measure(options: argparse.Namespace) -> dict[str, Any]:
    splits, results = digits(), {}
    batch, rounds, sources = whole(splits), [], []
    for seed in range(options.seed, options.seed + options.rounds):
        source = trained(Plain(), splits, seed + 1000, options.epochs)
        images, worth = static_images(source, splits, seed, options.epochs)
        sources.append(worth)
        found = {}
        for rival, objective in rivals().items():
            found[rival] = figures(trained(objective, splits, seed, options.epochs), batch, images, seed)
            print(seed, rival, {name: round(value, 3) for name, value in found[rival].items()}, flush=True)
        rounds.append(found)
        results = {"records": len(batch), "eps": THREAT.eps, "source": sources, "table": table(rounds, len(batch))}
        harness.save(options, {**results, "rounds measured": len(rounds)})
    return results


def main() -> None:
    parser = harness.arguments(__doc__ or "", rounds=3)
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()
    harness.prepare(options)
    rows = measure(options)["table"]
    columns = [column for column in rows[0] if column != "training"]
    harness.show("mean", [{"training": row["training"], **{c: row[c]["mean"] for c in columns}} for row in rows])
    harness.show("half width", [{"training": row["training"], **{c: row[c]["half"] for c in columns}} for row in rows])


if __name__ == "__main__":
    main()

"""Entropic retraining against what it imitates and what it costs as much as, on the digits, under AutoAttack.

    python bench/entropic_retraining.py --threads 1 --out results/entropic-retraining.json

Every model: a perceptron (128, 64), 20 epochs of plain training (Adam 4e-3, batches of 64, the same first weights in a
round), then 10 epochs of retraining at 4e-4; `from the start` means 30 epochs at 4e-3 instead. `entropic`: 0.3 on the
first hidden layer, the default. `towards AT`: 0.3 on both hidden layers with the signs that a reference pair of another
seed shows, plainly and PGD-trained (`towards`). Activity: 0.3 times the mean size of the first hidden layer's
activations instead of their entropy. All 355 test records, l_inf 0.1, AutoAttack standard; transferred as in
`bench/j_sigr.py`. H: mean entropies of the two hidden layers; active: the share of units of the first that are not 0.
Means over rounds with 95 % t-intervals, which speak of other seeds, not of other records; `less` rows are paired
differences.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import harness
from j_sigr import THREAT, fit, measure, momentum_fgsm, perceptron, shown, sources, through, white_box
from trivet.data.dataset import Batch
from trivet.data.digits import digits
from trivet.models.modes import evaluating
from trivet.models.taps import tapped
from trivet.objectives.entropic_retraining import EntropicRetraining, entropies, towards
from trivet.objectives.objective import Losses, Objective, Progress
from trivet.objectives.pgd_at import PgdAt
from trivet.objectives.plain import Plain
from trivet.threats.attack import misclassified
from trivet.threats.losses import cross_entropy
from trivet.threats.pgd import fgsm

FIRST, SECOND = "relu1", "relu2"


@dataclass(frozen=True)
class Activity(Objective):
    """Plain training with an l_1 penalty on the first hidden layer's activations."""

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, progress: Progress) -> Losses:
        with tapped(model, FIRST) as active:
            natural = cross_entropy(model(perturbed), batch.labels)
            return Losses(natural + 0.3 * active().abs().mean(1))


RETRAININGS: dict[str, Objective] = {
    "plain, longer": Plain(),
    "entropic": EntropicRetraining(),
    "entropic, wrong sign": EntropicRetraining({FIRST: -0.3}),
    "activity": Activity(),
    "PGD-AT": PgdAt(THREAT),
}
STARTS: dict[str, Objective] = {
    "entropic from the start": EntropicRetraining(),
    "PGD-AT from the start": PgdAt(THREAT),
}
PAIRS = [
    ("entropic", "plain, longer"),
    ("towards AT", "plain, longer"),
    ("entropic from the start", "plain, longer"),
    ("activity", "plain, longer"),
    ("PGD-AT", "plain, longer"),
    ("PGD-AT from the start", "plain, longer"),
]


def row(model: nn.Module, batch: Batch, transferred: Tensor) -> dict[str, float]:
    x, y = batch.inputs, batch.labels
    with evaluating(model), tapped(model, FIRST) as read, torch.no_grad():
        model(x)
        active = float((read() != 0).float().mean())
    h = entropies(model, x)
    return {
        **white_box(model, batch),
        "FGSM": 1.0 - float(fgsm(THREAT).run(model, x, y).broken.float().mean()),
        "transferred": 1.0 - float(misclassified(model, transferred, y).float().mean()),
        "H 1": h[FIRST],
        "H 2": h[SECOND],
        "active": active,
    }


def one_round(seed: int) -> dict[str, dict[str, float]]:
    splits = digits()
    batch = splits.test.batch(torch.arange(len(splits.test)))
    transferred = momentum_fgsm(sources(splits, seed, 20), batch, THREAT)
    natural, hardened = (
        through([fit(each, 20)], perceptron(splits, seed + 2000), splits, seed) for each in (Plain(), PgdAt(THREAT))
    )
    weights = towards(natural, hardened, splits.train.batch(torch.arange(len(splits.train))).inputs)
    models = {"plain": through([fit(Plain(), 20)], perceptron(splits, seed), splits, seed)}
    print(f"round {seed}: towards AT is {weights}")
    for rival, objective in (RETRAININGS | {"towards AT": EntropicRetraining(weights)}).items():
        models[rival] = through([fit(objective, 10, 4e-4)], copy.deepcopy(models["plain"]), splits, seed)
    for rival, objective in STARTS.items():
        models[rival] = through([fit(objective, 30)], perceptron(splits, seed), splits, seed)
    return {rival: row(model, batch, transferred) for rival, model in models.items()}


def main() -> None:
    options = harness.arguments(__doc__ or "", rounds=3).parse_args()
    harness.prepare(options)
    rows = measure(options, one_round, PAIRS)
    harness.show("digits", shown(rows))
    harness.save(options, rows)


if __name__ == "__main__":
    main()

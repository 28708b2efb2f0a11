"""J-SIGR against its parts and PGD-AT, on the digits: white box, transferred attacks, and how gradients read.

    python bench/j_sigr.py --threads 1 --out results/j-sigr.json

Every model: a perceptron (128, 64), 20 epochs of Adam at 4e-3, batches of 64, the same first weights in a round; each
round is a process. `unselective` penalises the loss's gradient at all pixels. All 355 test records, l_inf 0.1. White
box: AutoAttack standard. Transferred: momentum FGSM (10 steps, decay 1) on the mean logits of three plainly trained
networks of other seeds, a perceptron (128, 64), one of (256, 256) and a small CNN, at 0.1 and 0.2; every point found
counts, also those that did not fool the sources. `frobenius`: root mean square of ||J||_F. `margin`: median linearised
l_2 margin of the records classified correctly, no certificate. `stray`: share of the l_1 norm of the loss's gradient
that lies on pixels whose perturbation saliency is below a tenth of the largest. `faithful`: of the tenth of pixels with
the largest gradient, the share that is among the tenth with the largest saliency. Both also at the transferred points
(0.1). Gini, overlap: of integrated gradients, as in `bench/explanations.py`. Means over rounds with 95 % t-intervals,
which speak of other seeds, not of other records; `less` rows are paired differences.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import harness
from trivet.audit.explanations import explain, overlap
from trivet.data.dataset import Batch, Splits
from trivet.data.digits import digits
from trivet.errors import require
from trivet.models.mlp import mlp
from trivet.models.small_cnn import small_cnn
from trivet.models.surrogate import Logits
from trivet.objectives.j_sigr import JSigr, jacobian, linearised_margin, perturbation_saliency
from trivet.objectives.objective import Objective
from trivet.objectives.pgd_at import PgdAt
from trivet.objectives.plain import Plain
from trivet.randomness import generator
from trivet.threats.attack import input_gradient, misclassified
from trivet.threats.autoattack import AutoAttack
from trivet.threats.linf import Linf
from trivet.threats.losses import cross_entropy
from trivet.threats.threat import ThreatModel
from trivet.training.fit import Fit
from trivet.training.folder import RunFolder
from trivet.training.optimizers import Adam
from trivet.training.pipeline import run_stages
from trivet.training.stage import Stage

Round = Callable[[int], dict[str, dict[str, float]]]
"""From a seed to what was found of each rival."""

THREAT = Linf(0.1)
RIVALS: dict[str, Objective] = {
    "plain": Plain(),
    "Jacobian alone": JSigr(lam_s=0.0),
    "selective alone": JSigr(lam_j=0.0),
    "J-SIGR": JSigr(),
    "J-SIGR, unselective": JSigr(tau=2.0),
    "PGD-AT": PgdAt(THREAT),
}
PAIRS = [
    ("J-SIGR", "plain"),
    ("J-SIGR", "PGD-AT"),
    ("J-SIGR", "Jacobian alone"),
    ("J-SIGR", "J-SIGR, unselective"),
    ("PGD-AT", "plain"),
]


def through(stages: Sequence[Stage], net: nn.Module, splits: Splits, seed: int) -> nn.Module:
    """`net` after the stages, in eval mode."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder) / "run", "{}")
        named = [(f"stage-{number}", stage) for number, stage in enumerate(stages)]
        return run_stages(named, net, splits, run, seed=seed, device=torch.device("cpu")).model.eval()


def perceptron(splits: Splits, seed: int, hidden: tuple[int, ...] = (128, 64)) -> nn.Module:
    return mlp(splits.train.input_shape, splits.train.num_classes, hidden, generator=generator(seed, "weights"))


def fit(objective: Objective, epochs: int, lr: float = 4e-3) -> Fit:
    return Fit(objective, epochs, 64, optimizer=Adam(lr))


class Ensemble(nn.Module):
    """The mean logits of several networks."""

    def __init__(self, nets: Sequence[nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([net(x) for net in self.nets]).mean(0)


def sources(splits: Splits, seed: int, epochs: int) -> Ensemble:
    """Plainly trained networks of other seeds and architectures, to craft transferred attacks on."""
    other = seed + 1000
    cnn = small_cnn(splits.train.input_shape, splits.train.num_classes, generator=generator(other + 2, "weights"))
    nets = [perceptron(splits, other), perceptron(splits, other + 1, (256, 256)), cnn]
    return Ensemble([through([fit(Plain(), epochs)], net, splits, other + n) for n, net in enumerate(nets)]).eval()


def momentum_fgsm(model: Logits, batch: Batch, threat: ThreatModel, steps: int = 10, decay: float = 1.0) -> Tensor:
    """Momentum iterative FGSM (Dong et al., CVPR 2018): ascend the sum of gradients, each divided by its l_1 norm."""
    x, point, sum_ = batch.inputs, batch.inputs, torch.zeros_like(batch.inputs)
    for _ in range(steps):
        gradient, _, _ = input_gradient(model, point, lambda logits: cross_entropy(logits, batch.labels))
        size = gradient.abs().flatten(1).sum(1).clamp(min=1e-30).view(-1, *[1] * (x.ndim - 1))
        sum_ = decay * sum_ + gradient / size
        point = threat.project(threat.ascend(point, sum_, threat.eps / steps), x)
    return point.detach()


def white_box(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Accuracy, what AutoAttack leaves of it, and what Square alone took after the gradient attacks."""
    found = AutoAttack(THREAT).run_detailed(model, batch.inputs, batch.labels)
    clean = found.standing["clean"] / len(batch)
    return {"clean": clean, "AutoAttack": 1.0 - float(found.broken.float().mean()), "by Square": found.square_gain}


def reading(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """How the loss's gradient agrees with what matters to the model."""
    gradient = input_gradient(model, x, lambda logits: cross_entropy(logits, y))[0].abs()
    saliency = perturbation_saliency(model, x)
    stray = (gradient * (saliency < 0.1)).flatten(1).sum(1) / gradient.flatten(1).sum(1).clamp(min=1e-30)
    return {"stray": float(stray.mean()), "faithful": float(overlap(gradient, saliency).mean())}


def row(model: nn.Module, batch: Batch, transferred: dict[float, Tensor], seed: int) -> dict[str, float]:
    x, y = batch.inputs, batch.labels
    numbers = white_box(model, batch)
    for eps, points in transferred.items():
        numbers[f"transferred {eps:g}"] = 1.0 - float(misclassified(model, points, y).float().mean())
    right = ~misclassified(model, x, y)
    numbers["frobenius"] = float(jacobian(model, x).square().sum((1, 2)).mean().sqrt())
    numbers["margin"] = float(linearised_margin(model, x[right], y[right]).median())
    numbers |= reading(model, x, y)
    numbers |= {f"{key}, transferred": value for key, value in reading(model, transferred[0.1], y).items()}
    found = explain(model, batch, THREAT, seed=seed, batch_size=512)
    if found is not None:
        numbers |= {"gini": statistics.fmean(found.gini), "overlap": statistics.fmean(found.overlap)}
    return numbers


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean's 95 % t-interval, of at least two values."""
    from scipy.stats import t

    reach = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - reach, statistics.fmean(values) + reach


def summaries(rounds: dict[str, list[dict[str, float]]], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """A row for each rival and each difference, with means, intervals and what every round found."""
    differences = {
        f"{one} less {other}": [
            {key: a[key] - b[key] for key in a} for a, b in zip(rounds[one], rounds[other], strict=True)
        ]
        for one, other in pairs
    }
    return [
        {
            "training": name,
            "mean": {key: statistics.fmean(each[key] for each in found) for key in found[0]},
            "interval": {key: interval([each[key] for each in found]) for key in found[0]},
            "rounds": found,
        }
        for name, found in (rounds | differences).items()
    ]


def one_round(epochs: int, seed: int) -> dict[str, dict[str, float]]:
    splits = digits()
    batch = splits.test.batch(torch.arange(len(splits.test)))
    ensemble = sources(splits, seed, epochs)
    transferred = {eps: momentum_fgsm(ensemble, batch, Linf(eps)) for eps in (0.1, 0.2)}
    found = {}
    for rival, objective in RIVALS.items():
        model = through([fit(objective, epochs)], perceptron(splits, seed), splits, seed)
        found[rival] = row(model, batch, transferred, seed)
    return found


def measure(options: argparse.Namespace, one: Round, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """The summaries of `options.rounds` rounds, each in a process of its own."""
    require(options.rounds >= 2, f"rounds={options.rounds} must be at least 2: intervals are taken over rounds.")
    seeds = range(options.seed, options.seed + options.rounds)
    with ProcessPoolExecutor(options.rounds, get_context("fork")) as pool:
        found = list(pool.map(one, seeds))
    return summaries({rival: [each[rival] for each in found] for rival in found[0]}, pairs)


def shown(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"training": each["training"]}
        | {key: f"{mean:.3f} ±{each['interval'][key][1] - mean:.3f}" for key, mean in each["mean"].items()}
        for each in rows
    ]


def main() -> None:
    parser = harness.arguments(__doc__ or "", rounds=3)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    harness.prepare(options)
    rows = measure(options, partial(one_round, options.epochs), PAIRS)
    harness.show("digits", shown(rows))
    harness.save(options, rows)


if __name__ == "__main__":
    main()

"""What noisy copies before clipping buy a private model: DP-SGD alone against every variant of DP-CERT.

    python bench/dp_cert.py --data digits --rounds 2 --out results/dp-cert-digits.json
    python bench/dp_cert.py --data mnist --points 500 --n 10000 --device cuda --out results/dp-cert-mnist.json

Every model of a data set has the same steps, sampling, clipping and noise, hence the same epsilon. Each is certified by
randomized smoothing at the sigma it was trained with (DP-SGD alone, which knows no sigma, at each). A round is another
seed for weights, samples and noise. The seed makes runs repeatable, which private runs must not be: the epsilon shown
is that of a run without it, and no privacy is claimed for these models.

Average radii count wrong or abstained points as 0. The accuracy is that of the network itself, without noise, on all
test records. In the JSON every model has its certified accuracies by radius; `abstained` is the share of points
without a certificate.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import harness
from trivet.certify.certifier import ABSTAIN
from trivet.certify.curves import average_certified_radius, certified_accuracy
from trivet.certify.smoothing import Smoothing
from trivet.data.dataset import Splits
from trivet.methods import build
from trivet.models import initialize
from trivet.models.tanh_cnn import tanh_cnn
from trivet.objectives.dp_cert import DpCert
from trivet.objectives.objective import Objective
from trivet.objectives.plain import Plain
from trivet.privacy.accounting import account, noise_for
from trivet.privacy.dp_sgd import DpSgd
from trivet.privacy.gradient_rule import GradientRule
from trivet.privacy.mean import MeanGradient
from trivet.privacy.mechanism import Event
from trivet.randomness import generator
from trivet.training.fit import Fit
from trivet.training.folder import RunFolder
from trivet.training.optimizers import Optimizer, Sgd
from trivet.training.pipeline import run_stages
from trivet.training.schedules import Constant

RADII = [step / 8 for step in range(17)]
VARIANTS = ("gaussian", "stability", "macer", "smooth_adv", "consistency")


@dataclass(frozen=True)
class Setting:
    """How the models of one data set are trained. Digits: chosen for speed. MNIST: the paper's."""

    epochs: int
    batch_size: int
    lr: float
    noise_multiplier: float
    delta: float
    max_grad_norm: float = 0.1

    def rule(self, seed: int) -> DpSgd:
        return DpSgd(
            max_grad_norm=self.max_grad_norm, delta=self.delta, noise_multiplier=self.noise_multiplier, noise_seed=seed
        )

    def shortened(self, epochs: int | None, records: int) -> Setting:
        """The same with other `epochs`, at the epsilon of its own."""
        if epochs is None:
            return self
        per_epoch = -(-records // self.batch_size)
        event = Event("poisson", self.batch_size / records, self.noise_multiplier)
        target = account([(event, self.epochs * per_epoch)], self.delta).epsilon
        noise = noise_for(event, epochs * per_epoch, target, self.delta)
        return replace(self, epochs=epochs, noise_multiplier=noise)

    @property
    def optimizer(self) -> Optimizer:
        return Sgd(lr=self.lr, momentum=0.9, weight_decay=0.0)


SETTINGS = {
    "digits": Setting(epochs=36, batch_size=144, lr=2.0, noise_multiplier=2.0, delta=1e-4),
    "mnist": Setting(epochs=40, batch_size=512, lr=0.5, noise_multiplier=1.23, delta=1e-5),
}


def network(splits: Splits, seed: int) -> nn.Module:
    """The paper's tanh CNN where images are large enough, else a perceptron with one hidden layer of 64 tanh."""
    train = splits.train
    channels, height, width = train.input_shape
    draw = generator(seed, "weights")
    if min(height, width) >= 16:
        return tanh_cnn(train.input_shape, train.num_classes, generator=draw)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(channels * height * width, 64), nn.Tanh(), nn.Linear(64, train.num_classes)
    )
    initialize.uniform_(model, draw)
    return model


@dataclass(frozen=True)
class Rival:
    """One model to be: its objective, whether it is private, and the sigmas it is certified at."""

    name: str
    objective: Objective
    sigmas: tuple[float, ...]
    private: bool = True


def rivals(options: argparse.Namespace) -> list[Rival]:
    found = [
        Rival("not private, no noise", Plain(), tuple(options.sigma), private=False),
        Rival("DP-SGD alone", Plain(), tuple(options.sigma)),
    ]
    for variant in options.variants:
        for copies in options.copies:
            if copies > 1 or variant != "consistency":
                found += [
                    Rival(f"{variant}, K = {copies}", DpCert(sigma, variant, copies), (sigma,))
                    for sigma in options.sigma
                ]
    return found


def trained(
    rival: Rival, setting: Setting, splits: Splits, seed: int, device: torch.device
) -> tuple[nn.Module, dict[str, Any], float]:
    """The model, what its stage left in its history, and the seconds it took."""
    rule: GradientRule = setting.rule(seed) if rival.private else MeanGradient()
    # Without noise and clipping the private rate is far too high.
    optimizer = setting.optimizer if rival.private else Sgd(lr=0.1, momentum=0.9, weight_decay=0.0)
    fit = Fit(rival.objective, setting.epochs, setting.batch_size, optimizer=optimizer, schedule=Constant(), rule=rule)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run = RunFolder.create(Path(folder) / "run", "{}")
        checkpoint = run_stages([("fit", fit)], network(splits, seed), splits, run, seed=seed, device=device)
        return checkpoint.model.eval(), checkpoint.history[-1], time.perf_counter() - start


@torch.no_grad()
def accuracy(model: nn.Module, splits: Splits, device: torch.device) -> float:
    batches = (each.to(device) for each in splits.test.batches(1000))
    return sum(int((model(batch.inputs).argmax(1) == batch.labels).sum()) for batch in batches) / len(splits.test)


def certified(model: nn.Module, splits: Splits, sigma: float, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The row's columns that come from certificates, on test points spread evenly over the test set."""
    number = min(options.points, len(splits.test))
    index = torch.linspace(0, len(splits.test) - 1, number).round().long()
    batch = splits.test.batch(index).to(options.device)
    found = Smoothing(sigma, n=options.n).certify(model, batch.inputs, seed=seed, index=index)
    targets = batch.labels.cpu()
    return {
        "average_radius": average_certified_radius(found, targets),
        "abstained": float((found.labels == ABSTAIN).double().mean()),
        "certified": {
            str(r): each.value for r, each in zip(RADII, certified_accuracy(found, targets, RADII), strict=True)
        },
    }


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each model and sigma."""
    splits, device = build("data", options.data), torch.device(options.device)
    setting = SETTINGS[options.data].shortened(options.epochs, len(splits.train))
    rows = []
    for turn in range(options.rounds):
        seed = options.seed + turn
        for rival in rivals(options):
            model, history, seconds = trained(rival, setting, splits, seed, device)
            base = accuracy(model, splits, device)
            for sigma in rival.sigmas:
                row = {
                    "rival": rival.name,
                    "sigma": sigma,
                    "seed": seed,
                    "accuracy": base,
                    **certified(model, splits, sigma, options, seed),
                    "train_seconds": seconds,
                    "epsilon": epsilon(history, setting.delta),
                    "settings": history["settings"],
                }
                rows.append(row)
                print(f"seed {seed} sigma {sigma}: {rival.name}: {base:.4f}, {row['average_radius']:.4f}", flush=True)
    return rows


def epsilon(history: Mapping[str, Any], delta: float) -> float | None:
    """What the stage would have cost without its seed; None where nothing is protected."""
    if "privacy" not in history:
        return None
    privacy = history["privacy"]
    return account([(Event(**privacy["event"]), privacy["steps"])], delta).epsilon


def summary(rows: list[dict[str, Any]], sigma: float) -> list[dict[str, Any]]:
    """Means over the seeds, and how many times the radius of DP-SGD alone."""
    here = [row for row in rows if row["sigma"] == sigma]
    names = list(dict.fromkeys(row["rival"] for row in here))

    def mean(name: str, column: str) -> float:
        return statistics.fmean(row[column] for row in here if row["rival"] == name)

    return [
        {
            "rival": name,
            "accuracy": mean(name, "accuracy"),
            "average_radius": mean(name, "average_radius"),
            "times_alone": mean(name, "average_radius") / max(mean("DP-SGD alone", "average_radius"), 1e-9),
            "abstained": mean(name, "abstained"),
            **{
                f"R>={radius}": statistics.fmean(row["certified"][str(radius)] for row in here if row["rival"] == name)
                for radius in (0.0, 0.25, 0.5, 1.0)
            },
            "epsilon": next(row["epsilon"] for row in here if row["rival"] == name),
            "train_seconds": mean(name, "train_seconds"),
        }
        for name in names
    ]


def main() -> None:
    parser = harness.arguments(__doc__, rounds=2)
    parser.add_argument("--data", choices=SETTINGS, default="digits")
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--copies", type=int, nargs="+", default=[2], help="K, one model for each")
    parser.add_argument("--points", type=int, default=180, help="test points to certify")
    parser.add_argument("--n", type=int, default=2000, help="votes for each point")
    parser.add_argument("--epochs", type=int, help="instead of the setting's; the noise is fitted to equal epsilon")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    harness.prepare(options)
    rows = measure(options)
    means = {str(sigma): summary(rows, sigma) for sigma in options.sigma}
    for sigma, table in means.items():
        harness.show(
            f"{options.data}, sigma {sigma}, n {options.n}, {options.points} points, {options.rounds} seeds", table
        )
    harness.save(options, {"means": means, "models": rows})


if __name__ == "__main__":
    main()

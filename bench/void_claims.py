"""Privacy claims that are void: SIDP and StoBatch audited beside DP-SGD, and what sound training costs instead.

    python bench/void_claims.py --out results/void-claims.json

SIDP: softmax regression on 256 digits and one canary, a lit pixel that is dark in all others; its gradient is known
before training, so that a score reads it off the released weights. All runs advance together, in closed form.
StoBatch: the networks, objective and rule of the package, trained again and again with fresh noise on batches that
differ in one image. What is released is the model, and the frozen noise is part of it, as prediction needs it; who
knows the other records replays the training from it with the image and without.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import harness
from trivet.audit.many_run import many_run_bound
from trivet.data.dataset import Batch, Dataset
from trivet.data.digits import digits
from trivet.models.bare_norms import BareNorm
from trivet.models.modes import evaluating
from trivet.models.normalized_mlp import normalized_mlp
from trivet.models.stobatch import laplace, stobatch_cnn, stobatch_mlp
from trivet.objectives.objective import Losses, Objective, Progress
from trivet.objectives.plain import Plain
from trivet.objectives.stobatch import StoBatchLoss
from trivet.privacy.accounting import account
from trivet.privacy.dp_sgd import DpSgd
from trivet.privacy.gradient_rule import Plan
from trivet.privacy.mechanism import Event
from trivet.privacy.sidp import released_weights_mu
from trivet.privacy.stobatch import StoBatch, features_share, local_epsilon, published_epsilon
from trivet.randomness import derive_seed, generator
from trivet.statistics import gaussian_epsilon

DELTA = 1e-5


# --- SIDP against DP-SGD, in closed form ---------------------------------------------------------------------------


class Regression(NamedTuple):
    """Softmax regression: records [N, d + 1] with a one appended, targets [N, K]; the last record is the canary."""

    records: Tensor
    targets: Tensor

    @classmethod
    def with_canary(cls, data: Dataset) -> Regression:
        """Digits and a canary: the only record with light in a pixel that is dark in all of `data`."""
        pixels = data.batch(torch.arange(len(data))).inputs.flatten(1)
        dark = int((pixels.sum(0) == 0).nonzero()[0])
        records = torch.cat([pixels, F.one_hot(torch.tensor([dark]), pixels.shape[1])])
        labels = torch.cat([data.labels, torch.zeros(1, dtype=torch.int64)])
        return cls(torch.cat([records, torch.ones(len(records), 1)], 1), F.one_hot(labels, 10).float())

    def clipped_sum(self, weights: Tensor, taken: Tensor, clip: float) -> Tensor:
        """sum_i clip(g_i) for each run: weights [R, d + 1, K], taken [R, N] in {0, 1}."""
        residual = (self.records @ weights).softmax(2) - self.targets
        norms = residual.norm(dim=2) * self.records.norm(dim=1)
        return self.records.T @ ((taken * clip / norms.clamp_min(clip))[..., None] * residual)

    def score(self, weights: Tensor) -> Tensor:
        """[R]: how far the weights [R, d + 1, K] went along the canary's first step, its bias aside."""
        step = (self.records[-1, :-1, None] * (self.targets[-1] - 1 / self.targets.shape[1])).flatten()
        return weights[:, :-1].flatten(1) @ step


@dataclass(frozen=True)
class Setting:
    """Of the audit: rate q, steps T, noise multiplier z, learning rate, clip norm C."""

    rate: float = 0.1
    steps: int = 200
    noise_multiplier: float = 7.1
    lr: float = 0.5
    clip: float = 1.0

    @property
    def accountant(self) -> float:
        """What DP-SGD spends, and SIDP claims to."""
        return account([(Event("poisson", self.rate, self.noise_multiplier), self.steps)], DELTA).epsilon


def scores(
    task: Regression, setting: Setting, method: Literal["dp_sgd", "sidp"], with_canary: bool, runs: int, seed: int
) -> dict[str, Tensor]:
    """Scores [runs] of each thing that may be released: SIDP's mean weights, its last sample, the mean of samples."""
    draw = generator(seed, method, int(with_canary))
    expected = setting.rate * (len(task.records) - 1)
    std = setting.lr * setting.clip * setting.noise_multiplier / expected
    weights = torch.zeros(runs, task.records.shape[1], task.targets.shape[1])
    sampled, average = weights, torch.zeros_like(weights)
    for _ in range(setting.steps):
        taken = (torch.rand(runs, len(task.records), generator=draw) < setting.rate).float()
        taken[:, -1] *= with_canary
        noise = std * torch.randn(weights.shape, generator=draw)
        sampled = weights + noise if method == "sidp" else weights
        weights = weights - setting.lr * task.clipped_sum(sampled, taken, setting.clip) / expected
        if method == "dp_sgd":
            weights = weights + noise
        average += sampled / setting.steps
    if method == "dp_sgd":
        return {"weights": task.score(weights)}
    last = weights + std * torch.randn(weights.shape, generator=draw)
    return {
        "mean weights": task.score(weights),
        "last sample": task.score(last),
        "mean of samples": task.score(average),
    }


def bounds(
    task: Regression, setting: Setting, method: Literal["dp_sgd", "sidp"], runs: int, confidence: float, seed: int
) -> dict[str, Any]:
    """The audit of each release, `runs` with the canary and as many without."""
    inside, outside = (scores(task, setting, method, planted, runs, seed) for planted in (True, False))
    return {
        name: asdict(many_run_bound(inside[name].numpy(), outside[name].numpy(), DELTA, confidence)) for name in inside
    }


# --- StoBatch, as it is ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """One step's work for a rule, without a training stage around it."""

    objective: Objective
    progress: Progress
    rate: float

    def perturb(self, model: nn.Module, batch: Batch, part: int = 0) -> Tensor:
        return self.objective.perturb(model, batch, self.progress)

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, part: int = 0) -> Losses:
        return self.objective.losses(model, batch, perturbed, self.progress)


def fit(
    model: nn.Module,
    data: Dataset,
    objective: Objective,
    plan: Plan,
    optimizer: torch.optim.Optimizer,
    steps: int,
    seed: int,
) -> None:
    model.train()
    for step in range(steps):
        progress = Progress(step, steps, step / plan.per_epoch, seed)
        optimizer.zero_grad()
        rate = optimizer.param_groups[0]["lr"]
        plan.gradients(model, data.batch(plan.draw(step)), Moment(objective, progress, rate))
        optimizer.step()


def stobatch_scores(
    data: Dataset, claimed: float, runs: int, steps: int, hidden: int, seed: int, eps_labels: float
) -> tuple[Tensor, Tensor]:
    """Guesses [runs] about models trained on `data`, and on `data` with its first image blackened: 1 for the first."""
    black = data.images.clone()
    black[0] = 0
    candidates = (data, Dataset(black, data.labels, data.classes, data.name, data.scale))
    share = features_share(claimed, eps_labels, math.prod(data.input_shape) * (hidden + 2), len(data))

    model = stobatch_mlp(
        data.input_shape, data.num_classes, len(data), hidden=[hidden], generator=generator(seed, "start")
    )
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def released(records: Dataset, run: int) -> Tensor:
        """Weights trained from the common start under the noise of `run`; nothing else about training is a secret."""
        model.load_state_dict(start)
        model.draw(data.input_shape, len(data), share, eps_labels, generator(seed, "noise", run))
        plan = StoBatch().plan(len(records), len(records), steps, seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        fit(model, records, StoBatchLoss(steps=1), plan, optimizer, steps, seed)
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    found = torch.empty(2, runs)
    for side in range(2):
        for run in range(runs):
            replayed = [released(records, 2 * run + side) for records in candidates]
            seen = released(candidates[side], 2 * run + side)
            found[side, run] = float((seen - replayed[0]).norm() < (seen - replayed[1]).norm())
    return found[0], found[1]


def recovery(data: Dataset, scale: float, seed: int) -> float:
    """The largest error, over pixels in [-1, 1], of the first record read off its noised form and the other records."""
    model = stobatch_mlp(data.input_shape, data.num_classes, len(data), generator=generator(seed, "weights"))
    model.input_noise.copy_(laplace(model.input_noise.shape, scale, generator(seed, "noise")))
    inputs = data.batch(torch.arange(len(data))).inputs
    noised, _ = model.noised(inputs)
    records = (2 * inputs - 1).flatten(1)
    shared = (noised[1:] - records[1:]).mean(0)
    return float((noised[0] - shared - records[0]).abs().max())


def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    with evaluating(model), torch.no_grad():
        return float((model(inputs).argmax(1) == labels).float().mean())


def under_noise(kind: Literal["none", "shared", "independent"], scale: float, seed: int, epochs: int = 150) -> float:
    """Test accuracy of an MLP 64-64-10 on digits in [-1, 1] that carry Laplace noise, drawn once for training."""
    splits, draw = digits(), generator(seed, "noise")
    parts = [part.batch(torch.arange(len(part))) for part in (splits.train, splits.test)]
    inputs = [2 * part.inputs.flatten(1) - 1 for part in parts]
    if kind == "shared":
        noise = laplace((64,), scale, draw)
        inputs = [each + noise for each in inputs]
    if kind == "independent":
        inputs = [each + laplace(each.shape, scale, draw) for each in inputs]
    torch.manual_seed(derive_seed(seed, "weights"))
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer, order = torch.optim.Adam(model.parameters(), 1e-3), generator(seed, "order")
    for _ in range(epochs):
        for index in torch.randperm(len(inputs[0]), generator=order).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[0][index]), parts[0].labels[index]).backward()
            optimizer.step()
    return accuracy(model, inputs[1], parts[1].labels)


def stobatch_accuracy(norm: Literal["batch", "none"], claimed: float, seed: int, epochs: int = 200) -> dict[str, float]:
    """StoBatch on the digits in batches of 103 at a claimed epsilon: network, objective and rule as published."""
    splits, size = digits(), 103
    share = features_share(claimed, 0.1, 64 * 66, size)
    model = stobatch_mlp((1, 8, 8), 10, size, share, 0.1, norm=norm, generator=generator(seed, "weights"))
    plan = StoBatch().plan(len(splits.train), size, epochs, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    fit(model, splits.train, StoBatchLoss(steps=3), plan, optimizer, epochs * plan.per_epoch, seed)
    test = splits.test.batch(torch.arange(len(splits.test)))
    scale = 64 * 66 / (size * share)
    return {
        "claimed": published_epsilon(share, 0.1, 64 * 66, size),
        "laplace_scale": scale,
        "honest_local_epsilon": local_epsilon(64, scale),
        "accuracy": accuracy(model, test.inputs, test.labels),
    }


# --- the sound stand-in ---------------------------------------------------------------------------------------------


def private_accuracy(norm: BareNorm, noise_multiplier: float, seed: int, steps: int = 400) -> float:
    """True DP-SGD on digits, a ReLU MLP 64-64-64-64-10 with or without normalisation: q 0.1, C 1, lr 0.5."""
    splits = digits()
    size = round(0.1 * len(splits.train))
    model = normalized_mlp((1, 8, 8), 10, norm=norm, generator=generator(seed, "weights"))
    rule = DpSgd(max_grad_norm=1.0, delta=1e-4, noise_multiplier=noise_multiplier, noise_seed=seed)
    plan = rule.plan(len(splits.train), size, -(-steps * size // len(splits.train)), seed)
    fit(model, splits.train, Plain(), plan, torch.optim.SGD(model.parameters(), lr=0.5), steps, seed)
    test = splits.test.batch(torch.arange(len(splits.test)))
    return accuracy(model, test.inputs, test.labels)


def over_seeds(measure: Callable[[int], float], seeds: int) -> dict[str, Any]:
    values = [measure(seed) for seed in range(seeds)]
    return {"mean": statistics.fmean(values), "values": values}


def claims() -> Mapping[str, Any]:
    """Figures that follow from formulas alone: what was claimed, and what can be proved."""
    layer, rates = stobatch_cnn((1, 28, 28), 10, 2499), [0.1] * 18_750
    stobatch = []
    for total in (0.2, 2.0):
        share = features_share(total, 0.1, layer.sensitivity((1, 28, 28)), 2499)
        scale = layer.sensitivity((1, 28, 28)) / (2499 * share)
        stobatch.append({"claimed": total, "laplace_scale": scale, "honest_local_epsilon": local_epsilon(784, scale)})
    sidp = []
    for name, steps in {"first step only": [1], "once an epoch": [1 + 1875 * epoch for epoch in range(10)]}.items():
        mu = released_weights_mu(rates, steps, 7.1)
        sidp.append({"participation": name, "mu": mu, "epsilon": gaussian_epsilon(mu, DELTA)})
    claimed = account([(Event("poisson", 1 / 1875, 7.1), 18_750)], DELTA).epsilon
    return {"StoBatch on MNIST": stobatch, "SIDP on MNIST, all samples released": sidp, "SIDP's claim": claimed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=600, help="with the canary, and again as many without")
    parser.add_argument("--stobatch-runs", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the measurement here as JSON")
    options = parser.parse_args()
    harness.prepare(options)
    results: dict[str, Any] = {"formulas": claims()}

    setting = Setting()
    task = Regression.with_canary(digits().train.select(slice(256)))
    audits = {method: bounds(task, setting, method, options.runs, 0.95, options.seed) for method in ("dp_sgd", "sidp")}
    results["audit of SIDP"] = {"setting": asdict(setting), "accountant": setting.accountant, "audits": audits}
    harness.show(
        f"accountant {setting.accountant:.3f}; epsilon at least, 95 %, {options.runs} runs a side",
        [
            {"release": f"{m} {name}", "lower": b["lower"], "ceiling": b["ceiling"]}
            for m, found in audits.items()
            for name, b in found.items()
        ],
    )

    few = digits().train.select(slice(32))
    inside, outside = stobatch_scores(few, 0.2, options.stobatch_runs, 5, 32, options.seed, 0.1)
    audit = many_run_bound(inside.numpy(), outside.numpy(), 0.0)
    results["audit of StoBatch"] = {"claimed": 0.2, "records": 32, "steps": 5, "audit": asdict(audit)}
    harness.show("StoBatch", [{"claimed": 0.2, "lower": audit.lower, "ceiling": audit.ceiling}])

    results["record read off a shared draw, largest error at scale 35"] = recovery(few, 35.0, options.seed)
    table = {
        f"MLP, {kind} draw, scale 35": over_seeds(lambda seed, kind=kind: under_noise(kind, 35.0, seed), options.seeds)
        for kind in ("none", "shared", "independent")
    }
    results["accuracy on digits"] = table
    results["StoBatch on digits"] = {
        norm: [stobatch_accuracy(norm, 2.0, seed) for seed in range(options.seeds)] for norm in ("batch", "none")
    }
    results["DP-SGD on digits"] = [
        {
            "noise_multiplier": z,
            "norm": norm,
            **over_seeds(lambda s, n=norm, z=z: private_accuracy(n, z, s), options.seeds),
        }
        for z in (2.0, 8.0)
        for norm in ("none", "layer", "group", "public_batch")
    ]
    harness.show("accuracy", [{"of": name, "mean": row["mean"]} for name, row in table.items()])
    harness.show("DP-SGD", [{k: v for k, v in row.items() if k != "values"} for row in results["DP-SGD on digits"]])
    harness.save(options, results)


if __name__ == "__main__":
    main()

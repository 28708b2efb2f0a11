"""AutoAttack standard: ours against the authors' code, on the same network and points, in one run.

    python bench/autoattack.py --reference PATH/auto-attack --out results/autoattack.json

The network is trained here by FGSM with a random start, on MNIST (TRIVET_DATA) or the digits of scikit-learn. Both sides
attack the same correctly loaded points with fp32 arithmetic, in turns, round after round, with the allocator set alike.
Times are medians over the rounds. The points that still stand are compared one by one: the attacks are random, so a point
may stand on one side only, but not more than 0.5 % of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trivet.data.dataset import Splits
from trivet.randomness import derive_seed, generator
from trivet.threats.attack import misclassified
from trivet.threats.autoattack import AutoAttack
from trivet.threats.losses import cross_entropy
from trivet.threats.pgd import ascend
from trivet.threats.threat import ThreatModel

TOLERANCE = 0.005
Side = Callable[[int], tuple[Tensor, dict[str, float]]]
"""A seed to which points stand [N] bool, and the seconds of each component."""


def trained(model: nn.Module, splits: Splits, threat: ThreatModel, steps: int, seed: int) -> nn.Module:
    """`model` after `steps` steps of fast adversarial training at half the radius: neither broken nor robust."""
    draw = generator(seed, "training")
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    inner = threat.scaled(0.5)
    for _ in range(steps):
        batch = splits.train.batch(torch.randint(len(splits.train), (128,), generator=draw))
        x, y = batch.inputs, batch.labels
        step_size = 1.25 * inner.eps
        start = inner.random_start(x, draw)
        x = ascend(model, x, start, lambda z, y=y: cross_entropy(z, y), threat=inner, steps=1, step_size=step_size)
        loss = cross_entropy(model(x), y).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def ours(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, batch_size: int) -> Side:
    attack = AutoAttack(threat)

    def run(seed: int) -> tuple[Tensor, dict[str, float]]:
        detail = attack.run_detailed(model, x, y, generator=generator(seed, "attack"), batch_size=batch_size)
        return ~detail.broken, {}

    return run


def reference(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, batch_size: int) -> Side:
    from autoattack import AutoAttack as Reference

    def run(seed: int) -> tuple[Tensor, dict[str, float]]:
        attack = Reference(
            model, norm=threat.norm, eps=threat.eps, seed=derive_seed(seed, "reference"), verbose=False, device="cpu"
        )
        found = attack.run_standard_evaluation(x, y, bs=batch_size)
        return ~misclassified(model, found, y), {}

    return run

"""PGD-20 and a PGD-10 adversarial training step: ours against torchattacks, Foolbox and ART on the same model.

    python bench/pgd.py --out results/pgd.json

Every rival attacks the same points of the same network with the same eps, step size and number of steps from random
starts, in turns, with the allocator set alike. Ours checks every point before and after, in float32 on the model
itself, which the peers leave to the user; "unchecked" is the search alone, the work the peers do. The share of the
machine's limit counts 2 forward FLOPs per step, over the bfloat16 matrix product measured in the same run. Strength is
compared apart, on more points: the accuracy left by our bfloat16 gradients, our float32 gradients and each peer.
Without MNIST and CIFAR-10 (TRIVET_DATA) the digits stand in for them.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import harness
from trivet.data.dataset import Batch, Dataset
from trivet.errors import TrivetError
from trivet.methods import build
from trivet.models.modes import evaluating
from trivet.models.surrogate import surrogate
from trivet.objectives.fast_at import FastAt
from trivet.objectives.objective import Progress
from trivet.objectives.pgd_at import PgdAt
from trivet.randomness import generator
from trivet.threats.attack import Target, misclassified
from trivet.threats.linf import Linf
from trivet.threats.pgd import PGD

Attacker = Callable[[int], Tensor]

NETWORKS: dict[str, tuple[Any, str, float, int]] = {
    "small CNN": ("small_cnn", "mnist", 0.2, 256),
    "MNIST challenge CNN": ("mnist_cnn", "mnist", 0.2, 256),
    "ResNet-20": ({"name": "resnet", "depth": 20}, "cifar10", 4 / 255, 128),
}
"""Model, data, eps and batch size."""


def images(name: str) -> tuple[Dataset, Dataset]:
    """Training and test images."""
    try:
        splits = build("data", name)
    except TrivetError as error:
        print(f"{error} Taking the digits.")
        splits = build("data", "digits")
    return splits.train, splits.test


def trained(spec: Any, train: Dataset, threat: Linf, steps: int, seed: int) -> nn.Module:
    """The network after a short fast adversarial training: neither broken nor robust, so that strength shows."""
    model: nn.Module = build(
        "models", spec, input_shape=train.input_shape, num_classes=10, generator=generator(seed, "weights")
    )
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    objective, draw = FastAt(threat.scaled(0.5)), generator(seed, "batches")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(steps):
        batch = train.batch(torch.randint(len(train), (128,), generator=draw))
        loss = objective(model.train(), batch, Progress(step, steps, 0.0, seed)).per_example.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def attackers(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, seed: int) -> dict[str, Attacker]:
    """PGD by everybody, on copies of one model so that nobody changes another's."""
    import foolbox
    import torchattacks
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    step = 2.5 * eps / steps
    theirs = torchattacks.PGD(copy.deepcopy(model), eps=eps, alpha=step, steps=steps, random_start=True)
    fool = foolbox.PyTorchModel(copy.deepcopy(model), bounds=(0, 1))
    fool_pgd = foolbox.attacks.LinfPGD(abs_stepsize=step, steps=steps, random_start=True)
    classifier = PyTorchClassifier(
        copy.deepcopy(model), nn.CrossEntropyLoss(), tuple(x.shape[1:]), 10, clip_values=(0, 1), device_type="cpu"
    )
    art = ProjectedGradientDescentPyTorch(
        classifier, eps=eps, eps_step=step, max_iter=steps, num_random_init=1, batch_size=len(x), verbose=False
    )

    def ours(precision: Any) -> Attacker:
        attack = PGD(Linf(eps), steps=steps, step_size=step, precision=precision)
        return lambda turn: attack.run(model, x, y, generator=generator(seed, "pgd", turn), batch_size=len(x)).x_adv

    def unchecked(turn: int) -> Tensor:
        attack = PGD(Linf(eps), steps=steps, step_size=step, precision="bf16")
        return attack.search(Target(surrogate(model, "bf16"), model), x, y, generator(seed, "pgd", turn))

    x_numpy, y_numpy = x.numpy(), np.eye(10)[y.numpy()]
    return {
        "torchattacks": lambda turn: theirs(x, y).detach(),
        "foolbox": lambda turn: fool_pgd(fool, x, y, epsilons=eps)[1].detach(),
        "ART": lambda turn: torch.from_numpy(art.generate(x_numpy, y_numpy)),
        "trivet fp32": ours("fp32"),
        "trivet bf16": ours("bf16"),
        "trivet bf16, unchecked": unchecked,
    }


@torch.no_grad()
def correct(model: nn.Module, data: Dataset, count: int) -> Batch:
    """The first records the model classifies correctly: ours attacks no others, so that no others make equal work."""
    found: list[int] = []
    for batch in data.batches(500):
        found += batch.index[~misclassified(model, batch.inputs, batch.labels)].tolist()
        if len(found) >= count:
            return data.batch(torch.tensor(found[:count]))
    raise SystemExit(f"the model classifies only {len(found)} records correctly; train it longer.")


def accuracy_left(model: nn.Module, attack: Callable[[Tensor, Tensor], Attacker], data: Dataset, points: int) -> float:
    """Accuracy in float32 on the points an attacker leaves, judged alike for everybody."""
    standing = 0
    for index in torch.arange(points).split(500):
        batch = data.batch(index)
        standing += int((~misclassified(model, attack(batch.inputs, batch.labels)(0), batch.labels)).sum())
    return standing / points


def naive_step(model: nn.Module, batch: Batch, eps: float, steps: int) -> Callable[[int], None]:
    """The loop found in many repositories: float32, contiguous, `loss.backward()` inside the attack."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def run(turn: int) -> None:
        x = batch.inputs.contiguous()
        model.eval()
        adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
        for _ in range(steps):
            adv.requires_grad_()
            F.cross_entropy(model(adv), batch.labels).backward()
            assert adv.grad is not None
            adv = (x + (adv.detach() + 2.5 * eps / steps * adv.grad.sign() - x).clamp(-eps, eps)).clamp(0, 1)
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(adv), batch.labels).backward()
        optimizer.step()

    return run


def our_step(model: nn.Module, batch: Batch, eps: float, steps: int, precision: Any) -> Callable[[int], None]:
    """The step of the training stage: attack on the folded stand-in, update under autocast, channels last."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    objective = PgdAt(Linf(eps), steps=steps)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    inputs = batch.inputs.contiguous(memory_format=torch.channels_last)
    batch = Batch(inputs, batch.labels, batch.index)

    def run(turn: int) -> None:
        model.train()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            losses = objective(model, batch, Progress(turn, 1000, 0.0, 0, precision))
        losses.per_example.float().mean().backward()
        optimizer.step()

    return run


def forward_flops(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return int(counter.get_total_flops())


def matrix_limit() -> float:
    """FLOP/s of a bfloat16 matrix product, the best of a few."""
    a = torch.randn(2048, 2048, dtype=torch.bfloat16)
    best = 0.0
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        best = max(best, 2 * 2048**3 / (time.perf_counter() - start))
    return best


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    spec, source, eps, batch_size = NETWORKS[name]
    train, test = images(source)
    model = trained(spec, train, Linf(eps), options.training_steps, options.seed)
    batch = correct(model, test, batch_size)
    limit = matrix_limit()
    flops = forward_flops(model, batch.inputs)
    with evaluating(model):
        seconds, _ = harness.interleaved(
            attackers(model, batch.inputs, batch.labels, eps, options.steps, options.seed), options.rounds
        )
        left: dict[str, float] = {}
        if options.points:
            points = min(options.points, len(test))
            for rival in seconds:
                left[rival] = accuracy_left(
                    model,
                    lambda x, y, rival=rival: attackers(model, x, y, eps, options.steps, options.seed)[rival],
                    test,
                    points,
                )
    share = {
        rival: 2 * flops * options.steps / sorted(times)[len(times) // 2] / limit for rival, times in seconds.items()
    }
    fastest = min(
        ("torchattacks", "foolbox", "ART"), key=lambda rival: sorted(seconds[rival])[len(seconds[rival]) // 2]
    )
    attack_rows = harness.rows(seconds, fastest, share_of_bf16_limit=share, accuracy_left=left)
    harness.show(f"PGD-{options.steps}, {name}, batch {batch_size}, eps {eps:.4f}; against {fastest}", attack_rows)

    steps = {
        "naive loop": naive_step(copy.deepcopy(model), batch, eps, 10),
        "trivet fp32": our_step(copy.deepcopy(model), batch, eps, 10, "fp32"),
        "trivet bf16": our_step(copy.deepcopy(model), batch, eps, 10, "bf16"),
    }
    step_seconds, _ = harness.interleaved(steps, options.rounds)
    step_rows = harness.rows(step_seconds, "naive loop")
    harness.show(f"PGD-10 adversarial training step, {name}, batch {batch_size}", step_rows)
    return {
        "batch": batch_size,
        "eps": eps,
        "data": test.name,
        "forward_flops": flops,
        "bf16_limit_flops_per_second": limit,
        "fastest_peer": fastest,
        "attack": attack_rows,
        "training_step": step_rows,
    }


def main() -> None:
    parser = harness.arguments(__doc__, rounds=9)
    parser.add_argument("--steps", type=int, default=20, help="of the attack")
    parser.add_argument("--points", type=int, default=2000, help="on which strength is compared; 0 for none")
    parser.add_argument("--training-steps", type=int, default=400)
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    options = parser.parse_args()
    harness.prepare(options)
    warnings.filterwarnings("ignore")  # the peers' deprecations are not ours to report
    harness.save(options, {name: measure(name, options) for name in options.networks})


if __name__ == "__main__":
    main()

"""A DP-SGD step: ours against every mode of Opacus, a vmap loop and plain SGD on the same model; time and memory.

    python bench/dp_sgd.py --out results/dp_sgd.json

A step is the clipped per-record gradients, the noise and the SGD update, at equal clip and noise. Logical batches
above --physical records are cut into parts of that size for everybody. Rivals take turns in one run, with the
allocator set alike. Memory is the growth of the resident set of a process of its own at its highest, from the model
at rest to the end of three steps. Below it, the same step with PGD-10 inside, against training on the same attacks
that is not private.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import re
import resource
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import harness
from trivet.data.dataset import Batch
from trivet.methods import build
from trivet.objectives.objective import Losses, Objective, Progress
from trivet.objectives.pgd_at import PgdAt
from trivet.objectives.plain import Plain
from trivet.privacy.dp_sgd import DpSgd
from trivet.randomness import generator
from trivet.threats.linf import Linf

CLIP, NOISE, RATE = 1.0, 1.0, 1e-6
Step = Callable[[int], Any]

NETWORKS: dict[str, tuple[Any, tuple[int, int, int]]] = {
    "small CNN": ("small_cnn", (1, 28, 28)),
    "ResNet-20 GroupNorm": ({"name": "resnet", "depth": 20, "norm": "group"}, (3, 32, 32)),
}


@dataclass(frozen=True)
class Work:
    """What a gradient rule is offered in a step."""

    objective: Objective
    precision: Any = "fp32"
    rate: float = RATE

    @property
    def progress(self) -> Progress:
        return Progress(0, 1000, 0.0, 0, self.precision)

    def perturb(self, model: nn.Module, batch: Batch, part: int = 0) -> Tensor:
        return self.objective.perturb(model, batch, self.progress)

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, part: int = 0) -> Losses:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            found = self.objective.losses(model, batch, perturbed, self.progress)
        return found._replace(per_example=found.per_example.float())


def network(name: str, seed: int) -> nn.Module:
    spec, shape = NETWORKS[name]
    model: nn.Module = build("models", spec, input_shape=shape, num_classes=10, generator=generator(seed, "weights"))
    return model.train()


def records(name: str, count: int, seed: int) -> Batch:
    """Random images: no step looks at what they show."""
    draw = generator(seed, "images")
    inputs = torch.rand(count, *NETWORKS[name][1], generator=draw)
    return Batch(inputs, torch.randint(10, (count,), generator=draw), torch.arange(count))


def plain(model: nn.Module, batch: Batch, physical: int, work: Work | None = None) -> Step:
    """Training that is not private, its gradients accumulated over parts of the batch."""
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    work = work or Work(Plain())

    def step(turn: int) -> None:
        optimizer.zero_grad()
        for index in torch.arange(len(batch)).split(physical):
            part = batch.select(index)
            found = work.losses(model, part, work.perturb(model, part))
            (found.per_example.sum() / len(batch)).backward()
        optimizer.step()

    return step


def ours(model: nn.Module, batch: Batch, physical: int, engine: Any, work: Work | None = None) -> Step:
    """The plan that training follows, with its sampler left out: everybody takes the same records."""
    rule = DpSgd(CLIP, 1e-9, noise_multiplier=NOISE, engine=engine, physical_batch=physical)
    plan = rule.plan(len(batch) * 100, len(batch), 1, 0)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    work = work or Work(Plain())

    def step(turn: int) -> None:
        optimizer.zero_grad()
        plan.gradients(model, batch, work)
        optimizer.step()

    return step


def opacus(model: nn.Module, batch: Batch, physical: int, mode: str) -> Step:
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(batch.inputs, batch.labels), batch_size=len(batch))
    made = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), RATE),
        data_loader=loader,
        noise_multiplier=NOISE,
        max_grad_norm=CLIP,
        poisson_sampling=False,
        grad_sample_mode=mode,
        **({"criterion": nn.CrossEntropyLoss()} if mode == "ghost" else {}),
    )
    private, optimizer = made[0], made[1]
    criterion = made[2] if mode == "ghost" else nn.CrossEntropyLoss()

    def step(turn: int) -> None:
        parts = torch.arange(len(batch)).split(physical)
        for number, index in enumerate(parts):
            part = batch.select(index)
            optimizer.zero_grad()
            if len(parts) > 1:
                optimizer.signal_skip_step(do_skip=number + 1 < len(parts))
            criterion(private(part.inputs), part.labels).backward()
            optimizer.step()

    return step


def vectorised(model: nn.Module, batch: Batch, physical: int) -> Step:
    """The loop of the torch.func tutorial: vmap(grad), clip, add up, noise."""
    parameters = dict(model.named_parameters())

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, values, (x[None],)), y[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))

    def step(turn: int) -> None:
        values = {name: p.detach() for name, p in parameters.items()}
        total = {name: torch.zeros_like(value) for name, value in values.items()}
        for index in torch.arange(len(batch)).split(physical):
            part = batch.select(index)
            found = each(values, part.inputs, part.labels)
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in found.values()]).norm(dim=0)
            scale = (CLIP / (norms + 1e-6)).clamp(max=1.0)
            for name, g in found.items():
                total[name] += torch.einsum("b,b...->...", scale, g)
        with torch.no_grad():
            for name, p in parameters.items():
                p -= RATE * (total[name] + NOISE * CLIP * torch.randn_like(p)) / len(batch)

    return step


PLAIN = "SGD, not private"
RIVALS: dict[str, Callable[[nn.Module, Batch, int], Step]] = {
    PLAIN: plain,
    "Opacus hooks": lambda model, batch, physical: opacus(model, batch, physical, "hooks"),
    "Opacus ew": lambda model, batch, physical: opacus(model, batch, physical, "ew"),
    "Opacus functorch": lambda model, batch, physical: opacus(model, batch, physical, "functorch"),
    "Opacus ghost": lambda model, batch, physical: opacus(model, batch, physical, "ghost"),
    "vmap loop": vectorised,
    "trivet auto": lambda model, batch, physical: ours(model, batch, physical, "auto"),
    "trivet materialised": lambda model, batch, physical: ours(model, batch, physical, "materialised"),
}


def resident(field: str) -> float:
    """MiB of this process, "VmRSS" now or "VmHWM" at its highest."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def _growth(options: argparse.Namespace, name: str, size: int, rival: str, answer: Any) -> None:
    harness.prepare(options)
    warnings.filterwarnings("ignore")
    model, batch = network(name, options.seed), records(name, size, options.seed)
    step = RIVALS[rival](model, batch, options.physical)
    before = resident("VmRSS")
    try:  # forget the peak of the imports
        Path("/proc/self/clear_refs").write_text("5")
        peak = lambda: resident("VmHWM")  # noqa: E731
    except OSError:
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # noqa: E731
    for turn in range(3):
        step(turn)
    answer.put(peak() - before)


def memory(options: argparse.Namespace, name: str, size: int, rival: str) -> float:
    """MiB by which the resident set of a fresh process grows."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    child = context.Process(target=_growth, args=(options, name, size, rival, answer))
    child.start()
    found: float = answer.get(timeout=1800)
    child.join()
    return found


def measure(name: str, size: int, options: argparse.Namespace) -> dict[str, Any]:
    model, batch = network(name, options.seed), records(name, size, options.seed)
    rivals = {
        rival: make(copy.deepcopy(model), batch, options.physical)
        for rival, make in RIVALS.items()
        if rival in options.rivals
    }
    rounds = options.rounds if size <= options.physical else max(3, options.rounds // 4)
    seconds, _ = harness.interleaved(rivals, rounds)
    grown = {rival: memory(options, name, size, rival) for rival in rivals} if options.memory else {}
    table = harness.rows(
        seconds,
        PLAIN,
        times_plain=_ratios({rival: statistics.median(times) for rival, times in seconds.items()}),
        paired_times_plain={rival: _paired(seconds[PLAIN], times) for rival, times in seconds.items()},
        peak_growth_mib=grown,
        memory_times_plain=_ratios(grown),
    )
    harness.show(f"DP-SGD step, {name}, batch {size} in parts of {options.physical}", table)
    return {"network": name, "batch": size, "physical": options.physical, "step": table}


def attacked(name: str, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """PGD-10 inside: private against not private, with the same attacks."""
    model, batch = network(name, options.seed), records(name, size, options.seed)
    tables = {}
    for precision in ("fp32", "bf16"):
        work = Work(PgdAt(Linf(8 / 255), steps=10), precision)
        rivals = {
            "PGD-10 training, not private": plain(copy.deepcopy(model), batch, options.physical, work),
            "trivet auto": ours(copy.deepcopy(model), batch, options.physical, "auto", work),
        }
        seconds, _ = harness.interleaved(rivals, max(3, options.rounds // 2))
        reference = next(iter(rivals))
        tables[precision] = harness.rows(
            seconds,
            reference,
            times_plain={rival: _paired(seconds[reference], times) for rival, times in seconds.items()},
        )
        harness.show(f"The same with PGD-10 inside, {name}, batch {size}, {precision}", tables[precision])
    return {"network": name, "batch": size, "physical": options.physical, "step": tables}


def _ratios(values: dict[str, float]) -> dict[str, float]:
    return {rival: value / values[PLAIN] for rival, value in values.items()}


def _paired(reference: list[float], times: list[float]) -> float:
    """The median of the ratios within a round, which other work on the machine disturbs least."""
    return statistics.median(mine / its for mine, its in zip(times, reference, strict=True))


def main() -> None:
    parser = harness.arguments(__doc__, rounds=15)
    parser.add_argument("--sizes", type=int, nargs="*", default=[256, 2048], help="of the logical batch")
    parser.add_argument("--physical", type=int, default=256, help="records in memory at once, for everybody")
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out the memory")
    parser.add_argument("--no-attack", dest="attack", action="store_false", help="leave out PGD-10")
    options = parser.parse_args()
    options.rivals = list(dict.fromkeys([PLAIN, *options.rivals]))  # everybody is compared with it
    harness.prepare(options)
    warnings.filterwarnings("ignore")  # the peers' deprecations are not ours to report
    steps = [measure(name, size, options) for name in options.networks for size in options.sizes]
    attacks = [attacked(name, min(options.sizes), options) for name in options.networks] if options.attack else []
    harness.save(options, {"steps": steps, "with_pgd_10": attacks})


if __name__ == "__main__":
    main()

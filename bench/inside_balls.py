"""Millions of tries to break certificates: inside every certified ball, as close to its surface as numbers allow.

    python bench/inside_balls.py --seconds 240 --threads 1 --out results/inside-balls.json

Each certifier certifies records of scikit-learn's digits on networks trained here in seconds, each record at the
largest of some radii that it proves. Until the time is up, inputs within those balls are tried: random points, corners
and surfaces, gradient descent on the margin from many starts, and a rounding search: around the worst point found,
numbers are moved to their neighbours in floating point, and the network is asked in batches of other sizes, which add
in other orders. Of files in eight bits, which ONNX Runtime answers, edges of the input's levels are tried, too: the
last bit decides on which of two levels a number there comes to lie. Distances are checked in float64. A try is an input
that the network (or the smoothed one) was asked about; a violation is one with another answer than the certified, or a
tie. Of certificates by sampling an input counts as a violation if the votes there contradict the certificate at a
confidence of 1 - 1e-9: such certificates may be wrong with probability alpha each, all others never. One violation of
those is a release blocker; the exit status says so.

`flipped_beyond` is the share of balls in which the same search finds another answer at four times the radius: it shows
that the search finds what there is. Seconds are CPU time.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import harness
from ball_search import Claim, counted
from trivet.certify.alpha_crown import AlphaCrown
from trivet.certify.branch_and_bound import verify
from trivet.certify.certifier import Certificates, Certifier
from trivet.certify.crown import Crown, CrownIbp
from trivet.certify.ibp import Ibp
from trivet.certify.metric import MetricCertificate
from trivet.certify.pixeldp import PixelDP
from trivet.certify.smoothing import Smoothing
from trivet.certify.twice_noised import TwiceNoisedCertificate
from trivet.certify.vnnlib import Case, Halfspace, Property
from trivet.data.dataset import Dataset
from trivet.data.digits import digits
from trivet.methods import build
from trivet.models.foreign.export import int8_bytes, onnx_bytes
from trivet.models.foreign.load import load_model
from trivet.models.foreign.onnx_runtime import OnnxRuntimeModel
from trivet.models.foreign.twinned import Twinned
from trivet.models.mahalanobis_knn import MahalanobisKnn
from trivet.objectives.objective import Progress
from trivet.randomness import generator
from trivet.threats.linf import Linf

RADII = tuple(0.2 * 0.7**step for step in range(16))
"""Of which the largest proved counts."""


class Quantised(nn.Module):
    """Activations on a grid of 16 steps."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, 0.25, 0, 0, 15)


def dense(*between: Callable[[], nn.Module]) -> nn.Sequential:
    def hidden() -> list[nn.Module]:
        return [make() for make in between]

    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), *hidden(), nn.Linear(24, 24), *hidden(), nn.Linear(24, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "relu, plain": (lambda: dense(nn.ReLU), {"name": "plain"}),
    "relu, ibp": (lambda: dense(nn.ReLU), {"name": "ibp", "ramp": (0.0, 0.5)}),
    "convolutions, group norm": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(),
            nn.Linear(32, 10),
        ),
        {"name": "plain"},
    ),
    "gelu": (lambda: dense(nn.GELU), {"name": "plain"}),
    "silu, layer norm": (lambda: dense(lambda: nn.LayerNorm(24), nn.SiLU), {"name": "plain"}),
    "quantised activations": (lambda: dense(nn.ReLU, Quantised), {"name": "plain"}),
}  # fmt: skip


def trained(model: nn.Module, spec: dict[str, Any], data: Dataset, seed: int, epochs: int = 12) -> nn.Module:
    """By Adam, in seconds; noise and radii grow as the objective says."""
    objective = build("objectives", spec, threat=Linf(0.05))
    optimizer, per_epoch = torch.optim.Adam(model.parameters(), 3e-3), len(data) // 64
    steps = epochs * per_epoch
    for step in range(steps):
        rows = torch.randint(len(data), (64,), generator=generator(seed, "batch", step))
        optimizer.zero_grad()
        progress = Progress(step, steps, step / per_epoch, seed)
        objective(model, data.batch(rows), progress).per_example.mean().backward()
        optimizer.step()
    return model.eval()


def proved(certificates: Certificates) -> Tensor:
    return certificates.radii > 0


def certified(
    name: str, network: str, certifier: Certifier, model: nn.Module, x: Tensor, seed: int, **more: Any
) -> Claim | None:
    found = certifier.certify(model, x, seed=seed)
    rows = proved(found)
    if not bool(rows.any()):
        return None
    draw = generator(seed, "tries", name, network, found.norm)
    return Claim(
        name, network, found.norm, model, x[rows], found.labels[rows], found.radii[rows], draw, found.alpha, **more
    )


def in_eight_bits(model: nn.Module, data: Dataset) -> Twinned:
    """The file that is exported of it, answering in its runtime."""
    batch = data.batch(torch.arange(512)).inputs
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        path.write_bytes(int8_bytes(onnx_bytes(model, tuple(batch.shape[1:])), batch.split(64)))
        runtime = OnnxRuntimeModel(path)
        return Twinned(load_model(path), runtime, runtime.conditions).eval()


def complete(network: str, model: nn.Module, x: Tensor, seed: int) -> Claim | None:
    """Branch and bound: of each record the largest of some radii that is verified."""
    labels, radii = model(x).argmax(1), torch.zeros(len(x), dtype=torch.float64)
    for i, image in enumerate(x):
        pixels, label = [Fraction(v) for v in image.flatten().tolist()], int(labels[i])
        halves = tuple(
            (Halfspace(tuple(Fraction((k == label) - (k == j)) for k in range(10)), Fraction(0)),)
            for j in range(10)
            if j != label
        )
        for eps in (0.08, 0.05, 0.03):
            low, high = ([v + sign * Fraction(eps) for v in pixels] for sign in (-1, 1))
            box = tuple(max(v, Fraction(0)) for v in low), tuple(min(v, Fraction(1)) for v in high)
            verdict = verify(model, Property(64, 10, (Case(*box, halves),)), shape=(1, 8, 8), timeout=20, seed=seed)
            if verdict.answer == "verified":
                radii[i] = eps
                break
    rows = radii > 0
    draw = generator(seed, "tries", "branch and bound", network)
    if not bool(rows.any()):
        return None
    return Claim("branch and bound", network, "Linf", model, x[rows], labels[rows], radii[rows], draw)


def claims(data: Dataset, x: Tensor, seed: int) -> Iterator[Claim | None]:
    models = {name: trained(make(), spec, data, seed) for name, (make, spec) in NETWORKS.items()}
    for name, model in models.items():
        yield certified("ibp", name, Ibp(RADII), model, x, seed)
        yield certified("crown_ibp", name, CrownIbp(RADII), model, x, seed)
        for norm, scale in (("Linf", 1.0), ("L2", 4.0), ("L1", 20.0)):
            radii = tuple(scale * radius for radius in RADII[1::2])
            yield certified("crown", name, Crown(radii, norm=norm), model, x[:20], seed)  # type: ignore[arg-type]
        if name.startswith("relu"):
            yield certified("alpha_crown", name, AlphaCrown(RADII[2:9:2]), model, x[:12], seed)
    maps = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(32, 10),
    )  # fmt: skip
    models["convolutions, ibp"] = trained(maps, {"name": "ibp", "ramp": (0.0, 0.5)}, data, seed)
    for name in ("relu, plain", "relu, ibp", "convolutions, ibp"):
        file = in_eight_bits(models[name], data)
        yield certified("ibp", f"{name}, int8 file", Ibp(RADII), file, x, seed)
        yield certified("crown_ibp", f"{name}, int8 file", CrownIbp(RADII), file, x, seed)
        for norm, scale in (("Linf", 1.0), ("L2", 4.0), ("L1", 20.0)):
            radii = tuple(scale * radius for radius in RADII[1::2])
            yield certified("crown", f"{name}, int8 file", Crown(radii, norm=norm), file, x[:20], seed)  # type: ignore[arg-type]
    yield complete("relu, ibp", models["relu, ibp"], x[:6], seed)
    for k, exact in ((1, True), (5, False)):
        drawn = torch.randn(64, 64, generator=generator(seed, "metric"), dtype=torch.float64) / 8
        for metric, factor in (("neighbours", None), ("neighbours by a random metric", drawn)):
            knn = MahalanobisKnn(data.batch(torch.arange(400)).inputs, data.batch(torch.arange(400)).labels, k, factor)
            flat = x.flatten(1).double()
            yield certified("metric", f"{metric}, k={k}", MetricCertificate(exact), knn, flat, seed)
    sigma = 0.25
    noisy = trained(dense(nn.ReLU), {"name": "gaussian", "sigma": sigma}, data, seed)

    def passes(rows: Tensor) -> Tensor:
        return noisy(rows + sigma * torch.randn(rows.shape))

    smoothing = Smoothing(sigma, n=10_000)
    yield certified("smoothing", "relu, noise", smoothing, noisy, x, seed, smoothed=counted(passes), sigma=sigma)
    for name, model_spec, certifier in (
        ("pixeldp", {"name": "pixeldp_cnn", "hidden": 32, "attack_size": 0.3}, PixelDP(n=1_000, alpha=0.001)),
        ("twice_noised", {"name": "twice_noised_mlp"}, TwiceNoisedCertificate(n=2_000)),
    ):
        fresh = build("models", model_spec, input_shape=(1, 8, 8), num_classes=10)
        network = trained(fresh, {"name": "plain"}, data, seed, epochs=4)
        yield certified(name, str(model_spec["name"]), certifier, network, x[:12], seed, smoothed=counted(network))


def beyond(claim: Claim) -> float | None:
    """The share of balls of four times the radius in which the search finds another answer."""
    if claim.smoothed is not None:
        return None
    wide = Claim(
        claim.certifier, claim.network, claim.norm, claim.model, claim.x, claim.labels, 4 * claim.radii, claim.draw
    )
    for number in range(3):
        wide.round(number)
    return float((wide.margins <= 0).double().mean())


def main() -> None:
    parser = harness.arguments(__doc__, rounds=1)
    parser.add_argument("--seconds", type=float, default=240.0, help="of CPU time, for all tries together")
    parser.add_argument("--points", type=int, default=60, help="test records, at most")
    parser.add_argument("--minutes", type=float, default=60.0, help="by the clock, for the tries at most")
    options = parser.parse_args()
    harness.prepare(options)
    torch.manual_seed(options.seed)
    parts = digits()
    x = parts.test.batch(torch.arange(options.points)).inputs
    began = time.process_time()
    found = []
    for claim in claims(parts.train, x, options.seed):
        if claim is not None:
            print(f"{claim.certifier}, {claim.network}, {claim.norm}: {len(claim.x)} balls", flush=True)
            found.append(claim)
    certifying = time.process_time() - began
    print(f"{sum(len(each.x) for each in found)} balls of {len(found)} kinds after {certifying:.0f} s")
    for claim in found:
        claim.beyond = beyond(claim)
    started, until, number = time.process_time(), time.monotonic() + 60 * options.minutes, 0
    while time.process_time() - started < options.seconds and time.monotonic() < until:
        # The kind that has had the least time is next.
        claim = min(found, key=lambda each: each.seconds)
        start = time.process_time()
        claim.round(number)
        claim.seconds += time.process_time() - start
        number += 1
    table = [claim.seen() for claim in found]
    harness.show("tries inside certified balls", table)
    deterministic = sum(row["violations"] for row in table if not row["alpha"])
    totals = {
        "balls": sum(row["balls"] for row in table),
        "tries": sum(row["tries"] for row in table),
        "violations": sum(row["violations"] for row in table),
        "violations_of_proofs": deterministic,
        "certifying_seconds": certifying,
        "trying_seconds": time.process_time() - started,
    }
    print(totals)
    harness.save(options, {"claims": table, "totals": totals})
    sys.exit(1 if deterministic else 0)


if __name__ == "__main__":
    main()

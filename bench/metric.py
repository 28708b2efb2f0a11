"""How robust nearest neighbours are under metrics learnt by ARML and by its rivals: certified errors, paired by split.

    python bench/metric.py --data iris wine breast_cancer --threads 1 --out results/metric-tables.json
    python bench/metric.py --data digits --rounds 3 --threads 1 --out results/metric.json
    python bench/metric.py --data mnist --rounds 3 --threads 1 --points 100 --out results/metric-mnist.json

A round is another split: of the tables and digits, 70 % to train and 30 % to test, stratified; of MNIST, other records
to train and to test, which no two rounds share. Tables are scaled to [0, 1] by column, by the training records; images
are divided by their largest grey value. All rivals get the same records. ARML has its paper's settings, but fewer
epochs on images (the paper: 1000). NCA, LMNN and ITML have their libraries' defaults, ITML at most 200 passes, and all
start from the identity. Seconds are of one thread's CPU time.

Radii are l_2, of one neighbour exact (no attack can do better), of eleven a lower bound. The certified error at r is
the share of test records that are not proved right up to r, at 0 the ordinary error. A mean radius counts wrong answers
as 0. Intervals are 95 % intervals of Student's t for the mean difference to the Euclidean distance on the same split;
for splits of one table the variance is corrected for their overlap (Nadeau & Bengio, Machine Learning 2003).

LMNN and ITML are those of metric-learn (pip install metric-learn), left out if it is not installed, and of MNIST,
where they take too long.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from sklearn.model_selection import train_test_split
from sklearn.neighbors import NeighborhoodComponentsAnalysis
from sklearn.preprocessing import MinMaxScaler
from torch import Tensor

import harness
from trivet.certify.certifier import Certificates
from trivet.certify.curves import average_certified_radius, certified_accuracy
from trivet.certify.metric import MetricCertificate
from trivet.data.mnist import mnist
from trivet.models.mahalanobis_knn import MahalanobisKnn
from trivet.randomness import derive_seed, generator
from trivet.training.arml import Arml

Array = NDArray[Any]
NEIGHBOURS = (1, 11)


@dataclass(frozen=True)
class Split:
    """Records x [N, D] with labels y [N] to learn from, z [T, D] with labels t [T] to test, float64."""

    x: Array
    y: Array
    z: Array
    t: Array

    def limited(self, points: int) -> Split:
        """With the first `points` test records, which are in random order."""
        return Split(self.x, self.y, self.z[:points], self.t[:points])


@dataclass(frozen=True)
class Source:
    """A data set, and what is worth its time.

    Attributes:
        split: makes that of a seed.
        radii: at which errors are certified.
        epochs: of ARML.
        overlap: whether its splits share records.
        left_out: rivals that would take too long.
    """

    split: Callable[[argparse.Namespace, int], Split]
    radii: tuple[float, ...]
    epochs: int = 1000
    overlap: bool = True
    left_out: tuple[str, ...] = ()


def divided(whole: Array, labels: Array, seed: int) -> Split:
    x, z, y, t = train_test_split(whole, labels, test_size=0.3, stratify=labels, random_state=seed)
    return Split(x, y, z, t)


def table(load: Callable[..., Any]) -> Callable[[argparse.Namespace, int], Split]:
    def split(options: argparse.Namespace, seed: int) -> Split:
        whole = divided(*load(return_X_y=True), seed)
        scaler = MinMaxScaler().fit(whole.x)
        return Split(scaler.transform(whole.x), whole.y, scaler.transform(whole.z), whole.t)

    return split


def digits(options: argparse.Namespace, seed: int) -> Split:
    X, y = load_digits(return_X_y=True)
    return divided(X / 16, y, seed)


def mnist_part(options: argparse.Namespace, seed: int) -> Split:
    """Consecutive pieces of one random order of the training and of the test records."""
    turn, splits = seed - options.seed, whole_mnist()

    def piece(part: str, number: int) -> tuple[Array, Array]:
        dataset = getattr(splits, part)
        order = torch.randperm(len(dataset), generator=generator(options.seed, "records", part))
        batch = dataset.batch(order[turn * number : (turn + 1) * number])
        return batch.inputs.flatten(1).double().numpy(), batch.labels.numpy()

    return Split(*piece("train", options.mnist_records), *piece("test", options.points))


whole_mnist = cache(mnist)

SOURCES = {
    "iris": Source(table(load_iris), (0.0, 0.02, 0.05, 0.1, 0.2)),
    "wine": Source(table(load_wine), (0.0, 0.1, 0.2, 0.3, 0.5)),
    "breast_cancer": Source(table(load_breast_cancer), (0.0, 0.1, 0.2, 0.3, 0.5)),
    "digits": Source(digits, (0.0, 0.2, 0.3, 0.5, 0.8), epochs=300),
    "mnist": Source(mnist_part, (0.0, 0.5, 1.0, 1.5, 2.0), epochs=200, overlap=False, left_out=("lmnn", "itml")),
}


Learner = Callable[[Array, Array, int, int], Tensor]


def euclidean(x: Array, y: Array, seed: int, epochs: int) -> Tensor:
    return torch.eye(x.shape[1], dtype=torch.float64)


def arml(x: Array, y: Array, seed: int, epochs: int) -> Tensor:
    return Arml(epochs).learn(torch.from_numpy(x).float(), torch.from_numpy(y).long(), seed=seed)[0]


def nca(x: Array, y: Array, seed: int, epochs: int) -> Tensor:
    return torch.from_numpy(NeighborhoodComponentsAnalysis(init="identity", random_state=seed).fit(x, y).components_)


def lmnn(x: Array, y: Array, seed: int, epochs: int) -> Tensor:
    return torch.from_numpy(
        metric_learn().LMNN(n_neighbors=3, init="identity", random_state=seed).fit(x, y).components_
    )


def itml(x: Array, y: Array, seed: int, epochs: int) -> Tensor:
    return torch.from_numpy(
        metric_learn().ITML_Supervised(max_iter=200, prior="identity", random_state=seed).fit(x, y).components_
    )


@cache
def metric_learn() -> Any:
    """metric-learn, taught the new name of an argument that scikit-learn renamed; None if it is not installed."""
    try:
        import metric_learn as package
        from metric_learn import _util
    except ModuleNotFoundError:
        return None
    for name in ("check_array", "check_X_y"):
        setattr(_util, name, _renamed(getattr(_util, name)))
    return package


def _renamed(check: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*values: Any, **settings: Any) -> Any:
        if "force_all_finite" in settings:
            settings["ensure_all_finite"] = settings.pop("force_all_finite")
        return check(*values, **settings)

    return checked


RIVALS: dict[str, Learner] = {"euclidean": euclidean, "arml": arml, "nca": nca, "lmnn": lmnn, "itml": itml}
OPTIONAL = ("lmnn", "itml")


def judged(found: Certificates, targets: Tensor, radii: Sequence[float]) -> dict[str, Any]:
    errors = [1 - rate.value for rate in certified_accuracy(found, targets, radii)]
    return {
        "mean_radius": average_certified_radius(found, targets),
        "certified_error": {str(radius): error for radius, error in zip(radii, errors, strict=True)},
    }


def row(rival: str, split: Split, source: Source, seed: int) -> dict[str, Any]:
    """What one rival learns from one split, and how far its nearest neighbours can be trusted."""
    start = time.process_time()
    factor = RIVALS[rival](split.x, split.y, derive_seed(seed, "metric") % 2**31, source.epochs)
    learnt = time.process_time()
    x, y, z, t = (torch.from_numpy(each) for each in (split.x, split.y, split.z, split.t))
    models = {k: MahalanobisKnn(x, y, k, factor) for k in NEIGHBOURS}
    found = {k: MetricCertificate(exact=k == 1).certify(model, z) for k, model in models.items()}
    seconds = time.process_time() - learnt
    below = MetricCertificate().certify(models[1], z)
    positive = found[1].radii > 0
    return {
        "rival": rival,
        "seed": seed,
        "train_seconds": learnt - start,
        "certify_seconds": seconds,
        **{f"k={k}": judged(found[k], t, source.radii) for k in NEIGHBOURS},
        "bound_over_exact": float((below.radii / found[1].radii)[positive].mean()),
        "largest_gap_of_proof_and_flip": float((found[1].evidence["flip"] - found[1].radii).max()),
    }


def measure(options: argparse.Namespace, data: str) -> list[dict[str, Any]]:
    source, rows = SOURCES[data], []
    for turn in range(options.rounds):
        seed = options.seed + turn
        split = source.split(options, seed).limited(options.points)
        sizes = {"train": len(split.x), "test": len(split.z), "features": split.x.shape[1]}
        for rival in (each for each in options.rivals if each not in source.left_out):
            rows.append({"data": data, **sizes, **row(rival, split, source, seed)})
            last = rows[-1]
            print(
                f"{data}, split {seed}, {rival}: {last['train_seconds']:.1f} s, {last['certify_seconds']:.1f} s; mean "
                f"radius {last['k=1']['mean_radius']:.4f}, of 11 neighbours {last['k=11']['mean_radius']:.4f}",
                flush=True,
            )
    return rows


def interval(differences: Sequence[float], share: float) -> tuple[float, float] | None:
    """95 %, for the mean of differences of splits; `share` is test over training records, 0 for splits that do not
    share any.
    """
    from scipy.stats import t

    count = len(differences)
    if count < 2:
        return None
    spread = statistics.stdev(differences) * (1 / count + share) ** 0.5
    half = float(t.ppf(0.975, count - 1)) * spread
    mean = statistics.fmean(differences)
    return mean - half, mean + half


def summary(rows: Sequence[Mapping[str, Any]], k: int, overlap: bool) -> list[dict[str, Any]]:
    """Means over the splits, and the mean radius beyond the Euclidean distance's with its interval."""

    def column(rival: str, name: str) -> list[float]:
        return [each[f"k={k}"][name] for each in rows if each["rival"] == rival]

    share = rows[0]["test"] / rows[0]["train"] if overlap else 0.0
    found = []
    for rival in dict.fromkeys(each["rival"] for each in rows):
        radii = column(rival, "mean_radius")
        differences = [ours - base for ours, base in zip(radii, column("euclidean", "mean_radius"), strict=True)]
        between = interval(differences, share)
        errors = [each[f"k={k}"]["certified_error"] for each in rows if each["rival"] == rival]
        found.append(
            {
                "rival": rival,
                **{f"error at {r}": statistics.fmean(error[r] for error in errors) for r in errors[0]},
                "mean_radius": statistics.fmean(radii),
                "beyond_euclidean": statistics.fmean(differences),
                "from": between and between[0],
                "to": between and between[1],
                "splits": len(radii),
                "train_seconds": statistics.fmean(each["train_seconds"] for each in rows if each["rival"] == rival),
            }
        )
    return found


def main() -> None:
    parser = harness.arguments(__doc__, rounds=5)
    parser.add_argument("--data", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS), help="the Euclidean is always in")
    parser.add_argument("--points", type=int, default=150, help="test records to certify, at most")
    parser.add_argument("--mnist-records", type=int, default=500, help="to learn from and to search, in each round")
    options = parser.parse_args()
    harness.prepare(options)
    options.rivals = list(dict.fromkeys(["euclidean", *options.rivals]))
    if metric_learn() is None:
        left_out = [name for name in options.rivals if name in OPTIONAL]
        options.rivals = [name for name in options.rivals if name not in OPTIONAL]
        print(f"metric-learn is not installed; left out: {', '.join(left_out) or 'nothing'}")
    results: dict[str, Any] = {}
    for data in options.data:
        rows = measure(options, data)
        means = {f"k={k}": summary(rows, k, SOURCES[data].overlap) for k in NEIGHBOURS}
        for k, table_of_k in means.items():
            harness.show(f"{data}, {k}", table_of_k)
        results[data] = {"means": means, "splits": rows}
        harness.save(options, results)  # after every data set, so that an interrupted run leaves what it has


if __name__ == "__main__":
    main()

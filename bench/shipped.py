"""What shipped files weigh and take: small networks as ONNX, torch.export and packed files, beside the dense one.

    python bench/shipped.py --data digits --out results/shipped-digits.json
    python bench/shipped.py --data mnist --out results/shipped-mnist.json
    python bench/shipped.py --data resnet20 --out results/shipped-resnet20.json

One network is trained plainly, then goes on to train in four ways for as many epochs: as it is (dense); with half the
filters of each layer pruned by magnitude and cut out; with half the channels removed by the library Torch-Pruning
(DepGraph); with its kernels in Tucker form of half the size in each mode. Of that the packed file stores the factors,
and the others chains of small layers where these multiply less than the kernel (`compression.chains`). The ResNet-20
sees 64 random images once: its weights are good for sizes and times alone, and it has no accuracy.

Each of them is written to files: ONNX and torch.export archives, in float32 and in eight bits (by ONNX Runtime's and by
torchao's static quantisation, calibrated on 512 training records), and packed weights. ONNX files run in ONNX Runtime,
archives in PyTorch, as they are written and compiled by TorchInductor. Archives in eight bits that are not compiled
only simulate them.

Columns: parameters stored, and multiplications (MACs) of the network as the files hold it; bytes of the file, and of it
after zlib; right answers of the file on the whole test set, in per cent; bytes by which a fresh process grows that
loads the file and answers batches of 64 on one thread; and for each batch size and number of threads the median time of
a batch in milliseconds, its quartiles over rounds, and how many times faster than the dense float32 file in ONNX
Runtime, which took its turns in the same rounds. A turn is as many passes as fill --turn milliseconds. Compiling is not
counted. Times need a machine that does nothing else.
"""

from __future__ import annotations

import copy
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

import harness
from trivet.compression.chains import chained
from trivet.compression.cost import cost_of, limited_threads, quartiles
from trivet.compression.packing import save_packed
from trivet.compression.runtime import footprint
from trivet.data.dataset import Dataset, Splits
from trivet.errors import TrivetError
from trivet.methods import build
from trivet.models.baking import baked
from trivet.models.foreign.export import int8_bytes, onnx_bytes, pt2_bytes, pt2_int8_bytes
from trivet.models.foreign.exported_program import ExportedModel
from trivet.models.foreign.onnx_runtime import OnnxRuntimeModel
from trivet.randomness import generator
from trivet.training.folder import RunFolder
from trivet.training.pipeline import run_stages

NETWORKS: dict[str, dict[str, Any]] = {
    "digits": {"model": {"name": "small_cnn", "width": 2}, "train": 1442, "epochs": 20},
    "mnist": {"model": {"name": "mnist_cnn"}, "train": 6000, "epochs": 2},
    "resnet20": {"model": {"name": "resnet", "depth": 20}, "train": 64, "epochs": 1},
}
FILTERS = {"pattern": {"name": "structured", "granularity": "filter"}, "scope": "layerwise"}
WAYS: dict[str, list[dict[str, Any]]] = {
    "dense": [{}],
    "half the filters cut": [{"prune": {"pruner": "magnitude", "density": 0.5, **FILTERS}}, {"shrink": {}}, {}],
    "DepGraph, half": [{"dep_graph": {"ratio": 0.5}}, {}],
    "Tucker, half": [
        {"fit": {"compression": {"name": "tensorization", "rank": 0.5, "keep": 1.0, "exclude": ["logits"]}}}
    ],
}
REFERENCE = "dense, onnx"


@dataclass(frozen=True)
class Shipped:
    """A file, what opens it for a batch size, and in which process its memory is measured (None: in none)."""

    name: str
    path: Path
    opened: Callable[[int], nn.Module] | None
    memory: str | None


def data_of(options: Any) -> Splits:
    if options.data != "resnet20":
        splits: Splits = build("data", options.data, expects=Splits)
        return splits.limited(train=options.train, test=options.points)
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=generator(options.seed, "images"))
    noise = Dataset(images, torch.arange(64) % 10, tuple(map(str, range(10))), "noise")
    return Splits(noise, noise)


def stages_of(way: list[dict[str, Any]], options: Any) -> list[tuple[str, Any]]:
    """What follows the common training; {} is plain training, and other stages leave the last layer alone."""
    fit = {
        "objective": "plain",
        "epochs": max(1, options.epochs // 2),
        "batch_size": 64,
        "optimizer": {"name": "adam", "lr": 1e-3},
    }
    made = []
    for step in way:
        ((name, settings),) = (step or {"fit": {}}).items()
        given = fit | settings if name == "fit" else settings
        if name in ("prune", "dep_graph"):
            given = {**given, "exclude": ["logits"]}
        made.append((name, build("training", {"name": name, **given})))
    return made


def networks(options: Any, splits: Splits) -> dict[str, nn.Module]:
    """All go on from the same dense network."""
    shape, classes = splits.train.input_shape, splits.train.num_classes
    spec = NETWORKS[options.data]["model"]
    first: Any = build(
        "models", spec, input_shape=shape, num_classes=classes, generator=generator(options.seed, "weights")
    )
    plain = {"objective": "plain", "epochs": options.epochs, "batch_size": 64}
    start = [("fit", build("training", {"name": "fit", **plain, "optimizer": {"name": "adam", "lr": 1e-3}}))]
    found = {}
    with tempfile.TemporaryDirectory() as folder:

        def run(name: str, stages: list[tuple[str, Any]], model: nn.Module) -> nn.Module:
            where = RunFolder.create(Path(folder) / name.replace(" ", "-"), "benchmark")
            done = run_stages(stages, model, splits, where, seed=options.seed, device=torch.device("cpu"))
            return done.model.eval()

        common = run("common", start, first)
        for name, way in WAYS.items():
            found[name] = run(name, stages_of(way, options), copy.deepcopy(common))
            print(f"made: {name}", flush=True)
    return found


def files_of(name: str, model: nn.Module, splits: Splits, folder: Path) -> list[Shipped]:
    shape, train = splits.train.input_shape, splits.train
    batches = [train.batch(part).inputs for part in torch.arange(min(512, len(train))).split(64)]
    place = folder / name.replace(" ", "-")
    plain = chained(model, shape)
    in_onnx = onnx_bytes(plain, shape)
    content = {
        "onnx": in_onnx,
        "onnx int8": int8_bytes(in_onnx, batches),
        "pt2": pt2_bytes(plain, shape),
        "pt2 int8": pt2_int8_bytes(plain, shape, batches),
    }
    made = []
    for form, value in content.items():
        path = place.with_name(f"{place.name}-{form.replace(' ', '-')}").with_suffix("." + form.split()[0])
        path.write_bytes(value)
        full = f"{name}, {form}"
        if form.startswith("onnx"):
            made.append(Shipped(full, path, lambda _, path=path: OnnxRuntimeModel(path), "onnxruntime"))
            continue
        made.append(Shipped(full, path, lambda _, path=path: ExportedModel(path), "exported"))
        compiled = lambda size, path=path: ExportedModel(path, batch_size=size)  # noqa: E731
        made.append(Shipped(f"{full}, compiled", path, compiled, None))
    packed = place.with_suffix(".safetensors")
    save_packed(packed, model.state_dict(), {})
    return [*made, Shipped(f"{name}, packed", packed, None, None)]


@torch.no_grad()
def right(model: nn.Module, test: Dataset) -> float:
    parts = [test.batch(part) for part in torch.arange(len(test)).split(256)]
    hits = sum(int((model(each.inputs).argmax(1) == each.labels).sum()) for each in parts)
    return 100 * hits / len(test)


def passes(model: nn.Module, x: Tensor, milliseconds: float) -> int:
    """How many fill a turn."""
    model(x)
    start = perf_counter()
    for _ in range(3):
        model(x)
    return max(1, int(3e-3 * milliseconds / (perf_counter() - start)))


def times_of(shipped: list[Shipped], shape: tuple[int, ...], size: int, threads: int, options: Any) -> dict[str, Any]:
    """Milliseconds of a batch of every file, in turns."""
    x = torch.rand(size, *shape, generator=generator(options.seed, "inputs"))
    with torch.inference_mode(), limited_threads(threads):
        rivals: dict[str, Callable[[int], Any]] = {}
        counts = {}
        for each in shipped:
            if each.opened is None:
                continue
            try:
                model = each.opened(size)
            except TrivetError as error:
                print(f"{each.name}: {error}", flush=True)
                continue
            counts[each.name] = passes(model, x, options.turn)

            def turn(_: int, model: nn.Module = model, count: int = counts[each.name]) -> None:
                for _ in range(count):
                    model(x)

            rivals[each.name] = turn
        seconds, _ = harness.interleaved(rivals, options.rounds)
    each_pass = {name: [1e3 * taken / counts[name] for taken in found] for name, found in seconds.items()}
    base = quartiles(each_pass[REFERENCE])[1]
    found = {}
    for name, taken in each_pass.items():
        low, median, high = quartiles(taken)
        found[name] = {"ms": median, "from": low, "to": high, "times_faster": base / median}
    return found


def measured(options: Any, folder: Path) -> dict[str, Any]:
    splits = data_of(options)
    shape = splits.train.input_shape
    models = networks(options, splits)
    shipped: list[Shipped] = []
    rows: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        parameters, macs = cost_of(model, shape).parameters, cost_of(baked(chained(model, shape)), shape).macs
        for each in files_of(name, model, splits, folder):
            content = each.path.read_bytes()
            told = {"file": each.name, "parameters": parameters, "macs": macs, "bytes": len(content)}
            rows[each.name] = told | {"zipped": len(zlib.compress(content, 9)), "right": None, "memory": None}
            if each.opened is not None and options.data != "resnet20":
                rows[each.name]["right"] = right(each.opened(256), splits.test)
            if each.memory is not None:
                grown = footprint(each.path, shape, batch_size=64, threads=1, runtime=each.memory)
                rows[each.name]["memory"] = grown
            shipped.append(each)
        print(f"written: {name}", flush=True)
    results: dict[str, Any] = {"rows": list(rows.values()), "reference": REFERENCE, "latency": []}
    for size in options.batches:
        for threads in options.counts:
            found = times_of(shipped, shape, size, threads, options)
            for name, times in found.items():
                results["latency"].append({"file": name, "batch": size, "threads": threads, **times})
            table = [{"file": name, **times} for name, times in found.items()]
            harness.show(f"{options.data}: ms for a batch of {size}, threads: {threads}", table)
            harness.save(options, results)
    return results


def main() -> None:
    parser = harness.arguments(__doc__ or "", rounds=30)
    parser.add_argument("--data", choices=sorted(NETWORKS), default="digits")
    parser.add_argument("--epochs", type=int, help="of the common training; each way goes on for half as many")
    parser.add_argument("--train", type=int, help="training records")
    parser.add_argument("--points", type=int, help="test records; all if left out")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 64])
    parser.add_argument("--counts", type=int, nargs="*", default=[1, 2], help="numbers of threads to time")
    parser.add_argument("--turn", type=float, default=20.0, help="milliseconds of a turn, about")
    options = parser.parse_args()
    for name in ("train", "epochs"):
        if getattr(options, name) is None:
            setattr(options, name, NETWORKS[options.data][name])
    harness.prepare(options)
    with tempfile.TemporaryDirectory() as folder:
        results = measured(options, Path(folder))
    harness.show(f"{options.data}: sizes", results["rows"])
    harness.save(options, results)


if __name__ == "__main__":
    main()

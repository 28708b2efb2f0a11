"""What a model honestly costs: counted on the weights that ship, measured on the machine that is named.

Zeros are not savings by themselves. A dense file stores them and a dense kernel multiplies by them, so sizes and
operations are given twice where they differ: as executed, and as a kernel that skips zeros would need.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from trivet import machine
from trivet.compression.compression import WEIGHTED, originals
from trivet.compression.packing import pack, packed_bytes
from trivet.errors import require
from trivet.models.modes import device_of, evaluating
from trivet.models.sensitivity import UnitSensitivity
from trivet.models.surrogate import Surrogate


@dataclass(frozen=True)
class Cost:
    """The size and the work of a model.

    Attributes:
        parameters: trainable numbers, of any kind.
        nonzero_parameters: those that are not zero.
        weights: numbers in the kernels of convolutions and linear layers, without biases; of those stored as factors,
            in the kernels they make.
        nonzero_weights: those that are not zero.
        buffers: numbers saved with the model but not trained (running statistics, normalisation).
        file_bytes: length of the safetensors file of its state, header included, without metadata.
        packed_bytes: length of the packed file of the same (`compression.packing`), exact to the last bit.
        compressed_bytes: of that file after zlib.
        weight_bits: what the packed file spends on the kernels, whatever they are stored as.
        input_channels, idle_channels: of the convolutions' kernels, and those of them that are all zeros.
        activations: numbers that convolutions and linear layers read and write for one input.
        flops: operations of one forward pass of one input in convolutions and matrix products, two for each
            multiplication with addition, borders counted as if computed. What dense kernels execute, and what
            rebuilding factored kernels takes.
        nonzero_flops: the same without the products by zero weights of convolutions and linear layers.
    """

    parameters: int
    nonzero_parameters: int
    weights: int
    nonzero_weights: int
    buffers: int
    file_bytes: int
    packed_bytes: int
    compressed_bytes: int
    weight_bits: int
    input_channels: int
    idle_channels: int
    activations: int
    flops: int
    nonzero_flops: int

    @property
    def macs(self) -> int:
        """Multiplications with addition: half of `flops`."""
        return self.flops // 2

    @property
    def sparsity(self) -> float:
        """Share of zeros among the weights of all convolutions and linear layers together, in [0, 1]."""
        return 1.0 - self.nonzero_weights / self.weights if self.weights else 0.0

    @property
    def channel_sparsity(self) -> float:
        """Share of all-zero input slices among those of all convolutions together, in [0, 1]."""
        return self.idle_channels / self.input_channels if self.input_channels else 0.0

    @property
    def bits_per_weight(self) -> float:
        """What the packed file spends on a weight of the kernels, on average; 32 where nothing is compressed."""
        return self.weight_bits / self.weights if self.weights else 0.0


def cost_of(model: nn.Module, input_shape: tuple[int, ...]) -> Cost:
    """Count `model` as it stands, for one input of `input_shape` (C, H, W).

    Raises:
        BadValue: weights that are still computed from others (masks, quantizers): those would be counted twice, and
            are not what ships. Factors are, and are counted as they are stored; so is the scaling of a
            `UnitSensitivity`, which belongs to the network and adds no weights.
    """
    for name, module in model.named_modules():
        steps = module.parametrizations.values() if parametrize.is_parametrized(module) else ()
        require(
            all(
                isinstance(step, UnitSensitivity) or getattr(step, "factors", False) for each in steps for step in each
            ),
            f"the weights of {name or 'the model'} are still computed by a parametrization; finish the compression "
            "before counting.",
        )
    parameters, buffers = list(model.parameters()), list(model.buffers())
    layers = [module for module in model.modules() if isinstance(module, WEIGHTED)]
    weights = list({id(weight): weight for weight in [layer.weight for layer in layers]}.values())
    stored = {f"{number}.{part}": t for number, layer in enumerate(layers) for part, t in enumerate(originals(layer))}
    shared = {id(tensor): name for name, tensor in stored.items()}
    parts, _ = pack({name: stored[name] for name in shared.values()})
    slices = [(w != 0).transpose(0, 1).flatten(1).any(1) for w in weights if w.ndim > 2]
    packed, compressed = packed_bytes(model.state_dict())
    flops, skipped, activations = _work(model, input_shape)
    return Cost(
        parameters=sum(p.numel() for p in parameters),
        nonzero_parameters=_nonzero(parameters),
        weights=sum(w.numel() for w in weights),
        nonzero_weights=_nonzero(weights),
        buffers=sum(b.numel() for b in buffers),
        file_bytes=safetensors_bytes(model.state_dict()),
        packed_bytes=packed,
        compressed_bytes=compressed,
        weight_bits=8 * sum(part.nbytes for part in parts.values()),
        input_channels=sum(len(used) for used in slices),
        idle_channels=sum(int((~used).sum()) for used in slices),
        activations=activations,
        flops=flops,
        nonzero_flops=flops - skipped,
    )


def safetensors_bytes(tensors: dict[str, Tensor]) -> int:
    """The exact length of a safetensors file of `tensors` without metadata."""
    # Tensors that share memory are refused by the format, and saved once for each name by `trivet.files`.
    return len(safetensors.torch.save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}))


def _nonzero(tensors: list[Any]) -> int:
    return sum(int(t.detach().count_nonzero()) for t in tensors)


@torch.no_grad()
def _work(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """FLOPs of one forward pass of one input, how many of them multiply by a zero weight, and the numbers moved."""
    skipped = moved = 0
    layers: list[Any] = [module for module in model.modules() if isinstance(module, WEIGHTED)]
    # Before the counter runs: to look at a factored weight is to rebuild it.
    zeros = {id(layer): layer.weight.numel() - _nonzero([layer.weight]) for layer in layers}

    def count(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal skipped, moved
        moved += inputs[0][0].numel() + output[0].numel()
        # Every weight of a kernel is used once at each position of the output.
        positions = output[0, 0].numel() if not isinstance(module, nn.Linear) else output[..., 0].numel()
        skipped += 2 * zeros[id(module)] * positions

    hooks = [layer.register_forward_hook(count) for layer in layers]
    counter = FlopCounterMode(display=False)
    try:
        with evaluating(model), counter:
            model(torch.zeros(1, *input_shape, device=device_of(model)))
    finally:
        for hook in hooks:
            hook.remove()
    return int(counter.get_total_flops()), skipped, moved


@dataclass(frozen=True)
class Latency:
    """Measured time of one forward pass.

    Attributes:
        median: seconds a batch, over `repeats` runs.
        low, high: seconds; the quartiles of the runs.
        batch_size: inputs a batch.
        threads: processor threads PyTorch was allowed.
        repeats: timed runs, after warm-up.
        path: what ran the model, and how; of several ways in float32 the fastest, which is the one reported.
        machine: processor (and GPU, if the model lies there).
    """

    median: float
    low: float
    high: float
    batch_size: int
    threads: int
    repeats: int
    path: str
    machine: str


def measure_latency(
    model: nn.Module,
    input_shape: tuple[int, ...],
    *,
    batch_size: int = 1,
    threads: int | None = None,
    repeats: int = 30,
    warmup: int = 3,
) -> Latency:
    """The median time of a forward pass of `batch_size` inputs of `input_shape` in float32, eval mode.

    The model is run as it is and with BatchNorm folded in channels-last layout, and the faster way is reported: a
    speed-up against a slow baseline is none. The folded way counts only where its outputs agree with the model's.

    Args:
        threads: processor threads, None for PyTorch's present setting; restored afterwards.
        repeats: timed runs of each way.
        warmup: untimed runs before them.

    Raises:
        BadValue: numbers below 1.
    """
    for name, value in (("batch_size", batch_size), ("repeats", repeats), ("warmup", warmup)):
        require(value >= 1, f"{name}={value} must be at least 1.")
    require(threads is None or threads >= 1, f"threads={threads} must be at least 1.")
    x = torch.rand(batch_size, *input_shape, generator=torch.Generator().manual_seed(0)).to(device_of(model))
    with evaluating(model), torch.inference_mode(), limited_threads(threads) as allowed:
        folded = Surrogate(model, "fp32").refresh(model)
        ways: dict[str, Callable[[Tensor], Tensor]] = {"PyTorch": model}
        if torch.allclose(folded(x), model(x), rtol=1e-3, atol=1e-4):
            ways["PyTorch, BatchNorm folded, channels last"] = folded
        taken = {name: times(way, x, repeats, warmup) for name, way in ways.items()}
    path = min(taken, key=lambda name: statistics.median(taken[name]))
    low, median, high = quartiles(taken[path])
    gpu = f", {torch.cuda.get_device_name(x.device)}" if x.is_cuda else ""
    return Latency(median, low, high, batch_size, allowed, repeats, path, machine.processor() + gpu)


def times(way: Callable[[Tensor], Tensor], x: Tensor, repeats: int, warmup: int) -> list[float]:
    """Seconds of each of `repeats` runs, after `warmup` untimed ones."""
    taken = []
    for run in range(warmup + repeats):
        _wait(x)
        start = time.perf_counter()
        way(x)
        _wait(x)
        if run >= warmup:
            taken.append(time.perf_counter() - start)
    return taken


def _wait(x: Tensor) -> None:
    """Work on a GPU is only queued when the call returns."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def quartiles(taken: list[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    ordered = sorted(taken)
    last = len(ordered) - 1
    return ordered[math.floor(last / 4)], statistics.median(ordered), ordered[math.ceil(3 * last / 4)]


@contextmanager
def limited_threads(threads: int | None) -> Iterator[int]:
    """So many processor threads inside, the present number for None; yields the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield threads or before
    finally:
        torch.set_num_threads(before)

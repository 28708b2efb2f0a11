"""Time and memory of an exported file in the runtime it is made for.

Run as a program it answers for memory: it loads a file, lets it work, and prints what that took. Only a fresh process
can tell, because one that has done other work has memory to spare.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from trivet import machine
from trivet.compression.cost import Latency, limited_threads, quartiles, times
from trivet.errors import TrivetError, require
from trivet.models.foreign.exported_program import ExportedModel
from trivet.models.foreign.load import load_model
from trivet.models.foreign.onnx_runtime import OnnxRuntimeModel

_STATUS = Path("/proc/self/status")


def runtime_latency(
    path: str | Path,
    input_shape: tuple[int, ...],
    *,
    batch_size: int = 1,
    threads: int | None = None,
    repeats: int = 30,
    warmup: int = 3,
) -> Latency:
    """The median time of a batch on the processor in what `runner` finds; the fields are those of `measure_latency`.

    Raises:
        BadValue: numbers below 1.
        TrivetError: a file that its runtime refuses.
    """
    for name, value in (("batch_size", batch_size), ("repeats", repeats), ("warmup", warmup)):
        require(value >= 1, f"{name}={value} must be at least 1.")
    require(threads is None or threads >= 1, f"threads={threads} must be at least 1.")
    x = torch.rand(batch_size, *input_shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), limited_threads(threads) as allowed:
        model, way = runner(path, batch_size)
        low, median, high = quartiles(times(model, x, repeats, warmup))
    return Latency(median, low, high, batch_size, allowed, repeats, way, machine.processor())


def runner(path: str | Path, batch_size: int) -> tuple[nn.Module, str]:
    """The file as its users run it in batches of one size, with the present number of threads, and what that is called.

    An .onnx file runs in ONNX Runtime. A .pt2 file is compiled by TorchInductor; where that fails, as it does without
    a C++ compiler, PyTorch runs it operator by operator, which only simulates eight bits.

    Raises:
        TrivetError: a file that its runtime refuses.
    """
    if Path(path).suffix != ".pt2":
        return OnnxRuntimeModel(path), "ONNX Runtime"
    try:
        return ExportedModel(path, batch_size=batch_size), COMPILED
    except TrivetError:
        return ExportedModel(path), SIMULATED


COMPILED, SIMULATED = "PyTorch, compiled", "PyTorch, as written"
_READERS: dict[str, tuple[str, Callable[[str], nn.Module]]] = {
    "onnxruntime": ("onnxruntime", OnnxRuntimeModel),
    "torch": ("torch._dynamo", load_model),
    "exported": ("torch._dynamo", ExportedModel),
}
"""What a runtime needs loaded (shapes are worked out by code that the compiler shares), and what reads a file."""


def footprint(
    path: str | Path, input_shape: tuple[int, ...], *, batch_size: int, threads: int, runtime: str = "onnxruntime"
) -> int | None:
    """Bytes by which a fresh process grows at most while it loads the file and answers three batches.

    The runtime itself is loaded before. None where the system does not say (it must have /proc).

    Args:
        path: of an .onnx file; with runtime="torch", of anything `load_model` reads; with "exported", of a .pt2 file.
        input_shape: of one record.
        batch_size: records in a batch.
        threads: processor threads.
        runtime: "onnxruntime", "torch", or "exported" for operators as they are written (`ExportedModel`).

    Raises:
        BadValue: no such file, or another runtime.
        TrivetError: the process failed.
    """
    require(runtime in _READERS, f"runtime={runtime} must be onnxruntime, torch or exported.")
    require(Path(path).is_file(), f"{path} is no file.")
    if not _STATUS.exists():
        return None
    sides = "x".join(map(str, (batch_size, *input_shape)))
    command = [sys.executable, "-m", "trivet.compression.runtime", str(path), sides, str(threads), runtime]
    # Our own interpreter, with a path and numbers.
    found = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if found.returncode:
        last = (found.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise TrivetError(f"the memory of {path} cannot be measured: {last}")
    return int(found.stdout)


def _grown(path: str, sides: str, threads: str, runtime: str) -> int:
    torch.set_num_threads(int(threads))
    x = torch.rand(*map(int, sides.split("x")), generator=torch.Generator().manual_seed(0))
    library, reader = _READERS[runtime]
    for each in ("onnx", "torch.ao.quantization.fx._decomposed", library):
        importlib.import_module(each)
    for where in ("cpu", "meta"):  # libraries that are loaded at first use
        nn.Conv2d(1, 1, 1, device=where)(torch.zeros(1, 1, 1, 1, device=where))
    before = _status("VmRSS")
    model = reader(path)
    with torch.inference_mode():
        for _ in range(3):
            model(x)
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    line = next(each for each in _STATUS.read_text().splitlines() if each.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    print(_grown(*sys.argv[1:5]))

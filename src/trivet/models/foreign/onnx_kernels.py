"""Whether ONNX Runtime computes an eight-bit file as bounds of its rebuilt graph assume, and under which conditions.

The runtime rewrites the graph before it runs it: what is dequantised, multiplied and quantised again becomes one kernel
that adds products of integers exactly, in 32 bits, and multiplies the sum by one float. What such kernels lose by
rounding is in the bounds (`trivet.certify.bounds.staircase`), if

- the rewritten graph holds no kernel but those whose arithmetic was read in the runtime's sources (1.31 and before);
- it rounds to the grids of the file and no others, and the file not to two in turn (of which the runtime makes one);
- its integers are those of the file (the runtime may round a bias itself), and a bias is in steps of the input's times
  the weights', which is what kernels take it for;
- no sum can leave 32 bits.

All of that is looked up here, in the very graph that runs.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trivet.errors import TrivetError

_GRIDS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "QuantizeLinear": ((1, 2),),
    "DequantizeLinear": ((1, 2),),
    "QLinearConv": ((1, 2), (4, 5), (6, 7)),
    "QGemm": ((1, 2), (4, 5), (7, 8)),
    "QLinearMatMul": ((1, 2), (4, 5), (6, 7)),
    "QLinearAdd": ((1, 2), (4, 5), (6, 7)),
    "QLinearMul": ((1, 2), (4, 5), (6, 7)),
    "QLinearAveragePool": ((1, 2), (3, 4)),
    "QLinearGlobalAveragePool": ((1, 2), (3, 4)),
}
"""Kernels on integers, and where among their inputs scales and zeros are."""
_PLAIN = {
    *("Add", "AveragePool", "BatchNormalization", "Clip", "Concat", "Constant", "Conv", "Div", "Flatten", "FusedConv"),
    *("FusedGemm", "FusedMatMul", "Gemm", "GlobalAveragePool", "Identity", "LeakyRelu", "MatMul", "MaxPool", "Mul"),
    *("NhwcMaxPool", "Pad", "ReduceMean", "Relu", "Reshape", "Slice", "Squeeze", "Sub", "Transpose", "Unsqueeze"),
}
"""Kernels that move or compare numbers, or compute in float32 as bounds allow for."""
_MOVES = {
    *("Clip", "Flatten", "Identity", "MaxPool", "Pad", "Relu", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"),
}
"""What the runtime may drop, or pass on its way to one rounding instead of two."""
_WEIGHTS: Mapping[str, tuple[int, int, int | None]] = {
    "QLinearConv": (3, 5, 8),
    "QGemm": (3, 5, 6),
    "QLinearMatMul": (3, 5, None),
}
"""Of kernels that add up products: where weights, their zeros and the bias are."""
_WITHOUT_SATURATION = {"avx512_vnni", "avx_vnni", "amx_int8"}


def conditions_of(content: bytes) -> tuple[str, ...]:
    """What answers of ONNX Runtime to the file `content` owe to the machine, if the bounds of its graph cover them.

    Raises:
        TrivetError: they do not, or it is not known; the sentence says why.
    """
    import onnx
    import onnxruntime
    from onnx import numpy_helper

    machine = platform.machine().lower()
    _require(machine in ("x86_64", "amd64"), f"its kernels on {machine} round in ways that bounds here do not cover")
    file, made = onnx.load_model_from_string(content).graph, _rewritten(content)
    tensors = _tensors(made)
    for node in made.node:
        fused = [each.s.decode() for each in node.attribute if each.name == "activation"]
        known = (node.op_type in _PLAIN and {*fused} <= {"Relu", "Clip", "LeakyRelu"}) or node.op_type in _GRIDS
        what = " and ".join((node.op_type, *fused))
        _require(known, f"it computes {what}, whose arithmetic bounds here do not cover")
    _require(_grids(made, tensors) <= _grids(file, _tensors(file)), "it rounds to other grids than the file says")
    _check_turns(file, _tensors(file))
    _check_biases(file, _tensors(file))
    stored = {_sorted(numpy_helper.to_array(each)) for each in file.initializer}
    saturating = False
    for node in made.node:
        if node.op_type in _WEIGHTS:
            saturating |= _check_sums(node, tensors, stored)
    kernels = sorted({node.op_type for node in made.node if node.op_type in _GRIDS})
    found = (
        f"as ONNX Runtime {onnxruntime.__version__} computes it on x86-64 processors, by its kernels on integers "
        f"({', '.join(kernels)}) or in float32: a value so near the edge of two levels that rounding decides counts on "
        "both sides",
    )
    if not saturating:
        return found
    flags = _processor()
    _require(
        flags is None or bool(flags & _WITHOUT_SATURATION),
        "this processor adds products in 16 bits, where sums of these weights may saturate; quantise with 7 bits",
    )
    return (
        *found,
        "on processors with VNNI or AMX: others add two products in 16 bits, where sums may saturate, unless "
        "session.x64quantprecision is 1",
    )


def _require(condition: bool, why: str) -> None:
    if not condition:
        raise TrivetError(
            f"bounds are none of what ONNX Runtime answers: {why}; certify by sampling, or leave the certificate out."
        )


def _rewritten(content: bytes) -> Any:
    """The graph that runs."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rewritten.onnx"
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return onnx.load(path).graph


def _tensors(graph: Any) -> dict[str, Any]:
    return {each.name: each for each in graph.initializer}


def _array(name: str, tensors: Mapping[str, Any]) -> Any:
    from onnx import numpy_helper

    _require(name in tensors, f"{name!r} is computed from the data where a constant is expected")
    return numpy_helper.to_array(tensors[name])


def _optional(node: Any, place: int, tensors: Mapping[str, Any]) -> Any:
    """An input that may be left out."""
    present = place < len(node.input) and node.input[place]
    return _array(node.input[place], tensors) if present else None


Grid = tuple[bytes, bytes]
"""Scale and zero; equal if and only if the numbers are."""


def _grid(node: Any, scale: int, zero: int, tensors: Mapping[str, Any]) -> Grid:
    steps, zeros = _array(node.input[scale], tensors), _optional(node, zero, tensors)
    levels = np.zeros(steps.size, np.int64) if zeros is None else zeros.astype(np.int64).reshape(-1)
    return steps.astype(np.float64).tobytes(), levels.tobytes()


def _grids(graph: Any, tensors: Mapping[str, Any]) -> set[Grid]:
    return {
        _grid(node, *places, tensors)
        for node in graph.node
        for places in _GRIDS.get(node.op_type, ())
        if places[0] < len(node.input) and node.input[places[0]]
    }


def _check_turns(graph: Any, tensors: Mapping[str, Any]) -> None:
    """No value may be rounded to one grid and then, without arithmetic between, to another."""
    makers = {node.output[0]: node for node in graph.node}
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            before = makers.get(node.input[0])
            while before is not None and before.op_type in _MOVES:
                before = makers.get(before.input[0])
            if before is not None and before.op_type == "DequantizeLinear":
                same = _grid(before, 1, 2, tensors) == _grid(node, 1, 2, tensors)
                _require(same, f"the file rounds to two grids in turn, up to {node.name!r}, and the runtime to one")


def _check_biases(graph: Any, tensors: Mapping[str, Any]) -> None:
    makers = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm") and len(node.input) > 2 and all(name in makers for name in node.input):
            data, weight, bias = (_array(makers[name].input[1], tensors) for name in node.input)
            product = data.astype(np.float64).reshape(-1) * weight.astype(np.float64).reshape(-1)
            same = np.abs(bias.reshape(-1) - product) <= 2.0**-23 * product
            zeros = _optional(makers[node.input[2]], 2, tensors)
            _require(
                bool(same.all()) and (zeros is None or not zeros.any()),
                f"the bias of {node.name!r} is stored in other steps than its kernel takes it for",
            )


def _sorted(array: Any) -> tuple[str, bytes]:
    """Type and content, whatever the order: the runtime may transpose weights."""
    return array.dtype.name, np.sort(array, axis=None).tobytes()


def _check_sums(node: Any, tensors: Mapping[str, Any], file: set[tuple[str, bytes]]) -> bool:
    """Whether sums of two products may saturate in 16 bits; an error where sums may leave 32."""
    weight, zero, bias = _WEIGHTS[node.op_type]
    stored = _array(node.input[weight], tensors)
    added = None if bias is None else _optional(node, bias, tensors)
    own = all(_sorted(each) in file for each in (stored, added) if each is not None)
    _require(own, f"{node.name!r} computes with other integers than the file holds")
    attributes = {each.name: each for each in node.attribute}
    by_column = node.op_type != "QLinearConv" and not (attributes["transB"].i if "transB" in attributes else 0)
    _require("alpha" not in attributes or attributes["alpha"].f == 1.0, f"{node.name!r} multiplies by alpha")
    _require(stored.ndim >= 2 and (stored.ndim == 2 or not by_column), f"{node.name!r} multiplies batches of matrices")
    rows = (stored.T if by_column else stored).reshape(stored.shape[1 if by_column else 0], -1).astype(np.int64)
    zeros = _optional(node, zero, tensors)
    shifted = rows if zeros is None else rows - zeros.astype(np.int64).reshape(-1, 1)
    most = 255 * np.abs(shifted).sum(1)
    most = most if added is None else most + np.abs(added.astype(np.int64)).reshape(-1)
    _require(bool((most < 2**31).all()), f"sums of {node.name!r} may leave 32 bits")
    if stored.dtype != np.int8:
        return False
    return any(255 * part.clip(min=0)[:, -2:].sum(1).max() > 2**15 - 1 for part in (np.sort(rows), np.sort(-rows)))


def _processor() -> set[str] | None:
    """What the processor can do, by name; None where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next(_flags(lines), None)


def _flags(lines: list[str]) -> Iterator[set[str]]:
    return (set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags"))

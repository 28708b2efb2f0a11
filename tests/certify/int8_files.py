"""Small networks as eight-bit ONNX files, and graphs of single kernels on integers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bound_oracles import images
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from trivet.models.foreign.export import int8_bytes
from trivet.models.foreign.load import load_model
from trivet.models.foreign.onnx_runtime import OnnxRuntimeModel
from trivet.models.foreign.twinned import Twinned

Node = tuple[str, Sequence[str], str, dict[str, Any]]


def file(nodes: Sequence[Node], constants: dict[str, Any], shape: Sequence[int]) -> bytes:
    """A graph from "x" [b, *shape] to the result of the last node."""
    made = [helper.make_node(kind, list(names), [to], name=f"{kind} {to}", **more) for kind, names, to, more in nodes]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", *shape])
    y = helper.make_tensor_value_info(nodes[-1][2], TensorProto.FLOAT, None)
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    proto = helper.make_model(
        helper.make_graph(made, "g", [x], [y], stored), opset_imports=[helper.make_opsetid("", 20)], ir_version=9
    )
    content: bytes = proto.SerializeToString()
    return content


def weights(seed: int, **shapes: Sequence[int]) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape) * (0.1 if len(shape) == 1 else (2 / np.prod(shape[1:])) ** 0.5)).astype("f4")
        for name, shape in shapes.items()
    }


def dense(seed: int = 0, shape: Sequence[int] = (1, 6, 6), hidden: int = 12, classes: int = 4) -> bytes:
    inputs = int(np.prod(shape))
    nodes: list[Node] = [
        ("Flatten", ["x"], "flat", {}),
        ("Gemm", ["flat", "W1", "b1"], "z1", {"transB": 1}),
        ("Relu", ["z1"], "h1", {}),
        ("Gemm", ["h1", "W2", "b2"], "logits", {"transB": 1}),
    ]
    return file(nodes, weights(seed, W1=(hidden, inputs), b1=(hidden,), W2=(classes, hidden), b2=(classes,)), shape)


def residual(seed: int = 0) -> bytes:
    same = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes: list[Node] = [
        ("Conv", ["x", "W1", "b1"], "z1", same),
        ("Relu", ["z1"], "h1", {}),
        ("Conv", ["h1", "W2", "b2"], "z2", same),
        ("Add", ["h1", "z2"], "s", {}),
        ("Relu", ["s"], "h2", {}),
        ("MaxPool", ["h2"], "p", {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("Conv", ["p", "W3", "b3"], "z3", same),
        ("Relu", ["z3"], "h3", {}),
        ("GlobalAveragePool", ["h3"], "g", {}),
        ("Flatten", ["g"], "flat", {}),
        ("Gemm", ["flat", "W4", "b4"], "logits", {"transB": 1}),
    ]
    shapes = {"W1": (4, 1, 3, 3), "b1": (4,), "W2": (4, 4, 3, 3), "b2": (4,), "W3": (6, 4, 3, 3), "b3": (6,)}
    return file(nodes, weights(seed, **shapes, W4=(4, 6), b4=(4,)), (1, 6, 6))


def averaging(seed: int = 0) -> bytes:
    nodes: list[Node] = [
        ("Conv", ["x", "W1", "b1"], "z1", {"kernel_shape": [3, 3]}),
        ("Relu", ["z1"], "h1", {}),
        ("AveragePool", ["h1"], "p", {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("Flatten", ["p"], "flat", {}),
        ("MatMul", ["flat", "W2"], "logits", {}),
    ]
    return file(nodes, weights(seed, W1=(3, 1, 3, 3), b1=(3,), W2=(12, 4)), (1, 6, 6))


NETWORKS = {"dense": dense, "residual": residual, "averaging": averaging}


def twinned(content: bytes, folder: Path) -> Twinned:
    path = folder / "model.onnx"
    path.write_bytes(content)
    runtime = OnnxRuntimeModel(path)
    return Twinned(load_model(path), runtime, runtime.conditions).eval()


def quantised(kind: str, folder: Path, seed: int = 0) -> Twinned:
    return twinned(int8_bytes(NETWORKS[kind](seed), [images(64, 1, 6, 6, seed=seed)]), folder)


def pairs(nodes: Sequence[Node], constants: dict[str, Any]) -> bytes:
    """Two numbers, each on its own grid, go into `nodes` as "a" and "b"; the result "c" is rounded to a third grid."""
    inputs: list[Node] = []
    for i, name in enumerate("ab"):
        inputs += [
            ("Slice", ["x", f"from{i}", f"to{i}", "axis"], f"{name}0", {}),
            ("QuantizeLinear", [f"{name}0", f"s{name}", f"z{name}"], f"{name}1", {}),
            ("DequantizeLinear", [f"{name}1", f"s{name}", f"z{name}"], name, {}),
        ]
    ends: list[Node] = [
        ("QuantizeLinear", ["c", "sc", "zc"], "c1", {}),
        ("DequantizeLinear", ["c1", "sc", "zc"], "y", {}),
    ]
    places = {f"{end}{i}": np.array([i + (end == "to")]) for end in ("from", "to") for i in (0, 1)}
    return file([*inputs, *nodes, *ends], {**places, "axis": np.array([1]), **constants}, (2,))


def grid(name: str, step: float, zero: int) -> dict[str, Any]:
    return {f"s{name}": np.float32(step), f"z{name}": np.uint8(zero)}


def levels_of(constants: dict[str, Any], names: str) -> Tensor:
    """The middle of every level, for all pairs, [65536, 2]."""
    one = [(np.arange(256.0) - float(constants[f"z{n}"])) * float(constants[f"s{n}"]) for n in names]
    return torch.tensor(np.array(list(itertools.product(*one))), dtype=torch.float32)

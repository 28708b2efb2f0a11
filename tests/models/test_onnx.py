"""Imported ONNX graphs against ONNX Runtime on the same bytes, and the ways a file may try to do harm."""

from __future__ import annotations

import contextlib
import copy
import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from trivet.errors import TrivetError
from trivet.models.foreign.load import load_model, num_classes_of
from trivet.models.foreign.onnx_runtime import OnnxRuntimeModel
from trivet.models.resnet import resnet
from trivet.models.surrogate import surrogate
from trivet.models.trades_cnn import trades_cnn

Node = tuple[str, Sequence[str], dict[str, Any]]
F, I = np.float32, np.int64  # noqa: E741
rng = np.random.default_rng(0)


def graph(
    nodes: Sequence[Node],
    shape: Sequence[int | str] = ("b", 3, 8, 8),
    opset: int = 20,
    constants: dict[str, Any] | None = None,
) -> onnx.ModelProto:
    """A chain of nodes; each result is called by its position, the last one is the output."""
    made = [helper.make_node(kind, names, [str(i)], **attributes) for i, (kind, names, attributes) in enumerate(nodes)]
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info(str(len(nodes) - 1), TensorProto.FLOAT, None)
    proto = helper.make_graph(made, "g", [x], [y], initializers)
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def save(proto: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def compare(path: Path, x: torch.Tensor, tolerance: float = 1e-5) -> nn.Module:
    model = load_model(path)
    with torch.no_grad():
        torch.testing.assert_close(model(x), OnnxRuntimeModel(path)(x), rtol=tolerance, atol=tolerance)
    return model


def f32(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(F)


CHANNELS = np.array([[[0.5]], [[0.25]], [[-2.0]]], F)
CASES: dict[str, tuple[list[Node], dict[str, Any], dict[str, Any]]] = {
    "conv": (
        [("Conv", ["x", "w", "c"], {"strides": [2, 1], "pads": [1, 0, 1, 0]})],
        {"w": f32(4, 3, 3, 2), "c": f32(4)}, {},
    ),
    "conv with uneven pads": ([("Conv", ["x", "w"], {"pads": [0, 1, 2, 3]})], {"w": f32(4, 3, 3, 3)}, {}),
    "conv same upper": (
        [("Conv", ["x", "w"], {"auto_pad": "SAME_UPPER", "strides": [2, 3]})], {"w": f32(4, 3, 3, 4)}, {},
    ),
    "conv same lower": (
        [("Conv", ["x", "w"], {"auto_pad": "SAME_LOWER", "strides": [2, 2]})], {"w": f32(4, 3, 3, 4)}, {},
    ),
    "conv valid": ([("Conv", ["x", "w"], {"auto_pad": "VALID"})], {"w": f32(4, 3, 3, 3)}, {}),
    "conv in groups, dilated": ([("Conv", ["x", "w"], {"group": 3, "dilations": [2, 3]})], {"w": f32(6, 1, 2, 2)}, {}),
    "conv over one axis": ([("Conv", ["x", "w"], {"pads": [1, 1]})], {"w": f32(4, 3, 3)}, {"shape": ["b", 3, 8]}),
    "max-pool": ([("MaxPool", ["x"], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 1, 1, 1]})], {}, {}),
    "max-pool with uneven pads": ([("MaxPool", ["x"], {"kernel_shape": [3, 3], "pads": [0, 0, 2, 1]})], {}, {}),
    "max-pool rounding up": ([("MaxPool", ["x"], {"kernel_shape": [3, 3], "strides": [3, 3], "ceil_mode": 1})], {}, {}),
    "max-pool dilated": ([("MaxPool", ["x"], {"kernel_shape": [2, 2], "dilations": [2, 2]})], {}, {}),
    "average-pool": ([("AveragePool", ["x"], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]})], {}, {}),
    "average-pool counting": (
        [("AveragePool", ["x"], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1})], {}, {},
    ),
    "average-pool with uneven pads": (
        [("AveragePool", ["x"], {"kernel_shape": [3, 3], "pads": [0, 0, 2, 1], "count_include_pad": 1})], {}, {},
    ),
    "global average-pool": ([("GlobalAveragePool", ["x"], {})], {}, {}),
    "batch norm": (
        [("BatchNormalization", ["x", "s", "b", "m", "v"], {"epsilon": 0.01})],
        {"s": f32(3), "b": f32(3), "m": f32(3), "v": abs(f32(3))}, {},
    ),
    "batch norm of rows": (
        [("BatchNormalization", ["x", "s", "b", "m", "v"], {})],
        {"s": f32(5), "b": f32(5), "m": f32(5), "v": abs(f32(5))}, {"shape": ["b", 5]},
    ),
    "instance norm": ([("InstanceNormalization", ["x", "s", "b"], {"epsilon": 0.1})], {"s": f32(3), "b": f32(3)}, {}),
    "group norm": (
        [("GroupNormalization", ["x", "s", "b"], {"num_groups": 2, "epsilon": 0.1})],
        {"s": f32(4), "b": f32(4)}, {"shape": ["b", 4, 3, 3], "opset": 21},
    ),
    "gemm": (
        [("Gemm", ["x", "w", "c"], {"alpha": 0.5, "beta": 2.0, "transB": 1})],
        {"w": f32(4, 5), "c": f32(4)}, {"shape": ["b", 5]},
    ),
    "gemm with one bias": ([("Gemm", ["x", "w", "c"], {})], {"w": f32(5, 4), "c": F(0.5)}, {"shape": ["b", 5]}),
    "gemm without bias": ([("Gemm", ["x", "w"], {})], {"w": f32(5, 4)}, {"shape": ["b", 5]}),
    "matmul and bias": (
        [("MatMul", ["x", "w"], {}), ("Add", ["c", "0"], {})], {"w": f32(5, 4), "c": f32(1, 4)}, {"shape": ["b", 5]},
    ),
    "matmul read twice": (
        [("MatMul", ["x", "w"], {}), ("Add", ["0", "c"], {}), ("Mul", ["0", "1"], {})],
        {"w": f32(5, 4), "c": f32(4)}, {"shape": ["b", 5]},
    ),
    "matmul read twice under another name": (
        [("MatMul", ["x", "w"], {}), ("Identity", ["0"], {}), ("Add", ["1", "c"], {}), ("Mul", ["2", "0"], {})],
        {"w": f32(5, 4), "c": f32(4)}, {"shape": ["b", 5]},
    ),
    "matmul of the data": (
        [("Transpose", ["x"], {"perm": [0, 1, 3, 2]}), ("MatMul", ["x", "0"], {})], {}, {},
    ),
    "constants from the left": ([("Sub", ["c", "x"], {}), ("Div", ["c", "0"], {})], {"c": CHANNELS}, {}),
    "arithmetic of the data": (
        [("Mul", ["x", "x"], {}), ("Sub", ["x", "0"], {}), ("Add", ["0", "1"], {}), ("Neg", ["2"], {})], {}, {},
    ),
    "one constant twice": (
        [("Mul", ["x", "c"], {}), ("Add", ["0", "c"], {}), ("Mul", ["1", "d"], {})], {"c": CHANNELS, "d": F(3)}, {},
    ),
    "relu": ([("Relu", ["x"], {})], {}, {}),
    "leaky relu": ([("LeakyRelu", ["x"], {"alpha": 0.2}), ("LeakyRelu", ["0"], {})], {}, {}),
    "elu": ([("Elu", ["x"], {"alpha": 0.5})], {}, {}),
    "gelu": ([("Gelu", ["x"], {}), ("Gelu", ["0"], {"approximate": "tanh"})], {}, {}),
    "sigmoid, tanh, softplus": ([("Sigmoid", ["x"], {}), ("Tanh", ["0"], {}), ("Softplus", ["1"], {})], {}, {}),
    "sqrt": ([("Sigmoid", ["x"], {}), ("Sqrt", ["0"], {})], {}, {}),
    "softmax": ([("Softmax", ["x"], {"axis": 1}), ("Softmax", ["0"], {})], {}, {}),
    "log-softmax": ([("LogSoftmax", ["x"], {})], {}, {"shape": ["b", 5]}),
    "old softmax of rows": ([("Softmax", ["x"], {})], {}, {"shape": ["b", 5], "opset": 11}),
    "clip": ([("Clip", ["x", "l", "h"], {})], {"l": F(-0.5), "h": F(0.5)}, {}),
    "clip below": ([("Clip", ["x", "l"], {})], {"l": F(-0.5)}, {}),
    "clip at zero": ([("Clip", ["x", "l"], {})], {"l": F(0)}, {}),
    "clip above": ([("Clip", ["x", "", "h"], {})], {"h": F(0.5)}, {}),
    "old clip": ([("Clip", ["x"], {"min": 0.0, "max": 6.0})], {}, {"opset": 9}),
    "pad": ([("Pad", ["x", "p", "v"], {})], {"p": np.array([0, 0, 1, 2, 0, 1, 0, -1], I), "v": F(0.5)}, {}),
    "old pad": ([("Pad", ["x"], {"pads": [0, 1, 0, 0, 0, 1, 0, 0], "value": 2.0})], {}, {"opset": 9}),
    "mean over pixels": ([("ReduceMean", ["x", "a"], {"keepdims": 0})], {"a": np.array([2, -1], I)}, {}),
    "old mean over pixels": ([("ReduceMean", ["x"], {"axes": [2, 3]})], {}, {"opset": 13}),
    "mean over channels": ([("ReduceMean", ["x", "a"], {})], {"a": np.array([1], I)}, {}),
    "flatten": ([("Flatten", ["x"], {}), ("Flatten", ["0"], {"axis": -1})], {}, {}),
    "reshape": (
        [("Reshape", ["x", "s"], {}), ("Reshape", ["0", "t"], {})],
        {"s": np.array([-1, 24, 8]), "t": np.array([0, 4, -1])}, {},
    ),
    "old reshape": ([("Reshape", ["x", "s"], {})], {"s": np.array([0, -1])}, {"opset": 7}),
    "flatten as traced": (
        [
            ("Shape", ["x"], {}), ("Gather", ["0", "i"], {}), ("Unsqueeze", ["1", "a"], {}),
            ("Concat", ["2", "m"], {"axis": 0}), ("Reshape", ["x", "3"], {}),
        ],
        {"i": np.array(0), "a": np.array([0]), "m": np.array([-1])}, {},
    ),
    "reshape back by shape": (
        [("Shape", ["x"], {}), ("Flatten", ["x"], {}), ("Relu", ["1"], {}), ("Reshape", ["2", "0"], {})], {}, {},
    ),
    "shape slices": (
        [
            ("Shape", ["x"], {"start": 1}), ("Shape", ["x"], {}), ("Slice", ["1", "z", "o"], {}),
            ("Cast", ["2"], {"to": TensorProto.INT64}), ("Concat", ["3", "0"], {"axis": 0}), ("Flatten", ["x"], {}),
            ("Reshape", ["5", "4"], {}),
        ],
        {"z": np.array([0]), "o": np.array([1])}, {},
    ),
    "transpose": ([("Transpose", ["x"], {"perm": [0, 2, 3, 1]})], {}, {}),
    "squeeze and unsqueeze": (
        [("Unsqueeze", ["x", "a"], {}), ("Squeeze", ["0", "a"], {})], {"a": np.array([1, -1])}, {},
    ),
    "old squeeze": ([("Unsqueeze", ["x"], {"axes": [2]}), ("Squeeze", ["0"], {"axes": [2]})], {}, {"opset": 11}),
    "concat": ([("Relu", ["x"], {}), ("Concat", ["x", "0", "x"], {"axis": -3})], {}, {}),
    "slice": (
        [("Slice", ["x", "s", "e", "a", "t"], {})],
        {"s": np.array([1, -5]), "e": np.array([2**62, -1]), "a": np.array([1, 3]), "t": np.array([1, 2])}, {},
    ),
    "old slice": ([("Slice", ["x"], {"starts": [1], "ends": [3], "axes": [2]})], {}, {"opset": 9}),
    "gather": ([("Gather", ["x", "i"], {"axis": 1})], {"i": np.array([2, 0, -1])}, {}),
    "gather one": ([("Gather", ["x", "i"], {"axis": 2})], {"i": np.array(-2)}, {}),
    "constants computed in the graph": (
        [
            ("Constant", [], {"value_floats": [1.0, 2.0, 4.0]}), ("Sqrt", ["0"], {}), ("Unsqueeze", ["1", "a"], {}),
            ("Concat", ["2", "2"], {"axis": 1}), ("Slice", ["3", "z", "o", "z1"], {}), ("Transpose", ["4"], {}),
            ("Squeeze", ["5"], {}), ("Gather", ["6", "i"], {}), ("Reshape", ["7", "r"], {}), ("Mul", ["x", "8"], {}),
        ],
        {"a": np.array([1]), "z": np.array([0]), "o": np.array([1]), "z1": np.array([1]), "i": np.array([1, 2, 0]),
         "r": np.array([3, 1, 1])}, {},
    ),
    "quantise and dequantise": (
        [("QuantizeLinear", ["x", "s", "z"], {}), ("DequantizeLinear", ["0", "s", "z"], {})],
        {"s": F(0.02), "z": np.uint8(100)}, {},
    ),
    "quantise each channel": (
        [("QuantizeLinear", ["x", "s", "z"], {"axis": 1}), ("DequantizeLinear", ["0", "s", "z"], {"axis": 1})],
        {"s": F([0.02, 0.5, 0.003]), "z": np.array([0, -7, 5], np.int8)}, {},
    ),
    "conv of a quantised kernel": (
        [("DequantizeLinear", ["w", "s", "z"], {"axis": 0}), ("Conv", ["x", "0"], {})],
        {"w": rng.integers(-128, 127, (4, 3, 3, 3)).astype(np.int8), "s": F([0.1, 0.2, 0.3, 0.4]),
         "z": np.zeros(4, np.int8)}, {},
    ),
    "dropout and identity": ([("Dropout", ["x"], {}), ("Identity", ["0"], {}), ("Cast", ["1"], {"to": 1})], {}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_operator_computes_what_onnx_runtime_computes(name: str, tmp_path: Path) -> None:
    nodes, constants, settings = CASES[name]
    proto = graph(nodes, constants=constants, **settings)
    shape = settings.get("shape", ["b", 3, 8, 8])
    x = torch.from_numpy(rng.standard_normal((3, *shape[1:])).astype(F))
    model = compare(save(proto, tmp_path), x)
    torch.testing.assert_close(model(x[1:2]), model(x)[1:2])


def test_every_supported_operator_is_among_the_cases() -> None:
    from trivet.models.foreign.onnx_file import OPERATORS

    assert {kind for nodes, _, _ in CASES.values() for kind, _, _ in nodes} == set(OPERATORS)


def test_traced_flattening_becomes_a_plain_layer(tmp_path: Path) -> None:
    nodes, constants, _ = CASES["flatten as traced"]
    model = load_model(save(graph(nodes, constants=constants), tmp_path))
    assert [type(m) for m in model.children()] == [nn.Flatten]


def test_a_file_written_for_one_record_takes_any_number(tmp_path: Path) -> None:
    nodes: list[Node] = [
        ("Reshape", ["x", "s"], {}),
        ("MatMul", ["0", "w"], {}),
        ("Add", ["1", "c"], {}),
    ]
    constants = {"s": np.array([1, 12]), "w": f32(12, 4), "c": f32(4)}
    path = save(graph(nodes, (1, 3, 2, 2), constants=constants), tmp_path)
    model = compare(path, torch.rand(5, 3, 2, 2))
    assert [type(m) for m in model.children()] == [nn.Flatten, nn.Linear]


def test_a_network_of_one_vector_is_lifted_over_a_batch(tmp_path: Path) -> None:
    nodes: list[Node] = [("MatMul", ["w", "x"], {}), ("Add", ["0", "c"], {}), ("Relu", ["1"], {})]
    path = save(graph(nodes, (5,), constants={"w": f32(4, 5), "c": f32(4)}), tmp_path)
    x = torch.rand(3, 5)
    rows = torch.stack([OnnxRuntimeModel(path)(row) for row in x])
    torch.testing.assert_close(load_model(path)(x), rows)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("free", [True, False], ids=["any batch", "fixed batch"])
@pytest.mark.parametrize("kind", ["trades_cnn", "resnet", "resnet with group norm"])
def test_exported_networks_come_back_with_the_same_logits_and_gradients(kind: str, free: bool, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.2] * 3, "generator": torch.Generator().manual_seed(0)}
    if kind == "trades_cnn":
        model = trades_cnn((3, 16, 16), 4, **settings)
        nn.init.normal_(model.get_submodule("logits").weight)
    else:
        model = resnet((3, 16, 16), 4, depth=8, norm="group" if "group" in kind else "batch", **settings)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 2.0)
    model.eval()
    dynamic = ({0: torch.export.Dim("batch")},) if free else None
    example = (torch.rand(2, 3, 16, 16),)
    program = torch.onnx.export(model, example, dynamo=True, verbose=False, dynamic_shapes=dynamic)
    path = tmp_path / "model.onnx"
    program.save(path)
    x = torch.rand(5, 3, 16, 16)
    twin = compare(path, x, tolerance=1e-4)
    assert twin.meta["input_shape"] == (3, 16, 16)
    assert num_classes_of(twin, (3, 16, 16)) == 4
    for ask in (twin, surrogate(twin, "fp32")):
        gradients = []
        for net in (model, ask):
            point = x.clone().requires_grad_()
            logits = net(point)
            gradients.append(torch.autograd.grad(logits[:, 0].sum(), point)[0])
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


def unpacked(path: Path, folder: Path) -> Path:
    target = folder / path.stem
    target.write_bytes(gzip.decompress(path.read_bytes()))
    return target


def test_collision_avoidance_networks_agree_with_onnx_runtime(real_data: Path, tmp_path: Path) -> None:
    files = sorted((real_data / "vnncomp" / "acasxu" / "onnx").glob("*.onnx.gz"))
    if not files:
        pytest.skip("no ACAS Xu networks in the real data")
    for file in files[::9]:
        model = compare(unpacked(file, tmp_path), torch.rand(64, 1, 1, 5) - 0.5)
        assert num_classes_of(model, (1, 1, 5)) == 5
        assert {type(m) for m in model.children()} == {nn.Flatten, nn.Linear, nn.ReLU}


def test_competition_networks_agree_with_onnx_runtime(real_data: Path, tmp_path: Path) -> None:
    files = [*(real_data / "vnncomp" / "mnist_fc" / "onnx").glob("*.onnx.gz")]
    if not files:
        pytest.skip("no MNIST networks in the real data")
    for file in files:
        compare(unpacked(file, tmp_path), torch.rand(16, 784, 1))
    for file in (real_data / "vnncomp" / "test").glob("*.onnx"):
        model, box = load_model(file), OnnxRuntimeModel(file)
        x = torch.rand(8, *model.meta["input_shape"])
        single = len(model.meta["input_shape"]) == 1
        expected = torch.stack([box(row) for row in x]) if single else box(x)
        torch.testing.assert_close(model(x), expected)


CONV = ("Conv", ["x", "w"], {})
REFUSED: dict[str, tuple[list[Node], dict[str, Any], dict[str, Any], str]] = {
    "an unknown operator": ([("NonZero", ["x"], {})], {}, {}, "operator NonZero is not supported; OnnxRuntimeModel"),
    "another domain": ([("Relu", ["x"], {"domain": "com.evil"})], {}, {}, r"operator com.evil.Relu is not supported"),
    "a batch moved": ([("Transpose", ["x"], {"perm": [1, 0, 2, 3]})], {}, {}, "moves the batch"),
    "a mean over records": ([("ReduceMean", ["x", "a"], {})], {"a": np.array([0])}, {}, "along the batch"),
    "records joined": ([("Concat", ["x", "x"], {"axis": 0})], {}, {}, "along the batch"),
    "records reshaped": ([("Reshape", ["x", "s"], {})], {"s": np.array([-1, 96])}, {}, "mix the records"),
    "a softmax over records": ([("Softmax", ["x"], {"axis": 0})], {}, {}, "along the batch"),
    "a constant for each record": ([("Add", ["x", "c"], {})], {"c": f32(2, 3, 8, 8)}, {}, "keep the records"),
    "a constant of higher rank": ([("Add", ["x", "c"], {})], {"c": f32(1, 1, 3, 8, 8)}, {}, "different rank"),
    "training": (
        [("BatchNormalization", ["x", "s", "s", "s", "s"], {"training_mode": 1})], {"s": f32(3)}, {}, "training mode",
    ),
    "dropout in training": (
        [("Dropout", ["x", "r", "t"], {})], {"r": F(0.5), "t": np.array(True)}, {}, "training mode",
    ),
    "weights from the data": ([("Conv", ["x", "x"], {})], {}, {}, "only constants are supported"),
    "weights that do not fit": ([CONV], {"w": f32(4, 2, 3, 3)}, {}, "does not fit its inputs"),
    "a missing weight": ([CONV], {}, {}, "reads 'w', which nothing computes"),
    "float64 weights": ([CONV], {"w": f32(4, 3, 3, 3).astype(np.float64)}, {}, "float64 weights; export in float32"),
    "float64 constants": ([("Mul", ["x", "c"], {})], {"c": np.ones((1, 3, 1, 1))}, {}, "only float32 values"),
    "float16 weights": ([CONV], {"w": f32(4, 3, 3, 3).astype(np.float16)}, {}, "FLOAT16.*export the model in float32"),
    "a free image size": ([("Relu", ["x"], {})], {}, {"shape": ["b", 3, "h", "w"]}, "free axes"),
    "no dependence on the input": ([("Constant", [], {"value_float": 1.0})], {}, {}, "does not depend on the input"),
    "an old operator set": ([("Relu", ["x"], {})], {}, {"opset": 6}, "operator set 6"),
    "reflecting pads": (
        [("Pad", ["x", "p"], {"mode": "reflect"})], {"p": np.array([0, 0, 1, 1, 0, 0, 1, 1])}, {}, "mode 'reflect'",
    ),
    "a padded batch": ([("Pad", ["x", "p"], {})], {"p": np.array([1, 0, 0, 0, 0, 0, 0, 0])}, {}, "pads the batch"),
    "a transposed gemm": ([("Gemm", ["x", "w"], {"transA": 1})], {"w": f32(5, 4)}, {"shape": ["b", 5]}, "transposes"),
    "backward slices": (
        [("Slice", ["x", "s", "e", "a", "t"], {})],
        {"s": np.array([7]), "e": np.array([0]), "a": np.array([2]), "t": np.array([-1])}, {}, "slices backwards",
    ),
    "indices beyond the end": ([("Gather", ["x", "i"], {"axis": 1})], {"i": np.array([3])}, {}, "beyond the end"),
    "an old softmax over several axes": ([("Softmax", ["x"], {})], {}, {"opset": 11}, "several axes"),
    "a stride of zero": ([("Conv", ["x", "w"], {"strides": [0, 1]})], {"w": f32(4, 3, 3, 3)}, {}, "below 1"),
    "a gigantic pad": ([("Pad", ["x", "p"], {})], {"p": np.array([0, 0, 0, 0, 0, 0, 2**20, 2**20])}, {}, "are refused"),
    "constants that multiply": (
        [("Constant", [], {"value_floats": [0.0] * 1000}), ("Concat", ["0"] * 1000, {"axis": 0}),
         ("Concat", ["1"] * 1000, {"axis": 0})], {}, {}, "makes a constant of more than",
    ),
    "a constant spread out": (
        [("Add", ["a", "b"], {})], {"a": f32(2**14, 1), "b": f32(1, 2**14)}, {}, "makes a constant of more than",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rebuilt_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    nodes, constants, settings, complaint = REFUSED[name]
    path = save(graph(nodes, constants=constants, **settings), tmp_path)
    with pytest.raises(TrivetError, match=complaint) as caught:
        load_model(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_subgraphs_are_refused(tmp_path: Path) -> None:
    inner = helper.make_graph([helper.make_node("Relu", ["x"], ["r"])], "i", [], [
        helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
    ])  # fmt: skip
    proto = graph([("If", ["c"], {"then_branch": inner, "else_branch": inner})], constants={"c": np.array(True)})
    with pytest.raises(TrivetError, match="operator If is not supported"):
        load_model(save(proto, tmp_path))


def test_two_inputs_or_outputs_are_refused(tmp_path: Path) -> None:
    proto = graph([("Relu", ["x"], {})])
    twice = copy.deepcopy(proto)
    twice.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1]))
    with pytest.raises(TrivetError, match="2 inputs"):
        load_model(save(twice, tmp_path))
    proto.graph.output.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, None))
    with pytest.raises(TrivetError, match="2 outputs"):
        load_model(save(proto, tmp_path))


def with_external(location: str, folder: Path, **entries: str) -> Path:
    """A convolution whose weights are said to lie at `location`."""
    proto = graph([CONV], constants={"w": f32(4, 3, 3, 3)})
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return save(proto, folder)


def test_weights_beside_the_model_are_read(tmp_path: Path) -> None:
    weights = f32(4, 3, 3, 3)
    (tmp_path / "weights.bin").write_bytes(b"12345678" + weights.tobytes())
    model = load_model(with_external("weights.bin", tmp_path, offset="8"))
    torch.testing.assert_close(next(model.parameters()).detach(), torch.from_numpy(weights))


@pytest.mark.parametrize("location", ["../secret", "{root}/secret", "link", "sub/../../secret", ".", "", "absent"])
def test_weights_outside_the_folder_of_the_model_are_not_read(location: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(f32(4, 3, 3, 3).tobytes())
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path / "secret")
    path = with_external(location.format(root=tmp_path), folder)
    with pytest.raises(TrivetError, match="is no file in the model's folder"):
        load_model(path)


@pytest.mark.parametrize(("offset", "complaint"), [("4", "ends before tensor 'w'"), ("-4", "starts at '-4'")])
def test_weights_beyond_their_file_are_refused(offset: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(f32(4, 3, 3, 3).tobytes())
    with pytest.raises(TrivetError, match=complaint):
        load_model(with_external("weights.bin", tmp_path, offset=offset))


def test_declared_sizes_count_against_the_ceiling_before_anything_is_read(tmp_path: Path) -> None:
    proto = graph([CONV], constants={"w": f32(4, 3, 3, 3)})
    proto.graph.initializer[0].dims[0] = 2**40
    with pytest.raises(TrivetError, match="more than the ceiling"):
        load_model(save(proto, tmp_path))
    proto.graph.initializer[0].dims[0] = 5
    with pytest.raises(TrivetError, match="does not hold what its shape says"):
        load_model(save(proto, tmp_path))
    proto.graph.initializer[0].dims[0] = -1
    with pytest.raises(TrivetError, match="tensor 'w' is FLOAT"):
        load_model(save(proto, tmp_path))


@given(position=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.booleans())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_refused_or_read_but_never_crashes(
    position: int, byte: int, cut: bool, tmp_path: Path
) -> None:
    nodes: list[Node] = [
        CONV,
        ("Relu", ["0"], {}),
        ("MaxPool", ["1"], {"kernel_shape": [2, 2]}),
        ("Flatten", ["2"], {}),
    ]
    content = bytearray(graph(nodes, constants={"w": np.ones((2, 3, 3, 3), F)}).SerializeToString())
    position %= len(content)
    content[position] = byte
    path = tmp_path / "model.onnx"
    path.write_bytes(content[:position] if cut else content)
    with contextlib.suppress(TrivetError):
        assert isinstance(load_model(path), nn.Module)


def test_the_black_box_pads_a_file_of_fixed_batch_and_drops_the_surplus(tmp_path: Path) -> None:
    path = save(graph([("Relu", ["x"], {})], (4, 2, 3, 3)), tmp_path)
    x = torch.randn(6, 2, 3, 3)
    torch.testing.assert_close(OnnxRuntimeModel(path)(x), x.relu())


def test_the_black_box_follows_the_threads_of_pytorch(tmp_path: Path) -> None:
    path = save(graph([("Relu", ["x"], {})]), tmp_path)
    model, before = OnnxRuntimeModel(path), torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        model(torch.rand(1, 3, 8, 8))
        assert model.threads == before + 1
    finally:
        torch.set_num_threads(before)


def test_the_black_box_says_that_it_has_no_gradients(tmp_path: Path) -> None:
    model = OnnxRuntimeModel(save(graph([("Relu", ["x"], {})]), tmp_path))
    with pytest.raises(TrivetError, match="has no gradients"):
        model(torch.rand(1, 3, 8, 8, requires_grad=True))


def test_the_black_box_refuses_wrong_shapes_bad_files_and_weights_elsewhere(tmp_path: Path) -> None:
    model = OnnxRuntimeModel(save(graph([("Relu", ["x"], {})]), tmp_path))
    with pytest.raises(TrivetError, match=r"refuses inputs of shape \(1, 4\)"):
        model(torch.rand(1, 4))
    (tmp_path / "noise.onnx").write_bytes(b"no model")
    with pytest.raises(TrivetError, match="ONNX Runtime refuses"):
        OnnxRuntimeModel(tmp_path / "noise.onnx")
    (tmp_path / "weights.bin").write_bytes(f32(4, 3, 3, 3).tobytes())
    with pytest.raises(TrivetError, match="ONNX Runtime refuses"):
        OnnxRuntimeModel(with_external("weights.bin", tmp_path))


def test_the_black_box_survives_a_stand_in(tmp_path: Path) -> None:
    model = OnnxRuntimeModel(save(graph([("Relu", ["x"], {})]), tmp_path))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(surrogate(model, "fp32")(x), x.relu())

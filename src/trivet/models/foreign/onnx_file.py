"""Reading an ONNX file that somebody else made: its tensors under a ceiling, its graph into PyTorch layers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from trivet.errors import TrivetError
from trivet.files import read_packed
from trivet.models.foreign.assembly import Assembly, Unsupported, Value, refuse_unless
from trivet.models.foreign.onnx_graph import ARITHMETIC, Step
from trivet.models.foreign.onnx_quantized import QUANTIZED
from trivet.models.foreign.onnx_shapes import MOVES

OPERATORS = {**ARITHMETIC, **MOVES, **QUANTIZED}
OPSETS = range(7, 25)


def import_onnx(path: Path, max_bytes: int) -> fx.GraphModule:
    """The network in the ONNX file at `path`, as PyTorch layers with the file's weights.

    Nothing in the file is executed: it is data for the operators listed here. Weights beside the file are read only
    from within its folder.

    Raises:
        TrivetError: not an ONNX model, an operator or a type that is not supported (named), more than one input or
            output, axes of free size besides the batch, or weights of more than `max_bytes`.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        proto = onnx.load_model_from_string(read_packed(path, max_bytes))
    except DecodeError:
        raise TrivetError(f"{path} is not an ONNX model or is damaged; export it again.") from None
    try:
        return _Import(proto, _Tensors(path.resolve().parent, max_bytes)).run()
    except Unsupported as error:
        raise TrivetError(f"{path} cannot be rebuilt: {error}.") from None


class _Tensors:
    """Decodes tensors until the ceiling is reached, and follows external data no further than the model's folder."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.left, self.max_bytes = folder, max_bytes, max_bytes

    def decode(self, proto: Any) -> Tensor:
        from onnx import TensorProto, numpy_helper

        kinds = {TensorProto.FLOAT: 4, TensorProto.DOUBLE: 8, TensorProto.INT32: 4, TensorProto.INT64: 8}
        kinds |= {TensorProto.BOOL: 1, TensorProto.INT8: 1, TensorProto.UINT8: 1}
        if proto.data_type not in kinds or any(size < 0 for size in proto.dims):
            kind = TensorProto.DataType.Name(proto.data_type)
            raise Unsupported(f"tensor {proto.name!r} is {kind} {list(proto.dims)}; export the model in float32")
        size = math.prod(proto.dims) * kinds[proto.data_type]
        self.left -= size
        refuse_unless(self.left >= 0, f"its tensors take more than the ceiling of {self.max_bytes} bytes")
        if proto.data_location == TensorProto.EXTERNAL:
            loaded = TensorProto(name=proto.name, data_type=proto.data_type, dims=proto.dims)
            loaded.raw_data = self._beside(proto, size)
            proto = loaded
        try:
            array = numpy_helper.to_array(proto)
        except ValueError as error:
            raise Unsupported(f"tensor {proto.name!r} does not hold what its shape says ({error})") from None
        return torch.from_numpy(array.copy())

    def _beside(self, proto: Any, size: int) -> bytes:
        entries = {entry.key: entry.value for entry in proto.external_data}
        location = entries.get("location", "")
        target = (self.folder / location).resolve()
        refuse_unless(
            bool(location) and target.is_relative_to(self.folder) and target.is_file(),
            f"tensor {proto.name!r} lies in {location!r}, which is no file in the model's folder",
        )
        offset = entries.get("offset", "0")
        refuse_unless(offset.isascii() and offset.isdigit(), f"tensor {proto.name!r} starts at {offset!r}")
        with target.open("rb") as handle:
            handle.seek(int(offset))
            content = handle.read(size)
        refuse_unless(len(content) == size, f"{location} ends before tensor {proto.name!r} does")
        return content


class _Import:
    """One pass over the nodes, which ONNX keeps in an order that can be executed."""

    def __init__(self, proto: Any, tensors: _Tensors) -> None:
        self.graph, self.tensors = proto.graph, tensors
        opsets = {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import}
        self.opset = opsets.get("ai.onnx", 0)
        refuse_unless(self.opset in OPSETS, f"operator set {self.opset} is not among {OPSETS[0]} to {OPSETS[-1]}")
        refuse_unless(not proto.graph.sparse_initializer, "it has sparse tensors")
        self.stored = {tensor.name: tensor for tensor in self.graph.initializer}
        self.values: dict[str, Value] = {}
        self.readers = Counter(name for node in self.graph.node for name in node.input)
        self.readers.update(each.name for each in self.graph.output)
        self.shared: set[str] = set()

    def run(self) -> fx.GraphModule:
        inputs = [each for each in self.graph.input if each.name not in self.stored]
        refuse_unless(len(inputs) == 1, f"it has {len(inputs)} inputs, and a classifier has one")
        refuse_unless(len(self.graph.output) == 1, f"it has {len(self.graph.output)} outputs, and a classifier has one")
        shape, self.declared, self.batched = _input_shape(inputs[0])
        self.assembly = Assembly(shape)
        self.values[inputs[0].name] = self.assembly.input
        for node in self.graph.node:
            self._step(node)
        output = self.graph.output[0].name
        refuse_unless(output in self.values, f"nothing computes its output {output!r}")
        return self.assembly.finish(self.values[output])

    def _step(self, node: Any) -> None:
        what = f"{node.op_type} node {node.name or node.output[0]!r}" if node.output else node.op_type
        if node.op_type not in OPERATORS or node.domain not in ("", "ai.onnx"):
            operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            raise Unsupported(
                f"operator {operator} is not supported; OnnxRuntimeModel runs the file as it is, without gradients"
            )
        try:
            step = Step(
                assembly=self.assembly,
                inputs=[self._value(name) for name in node.input],
                attributes=self._attributes(node),
                outputs=sum(bool(self.readers[name]) for name in node.output),
                sole=[self.readers[name] == 1 and name not in self.shared for name in node.input],
                opset=self.opset,
                batched=self.batched,
                declared=self.declared,
            )
            result = OPERATORS[node.op_type](step)
        except Unsupported as error:
            raise Unsupported(f"{what} {error}") from None
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, ArithmeticError) as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise Unsupported(f"{what} does not fit its inputs ({first})") from error
        for name, value, alone in zip(node.input, step.inputs, step.sole, strict=True):
            if value is result and not alone and name:
                self.shared.add(node.output[0])
        self.values[node.output[0]] = result

    def _value(self, name: str) -> Value | None:
        if not name:
            return None
        if name not in self.values:
            refuse_unless(name in self.stored, f"reads {name!r}, which nothing computes before it")
            self.values[name] = self.tensors.decode(self.stored[name])
        return self.values[name]

    def _attributes(self, node: Any) -> Mapping[str, Any]:
        from onnx import AttributeProto, helper

        attributes: dict[str, Any] = {}
        for attribute in node.attribute:
            value = helper.get_attribute_value(attribute)
            if attribute.type == AttributeProto.STRING:
                value = value.decode("utf-8", "replace")
            elif attribute.type == AttributeProto.TENSOR:
                value = self.tensors.decode(value)
            attributes[attribute.name] = list(value) if attribute.type == AttributeProto.INTS else value
        return attributes


def _input_shape(declared: Any) -> tuple[list[int], int | None, bool]:
    """The shape of one record, the batch size in the file (None: free), and whether there is a batch axis at all."""
    from onnx import TensorProto

    tensor = declared.type.tensor_type
    refuse_unless(tensor.elem_type == TensorProto.FLOAT, f"its input {declared.name!r} is not float32")
    sizes = [dim.dim_value for dim in tensor.shape.dim]
    refuse_unless(len(sizes) >= 1, f"its input {declared.name!r} declares no shape")
    batched = len(sizes) > 1
    shape = sizes[1:] if batched else sizes
    refuse_unless(
        min(shape) >= 1,
        f"its input has the shape {sizes} with free axes (0) besides the batch; export it with fixed ones",
    )
    return shape, (sizes[0] or None) if batched else None, batched

"""Writing a network to the files that runtimes read: ONNX, torch.export archives, and ONNX in eight bits."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trivet.errors import TrivetError
from trivet.models.baking import baked, draws
from trivet.models.foreign.quiet import quiet

_OPSET = 20


def onnx_bytes(model: nn.Module, input_shape: tuple[int, ...]) -> bytes:
    """`model` in eval mode as an ONNX file for any batch size: `images` [B, *input_shape] to `logits` [B, K].

    Raises:
        TrivetError: onnx or onnxscript is missing, the model draws at random, or it cannot be exported.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise TrivetError("exporting to ONNX needs onnx and onnxscript; pip install 'trivet[onnx]'.") from None
    with _exporting(model) as net:
        program: Any = torch.onnx.export(
            net,
            (_example(input_shape),),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
        proto = program.model_proto
    # The exporter leaves shapes of one batch size behind, at which quantisation stumbles.
    del proto.graph.value_info[:]
    content: bytes = proto.SerializeToString()
    return content


def pt2_bytes(model: nn.Module, input_shape: tuple[int, ...]) -> bytes:
    """`model` in eval mode as a torch.export archive for any batch size.

    Raises:
        TrivetError: the model draws at random, or cannot be exported.
    """
    with _exporting(model) as net:
        return _archive(_traced(net, input_shape))


def pt2_int8_bytes(model: nn.Module, input_shape: tuple[int, ...], batches: Iterable[Tensor]) -> bytes:
    """`model` as a torch.export archive with eight bits, by torchao's static quantisation for x86 (PT2E).

    Weights of convolutions and linear layers are stored as levels, symmetric for each output channel; activations are
    rounded for each tensor, to the range that the library's histograms choose on `batches` of records [B, C, H, W].
    Which records these are can be read off the ranges. On processors without VNNI sums of two products may saturate.

    Raises:
        TrivetError: torchao is missing or cannot quantise the network, or as `pt2_bytes`.
    """
    with _exporting(model) as net:
        try:
            from torchao.quantization.pt2e import quantize_pt2e
            from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
        except ImportError:
            raise TrivetError("a .pt2 file in eight bits needs torchao; pip install 'trivet[pt2]'.") from None
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        observed = quantize_pt2e.prepare_pt2e(_traced(net, input_shape).module(), quantizer)
        for batch in batches:
            observed(batch)
        made = quantize_pt2e.convert_pt2e(observed)
        # The weights in float stay behind as attributes that nothing reads, and would be stored.
        read = {node.target for node in made.graph.nodes if node.op == "get_attr"}
        for name, _ in [*made.named_parameters(), *made.named_buffers()]:
            if name not in read:
                owner, _, last = name.rpartition(".")
                delattr(made.get_submodule(owner), last)
        return _archive(_traced(made, input_shape))


def _traced(net: nn.Module, input_shape: tuple[int, ...]) -> Any:
    shapes = ({0: torch.export.Dim("batch")},)
    return torch.export.export(net, (_example(input_shape),), dynamic_shapes=shapes, strict=False)


def _archive(program: Any) -> bytes:
    """An exported program as a file, without what only tells where it was made: paths of sources, names of classes."""
    for node in program.graph.nodes:
        for told in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node"):
            node.meta.pop(told, None)
    program.example_inputs = None  # a pickle, which readers would have to trust
    written = io.BytesIO()
    torch.export.save(program, written)
    return written.getvalue()


def int8_bytes(content: bytes, batches: Iterable[Tensor]) -> bytes:
    """An ONNX file with weights and activations in eight bits, by ONNX Runtime's static quantisation.

    Weights are rounded for each output channel, symmetric; activations for each tensor, to the range they have on
    `batches` of records [B, C, H, W]. Which records these are can be read off the ranges.

    Raises:
        TrivetError: onnxruntime is missing, or cannot quantise the file.
    """
    try:
        import onnx
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    except ImportError:
        raise TrivetError("eight bits need onnx and onnxruntime; pip install 'trivet[onnx]'.") from None
    proto = onnx.load_model_from_string(content)
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "int8.onnx"
        try:
            quantize_static(
                proto,
                path,
                _reader(proto.graph.input[0].name, batches),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        except (ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise TrivetError(f"ONNX Runtime cannot quantise this network ({error}); leave out --int8.") from error
        return path.read_bytes()


def _reader(name: str, batches: Iterable[Tensor]) -> Any:
    """What ONNX Runtime asks for records, one batch after another."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.left, None)
            return None if batch is None else {name: batch.numpy()}

    return Reader()


def is_quantized(content: bytes) -> bool:
    """Whether an ONNX file rounds values to levels on the way."""
    import onnx

    return any(node.op_type == "QuantizeLinear" for node in onnx.load_model_from_string(content).graph.node)


def _example(input_shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(2, *input_shape)  # at one record exporters take the batch for a constant


@contextmanager
def _exporting(model: nn.Module) -> Iterator[nn.Module]:
    """A plain copy to export; what the exporter finds impossible becomes one sentence."""
    if draws(model):
        raise TrivetError("the weights are drawn anew in every pass, and a file would hold a single draw; export none.")
    net = baked(model).eval().cpu()
    try:
        with quiet(), torch.no_grad():
            yield net
    except TrivetError:
        raise
    except Exception as error:  # exporters raise whatever the model's forward raises on symbols
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise TrivetError(f"{type(model).__name__} cannot be exported: {first}") from error

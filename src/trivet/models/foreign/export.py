"""Writing a network to the files that runtimes read: ONNX, torch.export archives, and ONNX in eight bits."""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trivet.errors import TrivetError
from trivet.models.baking import baked, draws

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
        program = torch.export.export(
            net, (_example(input_shape),), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
        )
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
    with tempfile.TemporaryDirectory() as folder, _quiet():
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
        with _quiet(), torch.no_grad():
            yield net
    except TrivetError:
        raise
    except Exception as error:  # exporters raise whatever the model's forward raises on symbols
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise TrivetError(f"{type(model).__name__} cannot be exported: {first}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn about themselves and about packages that are not needed."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)

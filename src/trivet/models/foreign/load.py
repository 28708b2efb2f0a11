"""Models that somebody else made, for the auditor: `.onnx` and `.pt2` files, read as data and never executed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from trivet.errors import TrivetError
from trivet.models.foreign.exported_file import import_exported
from trivet.models.foreign.onnx_file import import_onnx
from trivet.models.modes import evaluating

MAX_BYTES = 2 << 30
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".joblib")


def load_model(path: str | Path, *, max_bytes: int = MAX_BYTES) -> nn.Module:
    """The network in an ONNX file or a torch.export archive, rebuilt from ordinary PyTorch layers, in eval mode.

    The result computes what the file says up to float32 rounding, for any batch size [B, ...], has gradients, and
    carries the shape of one input in `meta["input_shape"]`. Nothing in the file is executed or unpickled.

    Args:
        path: a file ending in `.onnx`, `.onnx.gz` or `.pt2`.
        max_bytes: ceiling on the file and on all tensors it declares, checked before they are read.

    Raises:
        TrivetError: no such file, another kind of file, one above the ceiling, or one that cannot be rebuilt; the
            sentence names what stands in the way.
    """
    path = Path(path)
    if not path.is_file():
        raise TrivetError(f"{path} is no file.")
    size = path.stat().st_size
    if size > max_bytes:
        raise TrivetError(f"{path} has {size} bytes, more than the ceiling of {max_bytes}; raise max_bytes to read it.")
    if path.name.endswith((".onnx", ".onnx.gz")):
        return import_onnx(path, max_bytes)
    if path.suffix == ".pt2":
        return import_exported(path, max_bytes)
    if path.suffix in _PICKLES:
        raise TrivetError(
            f"{path} may hold a pickle, which can run code, and is never loaded; export the model with "
            "torch.export.save (.pt2) or torch.onnx.export (.onnx)."
        )
    if path.suffix == ".safetensors":
        raise TrivetError(
            f"{path} holds weights without their network; give the run folder, or export to .onnx or .pt2."
        )
    raise TrivetError(f"{path} is of an unknown kind; models are read from .onnx and .pt2 files.")


@torch.no_grad()
def num_classes_of(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """K, found by passing two all-zero inputs of `input_shape` (C, H, W) through `model`.

    Raises:
        TrivetError: the model does not take such inputs, or does not return one row of at least two logits for each.
    """
    shape = tuple(input_shape)
    try:
        with evaluating(model):
            logits = model(torch.zeros(2, *shape))
    except (RuntimeError, ValueError, IndexError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise TrivetError(
            f"the model does not take inputs of shape {shape} ({first}); check the input shape."
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 2 or logits.shape[1] < 2:
        found = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise TrivetError(f"the model maps two inputs to {found}, and a classifier gives logits [2, K] with K >= 2.")
    return logits.shape[1]

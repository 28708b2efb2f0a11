"""An ONNX file as its users run it: in ONNX Runtime, without gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trivet.errors import TrivetError, require
from trivet.files import read_packed
from trivet.models.foreign.onnx_kernels import conditions_of

MAX_BYTES = 2 << 30


class OnnxRuntimeModel(nn.Module):
    """The black box beside `load_model`'s twin: for latency, for attacks that only ask for logits, for comparison.

    Maps [B, ...] float32 to the file's first output. Runs on the processor with as many threads as PyTorch is set to.
    Weights must lie in the file itself.

    Raises:
        TrivetError: a file ONNX Runtime refuses; at the call, inputs it refuses or a request for gradients.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        path = Path(path)
        require(path.is_file(), f"{path} is no file.")
        self.where = str(path)
        # From bytes, not from the path, so that no reference to another file can be followed.
        self.content = read_packed(path, MAX_BYTES)
        self._open(torch.get_num_threads())

    def _open(self, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4
        try:
            self.session = onnxruntime.InferenceSession(self.content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its own classes, one for each status code, derive from Exception alone
            raise TrivetError(f"ONNX Runtime refuses {self.where} ({error}).") from error
        self.threads = threads
        declared = self.session.get_inputs()[0]
        self.input_name, first = declared.name, declared.shape[0]
        self.batch: int | None = first if isinstance(first, int) and len(declared.shape) > 1 else None

    def conditions(self) -> tuple[str, ...]:
        """Under which bounds of the rebuilt graph of an eight-bit file are bounds of its answers here."""
        return conditions_of(self.content)

    def forward(self, x: Tensor) -> Tensor:
        require(
            not (torch.is_grad_enabled() and x.requires_grad),
            f"{self.where} runs in ONNX Runtime and has no gradients; use a black-box attack, or load_model.",
        )
        if self.threads != torch.get_num_threads():
            self._open(torch.get_num_threads())
        size = self.batch or max(len(x), 1)
        parts = [self._run(part, size) for part in x.detach().cpu().split(size)]
        return torch.cat(parts).to(x.device)

    def _run(self, x: Tensor, size: int) -> Tensor:
        """A file written for one batch size gets exactly that; the surplus rows are dropped again."""
        missing = size - len(x)
        whole = F.pad(x, [0] * 2 * (x.ndim - 1) + [0, missing]) if missing else x
        try:
            (logits, *_) = self.session.run(None, {self.input_name: whole.contiguous().numpy()})
        except Exception as error:
            raise TrivetError(f"ONNX Runtime refuses inputs of shape {tuple(whole.shape)} ({error}).") from error
        return torch.from_numpy(logits)[: len(x)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a session is neither copied nor changed

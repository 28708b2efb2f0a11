"""Questions and answers in files, as verifiers exchange them in their competition (VNN-COMP): ONNX, VNN-LIB, result."""

from __future__ import annotations

import time
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, fx

from trivet.certify.bounds.rounding import Arithmetic
from trivet.certify.branch_and_bound import verify
from trivet.certify.queries import Verdict
from trivet.certify.vnnlib import read_vnnlib
from trivet.errors import TrivetError, require
from trivet.files import write_text
from trivet.models.foreign.load import load_model
from trivet.models.foreign.onnx_runtime import OnnxRuntimeModel

TIMEOUT = 120.0


def decide(
    onnx: str | Path,
    vnnlib: str | Path,
    *,
    timeout: float = TIMEOUT,
    arithmetic: Arithmetic = "float32",
    out: str | Path | None = None,
) -> Verdict:
    """Whether the network in one file has the property in the other (`verify`); ONNX Runtime confirms witnesses.

    Args:
        onnx: an .onnx or .onnx.gz file.
        vnnlib: a .vnnlib or .vnnlib.gz file.
        timeout: seconds, reading included.
        arithmetic: as in `verify`.
        out: where to write the result in the competition's format (`result_text`), "error" for input that is refused.

    Raises:
        TrivetError: files that are missing, damaged, not understood, or do not fit each other.
    """
    started = time.monotonic()
    try:
        # Written so that NaN is refused, too.
        require(timeout > 0, f"timeout={timeout} must be a number of seconds above 0.")
        require(arithmetic in ("real", "float32"), f"arithmetic={arithmetic!r} must be 'real' or 'float32'.")
        prop = read_vnnlib(vnnlib)
        require(Path(onnx).name.endswith((".onnx", ".onnx.gz")), f"{onnx} is no .onnx or .onnx.gz file.")
        model = load_model(onnx)
        shape = tuple(cast(fx.GraphModule, model).meta["input_shape"])
        box = OnnxRuntimeModel(onnx)
        single = len(box.session.get_inputs()[0].shape) == len(shape)

        def runtime(x: Tensor) -> Tensor:
            with torch.no_grad():
                return box(x.view(shape)).flatten() if single else box(x.view(1, *shape))[0].flatten()

        left = max(timeout - (time.monotonic() - started), 1e-3)
        verdict = verify(model, prop, shape=shape, timeout=left, runtime=runtime, arithmetic=arithmetic)
    except TrivetError:
        if out is not None:
            write_text(Path(out), "error\n")
        raise
    if out is not None:
        write_text(Path(out), result_text(verdict))
    return verdict


def result_word(verdict: Verdict) -> str:
    """The competition's word for it: of the counterexample, so that a property that holds is `unsat`."""
    words = {"verified": "unsat", "falsified": "sat", "error": "error"}
    return words.get(verdict.answer, "timeout" if verdict.timed_out else "unknown")


def result_text(verdict: Verdict) -> str:
    """The word, and with `sat` the witness: ((X_0 …) (X_1 …) … (Y_0 …) …)."""
    lines = [result_word(verdict)]
    if verdict.witness is not None:
        pairs = [f"(X_{i} {value!r})" for i, value in enumerate(verdict.witness.inputs)]
        pairs += [f"(Y_{i} {value!r})" for i, value in enumerate(verdict.witness.outputs)]
        lines.append("(" + "\n ".join(pairs) + ")")
    return "\n".join(lines) + "\n"

"""Archives in eight bits: read as data, answering as PyTorch's own loader answers, with gradients straight through."""

from __future__ import annotations

import importlib
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trivet.compression import runtime
from trivet.compression.runtime import footprint, runner, runtime_latency
from trivet.errors import TrivetError
from trivet.models.foreign import exported_program
from trivet.models.foreign.export import pt2_bytes, pt2_int8_bytes
from trivet.models.foreign.exported_program import ExportedModel
from trivet.models.foreign.load import load_model
from trivet.models.foreign.quantized import Quantize
from trivet.models.foreign.quiet import quiet
from trivet.models.resnet import resnet
from trivet.models.small_cnn import small_cnn

importlib.import_module("torch.ao.quantization.fx._decomposed")
OPS: Any = torch.ops.quantized_decomposed
STEP, ZERO = 0.07, 3


class Rounded(nn.Module):
    """Eight bits in PyTorch's own operators: input, kernel and result on levels."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("levels", torch.arange(-60, 60, dtype=torch.int8).view(4, 3, 10))
        self.register_buffer("scales", torch.tensor([0.01, 0.02, 0.03, 0.005]))
        self.register_buffer("zeros", torch.tensor([0, 1, -2, 0]))

    def forward(self, x: Tensor) -> Tensor:
        kernel = OPS.dequantize_per_channel(self.levels, self.scales, self.zeros, 0, -128, 127, torch.int8)
        y = nn.functional.linear(_on_levels(x, STEP, ZERO), kernel.flatten(1))
        return _on_levels(y, 0.1, 100)


def _on_levels(x: Tensor, step: float, zero: int) -> Tensor:
    levels = OPS.quantize_per_tensor(x, step, zero, 0, 255, torch.uint8)
    return OPS.dequantize_per_tensor(levels, step, zero, 0, 255, torch.uint8)


@pytest.fixture
def rounded(tmp_path: Path) -> Path:
    path = tmp_path / "rounded.pt2"
    path.write_bytes(pt2_bytes(Rounded(), (30,)))
    return path


def theirs(path: Path) -> Callable[[Tensor], Tensor]:
    """The program by PyTorch's own loader, which trusts what is in the file."""
    with quiet():
        module: Callable[[Tensor], Tensor] = torch.export.load(path).module()
    return module


def graph_of(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        name = next(each for each in archive.namelist() if each.endswith("models/model.json"))
        return name, json.loads(archive.read(name))


def edited(path: Path, change: Callable[[dict[str, Any]], None], operator: str) -> Path:
    """The archive after `change` was made to the first node of an operator; arguments by name."""
    changed, program = graph_of(path)
    node = next(each for each in program["graph_module"]["graph"]["nodes"] if operator in each["target"])
    change({"target": node} | {each["name"]: each["arg"] for each in node["inputs"]})
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in (content | {changed: json.dumps(program).encode()}).items():
            archive.writestr(name, value)
    return path


def test_levels_are_those_of_pytorch_itself(rounded: Path) -> None:
    x = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)) * 8  # beyond the range on both sides
    expected = Rounded()(x)
    assert torch.equal(theirs(rounded)(x), expected)
    assert torch.equal(ExportedModel(rounded)(x), expected)
    twin = load_model(rounded)(x).detach()
    assert float(((twin - expected).abs() > 1e-5).float().mean()) < 0.01  # 1 / step is rounded in one, not the other
    assert float((twin - expected).abs().max()) <= 0.1001


def test_gradients_pass_where_values_are_in_range_and_stop_outside(rounded: Path) -> None:
    x = torch.tensor([[-1.0, 0.2, 5.0, 17.0, 19.0] * 6]).requires_grad_()
    twin: Any = load_model(rounded)
    layer = next(each for each in twin.children() if isinstance(each, Quantize))
    (gradient,) = torch.autograd.grad((layer(x) * STEP).sum(), x)
    inside = ((x >= -ZERO * STEP) & (x <= (255 - ZERO) * STEP)).float()
    torch.testing.assert_close(gradient, inside)
    assert 0 < int(inside.sum()) < 30
    with pytest.raises(TrivetError, match="has no gradients; use a black-box attack, or load_model"):
        ExportedModel(rounded)(x)


@pytest.mark.parametrize(
    ("operator", "change", "complaint"),
    [
        ("quantize_per_tensor", lambda n: n["scale"].update(as_float=0.0), "has the scale 0.0"),
        ("quantize_per_tensor", lambda n: n["scale"].update(as_float=float("inf")), "has the scale inf"),
        ("quantize_per_tensor", lambda n: n["quant_max"].update(as_int=256), "has levels from 0 to 256"),
        ("quantize_per_tensor", lambda n: n["quant_min"].update(as_int=255), "has levels from 255 to 255"),
        ("quantize_per_tensor", lambda n: n["dtype"].update(as_scalar_type=5), "another type than int8 or uint8"),
        ("dequantize_per_tensor", lambda n: n["zero_point"].update(as_int=None), "has the zero None"),
        ("dequantize_per_channel", lambda n: n["axis"].update(as_int=2), "has .4,. scales for an axis of 10"),
        ("dequantize_per_channel", lambda n: n["quant_max"].update(as_int=5), "levels that are no torch.int8"),
        (
            "quantize_per_tensor",
            lambda n: n["target"].update(target="torch.ops.quantized_decomposed.quantize_per_tensor.tensor"),
            "is not supported",
        ),
        ("linear", lambda n: n["target"].update(target="torch.ops.quantized.linear.default"), "is not supported"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(
    operator: str, change: Callable[[dict[str, Any]], None], complaint: str, rounded: Path
) -> None:
    edited(rounded, change, operator)
    for read in (load_model, ExportedModel):
        with pytest.raises(TrivetError, match=complaint) as caught:
            read(rounded)
        assert "\n" not in str(caught.value)


def test_a_program_for_one_batch_size_answers_for_any(tmp_path: Path) -> None:
    with quiet():
        torch.export.save(torch.export.export(Rounded(), (torch.zeros(2, 30),)), tmp_path / "fixed.pt2")
    x = torch.randn(5, 30)
    assert torch.equal(ExportedModel(tmp_path / "fixed.pt2")(x), Rounded()(x))


def test_what_runs_is_read_without_unpickling_and_tells_its_conditions(rounded: Path) -> None:
    model = ExportedModel(rounded)
    assert "not compiled" in model.conditions()[0]
    with zipfile.ZipFile(rounded) as archive:
        pickles = [each for each in archive.infolist() if each.filename.endswith((".pt", ".pkl"))]
    assert sum(each.file_size for each in pickles) == 0
    with pytest.raises(TrivetError, match="batch_size=0 must be at least 1"):
        ExportedModel(rounded, batch_size=0)
    with pytest.raises(TrivetError, match="is no file"):
        ExportedModel("absent.pt2")


def test_without_a_compiler_the_program_runs_as_it_is_written(rounded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Callable[[Tensor], Tensor]:
        def fail(x: Tensor) -> Tensor:
            raise AssertionError("No working C++ compiler found")

        return fail

    monkeypatch.setattr(exported_program.torch, "compile", broken)
    with pytest.raises(TrivetError, match="TorchInductor cannot compile the program here: No working"):
        ExportedModel(rounded, batch_size=2)
    model, way = runner(rounded, 2)
    x = torch.randn(5, 30)
    assert way == runtime.SIMULATED
    assert torch.equal(model(x), Rounded()(x))
    assert runtime_latency(rounded, (30,), batch_size=2, repeats=2, warmup=1).path == runtime.SIMULATED


@pytest.mark.slow
def test_its_memory_is_measured_in_a_fresh_process(rounded: Path) -> None:
    found = footprint(rounded, (30,), batch_size=2, threads=1, runtime="exported")
    assert found is None or 0 < found < 1 << 28


@pytest.fixture
def quantised(tmp_path: Path) -> tuple[nn.Module, Path]:
    pytest.importorskip("torchao", reason="what quantises archives")
    generator = torch.Generator().manual_seed(0)
    model = resnet((3, 8, 8), 4, depth=8, mean=[0.5] * 3, std=[0.2] * 3, generator=generator).eval()
    for each in model.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.running_mean.uniform_(-0.3, 0.3, generator=generator)
            each.running_var.uniform_(0.5, 2.0, generator=generator)
    path = tmp_path / "int8.pt2"
    batches = (torch.rand(32, 3, 8, 8, generator=generator) for _ in range(3))
    path.write_bytes(pt2_int8_bytes(model, (3, 8, 8), batches))
    return model, path


def test_a_residual_network_in_eight_bits_answers_as_its_program(quantised: tuple[nn.Module, Path]) -> None:
    model, path = quantised
    x = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, program, float_logits = load_model(path)(x), theirs(path)(x), model(x)
        assert torch.equal(ExportedModel(path)(x), program)
    spread = float(float_logits.std())
    assert float((ours - program).abs().mean()) < 0.01 * spread
    assert 0 < float((program - float_logits).abs().mean()) < 0.1 * spread
    gradients = []
    for net in (model, load_model(path)):
        y = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(net(y).logsumexp(1).sum(), y)[0].flatten(1))
    assert float(torch.cosine_similarity(*gradients, dim=1).mean()) > 0.9  # measured: 0.98


def test_weights_lie_on_levels_and_nothing_else_is_stored(tmp_path: Path) -> None:
    """Symmetric levels for each output channel from -128 to 127, to half a step; no weights in float, no paths."""
    pytest.importorskip("torchao", reason="what quantises archives")
    model, path = small_cnn((1, 8, 8), 10, generator=torch.Generator().manual_seed(0)).eval(), tmp_path / "int8.pt2"
    path.write_bytes(pt2_int8_bytes(model, (1, 8, 8), [torch.rand(64, 1, 8, 8)]))
    own = [each.weight.detach() for each in model.modules() if isinstance(each, (nn.Conv2d, nn.Linear))]
    layers = [each for each in load_model(path).modules() if isinstance(each, (nn.Conv2d, nn.Linear))]
    stored = [each.weight.detach() for each in layers]
    assert len(own) == len(stored) == 4
    for weight, found in zip(own, stored, strict=True):
        step = weight.flatten(1).abs().amax(1) / 127.5
        steps = step.view(-1, *[1] * (weight.ndim - 1))
        assert float(((found - weight).abs() / steps).max()) <= 0.5001
        torch.testing.assert_close(found / steps, (found / steps).round(), atol=1e-3, rtol=0)
    with zipfile.ZipFile(path) as archive:
        sizes = {each.filename.partition("/")[2]: each.file_size for each in archive.infolist()}
    count = sum(weight.numel() for weight in own)
    beside = sum(4 * len(weight) + (4 + 8) * len(weight) for weight in own)  # bias, scale, zero
    assert sum(size for name, size in sizes.items() if name.startswith("data/weights/weight")) == count + beside
    content = path.read_bytes()
    assert b"site-packages" not in content
    assert b"nn_module_stack" not in content


def test_a_network_that_cannot_be_traced_is_refused_in_one_sentence() -> None:
    pytest.importorskip("torchao", reason="what quantises archives")

    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(TrivetError, match="Branching cannot be exported") as caught:
        pt2_int8_bytes(Branching(), (4,), [])
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="TorchInductor needs a C++ compiler")
def test_compiled_it_answers_within_a_level(rounded: Path) -> None:
    x = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    written, compiled = ExportedModel(rounded), ExportedModel(rounded, batch_size=3)
    assert float((written(x) - compiled(x)).abs().max()) <= 0.1001
    assert compiled(x).shape == (5, 4)
    with pytest.raises(TrivetError, match="computes on integers"):
        compiled.conditions()

"""Bounds of eight-bit files hold for what ONNX Runtime itself answers: at edges, corners and where attacks lead."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bound_oracles import ball, images
from torch import Tensor, nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from int8_files import NETWORKS, dense, grid, pairs, quantised, twinned  # noqa: E402
from onnx import numpy_helper  # noqa: E402

from trivet.certify.bounds.network import Network, margin_rows  # noqa: E402
from trivet.certify.bounds.rounding import Rounding  # noqa: E402
from trivet.certify.certifier import ABSTAIN  # noqa: E402
from trivet.certify.crown import Crown, CrownIbp  # noqa: E402
from trivet.certify.ibp import Ibp  # noqa: E402
from trivet.errors import BadValue, TrivetError  # noqa: E402
from trivet.models.foreign import onnx_kernels  # noqa: E402
from trivet.models.foreign.export import int8_bytes  # noqa: E402
from trivet.models.foreign.onnx_kernels import conditions_of  # noqa: E402
from trivet.models.foreign.twinned import Twinned  # noqa: E402
from trivet.randomness import generator  # noqa: E402

FLOAT32 = Rounding.of("float32", torch.float64)
METHODS = ("ibp", "crown-ibp", "crown")


def tries(model: Twinned, x: Tensor, eps: float, labels: Tensor, seed: int) -> Tensor:
    """Points of each ball, [T, N, ...]: random, corners, edges of levels, and where gradients of the twin lead."""
    draw = generator(seed, "tries in eight bits")
    step = next(each for each in model.twin.modules() if hasattr(each, "low")).scale
    moves = 2 * torch.rand(60, *x.shape, generator=draw) - 1
    corners = torch.randn(120, *x.shape, generator=draw).sign()
    points = [x + eps * moves, x + eps * corners, ((((x + eps * moves) / step).floor() + 0.5) * step)]
    for part in range(6):
        at = (x + eps * (2 * torch.rand(x.shape, generator=draw) - 1)).clamp(0, 1)
        for _ in range(12):
            at = at.detach().requires_grad_()
            logits = model(at)
            rest = logits.scatter(1, labels[:, None], -torch.inf)
            loss = (rest.amax(1) if part % 2 else rest.logsumexp(1)) - logits.gather(1, labels[:, None])[:, 0]
            (gradient,) = torch.autograd.grad(loss.sum(), at)
            at = (at + eps / 4 * gradient.sign()).detach()
            at = torch.minimum(torch.maximum(at, x - eps), x + eps).clamp(0, 1)
            points.append(at[None])
    allowed = eps * (1 - 1e-6)
    return torch.minimum(torch.maximum(torch.cat(points), x - allowed), x + allowed).clamp(0, 1)


@pytest.mark.parametrize("kind", sorted(NETWORKS))
def test_no_try_crosses_what_is_certified_and_none_lies_below_any_bound(kind: str, tmp_path: Path) -> None:
    model, x = quantised(kind, tmp_path), images(10, 1, 6, 6, seed=1)
    network = Network.of(model, (1, 6, 6))
    with torch.no_grad():
        labels = model(x).argmax(1)
    proved = crossed_beyond = 0
    for eps in (0.004, 0.02):
        points = tries(model, x, eps, labels, 1)
        with torch.no_grad():
            logits = model(points.flatten(0, 1)).view(len(points), len(x), -1)
        margins = torch.einsum("nsk,tnk->tns", margin_rows(labels, network.classes), logits).amin(0)
        domain = ball(x.double(), eps)
        known = network.intervals(domain, "float32")[-1]
        assert bool((known.lower <= logits.amin(0)).all() and (logits.amax(0) <= known.upper).all())
        for method in METHODS:
            bound = network.margins(domain, labels, method=method, arithmetic="float32")  # type: ignore[arg-type]
            assert bool((bound <= margins).all()), method
        for certifier in (Ibp(eps), CrownIbp(eps, slopes=("adaptive", "zero", "one", "same")), Crown(eps)):
            found = certifier.certify(model, x)
            held = found.labels != ABSTAIN
            assert torch.equal(found.labels[held], labels[held])
            assert bool((logits.argmax(2) == labels)[:, held].all())
            proved += int(held.sum())
        crossed_beyond += int((logits.argmax(2) != labels).any(0).sum())
    assert proved >= 10
    if kind != "averaging":
        assert crossed_beyond > 0 or proved < 60


def test_a_tiny_file_against_all_levels_of_its_inputs(tmp_path: Path) -> None:
    """Three inputs: within the ball every combination of their levels is asked of the runtime, and nothing else is."""
    shape, eps = (1, 1, 3), 0.016
    content = int8_bytes(dense(3, shape, hidden=6, classes=3), [torch.rand(200, *shape, generator=generator(3, "c"))])
    model = twinned(content, tmp_path)
    quantize = next(each for each in model.twin.modules() if hasattr(each, "low"))
    step, zero = float(quantize.scale), float(quantize.zero)
    x = images(24, *shape, seed=3)
    network = Network.of(model, shape)
    with torch.no_grad():
        labels = model(x).argmax(1)
    rows = margin_rows(labels, 3)
    bounds = {m: network.margins(ball(x.double(), eps), labels, method=m, arithmetic="float32") for m in METHODS}  # type: ignore[arg-type]
    output = float(list(model.twin.modules())[-1].scale)
    gaps: dict[str, list[float]] = {method: [] for method in METHODS}
    verdicts = []
    for i, image in enumerate(x):
        ends = [
            (np.clip(np.round(np.clip(float(v) + sign * eps, 0, 1) / step) + zero, 0, 255))
            for v in image.flatten()
            for sign in (-1, 1)
        ]
        levels = [range(int(low), int(high) + 1) for low, high in zip(ends[::2], ends[1::2], strict=True)]
        points = (torch.tensor(list(itertools.product(*levels))) - zero) * step
        with torch.no_grad():
            exact = (model(points.float().view(-1, *shape)) @ rows[i].T).amin(0)
        for method, bound in bounds.items():
            assert bool((bound[i] <= exact + 1e-9).all())
            gaps[method] += ((exact - bound[i]) / output).tolist()
        verdicts.append((bool((exact > 0).all()), bool((bounds["crown"][i] > 0).all())))
    assert max(gaps["crown"]) < 4  # levels of the output; measured: 2.1
    truly, proved = (sum(each) for each in zip(*verdicts, strict=True))
    assert 8 <= proved <= truly < len(x)


def test_bounds_at_a_point_are_the_answer_itself(tmp_path: Path) -> None:
    """But for edges: means of four levels on the grid that they had are ties one time in four."""
    for kind, sure in (("dense", 0.9), ("residual", 0.9), ("averaging", 0.4)):
        model, x = quantised(kind, tmp_path), images(40, 1, 6, 6, seed=2)
        found = Network.of(model, (1, 6, 6)).intervals(ball(x.double(), 0.0), "float32")[-1]
        with torch.no_grad():
            answers = model(x)
        assert bool((found.lower <= answers).all() and (answers <= found.upper).all())
        output = float(list(model.twin.modules())[-1].scale)
        assert float(((found.upper - found.lower) < output / 2).double().mean()) > sure


def test_the_margins_rows_are_merged_into_the_layer_before_the_last_rounding(tmp_path: Path) -> None:
    """Differences of rounded intervals would be far looser."""
    model, x = quantised("dense", tmp_path), images(20, 1, 6, 6, seed=4)
    network = Network.of(model, (1, 6, 6))
    domain, labels = ball(x.double(), 0.05), model(x).argmax(1)
    known = network.intervals(domain, "float32")
    merged = network.margins(domain, labels, method="ibp", arithmetic="float32")
    apart = known[-1].least(margin_rows(labels, 4).double(), FLOAT32)
    output = float(list(model.twin.modules())[-1].scale)
    assert bool((merged >= apart - 2.01 * output).all())
    assert float((merged - apart).mean()) > 0.1
    rough = network.margins(ball(x, 0.05), labels, method="ibp")  # for training: without error terms
    torch.testing.assert_close(rough.double(), merged, rtol=0, atol=2.01 * output)


# Conditions


def changed(content: bytes, **arrays: Any) -> bytes:
    proto = onnx.load_model_from_string(content)
    for each in proto.graph.initializer:
        if each.name in arrays:
            each.CopyFrom(numpy_helper.from_array(np.asarray(arrays[each.name]), each.name))
    altered: bytes = proto.SerializeToString()
    return altered


def stored(content: bytes) -> dict[str, Any]:
    return {each.name: numpy_helper.to_array(each) for each in onnx.load_model_from_string(content).graph.initializer}


@pytest.fixture(scope="module")
def eight_bits() -> bytes:
    return int8_bytes(dense(), [images(64, 1, 6, 6)])


def test_conditions_say_what_runs_and_on_which_processors(eight_bits: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_kernels, "_processor", lambda: {"avx2", "avx512_vnni"})
    first, second = conditions_of(eight_bits)
    assert "QGemm" in first
    assert "x86-64" in first
    assert "VNNI or AMX" in second
    small = {name: array // 2 for name, array in stored(eight_bits).items() if name.endswith("weight_quantized")}
    small |= {
        name: array // 2 for name, array in stored(eight_bits).items() if name in ("W1_quantized", "W2_quantized")
    }
    assert small
    assert len(conditions_of(changed(eight_bits, **small))) == 1  # 7 bits cannot saturate
    monkeypatch.setattr(onnx_kernels, "_processor", lambda: {"avx2"})
    with pytest.raises(TrivetError, match="may saturate; quantise with 7 bits"):
        conditions_of(eight_bits)
    monkeypatch.setattr(onnx_kernels.platform, "machine", lambda: "aarch64")
    with pytest.raises(TrivetError, match="its kernels on aarch64 round in ways"):
        conditions_of(eight_bits)


def test_what_runs_otherwise_than_bounds_assume_is_refused(eight_bits: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = stored(eight_bits)
    scale = next(name for name in arrays if name.startswith("b1") and name.endswith("scale"))
    with pytest.raises(TrivetError, match="is stored in other steps than its kernel takes it for"):
        conditions_of(changed(eight_bits, **{scale: arrays[scale] * np.float32(1.01)}))
    bias = next(name for name in arrays if name.startswith("b1") and name.endswith("quantized"))
    with pytest.raises(TrivetError, match="may leave 32 bits"):
        conditions_of(changed(eight_bits, **{bias: np.full_like(arrays[bias], 2**31 - 1)}))
    twice = pairs(
        [
            ("QuantizeLinear", ["a", "sb", "zb"], "q", {}),
            ("DequantizeLinear", ["q", "sb", "zb"], "d", {}),
            ("Add", ["d", "b"], "c", {}),
        ],
        grid("a", 0.1, 3) | grid("b", 0.07, 0) | grid("c", 0.1, 3),
    )
    with pytest.raises(TrivetError, match="rounds to two grids in turn, up to 'QuantizeLinear q', and the runtime to"):
        conditions_of(twice)
    monkeypatch.setattr(onnx_kernels, "_check_turns", lambda *_: None)
    wider = pairs(
        [
            ("QuantizeLinear", ["a", "sb", "zb"], "q", {}),
            ("DequantizeLinear", ["q", "sb", "zb"], "d", {}),
            ("Add", ["d", "b"], "c", {}),
        ],
        grid("a", 0.1, 250) | grid("b", 0.07, 0) | grid("c", 0.1, 3),
    )
    with pytest.raises(TrivetError, match="rounds to other grids than the file says"):
        conditions_of(wider)
    squashed = pairs([("Sigmoid", ["a"], "c", {})], grid("a", 0.1, 3) | grid("b", 0.07, 0) | grid("c", 0.1, 3))
    with pytest.raises(TrivetError, match="Sigmoid, whose arithmetic bounds here do not cover"):
        conditions_of(squashed)


def test_certificates_about_a_file_are_about_its_runtimes_answers(tmp_path: Path) -> None:
    model, x = quantised("dense", tmp_path), images(6, 1, 6, 6, seed=1)
    found = Ibp(0.004).certify(model, x)
    assert "the file's own answers" in found.conditions[0]
    assert "ONNX Runtime" in found.conditions[1]
    with pytest.raises(BadValue, match="arithmetic='real' must be 'float32'"):
        Ibp(0.004, arithmetic="real").certify(model, x)
    with pytest.raises(TrivetError, match="nothing is known of its arithmetic"):
        Ibp(0.004).certify(Twinned(model.twin, model.answering), x)


def test_a_runtime_that_answers_another_network_is_noticed(tmp_path: Path) -> None:
    """The input lies in its own ball: its margin, as the runtime has it, must not lie below a bound."""
    model, x = quantised("dense", tmp_path), images(6, 1, 6, 6, seed=1)

    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * model.answering(x)

    with pytest.raises(TrivetError, match="lies above the margin of the input itself"):
        Ibp(0.004).certify(Twinned(model.twin, Other(), model.conditions), x)

"""Bounds of eight-bit files hold for what ONNX Runtime itself answers: all levels tried, edges, corners and attacks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bound_oracles import ball, images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trivet.certify.bounds import staircase
from trivet.certify.bounds.interval import Interval
from trivet.certify.bounds.network import Network, margin_rows
from trivet.certify.bounds.rounding import Rounding
from trivet.certify.bounds.staircase import Dequantised, Levels
from trivet.certify.certifier import ABSTAIN
from trivet.certify.crown import Crown, CrownIbp
from trivet.certify.ibp import Ibp
from trivet.errors import BadValue, TrivetError
from trivet.models.foreign import onnx_kernels
from trivet.models.foreign.export import int8_bytes
from trivet.models.foreign.load import load_model
from trivet.models.foreign.onnx_kernels import conditions_of
from trivet.models.foreign.onnx_runtime import OnnxRuntimeModel
from trivet.models.foreign.twinned import Twinned
from trivet.randomness import generator

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

REAL, FLOAT32 = (Rounding.of(kind, torch.float64) for kind in ("real", "float32"))
METHODS = ("ibp", "crown-ibp", "crown")
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


# Single layers


def layers(off: float, low: int, zero: Sequence[float], step: Sequence[float]) -> tuple[Levels, Dequantised]:
    z, s = (torch.tensor(each, dtype=torch.float64) for each in (zero, step))
    return Levels(torch.round, off, off, s, low - z, low + 255 - z, z), Dequantised.of(s, z)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from([0, -128]), st.booleans())
def test_levels_are_those_found_by_trying_and_lines_lie_on_their_side(seed: int, low: int, same: bool) -> None:
    """Six numbers with a step and a zero each; intervals within range, across its ends and of a step or less."""
    draw = generator(seed, "levels")
    zero = torch.full((6,), 7.0 + low) if same else torch.randint(low, low + 256, (6,), generator=draw).double()
    step = torch.full((6,), 0.3) if same else 0.05 + torch.rand(6, generator=draw, dtype=torch.float64)
    to, back = layers(0.5, low, zero.tolist(), step.tolist())
    middle = (torch.rand(6, generator=draw, dtype=torch.float64) * 400 - 200) * step
    radius = torch.tensor([0.2, 0.9, 3.0, 20.0, 100.0, 300.0], dtype=torch.float64) * step
    grid = torch.linspace(-1, 1, 4001, dtype=torch.float64)[:, None] * radius + middle
    before = Interval((middle - radius)[None], (middle + radius)[None])
    values = to(grid)
    found = to.bounds([before], FLOAT32)
    assert torch.equal(found.lower[0], values.amin(0))
    assert torch.equal(found.upper[0], values.amax(0))
    assert low <= float(values.min()) <= float(values.max()) <= low + 255
    ends = back.bounds([found], FLOAT32)
    assert bool((ends.lower[0] <= back(values)).all() and (back(values) <= ends.upper[0]).all())
    assert bool((ends.upper - ends.lower <= (found.upper - found.lower + 1e-3) * step).all())
    rows = torch.cat([torch.eye(6), -torch.eye(6)])[None].double()
    for slope in ("adaptive", "zero", "one", "same"):
        pulled = to.pull(rows, [before], found, slope, FLOAT32, 5)
        line = (grid @ pulled.rows[0][0].T) + pulled.constant[0]
        assert bool((line <= values @ rows[0].T).all()), slope


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000))
def test_values_on_the_grid_already_cost_no_rounding(seed: int) -> None:
    """Pooling and reshaping between two roundings to one grid: the second changes nothing, and its lines know."""
    draw = generator(seed, "grid")
    to, _ = layers(0.0, 0, [9.0], [0.25])
    ends = (torch.randint(-60, 1200, (2,), generator=draw) / 4).sort().values
    inside = torch.arange(-9, 247, dtype=torch.float64) * 0.25
    inside = inside[(inside >= ends[0]) & (inside <= ends[1])][:, None]
    if not len(inside):
        return
    before = Interval(ends[:1].double()[None], ends[1:].double()[None])
    known = to.bounds([before], FLOAT32)
    rows = torch.tensor([[[1.0], [-1.0]]], dtype=torch.float64)
    pulled = to.pull(rows, [before], known, "adaptive", FLOAT32, 5)
    line = inside @ pulled.rows[0][0].T + pulled.constant[0]
    exact = to(inside) @ rows[0].T
    assert bool((line <= exact).all())
    if before.lower.item() in inside and before.upper.item() in inside:
        assert float((exact - line).max()) < 1e-3


def test_slopes_of_a_rectifier_among_the_levels_are_those_asked_for() -> None:
    to, _ = layers(0.5, 0, [0.0], [0.1])
    one = torch.ones(1, 1, 1, dtype=torch.float64)

    def steepness(low: float, high: float, slope: str) -> float:
        before = Interval(*(torch.tensor([[end]], dtype=torch.float64) for end in (low, high)))
        return float(to.pull(one, [before], to.bounds([before], FLOAT32), slope, FLOAT32, 5).rows[0]) * 0.1

    found = {slope: steepness(-3.01, 5.02, slope) for slope in ("adaptive", "zero", "one", "same")}
    assert found["adaptive"] == found["one"] == pytest.approx(1)
    assert found["zero"] == 0
    assert found["same"] == pytest.approx(5 / (3.01 + 4.95), rel=1e-6)
    assert steepness(-5.02, 3.01, "adaptive") == 0
    assert steepness(-5.02, 3.01, "one") == pytest.approx(1)
    assert steepness(0.01, 3.01, "zero") == pytest.approx(1)  # nothing of it is cut off


# All levels of two values, against the kernels


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


@pytest.mark.parametrize(
    ("steps", "zeros", "edges"),
    [
        ((0.02, 0.03, 0.05), (129, 14, 101), False),
        ((0.013, 0.9, 1.7), (129, 14, 101), False),
        (
            (0.5, 0.25, 1.0),
            (129, 14, 101),
            True,
        ),  # sums on edges: the kernel adds its odd zero before it rounds to even
        ((0.5 * (1 - 2e-6), 0.25, 1.0), (0, 0, 200), True),  # and so near to them that a float with the zero lies there
    ],
)
def test_every_sum_of_two_levels_is_within_the_bounds_and_the_kernel_rounds_otherwise_than_the_graph(
    steps: tuple[float, float, float], zeros: tuple[int, int, int], edges: bool, tmp_path: Path
) -> None:
    constants = {name: value for part in zip("abc", steps, zeros, strict=True) for name, value in grid(*part).items()}
    model = twinned(pairs([("Add", ["a", "b"], "c", {})], constants), tmp_path)
    assert "QLinearAdd" in model.conditions()[0]
    x = levels_of(constants, "ab")
    with torch.no_grad():
        answers, twin = model(x), model.twin(x)
    found = Network.of(model, (2,)).intervals(ball(x.double(), 0.0, clip=None), "float32")[-1]
    assert bool((found.lower <= answers).all() and (answers <= found.upper).all())
    width = ((found.upper - found.lower) / steps[2]).round()
    assert float(width.max()) <= 1
    assert not (edges and torch.equal(answers, twin))
    assert float(width.mean()) < (0.3 if edges else 0.02)


@pytest.mark.parametrize("seed", range(3))
def test_every_product_sum_of_two_levels_is_within_the_bounds(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    constants: dict[str, Any] = grid("x", 0.1 * rng.random() + 0.01, 100) | grid("c", 10 * rng.random() + 0.5, 77)
    scale = (0.02 * rng.random(3) + 0.001).astype("f4")
    constants |= {"w": rng.integers(-127, 128, (3, 2)).astype("i1"), "sw": scale, "zw": np.zeros(3, "i1")}
    constants |= {"bias": rng.integers(-4000, 4000, 3).astype("i4"), "sb": scale * constants["sx"]}
    nodes: list[Node] = [
        ("QuantizeLinear", ["x", "sx", "zx"], "x1", {}),
        ("DequantizeLinear", ["x1", "sx", "zx"], "x2", {}),
        ("DequantizeLinear", ["w", "sw", "zw"], "w2", {"axis": 0}),
        ("DequantizeLinear", ["bias", "sb"], "b2", {"axis": 0}),
        ("Gemm", ["x2", "w2", "b2"], "c", {"transB": 1}),
        ("QuantizeLinear", ["c", "sc", "zc"], "c1", {}),
        ("DequantizeLinear", ["c1", "sc", "zc"], "y", {}),
    ]
    model = twinned(file(nodes, constants, (2,)), tmp_path)
    assert "QGemm" in model.conditions()[0]
    x = levels_of({"sa": constants["sx"], "za": 100, "sb": constants["sx"], "zb": 100}, "ab")
    with torch.no_grad():
        answers = model(x)
    found = Network.of(model, (2,)).intervals(ball(x.double(), 0.0, clip=None), "float32")[-1]
    assert bool((found.lower <= answers).all() and (answers <= found.upper).all())
    assert float((found.upper > found.lower + float(constants["sc"]) / 2).double().mean()) < 0.01


def test_at_the_edge_of_two_levels_the_runtime_leaves_bounds_for_real_numbers(tmp_path: Path) -> None:
    """The oracle sees roundings: an edge divided by the step is a tie in float32, and no tie in real numbers."""
    constants = grid("a", 0.1, 3) | grid("b", 0.07, 0) | grid("c", 0.1, 3)
    model = twinned(pairs([("Concat", ["a", "a"], "c", {"axis": 1})], constants), tmp_path)
    edges = torch.tensor([(k + 0.5) * 0.1 for k in range(-3, 240)], dtype=torch.float32)
    near = torch.cat([edges, edges.nextafter(torch.tensor(9e9)), edges.nextafter(torch.tensor(-9e9))])
    x = near[:, None].expand(-1, 2)
    with torch.no_grad():
        answers = model(x)
    outside = {}
    for arithmetic in ("real", "float32"):
        found = Network.of(model, (2,)).intervals(ball(x.double(), 0.0, clip=None), arithmetic)[-1]  # type: ignore[arg-type]
        # Of the last product and sum only float32 knows, too: half a step tells levels apart.
        outside[arithmetic] = int(((found.lower > answers + 0.05) | (answers > found.upper + 0.05)).any(1).sum())
    assert outside["real"] > 0
    assert outside["float32"] == 0


# Whole files


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


def test_the_roundings_allowed_for_are_more_than_the_kernels_have() -> None:
    """Conversion of the sum, two roundings of the scale, the product: 4; sum of levels times ratios, and a zero: 8."""
    assert staircase.ROUNDED >= 8

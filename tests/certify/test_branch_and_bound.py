"""Verdicts against enumerating all linear pieces of tiny networks, broken bounds that must show, and known answers."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor, nn

from trivet.certify import branch_and_bound, dense_crown, input_splits
from trivet.certify.bounds.network import Network
from trivet.certify.branch_and_bound import verify
from trivet.certify.counterexample import Confirm
from trivet.certify.dense_crown import DenseNetwork, Linear
from trivet.certify.queries import Queries, Search, UnsoundBound, Witness
from trivet.certify.vnnlib import Property, parse_vnnlib
from trivet.errors import BadValue


def never(query: int, point: Tensor) -> None:
    """Confirms no witness."""


def network(widths: list[int], seed: int, scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    for parameter in model.parameters():
        parameter.data *= scale
    return model.eval()


def asserted(inputs: int, outputs: int, *formulas: str, low: str = "-1", high: str = "1") -> Property:
    declared = [f"(declare-const X_{i} Real)" for i in range(inputs)]
    declared += [f"(declare-const Y_{i} Real)" for i in range(outputs)]
    box = [f"(assert (>= X_{i} {low}))(assert (<= X_{i} {high}))" for i in range(inputs)]
    return parse_vnnlib("\n".join([*declared, *box, *(f"(assert {each})" for each in formulas)]))


def least_on_pieces(model: nn.Sequential, rows: np.ndarray) -> float:
    """min over [-1, 1]^n of the largest <row, (y, 1)>, by one linear programme for each activation pattern."""
    layers = [m for m in model if isinstance(m, nn.Linear)]
    weights = [(m.weight.detach().double().numpy(), m.bias.detach().double().numpy()) for m in layers]
    n = weights[0][0].shape[1]
    best = np.inf
    for pattern in itertools.product([0, 1], repeat=sum(len(b) for _, b in weights[:-1])):
        matrix, shift, sides, ends, at = np.eye(n), np.zeros(n), [], [], 0
        for weight, bias in weights[:-1]:
            matrix, shift = weight @ matrix, weight @ shift + bias
            on = np.array(pattern[at : at + len(bias)])
            at += len(bias)
            sign = 1 - 2 * on  # z >= 0 where on: -z <= 0
            sides.append(sign[:, None] * matrix)
            ends.append(-sign * shift)
            matrix, shift = on[:, None] * matrix, on * shift
        matrix, shift = weights[-1][0] @ matrix, weights[-1][0] @ shift + weights[-1][1]
        values, constants = rows[:, :-1] @ matrix, rows[:, :-1] @ shift + rows[:, -1]
        above = np.hstack([values, -np.ones((len(rows), 1))])
        inside = np.hstack([np.vstack(sides), np.zeros((len(np.vstack(sides)), 1))])
        found = linprog(
            np.eye(n + 1)[-1],
            np.vstack([above, inside]),
            np.concatenate([-constants, np.concatenate(ends)]),
            bounds=[(-1, 1)] * n + [(None, None)],
        )
        if found.status == 0:
            best = min(best, found.fun)
    return float(best)


def constrained(inputs: int, rows: np.ndarray) -> Property:
    """Counterexamples are the outputs with <row, (y, 1)> <= 0 for all rows."""
    sums = [" ".join(f"(* {value} Y_{i})" for i, value in enumerate(row[:-1])) for row in rows]
    return asserted(
        inputs, rows.shape[1] - 1, *(f"(<= (+ {each} {row[-1]:.17f}) 0)" for each, row in zip(sums, rows, strict=True))
    )


def rows_of(model: nn.Sequential, seed: int, widths: list[int], count: int, offset: float) -> np.ndarray:
    """Random constraints, shifted so that at the best point all are met by `offset`, or missed if it is negative."""
    rows = np.random.default_rng(seed).integers(-3, 4, (count, widths[-1] + 1)).astype(float)
    rows[:, 0] += 0.5  # none is all 0
    rows[:, -1] -= least_on_pieces(model, rows) + offset
    return rows


CASES = [
    (seed, widths, count)
    for seed, (widths, count) in enumerate(
        [([2, 3, 2], 1), ([2, 4, 3], 2), ([3, 3, 2, 2], 2), ([2, 2, 2, 2, 2], 1), ([1, 5, 2], 2), ([3, 5, 3], 3)]
    )
]


@pytest.mark.parametrize("splits", ["inputs", "rectifiers"])
@pytest.mark.parametrize("offset", [-1e-4, 1e-4])
@pytest.mark.parametrize(("seed", "widths", "count"), CASES)
def test_verdicts_agree_with_all_linear_pieces(
    seed: int, widths: list[int], count: int, offset: float, splits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(widths, seed)
    prop = constrained(widths[0], rows_of(model, seed, widths, count, offset))
    if splits == "rectifiers":
        monkeypatch.setattr(branch_and_bound, "FEW_INPUTS", 0)
    for arithmetic in ("real", "float32") if splits == "inputs" else ("real",):
        verdict = verify(model, prop, shape=(widths[0],), timeout=20, arithmetic=arithmetic)
        assert verdict.answer != ("verified" if offset > 0 else "falsified"), "a wrong verdict"
        if splits == "inputs":
            assert verdict.answer == ("falsified" if offset > 0 else "verified")
        assert verdict.arithmetic == arithmetic


@pytest.mark.parametrize("arithmetic", ["real", "float32"])
@pytest.mark.parametrize("seed", range(6))
def test_linear_bounds_lie_below_the_network(seed: int, arithmetic: str) -> None:
    model = network([3, 12, 10, 8, 2], seed, scale=1.5)
    dense = DenseNetwork.of(Network.of(model, (3,)), arithmetic)
    draw = torch.Generator().manual_seed(seed)
    lower = torch.rand(8, 3, generator=draw, dtype=torch.float64) * 2 - 1
    upper = lower + torch.rand(8, 3, generator=draw, dtype=torch.float64) ** 3
    whole = dense.intervals(torch.full((8, 3), -1.0, dtype=torch.float64), torch.full((8, 3), 2.0, dtype=torch.float64))
    rows = torch.randn(8, 3, generator=draw, dtype=torch.float64)
    found = dense.bound(lower, upper, whole, torch.arange(8), rows)
    x = lower[:, None] + torch.rand(8, 4000, 3, generator=draw, dtype=torch.float64) * (upper - lower)[:, None]
    corners = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=torch.float64)
    x = torch.cat([x, lower[:, None] + corners * (upper - lower)[:, None]], 1)
    values = ((dense(x.flatten(0, 1)).view(8, -1, 2) * rows[:, None, :-1]).sum(2)) + rows[:, None, -1]
    lines = (x * found.slope[:, None]).sum(2) + found.constant[:, None]
    assert bool((lines <= values).all())
    assert bool((found.least <= values.amin(1)).all())
    # The intervals that came with them contain every pre-activation.
    h, at = x, 0
    for layer in dense.layers[:-1]:
        z = h @ layer.weight.T + layer.bias
        ends = whole[:, None, :, at : at + z.shape[2]]
        assert bool(((ends[:, :, 0] <= z) & (z <= ends[:, :, 1])).all())
        h, at = z.relu(), at + z.shape[2]
    # At a point they are the value, up to the error terms.
    point = dense.bound(lower, lower, whole.clone(), torch.arange(8), rows)
    exact = (dense(lower) * rows[:, :-1]).sum(1) + rows[:, -1]
    torch.testing.assert_close(point.least, exact, rtol=0, atol=1e-9 if arithmetic == "real" else 1e-3)
    assert bool((point.least < exact).all())


def test_float32_proofs_hold_for_float32_evaluation() -> None:
    """At points, where nothing but the error terms keeps the bound below what float32 makes of the network."""
    model = network([4, 30, 30, 1], 3, scale=3.0)
    dense = DenseNetwork.of(Network.of(model, (4,)), "float32")
    real = DenseNetwork.of(Network.of(model, (4,)), "real")
    x = torch.rand(500, 4)
    with torch.no_grad():
        seen = model(x).squeeze(1).double()
    points, rows = x.double(), torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(500, -1)
    least = [
        each.bound(points, points, each.intervals(points, points), torch.arange(500), rows).least
        for each in (dense, real)
    ]
    assert bool((least[0] <= seen).all())
    assert bool((least[1] > seen).any()), "the test could not fail: rounding never lowers the output"


def test_exact_evaluation_is_that_of_fractions() -> None:
    model = network([2, 3, 2], 5)
    dense = DenseNetwork.of(Network.of(model, (2,)), "real")
    x = torch.tensor([0.1, -0.7])
    h = [Fraction(v) for v in x.tolist()]
    for layer in (model[0], model[2]):
        rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
        h = [sum((Fraction(w) * v for w, v in zip(row, h, strict=True)), Fraction(b)) for row, b in rows]
        h = [max(v, Fraction(0)) for v in h] if layer is model[0] else h
    assert dense.exactly(x) == h


def test_a_bound_above_the_network_is_an_error_and_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prop = network([2, 6, 2], 0), asserted(2, 2, "(>= Y_0 30)")
    dense, sound = DenseNetwork.of(Network.of(model, (2,)), "real"), DenseNetwork.bound
    assert input_splits.search(dense, Queries.of(prop), Search(never, float("inf")))

    def broken(self: DenseNetwork, *args: Tensor) -> Linear:
        found = sound(self, *args)
        return replace(found, least=found.least + 50.0)

    monkeypatch.setattr(DenseNetwork, "bound", broken)
    with pytest.raises(UnsoundBound):
        input_splits.search(dense, Queries.of(prop), Search(never, float("inf")))
    verdict = verify(model, prop, shape=(2,), timeout=10)
    assert verdict.answer == "error"
    assert "a bug" in verdict.reason


@pytest.mark.parametrize("mutant", ["chord", "offset", "sign"])
def test_broken_relaxations_give_wrong_verdicts_that_the_pieces_catch(
    mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison with all linear pieces can fail: with these mistakes a violated property is "proved"."""
    sound = dense_crown._lines

    def broken(lower: Tensor, upper: Tensor, error: Tensor, rectified: bool) -> object:
        line = sound(lower, upper, error, rectified)
        if mutant == "chord":
            return replace(line, chord=line.chord * 0.5)
        if mutant == "offset":
            return replace(line, half_offset=0 * line.half_offset, loss=0 * line.loss, radius=0.3 * line.radius)
        return replace(line, adaptive=torch.ones_like(line.adaptive), radius=0.5 * line.radius)

    monkeypatch.setattr(dense_crown, "_lines", broken)
    monkeypatch.setattr(branch_and_bound, "attack", lambda *_: False)
    wrong = 0
    for seed, widths, count in CASES:
        model = network(widths, seed)
        prop = constrained(widths[0], rows_of(model, seed, widths, count, 0.02))
        wrong += verify(model, prop, shape=(widths[0],), timeout=5).answer in ("verified", "error")
    assert wrong > 0


def test_numbers_that_are_none_are_never_verified() -> None:
    prop = asserted(2, 2, "(>= Y_0 1e30)")
    for bad in (float("nan"), float("inf"), -float("inf")):
        model = network([2, 4, 2], 0)
        model[0].weight.data[0, 0] = bad
        with pytest.raises(BadValue, match="weights that are no finite numbers"):
            verify(model, prop, shape=(2,), timeout=1)
        dense = DenseNetwork.of(Network.of(model, (2,)), "real")
        boxes = Queries.of(prop)
        found = dense.bound(
            boxes.lower, boxes.upper, dense.intervals(boxes.lower, boxes.upper), torch.zeros(1).long(), boxes.rows[:, 0]
        )
        assert not bool((found.least > 0).any())
    huge = network([2, 4, 2], 0)
    huge[0].weight.data *= 1e30
    huge[2].weight.data *= 1e30
    assert (
        verify(huge, asserted(2, 2, "(>= Y_0 1e70)"), shape=(2,), timeout=2, arithmetic="float32").answer != "verified"
    )


def test_a_property_met_only_by_equality_is_falsified_and_one_missed_by_a_float_is_not() -> None:
    """y = x: the counterexample y <= -1 over [-1, 1] is the single point -1."""
    model = nn.Sequential(nn.Linear(1, 1))
    model[0].weight.data.fill_(1.0)
    model[0].bias.data.zero_()
    verdict = verify(model, asserted(1, 1, "(<= Y_0 -1)"), shape=(1,), timeout=5)
    assert verdict.witness == Witness((-1.0,), (-1.0,))
    assert verify(model, asserted(1, 1, "(<= Y_0 -1.000000001)"), shape=(1,), timeout=5).answer == "verified"


def test_a_witness_must_convince_runtime_and_exact_arithmetic_and_lie_in_the_exact_box() -> None:
    prop = asserted(1, 1, "(<= Y_0 0.3)", low="0.1", high="0.3")

    def confirm(runtime: float, reference: float) -> Witness | None:
        check = Confirm(prop, lambda _: torch.tensor([runtime]), lambda _: [Fraction(reference)])
        return check(0, torch.tensor([0.9], dtype=torch.float64))

    assert confirm(0.2, 0.2) == Witness(
        (float(torch.tensor(0.3).nextafter(torch.tensor(0.0))),), (float(torch.tensor(0.2)),)
    )
    assert Fraction(confirm(0.2, 0.2).inputs[0]) <= Fraction("0.3") < Fraction(float(torch.tensor(0.3)))
    assert confirm(0.31, 0.2) is confirm(0.2, 0.31) is confirm(float("nan"), 0.2) is None
    narrow = asserted(1, 1, "(<= Y_0 1)", low="0.1", high="0.1")  # no float32 is 0.1
    assert Confirm(narrow, lambda x: x, lambda _: [Fraction(0)])(0, torch.tensor([0.1])) is None
    identity = nn.Sequential(nn.Linear(1, 1)).eval()
    assert verify(identity, narrow, shape=(1,), timeout=5).answer == "unknown"


def test_a_network_built_to_round_badly_is_not_verified_as_it_runs() -> None:
    """After Zombori et al. (ICLR 2021): y = (x + 2^26) - 2^26 is x in real numbers and 0 in float32."""
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    model[0].weight.data = torch.tensor([[1.0], [0.0]])
    model[0].bias.data = torch.full((2,), 2.0**26)
    model[2].weight.data = torch.tensor([[1.0, -1.0]])
    model[2].bias.data.zero_()
    prop = asserted(1, 1, "(<= Y_0 0.1)", low="0.5", high="1")
    assert model(torch.tensor([[0.7]])).tolist() == [[0.0]]
    assert verify(model, prop, shape=(1,), timeout=5, arithmetic="real").answer == "verified"
    assert verify(model, prop, shape=(1,), timeout=2).answer == "unknown"
    with pytest.raises(BadValue, match="must be asked of float32 weights"):
        verify(copy.deepcopy(model).double(), prop, shape=(1,), timeout=2)


def test_what_runtime_and_reals_disagree_about_stays_unknown() -> None:
    model, prop = network([2, 4, 2], 1), asserted(2, 2, "(<= Y_0 100)")
    assert verify(model, prop, shape=(2,), timeout=5).answer == "falsified"
    verdict = verify(model, prop, shape=(2,), timeout=1, runtime=lambda _: torch.tensor([101.0, 0.0]))
    assert verdict.answer == "unknown"
    assert verdict.witness is None


def test_several_cases_must_all_be_excluded() -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    model[0].weight.data.fill_(1.0)
    model[0].bias.data.zero_()
    either = "(or (and (<= X_0 -0.5) (>= Y_0 0)) (and (>= X_0 0.5) (<= Y_0 {})))"
    assert verify(model, asserted(1, 1, either.format(0.4)), shape=(1,), timeout=5).answer == "verified"
    verdict = verify(model, asserted(1, 1, either.format(0.6)), shape=(1,), timeout=5)
    assert 0.5 <= verdict.witness.inputs[0] <= 0.6
    assert verify(model, asserted(1, 1, "(<= 1 0)"), shape=(1,), timeout=5).reason.startswith(
        "the property's assertions"
    )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(2, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))) + x


def test_networks_that_are_no_chains_are_decided_by_the_shared_bounds() -> None:
    model = Residual().eval()
    assert DenseNetwork.of(Network.of(model, (2,)), "real") is None
    x = torch.cartesian_prod(torch.linspace(-1, 1, 201), torch.linspace(-1, 1, 201))
    with torch.no_grad():
        top = float(model(x)[:, 0].max())
    assert verify(model, asserted(2, 2, f"(>= Y_0 {top + 0.05:.6f})"), shape=(2,), timeout=20).answer == "verified"
    verdict = verify(model, asserted(2, 2, f"(>= Y_0 {top - 0.01:.6f})"), shape=(2,), timeout=20)
    assert verdict.answer == "falsified"


def test_shrinking_a_box_loses_no_counterexample() -> None:
    draw = torch.Generator().manual_seed(0)
    slope = torch.randn(2, 3, generator=draw, dtype=torch.float64)
    constant = torch.tensor([0.4, -0.3], dtype=torch.float64)
    lower, upper = torch.full((1, 3), -1.0, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)
    least = torch.zeros(2, dtype=torch.float64)  # better than the lines', which alone may be used here
    boxes = input_splits.Boxes(lower, upper, torch.zeros(1, 0), torch.zeros(1).long())
    small = input_splits.shrunk(boxes, Linear(torch.zeros(2).long(), slope, constant, least, (), ()))
    x = torch.rand(20_000, 3, generator=draw, dtype=torch.float64) * 2 - 1
    met = ((x @ slope.T + constant) <= 0).all(1)
    assert bool(((small.lower <= x[met]) & (x[met] <= small.upper)).all())
    assert float((small.upper - small.lower).prod()) < 0.9 * 8, "nothing was cut off"


def test_convolutions_are_written_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    )
    model[1].running_mean += 0.3
    model[1].bias.data += 0.2
    model[1].running_var *= 2.0
    dense = DenseNetwork.of(Network.of(model.eval(), (1, 4, 4)), "real")
    assert sum(layer.rectified for layer in dense.layers) == 1
    # BatchNorm's shift is a difference, and rounds like its larger terms.
    assert bool((dense.layers[1].bias_size >= dense.layers[1].bias.abs()).all())
    assert bool((dense.layers[1].bias_size > dense.layers[1].bias.abs()).any())
    x = torch.rand(5, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(dense(x.flatten(1)), copy.deepcopy(model).double()(x))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.floats(-2, 2))
def test_random_properties_are_never_answered_against_a_sample(seed: int, inputs: int, level: float) -> None:
    model = network([inputs, 6, 5, 2], seed, scale=1.5)
    verdict = verify(model, asserted(inputs, 2, f"(>= (- Y_0 Y_1) {level:.6f})"), shape=(inputs,), timeout=5)
    x = torch.rand(3000, inputs) * 2 - 1
    with torch.no_grad():
        y = model(x)
    found = bool((y[:, 0] - y[:, 1] >= level + 1e-4).any())
    assert not (found and verdict.answer == "verified")
    if verdict.witness is not None:
        assert verdict.witness.outputs[0] - verdict.witness.outputs[1] >= round(level, 6) - 1e-6


def test_time_is_kept() -> None:
    model = network([3, 40, 40, 40, 2], 0, scale=3.0)
    verdict = verify(model, asserted(3, 2, "(>= Y_0 1e5)", low="-1000", high="1000"), shape=(3,), timeout=0.2)
    assert verdict.answer in ("unknown", "falsified", "verified")
    assert verdict.timed_out == (verdict.answer == "unknown")

"""Chains of small layers compute what factorised layers do, in the files that ship too, and only where they pay."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trivet import api
from trivet.compression.chains import chained
from trivet.compression.cost import cost_of
from trivet.compression.tensorization import Cp, Tensorization, Tucker
from trivet.models.baking import baked
from trivet.models.foreign.export import int8_bytes, onnx_bytes, pt2_bytes
from trivet.models.foreign.exported_program import ExportedModel
from trivet.models.foreign.load import load_model
from trivet.models.foreign.onnx_runtime import OnnxRuntimeModel

onnx = pytest.importorskip("onnx")


def factorised(layer: nn.Module, **settings: Any) -> nn.Sequential:
    """A network of this layer, its factors drawn: those of a decomposition would be special."""
    torch.manual_seed(0)
    model = nn.Sequential(layer)
    if settings.get("form") == "cp":
        pytest.importorskip("tensorly", reason="what makes CP terms")
    Tensorization(**{"keep": 1.0, **settings}).attach(model)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "original" in name:
                each.normal_(std=0.5)
    return model


def rebuilt(model: nn.Module) -> nn.Module:
    return baked(model).eval()


def shapes(net: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(each.shape) for each in net.parameters() if each.ndim > 1]


def multiplications(net: nn.Module, shape: tuple[int, ...]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, *shape))
    return int(counter.get_total_flops()) // 2


CONVOLUTIONS: list[dict[str, Any]] = [
    {},
    {"padding": 1},
    {"padding": 2, "bias": False},
    {"stride": 2, "padding": 1},
    {"stride": (1, 2), "padding": (2, 1), "dilation": 2},
    {"dilation": (1, 2), "padding": "same"},
    {"kernel_size": (1, 3), "padding": (0, 1)},
]


@pytest.mark.parametrize("form", ["tucker", "cp"])
@pytest.mark.parametrize("settings", CONVOLUTIONS, ids=str)
def test_a_convolution_is_three_and_the_same(form: str, settings: dict[str, Any]) -> None:
    """The oracle is the dense kernel; with a bias, which must not meet the padding."""
    model = factorised(nn.Conv2d(12, 16, **{"kernel_size": 3, **settings}), form=form, rank=0.3)
    shape = (12, 9, 10)
    net, dense = chained(model, shape), rebuilt(model)
    x = torch.randn(3, *shape)
    torch.testing.assert_close(net(x), dense(x), atol=1e-5, rtol=1e-5)
    ((_, _, *kernel),) = shapes(dense)
    first, middle, last = shapes(net)
    r_out, r_in = (5, 4) if form == "tucker" else (last[1], first[0])
    assert first == (r_in, 12, 1, 1)
    assert last == (16, r_out, 1, 1)
    assert middle == (r_out, r_in if form == "tucker" else 1, *kernel)
    assert multiplications(net, shape) < multiplications(dense, shape)


@pytest.mark.parametrize("form", ["tucker", "cp"])
@pytest.mark.parametrize("sizes", [(20, 16), (40, 10), (10, 40)])
def test_a_linear_layer_is_two_and_the_same(form: str, sizes: tuple[int, int]) -> None:
    model = factorised(nn.Linear(*sizes), form=form, rank=0.3)
    net = chained(model, (sizes[0],))
    x = torch.randn(7, sizes[0])
    torch.testing.assert_close(net(x), rebuilt(model)(x), atol=1e-5, rtol=1e-5)
    first, last = shapes(net)
    assert first[0] == last[1] < min(sizes)
    assert multiplications(net, (sizes[0],)) == first[0] * sum(sizes)


@pytest.mark.parametrize("form", ["tucker", "cp"])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d])
def test_one_and_three_axes(form: str, kind: Any) -> None:
    layer = kind(12, 16, 3, dilation=2, padding=2)
    shape = (12, *(6,) * len(layer.kernel_size))
    model = factorised(layer, form=form, rank=0.3)
    x = torch.randn(2, *shape)
    net = chained(model, shape)
    torch.testing.assert_close(net(x), rebuilt(model)(x), atol=1e-5, rtol=1e-5)
    assert len(shapes(net)) == 3


@pytest.mark.parametrize("form", [Tucker, Cp])
@pytest.mark.parametrize("shape", [(6, 5, 3, 2), (6, 5, 3), (6, 5)])
def test_links_contract_to_the_kernel_whichever_stand_alone(form: Any, shape: tuple[int, ...]) -> None:
    made = form(torch.Size(shape), 0.7, 1.0, False)
    torch.manual_seed(0)
    if form is Tucker:
        stored = [torch.randn(made.ranks), *(torch.randn(n, r) for n, r in zip(shape, made.ranks, strict=True))]
    else:
        stored = [torch.randn(n, made.terms) for n in shape]
    links = made.links(*stored)
    expected = made(*stored)
    for first in (False, True):
        for last in (False, True):
            kernel = links.middle(first, last)
            if links.depthwise and first and last:
                kernel = torch.stack([torch.diag(each) for each in kernel.flatten(1).mT], -1).reshape(
                    len(kernel), len(kernel), *shape[2:]
                )
            if first:
                kernel = torch.einsum("sr...,ri->si...", kernel, links.first)
            if last:
                kernel = torch.einsum("sr...,os->or...", kernel, links.last)
            torch.testing.assert_close(kernel, expected, atol=1e-5, rtol=1e-5)


def test_a_1x1_layer_that_saves_nothing_is_contracted_into_the_middle() -> None:
    """Of one input channel 1 -> 1 before the core would be work for nothing. The layer is of a mixed class."""
    model = factorised(nn.Conv2d(1, 16, 3, padding=1), rank=0.3, per_sample=True)
    net, x = chained(model, (1, 8, 8)), torch.randn(2, 1, 8, 8)
    assert shapes(net) == [(5, 1, 3, 3), (16, 5, 1, 1)]
    torch.testing.assert_close(net(x), rebuilt(model)(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("layer", "settings"),
    [
        (nn.Conv2d(12, 16, 3), {"rank": 1.0}),
        (nn.Conv2d(12, 12, 3, stride=3), {"rank": 1.0, "form": "cp"}),
        (nn.Linear(12, 16), {"rank": 0.6}),
        (nn.Conv2d(12, 16, 3, padding=1, padding_mode="reflect"), {"rank": 0.3}),
        (nn.Conv2d(12, 16, 3, groups=2), {"rank": 0.3}),
        (nn.Conv2d(12, 16, 3), {"rank": 0.3, "binary": True}),
        (nn.Conv2d(12, 16, 3), {"rank": 0.3, "keep": 0.9}),
    ],
    ids=str,
)
def test_what_does_not_pay_or_is_not_the_same_is_left(layer: nn.Module, settings: dict[str, Any]) -> None:
    model = factorised(copy.deepcopy(layer), **settings)
    net = chained(model, (12,) if isinstance(layer, nn.Linear) else (12, 9, 9))
    assert type(net[0]) is type(model[0])  # type: ignore[index]
    assert net is not model
    assert shapes(net) == shapes(model)


class Twice(nn.Module):
    """One layer under two names, one that nobody calls, and BatchNorm, in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.once = nn.Conv2d(12, 12, 3, padding=1)
        self.again = self.once
        self.idle = nn.Linear(50, 50)
        self.logits = nn.Linear(12 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.again(self.once(x).relu())
        return self.logits(nn.functional.max_pool2d(x, 2).flatten(1))


def twice() -> Twice:
    torch.manual_seed(0)
    model = Twice()
    pytest.importorskip("tensorly", reason="what makes CP terms")
    Tensorization(keep=1.0, rank=0.3, exclude=("once",)).attach(model)
    Tensorization(keep=1.0, rank=0.3, form="cp", include=("once",)).attach(model)
    return model


def test_the_network_is_the_same_and_the_given_one_is_untouched() -> None:
    model = twice()
    state = copy.deepcopy(model.state_dict())
    drawn = torch.random.get_rng_state()
    net: Any = chained(model, (3, 8, 8))
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert model.training
    assert all(torch.equal(each, state[name]) for name, each in model.state_dict().items())
    assert net.once is net.again
    assert not isinstance(net.idle, nn.Sequential)
    x = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(net(x), rebuilt(model)(x), atol=1e-5, rtol=1e-5)


def test_files_hold_the_chains_and_answer_the_same(tmp_path: Path) -> None:
    """As runtimes and readers see them; in eight bits as well."""
    model, shape = twice(), (3, 8, 8)
    net, dense, x = chained(model, shape), rebuilt(model), torch.rand(4, 3, 8, 8)
    in_onnx, in_pt2 = tmp_path / "m.onnx", tmp_path / "m.pt2"
    in_onnx.write_bytes(onnx_bytes(net, shape))
    in_pt2.write_bytes(pt2_bytes(net, shape))
    with torch.no_grad():
        expected = dense(x)
        for read in (OnnxRuntimeModel(in_onnx), ExportedModel(in_pt2), load_model(in_onnx), load_model(in_pt2)):
            torch.testing.assert_close(read(x), expected, atol=1e-4, rtol=1e-4)
    stored = onnx.load(in_onnx).graph.initializer
    called = sum(each.numel() for name, each in dense.named_parameters() if not name.startswith("idle"))
    assert sum(onnx.numpy_helper.to_array(each).size for each in stored) < 0.6 * called
    assert cost_of(load_model(in_onnx), shape).macs < 0.7 * cost_of(dense, shape).macs
    in_eight = tmp_path / "m8.onnx"
    in_eight.write_bytes(int8_bytes(in_onnx.read_bytes(), [x]))
    assert float((OnnxRuntimeModel(in_eight)(x) - expected).abs().max()) < 0.1 * float(expected.abs().max())


RECIPE = """\
name: tiny
about: A recipe for tests.
data: {name: digits, train_limit: 100, test_limit: 40}
model: {name: small_cnn}
threat: {name: linf, eps: 0.1}
stages:
  - fit:
      objective: plain
      epochs: 1
      batch_size: 50
      optimizer: {name: adam, lr: 5e-3}
      compression: {name: tensorization, keep: 1.0, rank: 0.3}
audit: {latency: []}
"""


def test_a_run_is_exported_as_chains(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    run = api.train_model(tmp_path / "tiny.yaml", out=tmp_path / "tiny")
    dense = rebuilt(run.model(run.plan.splits().test))
    weights = sum(each.numel() for each in dense.parameters())
    made = api.export_model(run.folder.path, to="pt2")
    assert made.max_difference <= 1e-4 * max(1.0, made.largest)
    assert sum(each.numel() for each in load_model(made.path).parameters()) < 0.6 * weights

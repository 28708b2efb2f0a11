"""Counts against arithmetic by hand; latency only that it is measured and leaves nothing behind."""

from __future__ import annotations

import math
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from trivet.compression.binary import Binary
from trivet.compression.cost import cost_of, measure_latency, safetensors_bytes
from trivet.compression.packing import save_packed
from trivet.compression.smart_deal import SmartDeal
from trivet.compression.tensorization import Tensorization
from trivet.errors import BadValue
from trivet.files import load_tensors, save_tensors
from trivet.models.pixeldp import pixeldp_cnn
from trivet.models.resnet import resnet
from trivet.models.small_cnn import small_cnn


def test_the_small_network_costs_what_the_hand_counts() -> None:
    cost = cost_of(small_cnn((1, 28, 28), 10), (1, 28, 28))
    kernels = [1 * 16 * 16, 16 * 32 * 16, 1568 * 100, 100 * 10]
    assert cost.weights == sum(kernels)
    assert cost.parameters == sum(kernels) + 16 + 32 + 100 + 10
    assert cost.macs == kernels[0] * 14 * 14 + kernels[1] * 7 * 7 + kernels[2] + kernels[3]
    assert cost.flops == 2 * cost.macs == cost.nonzero_flops
    assert cost.sparsity == 0.0
    assert cost.buffers == 0


def test_a_kernel_kept_at_unit_sensitivity_is_counted_once() -> None:
    cost = cost_of(pixeldp_cnn((1, 28, 28), 10), (1, 28, 28))
    kernels = [25 * 32, 32 * 25 * 64, 3136 * 1024, 1024 * 10]
    assert cost.weights == sum(kernels)
    assert cost.parameters == sum(kernels) + 32 + 64 + 1024 + 10
    assert cost.macs == kernels[0] * 14 * 14 + kernels[1] * 7 * 7 + kernels[2] + kernels[3]


@given(
    channels=st.sampled_from([2, 4]),
    outputs=st.sampled_from([2, 6]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    grouped=st.booleans(),
    side=st.integers(4, 7),
)
@settings(deadline=None, max_examples=25)
def test_a_convolution_multiplies_its_kernel_at_every_position(
    channels: int, outputs: int, kernel: int, stride: int, padding: int, grouped: bool, side: int
) -> None:
    layer = nn.Conv2d(channels, outputs, kernel, stride, padding, groups=2 if grouped else 1)
    positions = ((side + 2 * padding - kernel) // stride + 1) ** 2
    cost = cost_of(layer, (channels, side, side))
    assert cost.flops == 2 * layer.weight.numel() * positions
    with torch.no_grad():
        layer.weight[0] = 0.0
    share = (outputs - 1) / outputs
    pruned = cost_of(layer, (channels, side, side))
    assert pruned.flops == cost.flops
    assert pruned.nonzero_flops == round(share * cost.flops)
    assert math.isclose(pruned.sparsity, 1 / outputs)


def test_a_linear_layer_over_many_positions_is_counted_at_each() -> None:
    layer = nn.Linear(5, 3)
    with torch.no_grad():
        layer.weight[:, 0] = 0.0
    cost = cost_of(layer, (7, 5))
    assert (cost.flops, cost.nonzero_flops) == (2 * 7 * 15, 2 * 7 * 12)


def test_zeros_are_counted_over_all_weights_and_not_by_layer() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(90, 10), nn.ReLU(), nn.Linear(10, 10))
    with torch.no_grad():
        model.get_submodule("1").weight.zero_()
    cost = cost_of(model, (1, 9, 10))
    assert cost.sparsity == pytest.approx(0.9)
    assert cost.parameters - cost.nonzero_parameters == 900
    assert cost.nonzero_flops == 2 * 100


def test_a_layer_used_twice_is_stored_once_and_worked_twice() -> None:
    layer = nn.Linear(4, 4, bias=False)
    cost = cost_of(nn.Sequential(layer, nn.ReLU(), layer), (4,))
    assert (cost.parameters, cost.weights, cost.flops) == (16, 16, 2 * 2 * 16)


def test_buffers_count_running_statistics() -> None:
    assert cost_of(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), (3, 4, 4)).buffers == 17


def test_file_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    model = resnet((3, 8, 8), 10, depth=8)
    path = tmp_path / "weights.safetensors"
    save_tensors(path, model.state_dict())
    cost = cost_of(model, (3, 8, 8))
    tensors, metadata = load_tensors(path)
    # `save_tensors` adds its own empty metadata: {"__metadata__":{"trivet":"{}"},…}, padded to eight bytes.
    assert metadata == {}
    assert 0 <= path.stat().st_size - cost.file_bytes <= 40
    assert cost.file_bytes == safetensors_bytes(tensors)
    assert cost.file_bytes > 4 * cost.parameters


def test_file_bytes_follow_the_type() -> None:
    one, half = torch.zeros(1000), torch.zeros(1000, dtype=torch.int8)
    assert safetensors_bytes({"w": one}) - safetensors_bytes({"w": half}) == pytest.approx(3000, abs=8)


def test_counting_leaves_no_mark_on_the_model() -> None:
    model = resnet((3, 8, 8), 10, depth=8).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cost_of(model, (3, 8, 8))
    measure_latency(model, (3, 8, 8), repeats=1, warmup=1)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_unfinished_compression_is_refused() -> None:
    class Halved(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight / 2

    model = nn.Sequential(nn.Linear(3, 3))
    parametrize.register_parametrization(model[0], "weight", Halved())
    with pytest.raises(BadValue, match="weights of 0 are still computed by a parametrization"):
        cost_of(model, (3,))


def test_latency_is_positive_and_says_how_it_was_measured() -> None:
    latency = measure_latency(resnet((3, 8, 8), 10, depth=8), (3, 8, 8), batch_size=2, threads=1, repeats=3, warmup=1)
    assert 0 < latency.low <= latency.median <= latency.high
    assert (latency.batch_size, latency.threads, latency.repeats) == (2, 1, 3)
    assert latency.path in ("PyTorch", "PyTorch, BatchNorm folded, channels last")
    assert latency.machine


def test_a_stand_in_that_computes_something_else_is_not_timed() -> None:
    class Doubling(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.01)
            return 2 * x

        def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
            return nn.Identity()  # faster, and wrong

    assert measure_latency(Doubling(), (3,), repeats=1, warmup=1).path == "PyTorch"


def test_threads_are_restored_even_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError):
        measure_latency(nn.Linear(4, 2), (5,), threads=before + 1, repeats=1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("setting", ["batch_size", "repeats", "warmup", "threads"])
def test_numbers_below_one_are_refused(setting: str) -> None:
    with pytest.raises(BadValue, match=f"{setting}=0 must be at least 1"):
        measure_latency(nn.Linear(2, 2), (2,), **{setting: 0})


def test_packed_bytes_are_those_of_the_file_and_zip_never_adds_much(tmp_path: Path) -> None:
    model = small_cnn((1, 28, 28), 10)
    with torch.no_grad():
        for each in model.parameters():
            each.copy_(Binary().project(each.where(torch.rand(each.shape) < 0.3, 0.0)))
    cost = cost_of(model, (1, 28, 28))
    save_packed(tmp_path / "packed", model.state_dict(), {})
    written = (tmp_path / "packed").read_bytes()
    assert cost.packed_bytes == len(written) < cost.file_bytes / 10
    assert cost.compressed_bytes == len(zlib.compress(written, 9))
    assert cost.bits_per_weight < 2


def test_idle_channels_and_moved_numbers_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 2, 1), nn.Flatten(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight[:, 1] = 0.0
        model[1].weight[:, :3] = 0.0
        model[1].weight[0] = 0.0
        model[3].weight[:, 0] = 0.0
    cost = cost_of(model, (4, 4, 4))
    assert (cost.input_channels, cost.idle_channels, cost.channel_sparsity) == (10, 4, 0.4)
    assert cost.activations == (4 * 16 + 6 * 4) + (6 * 4 + 2 * 4) + (8 + 3)
    assert cost_of(nn.Linear(4, 3), (4,)).bits_per_weight == 32.0


def test_rebuilding_a_kernel_from_factors_is_counted_once() -> None:
    """8 blocks of 16 x 3 coefficients times 3 x 3: looking at the weight for its zeros must not count again."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 8))
    method = SmartDeal(threshold=0.5)
    plain = cost_of(model, (1, 4, 12))
    method.attach(model)
    method.end(model)
    assert cost_of(model, (1, 4, 12)).flops == plain.flops + 2 * 8 * 16 * 3 * 3


def test_factors_are_counted_as_they_are_stored() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 2))
    Tensorization(include=("0",), rank=0.5, keep=1.0).attach(model)
    cost = cost_of(model, (8, 4, 4))
    stored = 4 * 4 * 2 * 2 + 2 * 8 * 4 + 2 * 3 * 2
    assert cost.parameters == stored + 8 + 64 + 2
    assert cost.weights == 8 * 8 * 9 + 64
    assert cost.weight_bits == 32 * (stored + 64)

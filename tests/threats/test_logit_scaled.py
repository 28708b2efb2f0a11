"""Which networks the attack on scaled logits is never left out for."""

from __future__ import annotations

import torch
from torch import nn

from trivet.compression.m_bit import MBit
from trivet.models.foreign.quantized import Dequantize, Quantize
from trivet.threats.l2 import L2
from trivet.threats.linf import Linf
from trivet.threats.logit_scaled import LogitScaledPGD, quantized_battery
from trivet.threats.union import Union

THREAT = Linf(0.1)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))


def test_weights_on_few_levels_are_seen_and_others_are_not() -> None:
    model = network()
    assert quantized_battery(model, THREAT) == ()
    with torch.no_grad():
        first, weight = model.get_parameter("0.weight"), model.get_parameter("4.weight")
        weight.mul_(torch.rand_like(weight) < 0.02)  # zeros alone make no levels
        assert quantized_battery(model, THREAT) == ()
        first.copy_(MBit(4).project(first))
    assert quantized_battery(model, THREAT) == (LogitScaledPGD(THREAT),)


def test_rounded_activations_are_seen() -> None:
    step = torch.tensor(0.1)
    model = nn.Sequential(network(), Quantize(step, torch.zeros(()), 0, 255), Dequantize(step, torch.zeros(())))
    assert quantized_battery(model, THREAT, samples=20) == (LogitScaledPGD(THREAT, samples=20),)


def test_each_part_of_a_union_is_attacked() -> None:
    model = network()
    with torch.no_grad():
        model.get_parameter("4.weight").sign_()
    parts = (THREAT, L2(0.5))
    assert quantized_battery(model, Union(parts)) == tuple(LogitScaledPGD(part) for part in parts)


def test_an_empty_layer_is_no_level() -> None:
    model = network()
    with torch.no_grad():
        model.get_parameter("4.weight").zero_()
    assert quantized_battery(model, THREAT) == ()

"""Cut networks compute what the masked ones did; what cannot go stays; a cut network is built again from its recipe."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trivet.compression.shrink import Shrink, shrunk
from trivet.compression.structure import finish, restructure
from trivet.compression.tensorization import Tensorization
from trivet.errors import BadValue, TrivetError
from trivet.methods import build, spec_of
from trivet.models.preact_resnet import preact_network
from trivet.models.resnet import resnet
from trivet.models.small_cnn import small_cnn
from trivet.models.wide_resnet import wide_resnet

SHAPE = (3, 8, 8)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "small_cnn": lambda: small_cnn(SHAPE, 5, mean=[0.5] * 3, std=[0.2] * 3),
    "resnet": lambda: resnet(SHAPE, 5, depth=8),
    "resnet without norm": lambda: resnet(SHAPE, 5, depth=8, norm="none"),
    "preact_resnet": lambda: preact_network(SHAPE, 5, 8, [(2, 8), (1, 16)], "batch", None, None, None),
    "wide_resnet": lambda: wide_resnet(SHAPE, 5, depth=10, widen_factor=2, norm="group"),
}


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def used(model: nn.Module, seed: int) -> nn.Module:
    """As after training: norms with statistics and offsets of both signs, biases that are not zero."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.ndim == 1:
            noise = 0.3 * torch.randn(tensor.shape, generator=drawn(seed + len(name)))
            tensor.copy_(noise.abs() + 0.5 if "var" in name else tensor + noise)
    return model.eval()


@torch.no_grad()
def pruned(model: nn.Module, share: float, seed: int) -> nn.Module:
    """Without a random share of the filters of every layer but the last, and of the inputs of every layer."""
    layers = [each for each in model.modules() if isinstance(each, (nn.Conv2d, nn.Linear))]
    for number, layer in enumerate(layers):
        draw = drawn(seed + number)
        if number < len(layers) - 1:
            gone = torch.rand(len(layer.weight), generator=draw) < share
            layer.weight[gone] = 0.0
            if layer.bias is not None:
                layer.bias[gone] *= (torch.rand(int(gone.sum()), generator=draw) < 0.5).float()
        if number:
            layer.weight[:, torch.rand(layer.weight.shape[1], generator=draw) < share / 2] = 0.0
    return model


def parameters(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


def images(count: int = 16) -> Tensor:
    return torch.rand(count, *SHAPE, generator=drawn(9))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_shrunk_is_masked_to_1e5_and_smaller(name: str, share: float) -> None:
    for seed in range(3):
        model = pruned(used(NETWORKS[name](), seed), share, seed)
        before = copy.deepcopy(model)
        shrunk(model, SHAPE)
        torch.testing.assert_close(model(images()), before(images()), atol=1e-5, rtol=1e-5)
        if name != "wide_resnet" or share == 1.0:  # a norm of groups of one or two channels gives none away alone
            assert parameters(model) < parameters(before)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_in_which_everything_counts_is_left_alone(name: str) -> None:
    model = used(NETWORKS[name](), 0)
    with torch.no_grad():
        for each in model.modules():
            if isinstance(each, (nn.Conv2d, nn.Linear)):
                each.weight += 0.01 * torch.randn(each.weight.shape, generator=drawn(1))
    assert shrunk(model, SHAPE).keep == {}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_cut_network_is_built_again_from_its_structure(name: str) -> None:
    model = pruned(used(NETWORKS[name](), 0), 0.6, 0)
    made = shrunk(model, SHAPE)
    structure = finish(model, [spec_of(made)])
    again = NETWORKS[name]()
    restructure(again, structure, "here")
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(images()), model(images()))


def test_the_count_is_that_of_the_hand() -> None:
    """Of 4 filters one is at zero behind its bias, one at a constant that the next bias takes, one is not read."""
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 2)).eval()
    first, last = model[0], model[3]
    with torch.no_grad():
        first.weight[:2] = 0.0
        first.bias[0], first.bias[1] = -1.0, 2.0
        last.weight[:, 2 * 64 : 3 * 64] = 0.0
    before, bias = copy.deepcopy(model), last.bias.clone() + 2.0 * last.weight[:, 64:128].sum(1)
    assert shrunk(model, SHAPE).keep == {"0": {"outputs": (3,)}, "3": {"inputs": tuple(range(192, 256))}}
    torch.testing.assert_close(last.bias, bias)
    torch.testing.assert_close(model(images()), before(images()), atol=1e-5, rtol=1e-5)
    assert (first.out_channels, last.in_features) == (1, 64)


def test_a_constant_before_a_border_of_zeros_stays() -> None:
    """Along the border the next layer sees less of it: no bias can say that."""
    model: Any = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1), nn.Flatten(), nn.Linear(72, 2)
    )
    with torch.no_grad():
        model[0].weight[:2] = 0.0
        model[0].bias[0], model[0].bias[1] = -1.0, 2.0
    assert shrunk(model, SHAPE).keep == {"0": {"outputs": (1, 2, 3)}, "2": {"inputs": (1, 2, 3)}}


def test_a_sum_goes_only_where_both_terms_do() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False)
            self.last = nn.Conv2d(3, 2, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.one(x) + self.other(x))).flatten(1)

    model: Any = Sum().eval()
    with torch.no_grad():
        model.one.weight[:2] = 0.0
        model.other.weight[1:] = 0.0
    before = copy.deepcopy(model)
    kept = {"outputs": (0, 2)}
    assert shrunk(model, SHAPE).keep == {"one": kept, "other": kept, "last": {"inputs": (0, 2)}}
    torch.testing.assert_close(model(images()), before(images()))


def test_depthwise_convolutions_lose_what_they_are_given() -> None:
    model: Any = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1)
    ).append(nn.Flatten())
    with torch.no_grad():
        model[0].weight[0] = 0.0
        model[1].weight[3] = 0.0
    before = copy.deepcopy(model)
    shrunk(model, SHAPE)
    assert (model[1].groups, model[1].weight.shape) == (2, (2, 1, 3, 3))
    torch.testing.assert_close(model(images()), before(images()))


def test_group_norm_gives_up_whole_groups() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 2, 6), nn.Flatten())
    with torch.no_grad():
        model[3].weight[:, [0, 2, 3]] = 0.0
    before = copy.deepcopy(model)
    shrunk(model, SHAPE)
    assert (model[1].num_groups, model[1].num_channels) == (2, 4)
    torch.testing.assert_close(model(images()), before(images()))


def test_a_layer_in_use_twice_and_one_stored_as_factors_keep_their_channels() -> None:
    shared = nn.Conv2d(3, 3, 1, bias=False)
    with torch.no_grad():
        shared.weight[0] = 0.0
    assert shrunk(nn.Sequential(shared, nn.ReLU(), shared, nn.Flatten(), nn.Linear(192, 2)), SHAPE).keep == {}
    model: Any = small_cnn(SHAPE, 5)
    with torch.no_grad():
        model.conv1.weight[0] = 0.0
    Tensorization(include=("conv1",), keep=1.0).attach(model)
    assert shrunk(model, SHAPE).keep == {}


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 10**6), st.floats(0.1, 0.9))
def test_random_patterns_of_single_weights_never_change_the_function(seed: int, share: float) -> None:
    model = used(NETWORKS["preact_resnet"](), seed % 100)
    with torch.no_grad():
        for each in model.modules():
            if isinstance(each, nn.Conv2d):
                each.weight[torch.rand(each.weight.shape, generator=drawn(seed)) < 0.5 + share / 2] = 0.0
    before = copy.deepcopy(model)
    shrunk(model, SHAPE)
    torch.testing.assert_close(model(images()), before(images()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("keep", "sentence"),
    [
        ({"conv9": {"outputs": [0]}}, "layer that the model does not have"),
        ({"conv1": {"outputs": [99]}}, "lists outputs that"),
        ({"conv1": {"inputs": [-1]}}, "lists inputs that"),
        ({"relu1": {"outputs": [0]}}, "lists outputs that"),
    ],
)
def test_a_structure_of_another_network_is_refused(keep: dict[str, Any], sentence: str) -> None:
    made = build("compression", {"name": "shrink", "keep": keep})
    with pytest.raises(BadValue, match=sentence):
        made.attach(small_cnn(SHAPE, 5))


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(TrivetError, match="at least one"):
        Shrink(keep={"conv1": {"outputs": ()}})
    with pytest.raises(TrivetError, match="at least one"):
        Shrink(keep={"conv1": {"rows": (1,)}})


def test_a_network_that_cannot_be_traced_is_refused_in_one_sentence() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) if x.sum() > 0 else -x.flatten(1)

    with pytest.raises(TrivetError, match="graph of Branching cannot be traced"):
        shrunk(Branching(), SHAPE)

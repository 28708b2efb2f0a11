"""The networks: shapes, published sizes, first weights, and that every tool can take them apart."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import fx, nn

from trivet.errors import BadValue
from trivet.methods import build, methods
from trivet.models.mlp import mlp
from trivet.models.modes import evaluating
from trivet.models.normalize import Normalize
from trivet.models.preact_resnet import PreActBlock
from trivet.models.resnet import BasicBlock, resnet
from trivet.models.single_prop_cnn import single_prop_cnn
from trivet.models.small_cnn import small_cnn
from trivet.models.surrogate import surrogate
from trivet.models.trades_cnn import trades_cnn

SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": [20, 10]},
    "small_cnn": {},
    "mnist_cnn": {},
    "trades_cnn": {},
    "lenet": {},
    "tanh_cnn": {},
    "resnet": {"depth": 8},
    "preact_resnet18": {},
    "wide_resnet": {"depth": 10, "widen_factor": 1},
    "en_resnet": {"members": 2, "blocks": 1, "channels": 4},
    "pixeldp_cnn": {"hidden": 20},
    "heterogeneous_noise_cnn": {"hidden": 20},
    "lenet5": {"norm": "layer"},
    "normalized_mlp": {"hidden": [20, 10]},
    "stobatch_mlp": {"batch_size": 32, "hidden": [20, 10]},
    "stobatch_cnn": {"batch_size": 32},
    "twice_noised_mlp": {"hidden": [20, 10]},
    "twice_noised_cnn": {},
    "single_prop_cnn": {"size": "medium"},
    "cnn7": {"width": 4, "hidden": 16},
    "patch_network": {},
}


def network(name: str, shape: tuple[int, int, int] = (3, 16, 16), **settings: Any) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    spec = {"name": name, **SMALL[name], **settings}
    return build("models", spec, input_shape=shape, num_classes=4, generator=generator)


def _with_the_same_noise(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The answer of a model that may draw from the global stream."""
    torch.manual_seed(0)
    return model(x)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_every_network_in_the_register_is_tested_here() -> None:
    assert {m.name for m in methods("models")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_images_become_one_row_of_logits_each(name: str) -> None:
    assert network(name)(torch.rand(2, 3, 16, 16)).shape == (2, 4)


@pytest.mark.parametrize("name", SMALL)
def test_fx_traces_every_network_and_the_fast_stand_in_agrees(name: str) -> None:
    model, x = network(name, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4]), torch.rand(3, 3, 16, 16)
    with evaluating(model), torch.no_grad():
        expected = _with_the_same_noise(model, x)
        torch.testing.assert_close(_with_the_same_noise(fx.symbolic_trace(model), x), expected)
        torch.testing.assert_close(_with_the_same_noise(surrogate(model, "fp32"), x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.parametrize("name", SMALL)
def test_torch_export_takes_every_network_with_any_batch_size(name: str) -> None:
    model = network(name).eval()
    program = torch.export.export(
        model, (torch.rand(2, 3, 16, 16),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    ).module()
    x = torch.rand(5, 3, 16, 16)
    torch.testing.assert_close(_with_the_same_noise(program, x), _with_the_same_noise(model, x))


@pytest.mark.parametrize("name", SMALL)
def test_the_same_generator_gives_the_same_first_weights_whatever_the_global_seed(name: str) -> None:
    torch.manual_seed(1)
    one = network(name)
    torch.manual_seed(2)
    other = network(name)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("spec", "shape", "published", "rounding"),
    [
        ({"name": "small_cnn"}, (1, 28, 28), 166_406, 0),
        ({"name": "mnist_cnn"}, (1, 28, 28), 3_274_634, 0),
        ({"name": "trades_cnn"}, (1, 28, 28), 312_202, 0),
        ({"name": "lenet"}, (1, 28, 28), 431_080, 0),
        ({"name": "resnet", "depth": 20}, (3, 32, 32), 0.27e6, 0.005e6),
        ({"name": "resnet", "depth": 56}, (3, 32, 32), 0.85e6, 0.01e6),
        ({"name": "resnet", "depth": 110}, (3, 32, 32), 1.7e6, 0.05e6),
        ({"name": "preact_resnet18"}, (3, 32, 32), 11.17e6, 0.005e6),
        ({"name": "wide_resnet", "depth": 28, "widen_factor": 10}, (3, 32, 32), 36.5e6, 0.05e6),
        ({"name": "wide_resnet", "depth": 16, "widen_factor": 8}, (3, 32, 32), 11.0e6, 0.05e6),
        ({"name": "wide_resnet", "depth": 40, "widen_factor": 4}, (3, 32, 32), 8.9e6, 0.05e6),
        ({"name": "cnn7"}, (3, 32, 32), 17.2e6, 0.05e6),
    ],
)
def test_parameter_counts_are_the_published_ones(
    spec: dict[str, Any], shape: tuple[int, int, int], published: float, rounding: float
) -> None:
    # Counting needs no weights: on the meta device nothing is allocated or drawn.
    with torch.device("meta"):
        count = parameters(build("models", spec, input_shape=shape, num_classes=10))
    assert abs(count - published) <= rounding


def test_small_cnn_takes_the_digits() -> None:
    assert small_cnn((1, 8, 8), 10)(torch.rand(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("side", [4, 5, 6, 7, 9, 15])
def test_linear_sizes_fit_odd_images_too(side: int) -> None:
    for name in ("small_cnn", "mnist_cnn"):
        assert network(name, (1, side, side + 1))(torch.rand(1, 1, side, side + 1)).shape == (1, 4)
    for name in ("lenet", "trades_cnn"):
        assert network(name, (1, side + 12, side + 13))(torch.rand(1, 1, side + 12, side + 13)).shape == (1, 4)


@pytest.mark.parametrize(("name", "smallest"), [("small_cnn", 4), ("mnist_cnn", 4), ("lenet", 16), ("trades_cnn", 16)])
def test_too_small_an_image_is_refused_in_a_sentence(name: str, smallest: int) -> None:
    network(name, (1, smallest, smallest))(torch.rand(1, 1, smallest, smallest))
    with pytest.raises(BadValue, match=rf"{name} needs images of at least {smallest}x{smallest} pixels"):
        network(name, (1, smallest - 1, smallest))


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ({"name": "resnet", "depth": 21}, "depth=21 must be 6n [+] 2"),
        ({"name": "resnet", "width": 0}, "width=0"),
        ({"name": "resnet", "norm": "layer"}, "norm"),
        ({"name": "wide_resnet", "depth": 20}, "depth=20 must be 6n [+] 4"),
        ({"name": "wide_resnet", "widen_factor": 0}, "widen_factor=0"),
        ({"name": "mlp", "hidden": [0]}, "hidden=.0."),
        ({"name": "small_cnn", "width": 0}, "width=0"),
        ({"name": "cnn7", "width": 0}, "width=0"),
        ({"name": "cnn7", "hidden": 0}, "hidden=0"),
        ({"name": "trades_cnn", "dropout": 1.0}, "dropout=1.0"),
        ({"name": "mlp", "mean": [0.5], "std": [0.2]}, "1 values, but inputs have 3 channels"),
        ({"name": "mlp", "mean": [0.5], "std": [0.2, 0.1]}, "mean has 1 values and std 2"),
        ({"name": "mlp", "std": [0.2, 0.0, 0.1]}, "must be positive"),
        ({"name": "mlp", "mean": [float("nan"), 0.0, 0.0]}, "must be finite"),
    ],
)
def test_impossible_settings_are_refused(spec: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BadValue, match=complaint):
        build("models", spec, input_shape=(3, 32, 32), num_classes=10)


def test_one_class_is_refused() -> None:
    with pytest.raises(BadValue, match="num_classes=1"):
        mlp((1, 8, 8), 1)


def test_normalisation_subtracts_the_mean_and_divides_by_the_deviation_of_each_channel() -> None:
    x = torch.rand(2, 2, 3, 3)
    out = Normalize([0.5, 0.25], [0.1, 2.0])(x)
    torch.testing.assert_close(out[:, 0], (x[:, 0] - 0.5) / 0.1)
    torch.testing.assert_close(out[:, 1], (x[:, 1] - 0.25) / 2.0)


def test_normalisation_is_saved_with_the_model_and_not_trained() -> None:
    model = small_cnn((1, 8, 8), 10, mean=[0.5], std=[0.25])
    assert {"normalize.mean", "normalize.std"} <= set(model.state_dict())
    assert not any(name.startswith("normalize") for name, _ in model.named_parameters())


def test_he_weights_have_the_variance_of_the_paper() -> None:
    model = mlp((1, 20, 20), 10, hidden=[500])
    weight = model.get_submodule("fc1").weight
    # 200,000 draws: the sample variance is within 2 % of the true one but for odds below 1e-9.
    assert abs(float(weight.detach().var()) * 400 / 2 - 1) < 0.02
    assert not model.get_submodule("fc1").bias.any()
    conv = resnet((3, 32, 32), 10, width=4).get_submodule("block3_2.conv1").weight
    assert abs(float(conv.detach().var()) * (9 * 256) / 2 - 1) < 0.02


def test_default_weights_fill_the_interval_of_one_over_root_fan_in() -> None:
    weight = small_cnn((1, 28, 28), 10).get_submodule("fc1").weight
    bound = 1 / math.sqrt(32 * 7 * 7)
    assert weight.detach().abs().max() <= bound
    assert abs(float(weight.detach().var()) / (bound**2 / 3) - 1) < 0.02


def test_weights_for_interval_bounds_have_the_deviation_of_the_paper_and_the_last_layer_the_default() -> None:
    model = single_prop_cnn((1, 28, 28), 10, size="medium", weights="ibp")
    weight = model.get_submodule("fc1").weight
    # 524,288 draws: the sample deviation is within 1 % of the true one but for odds below 1e-20.
    assert abs(float(weight.detach().std()) * 1024 / math.sqrt(2 * math.pi) - 1) < 0.01
    bound = 1 / math.sqrt(512)
    last = model.get_submodule("logits").weight.detach()
    assert 0.9 * bound < float(last.abs().max()) <= bound


@pytest.mark.parametrize(
    ("size", "maps", "fan_in"),
    [
        ("small", [(16, 14), (32, 14)], [16, 256, 6272, 100]),
        ("medium", [(32, 26), (32, 12), (64, 10), (64, 4)], [9, 512, 288, 1024, 1024, 512, 512]),
        ("wide", [(128, 28), (256, 14), (512, 7)], [9, 1152, 2304, 25088, 1024]),
        ("large", [(64, 28), (64, 28), (128, 14), (128, 14), (128, 14)], [9, 576, 576, 1152, 1152, 25088, 512]),
    ],
)
def test_single_prop_networks_have_the_maps_of_their_code_on_mnist(size: Any, maps: Any, fan_in: Any) -> None:
    """28 pixels through strides and paddings as TensorFlow's SAME and VALID have them."""
    model = single_prop_cnn((1, 28, 28), 10, size=size)
    weighted = [m for m in model if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert [m.weight[0].numel() for m in weighted] == fan_in
    x, seen = torch.rand(1, 1, 28, 28), []
    for module in model:
        x = module(x)
        if isinstance(module, nn.Conv2d):
            seen.append((x.shape[1], x.shape[2]))
    assert seen == maps
    assert all(not m.bias.any() for m in weighted)
    widest = max(weighted, key=lambda m: m.weight.numel()).weight.detach()
    assert abs(float(widest.var()) * widest[0].numel() - 1) < 0.02


def test_the_odd_row_of_padding_lies_below_and_on_the_right() -> None:
    """TensorFlow pads a kernel of 4 at stride 1 by one before and two after."""
    pad = single_prop_cnn((1, 8, 8), 10).get_submodule("pad2")
    assert tuple(pad.padding) == (1, 2, 1, 2)


def test_trades_network_starts_with_all_logits_zero() -> None:
    assert not trades_cnn((1, 28, 28), 10)(torch.rand(3, 1, 28, 28)).any()


@pytest.mark.parametrize("name", ["resnet", "wide_resnet", "preact_resnet18"])
def test_group_norm_treats_each_record_alone_and_batch_norm_does_not(name: str) -> None:
    x = torch.rand(4, 3, 16, 16)
    grouped, batched = network(name, norm="group").train(), network(name, norm="batch").train()
    torch.testing.assert_close(grouped(x)[:1], grouped(x[:1]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(batched(x)[:1], batched(x[:1]), atol=1e-3)


@pytest.mark.parametrize(("name", "block"), [("resnet", BasicBlock), ("wide_resnet", PreActBlock)])
def test_blocks_without_norm_start_as_their_shortcut(name: str, block: type[nn.Module]) -> None:
    model = network(name, norm="none")
    blocks = [m for m in model.modules() if isinstance(m, block)]
    x = torch.rand(2, blocks[0].conv1.in_channels, 4, 4)
    torch.testing.assert_close(blocks[0](x), x)
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)) for m in model.modules())
    assert blocks[0].conv1.bias is not None
    assert model(torch.rand(2, 3, 16, 16)).std() > 0

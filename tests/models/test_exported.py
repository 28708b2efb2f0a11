"""torch.export archives, read without running what is in them."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from trivet.errors import TrivetError
from trivet.models.foreign.load import load_model, num_classes_of
from trivet.models.resnet import resnet
from trivet.models.small_cnn import small_cnn

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def export(model: nn.Module, x: Tensor, path: Path, *, free: bool = True, decomposed: bool = False) -> Path:
    dynamic = ({0: torch.export.Dim("batch")},) if free else None
    program = torch.export.export(model, (x,), dynamic_shapes=dynamic)
    torch.export.save(program.run_decompositions() if decomposed else program, path)
    return path


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewrite(path: Path, changed: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    """The archive with some members replaced or added, by their path below its folder."""
    content = members(path)
    folder = next(iter(content)).partition("/")[0]
    content |= {f"{folder}/{name}": value for name, value in changed.items()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, value in content.items():
            archive.writestr(name, value)
    return path


def edit(path: Path, member: str, change: Callable[[Any], None]) -> Path:
    """The archive with a JSON member changed in place."""
    content = json.loads(next(value for name, value in members(path).items() if name.partition("/")[2] == member))
    change(content)
    return rewrite(path, {member: json.dumps(content).encode()})


class Block(nn.Module):
    """A few of everything, with constants, in-place steps and shape arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm, self.group = nn.BatchNorm2d(8), nn.GroupNorm(4, 8)
        self.relu = nn.ReLU(inplace=True)
        self.grouped = nn.Conv2d(8, 8, 3, padding="same", groups=2, dilation=2)
        self.out = nn.Linear(8, 5)
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
        x = self.relu(self.norm(self.conv(x)))
        y = self.grouped(x)
        y += self.group(x)
        y = self.relu(y)
        y = F.dropout(F.avg_pool2d(F.max_pool2d(y, 3, 1, 1), 2), training=self.training)
        y = F.adaptive_avg_pool2d(y, 1)
        return self.out(y.view(x.size(0), -1))


@pytest.mark.parametrize("decomposed", [False, True], ids=["as exported", "decomposed"])
@pytest.mark.parametrize("free", [True, False], ids=["any batch", "fixed batch"])
def test_a_network_of_many_parts_comes_back(free: bool, decomposed: bool, tmp_path: Path) -> None:
    model = Block().eval()
    path = export(model, torch.rand(2, 3, 8, 8), tmp_path / "m.pt2", free=free, decomposed=decomposed)
    twin, x = load_model(path), torch.rand(5, 3, 8, 8)
    torch.testing.assert_close(twin(x), model(x))
    kinds = {type(m) for m in twin.children()}
    assert {nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm, nn.ReLU, nn.Linear} <= kinds
    assert twin.meta["input_shape"] == (3, 8, 8)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_networks_of_the_house_come_back_with_their_gradients(norm: str, tmp_path: Path) -> None:
    model = resnet((3, 8, 8), 4, depth=8, norm=norm, mean=[0.5] * 3, std=[0.2] * 3).eval()
    twin = load_model(export(model, torch.rand(2, 3, 8, 8), tmp_path / "m.pt2"))
    gradients = []
    for net in (model, twin):
        x = torch.linspace(0, 1, 3 * 192).view(3, 3, 8, 8).requires_grad_()
        gradients.append(torch.autograd.grad(net(x).square().sum(), x)[0])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert num_classes_of(twin, (3, 8, 8)) == 4


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


KERNEL = torch.linspace(-1, 2, 240)
WEIGHT = torch.linspace(-1, 1, 20).view(5, 4)
PIECES: dict[str, Callable[[Tensor], Tensor]] = {
    "activations": lambda x: F.leaky_relu(F.elu(F.gelu(F.silu(torch.tanh(x.sigmoid())))), 0.2) - 0.5,
    "hardtanh": lambda x: F.relu6(F.hardtanh(x, -0.2, 0.7)),
    "softmax": lambda x: F.softmax(x, 1) + F.log_softmax(x, -1),
    "clamp": lambda x: x.clamp(0.2, 0.6) + x.clamp(min=0) + x.clamp(min=0.3) + x.clamp(max=0.4),
    "arithmetic": lambda x: -(2 * x - 1) / 3 + x * x - x / (x + 1),
    "square root": lambda x: x.sqrt(),
    "shapes": lambda x: x.permute(0, 2, 3, 1).transpose(1, -1).unsqueeze(2).squeeze(2).reshape(x.shape[0], 2, -1),
    "flatten in part": lambda x: x.flatten(2).flatten(-2, -1),
    "slices": lambda x: torch.cat([x[:, 1:, ::2], x[:, :2, 1::2]], 1)[:, :, 1],
    "pad": lambda x: F.pad(x, [1, 0, 2, -1, 0, 1], value=0.5),
    "mean": lambda x: x.mean((2, 3)) + x.mean((2, 3), keepdim=True).flatten(1),
    "mean over channels": lambda x: x.mean((1, 2)) + x.mean(1).mean(-1),
    "pools": lambda x: F.max_pool2d(x, 2, 2, 1, ceil_mode=True) + F.avg_pool2d(x, 2, 2, 1, count_include_pad=False),
    "pools over one axis": lambda x: F.avg_pool1d(F.max_pool1d(x.flatten(1, 2), 2), 2),
    "products": lambda x: x.flatten(2) @ x.flatten(2).transpose(1, 2),
    "rows times constants": lambda x: F.linear(x.flatten(1), KERNEL.view(5, 48) * 2) @ (WEIGHT.abs().sqrt() + 1),
    "convolution over one axis": lambda x: F.conv1d(x.flatten(2), KERNEL.view(16, 3, 5), padding=2, stride=3),
    "unary": lambda x: (x.exp() + 1).log() + x.sub(0.5).abs(),
    "in place": lambda x: F.relu_((x * 2 - 1).add_(0.1)).mul_(3),
    "in place, read under the old name": lambda x: _in_place(x),
}


def _in_place(x: Tensor) -> Tensor:
    y = x - 0.5
    z = y.clamp_(min=0)
    z.add_(1)
    return y + z


@pytest.mark.parametrize("decomposed", [False, True], ids=["as exported", "decomposed"])
@pytest.mark.parametrize("name", PIECES)
def test_each_piece_computes_what_the_program_computes(name: str, decomposed: bool, tmp_path: Path) -> None:
    model = Lambda(PIECES[name])
    path = export(model, torch.rand(2, 3, 4, 4), tmp_path / "m.pt2", decomposed=decomposed)
    x = torch.rand(3, 3, 4, 4)
    torch.testing.assert_close(load_model(path)(x), model(x))


def test_softplus_comes_back_as_a_layer_with_its_threshold(tmp_path: Path) -> None:
    model = nn.Softplus(2.0, 0.5)
    x = torch.rand(3, 3, 4, 4)
    torch.testing.assert_close(load_model(export(model, x, tmp_path / "m.pt2"))(x), model(x))


def test_a_value_changed_in_place_cannot_be_read_under_its_old_name(tmp_path: Path) -> None:
    path = export(Lambda(lambda x: F.relu_(x - 0.5) + 1), torch.rand(2, 3), tmp_path / "m.pt2")

    def change(program: Any) -> None:
        nodes = program["graph_module"]["graph"]["nodes"]
        nodes[2]["inputs"][0]["arg"]["as_tensor"]["name"] = nodes[0]["name"]

    with pytest.raises(TrivetError, match="'sub' is read, and nothing computes it before"):
        load_model(edit(path, "models/model.json", change))


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.target, "boom"))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return export(small_cnn((1, 8, 8), 10).eval(), torch.rand(2, 1, 8, 8), tmp_path / "m.pt2")


def test_a_pickled_bomb_in_the_sample_inputs_goes_off_in_torch_and_not_here(archive: Path, tmp_path: Path) -> None:
    target = tmp_path / "boom"
    buffer = io.BytesIO()
    torch.save((Bomb(target),), buffer)
    rewrite(archive, {"data/sample_inputs/model.pt": buffer.getvalue()})
    load_model(archive)(torch.rand(1, 1, 8, 8))
    assert not target.exists()
    # The power of this test: PyTorch's own loader does run it.
    with contextlib.suppress(Exception):
        torch.export.load(archive)
    assert target.exists()


@pytest.mark.parametrize(
    "member",
    ["data/constants/custom_obj_0", "data/constants/opaque_obj_0", "data/weights/model.pt", "data/constants/model.pt"],
)
def test_members_that_would_be_unpickled_are_refused_by_name(member: str, archive: Path, tmp_path: Path) -> None:
    target = tmp_path / "boom"
    rewrite(archive, {member: pickle.dumps(Bomb(target))})
    with pytest.raises(TrivetError, match=f"{member} is a pickle, which can run code, and is never loaded"):
        load_model(archive)
    assert not target.exists()


def test_weights_marked_as_pickled_are_refused_by_name(archive: Path, tmp_path: Path) -> None:
    target = tmp_path / "boom"
    buffer = io.BytesIO()
    torch.save(Bomb(target), buffer)
    edit(archive, "data/weights/model_weights_config.json", lambda c: c["config"]["conv1.bias"].update(use_pickle=True))
    rewrite(archive, {"data/weights/weight_1": buffer.getvalue()})
    with pytest.raises(TrivetError, match=r"data/weights/weight_1 \(conv1.bias\) is a pickle"):
        load_model(archive)
    assert not target.exists()


def test_compiled_code_is_refused(archive: Path) -> None:
    rewrite(archive, {"data/aotinductor/model/x.so": b"\x7fELF"})
    with pytest.raises(TrivetError, match="is compiled code, which is never loaded"):
        load_model(archive)


@pytest.mark.parametrize(
    "target",
    ["torch.ops.aten.from_file.default", "torch.os.system", "torch.hub.load", "_operator.add", "os.system",
     "torch.ops.aten.relu.default.__globals__", "torch.ops.aten.__class__", "relu.default", ""],
)  # fmt: skip
def test_operators_come_from_the_list_alone(target: str, archive: Path) -> None:
    def change(program: Any) -> None:
        program["graph_module"]["graph"]["nodes"][1]["target"] = target

    edit(archive, "models/model.json", change)
    with pytest.raises(TrivetError, match="is not supported; exported to ONNX"):
        load_model(archive)


def test_expressions_and_guards_of_the_file_are_not_evaluated(archive: Path, tmp_path: Path) -> None:
    target = tmp_path / "boom"
    code = f"__import__('pathlib').Path({str(target)!r}).write_text('boom')"

    def change(program: Any) -> None:
        program["guards_code"] = [code]
        for value in program["graph_module"]["graph"]["tensor_values"].values():
            for size in value["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = code

    edit(archive, "models/model.json", change)
    load_model(archive)(torch.rand(1, 1, 8, 8))
    assert not target.exists()


def test_a_model_in_training_mode_is_refused(tmp_path: Path) -> None:
    for model, complaint in (
        (nn.Sequential(nn.Flatten(), nn.Dropout()), "is in training mode; export it in eval mode"),
        (nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)), "buffers it changes count|training mode"),
    ):
        path = export(model.train(), torch.rand(2, 1, 4, 4), tmp_path / "m.pt2")
        with pytest.raises(TrivetError, match=complaint):
            load_model(path)


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (lambda x: x.permute(1, 0, 2, 3), "moves the batch"),
        (lambda x: x.mean((0, 1)), "along the batch"),
        (lambda x: x.reshape(-1, 8), "mix the records"),
        (lambda x: torch.cat([x, x]), "along the batch"),
        (lambda x: x.cumsum(1), "operator torch.ops.aten.cumsum.default is not supported"),
        (lambda x: x.double().mean((2, 3)), "casts to another type|not supported"),
        (lambda x: F.relu_(x.clone().flatten(1)), "changes a value in place that has other names"),
        (lambda x: F.pad(x, [1, 1, 1, 1], mode="reflect"), "not supported|mode 'reflect'"),
        (lambda x: F.avg_pool2d(x, 2, divisor_override=3), "divides by a number of its own"),
        (lambda x: torch.add(x, x, alpha=2), "scales what it adds"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused_in_one_sentence(
    function: Callable[[Tensor], Tensor], complaint: str, tmp_path: Path
) -> None:
    path = export(Lambda(function), torch.rand(2, 1, 4, 4), tmp_path / "m.pt2", free=False)
    with pytest.raises(TrivetError, match=complaint) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


def test_a_free_image_size_is_refused(tmp_path: Path) -> None:
    program = torch.export.export(
        nn.AdaptiveAvgPool2d(1), (torch.rand(2, 1, 8, 8),), dynamic_shapes=({2: torch.export.Dim("height")},)
    )
    torch.export.save(program, tmp_path / "m.pt2")
    with pytest.raises(TrivetError, match="free axes"):
        load_model(tmp_path / "m.pt2")


def weight_entry(change: Callable[[dict[str, Any]], None]) -> Callable[[Any], None]:
    return lambda config: change(config["config"]["conv1.weight"]["tensor_meta"])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m: m["sizes"][0].update(as_int=2**40), "exceeds the ceiling"),
        (lambda m: m["sizes"][0].update(as_int=-1), "exceeds the ceiling"),
        (lambda m: m["sizes"][0].update(as_int=17), "reaches beyond"),
        (lambda m: m["storage_offset"].update(as_int=1), "reaches beyond"),
        (lambda m: m["storage_offset"].update(as_int=-1), "reaches beyond"),
        (lambda m: m["strides"][0].update(as_int=-16), "reaches beyond"),
        (lambda m: m.update(dtype=9), "type .number 9. that is not supported"),
        (lambda m: m.update(dtype=8), "reaches beyond"),
        (lambda m: m.update(sizes="x"), "has the size x"),
        (lambda m: m["sizes"].pop(), "is not laid out as"),
    ],
)
def test_weights_that_do_not_fit_their_bytes_are_refused(
    change: Callable[[dict[str, Any]], None], complaint: str, archive: Path
) -> None:
    edit(archive, "data/weights/model_weights_config.json", weight_entry(change))
    with pytest.raises(TrivetError, match=complaint):
        load_model(archive)


def test_compressed_members_are_refused(archive: Path) -> None:
    rewrite(archive, {}, zipfile.ZIP_DEFLATED)
    with pytest.raises(TrivetError, match="is compressed or encrypted"):
        load_model(archive)


def test_another_schema_or_byte_order_is_refused(archive: Path) -> None:
    edit(archive, "models/model.json", lambda p: p["schema_version"].update(major=7))
    with pytest.raises(TrivetError, match="schema has version 7"):
        load_model(archive)
    rewrite(archive, {"byteorder": b"big"})
    with pytest.raises(TrivetError, match="big-endian"):
        load_model(archive)


def test_two_models_in_one_archive_are_refused(archive: Path) -> None:
    rewrite(archive, {"models/other.json": b"{}"})
    with pytest.raises(TrivetError, match="2 exported models"):
        load_model(archive)


@given(position=st.integers(0, 10_000), byte=st.integers(0, 255))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_graph_is_refused_or_read_but_never_crashes(position: int, byte: int, archive: Path) -> None:
    whole = archive.read_bytes()
    try:
        content = bytearray(next(value for name, value in members(archive).items() if name.endswith("model.json")))
        content[position % len(content)] = byte
        rewrite(archive, {"models/model.json": bytes(content)})
        with contextlib.suppress(TrivetError):
            assert isinstance(load_model(archive), nn.Module)
    finally:
        archive.write_bytes(whole)

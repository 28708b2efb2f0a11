"""The front door for foreign models, and the question how many classes one has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from trivet.errors import TrivetError
from trivet.models.foreign.load import load_model, num_classes_of


@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.pkl", "m.bin", "m.ckpt"])
def test_pickles_are_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(TrivetError, match=r"may hold a pickle.*export the model with torch.export.save"):
        load_model(tmp_path / name)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"")
    with pytest.raises(TrivetError, match="weights without their network"):
        load_model(tmp_path / "m.safetensors")
    (tmp_path / "m.tflite").write_bytes(b"")
    with pytest.raises(TrivetError, match="of an unknown kind"):
        load_model(tmp_path / "m.tflite")
    with pytest.raises(TrivetError, match="is no file"):
        load_model(tmp_path / "absent.onnx")
    with pytest.raises(TrivetError, match="is no file"):
        load_model(tmp_path)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_noise_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"m{suffix}"
    for content in (b"", b"\xff" * 100, bytes(range(256))):
        path.write_bytes(content)
        with pytest.raises(TrivetError, match=r"export it again|cannot be rebuilt"):
            load_model(path)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_files_above_the_ceiling_are_not_even_opened(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"m{suffix}"
    with path.open("wb") as handle:
        handle.truncate((2 << 30) + 1)  # a hole: it takes no space on disk
    with pytest.raises(TrivetError, match="more than the ceiling"):
        load_model(path)


def test_classes_are_counted_on_the_logits_and_the_mode_is_restored() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 7)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert num_classes_of(model, (1, 4, 4)) == 7
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_wrong_input_shape_is_one_clear_sentence() -> None:
    with pytest.raises(TrivetError, match=r"does not take inputs of shape \(1, 5, 5\)") as caught:
        num_classes_of(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), (1, 5, 5))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", [nn.Identity(), nn.Flatten(0), nn.Sequential(nn.Flatten(), nn.Linear(16, 1))])
def test_what_is_no_classifier_is_refused(model: nn.Module) -> None:
    with pytest.raises(TrivetError, match="a classifier gives logits"):
        num_classes_of(model, (1, 4, 4))

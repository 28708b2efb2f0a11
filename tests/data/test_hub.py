"""The hub source, offline: local files through the `datasets` library itself."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trivet.data.hub import hub
from trivet.data.parquet import parquet
from trivet.errors import BadValue, TrivetError
from trivet.methods import build

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _offline_in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Parquet files written by the library itself: 6 and 3 records."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 5, 4, 3), np.uint8)
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog", "owl"])})
    for part, rows in (("train", slice(0, 6)), ("test", slice(6, 9))):
        records = {"img": [Image.fromarray(p) for p in pixels[rows]], "kind": ([0, 1, 2] * 3)[rows]}
        file = tmp_path / "set" / "data" / f"{part}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(records, features=features).to_parquet(file)
    return tmp_path / "set"


def test_a_folder_read_through_the_library_equals_our_own_reader(folder: Path) -> None:
    ours, theirs = parquet(folder), hub(str(folder))
    assert ours.train.digest() == theirs.train.digest()
    assert ours.test.digest() == theirs.test.digest()
    assert theirs.train.classes == ours.train.classes == ("cat", "dog", "owl")
    assert theirs.train.name == str(folder)


def test_recipes_name_a_file_type_files_and_slices(folder: Path) -> None:
    files = {part: str(folder / "data" / f"{part}-*.parquet") for part in ("train", "test")}
    spec: dict[str, Any] = {"name": "hub", "dataset": "parquet", "data_files": files, "train": "train[2:5]"}
    splits = build("data", spec | {"title": "mine"})
    assert torch.equal(splits.train.images, parquet(folder).train.images[2:5])
    assert splits.train.labels.tolist() == [2, 0, 1]
    assert splits.train.name == "mine"


def test_images_that_the_library_keeps_as_files_are_read_in(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (4, 5, 4), np.uint8)
    for part in ("train", "test"):
        for position, label in enumerate(("cat", "cat", "dog", "dog")):
            file = tmp_path / "pictures" / part / label / f"{position}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            Image.fromarray(pixels[position]).save(buffer, "PNG")
            file.write_bytes(buffer.getvalue())
    splits = hub(str(tmp_path / "pictures"))
    order = splits.train.images[:, 0, 0, 0].tolist()
    assert sorted(order) == sorted(pixels[:, 0, 0].tolist())
    assert splits.train.classes == ("cat", "dog")
    assert splits.train.labels.bincount().tolist() == [2, 2]


def test_what_cannot_be_loaded_is_refused_in_one_line(folder: Path) -> None:
    for settings, message in (
        ({"dataset": "no-such-owner/no-such-set"}, "no-such-owner/no-such-set cannot be loaded"),
        ({"dataset": str(folder), "test": "validation"}, "cannot be loaded"),
        ({"dataset": str(folder), "config": "other"}, "cannot be loaded"),
    ):
        with pytest.raises(TrivetError, match=message) as refusal:
            hub(**settings)
        assert "\n" not in str(refusal.value)
    with pytest.raises(BadValue, match="no column 'label'; set label to one of: img, kind"):
        hub(str(folder), label="label")


def test_a_dataset_that_is_a_program_is_refused_and_does_not_run(tmp_path: Path) -> None:
    program = tmp_path / "evil" / "evil.py"
    program.parent.mkdir()
    program.write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    for name in (program, program.parent):
        with pytest.raises(TrivetError, match="cannot be loaded"):
            hub(str(name))
    assert not (tmp_path / "ran").exists()


def test_progress_bars_are_left_as_they_were(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert not datasets.are_progress_bars_disabled()
    hub(str(folder))
    assert not datasets.are_progress_bars_disabled()
    assert capfd.readouterr().err == ""

"""Each source on small files made here, by another library where there is one; and every refusal it owes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trivet.data.cifar10 import cifar10
from trivet.data.dataset import Splits
from trivet.data.digits import digits
from trivet.data.image_folder import image_folder
from trivet.data.images import decode
from trivet.data.mnist import mnist
from trivet.data.npz import npz
from trivet.data.parquet import parquet
from trivet.errors import BadValue, TrivetError
from trivet.methods import build

NAMES = ("cat", "dog", "owl")


def pictures(count: int, channels: int = 3, seed: int = 0) -> np.ndarray[Any, Any]:
    """[N, 5, 4, C] random pixels, or [N, 5, 4] for one channel."""
    shape = (count, 5, 4, channels) if channels > 1 else (count, 5, 4)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def encoded(pixels: np.ndarray[Any, Any], kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def write_parquet(
    file: Path,
    images: list[bytes] | list[None],
    labels: list[Any],
    *,
    image: str = "image",
    names: tuple[str, ...] | None = NAMES,
    struct: bool = True,
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    column = pa.array([{"bytes": each, "path": "somewhere.png"} for each in images] if struct else images)
    if not images:
        column = pa.array([], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({"id": list(range(len(images))), image: column, "label": labels or pa.array([], pa.int64())})
    if names is not None:
        features = {image: {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(names)}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, file)


def as_nchw(pixels: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(pixels.reshape(*pixels.shape[:3], -1).transpose(0, 3, 1, 2).copy())


# ---- digits -------------------------------------------------------------------------------------------------------


def test_the_digits_and_their_division_never_change() -> None:
    splits = digits()
    assert (len(splits.train), len(splits.test), splits.train.input_shape) == (1442, 355, (1, 8, 8))
    assert splits.train.digest() == "624d54ea54e3a5fe8ad643d60f2b973a09fd56fa1355f908351d05d505f779d3"
    assert splits.test.digest() == "f445f9e154ab65e553eb602c681b85a2d57e03d5e7f22e70ed385e5cab0ce266"


def test_every_fifth_digit_of_a_class_is_a_test_record() -> None:
    from sklearn.datasets import load_digits

    loaded, splits = load_digits(), digits()
    for label in range(10):
        of_class = loaded.images[loaded.target == label]
        tested = splits.test.images[splits.test.labels == label].squeeze(1).numpy()
        assert np.array_equal(tested, of_class[4::5])
        trained = splits.train.images[splits.train.labels == label].squeeze(1).numpy()
        assert np.array_equal(trained, np.delete(of_class, np.s_[4::5], axis=0))


def test_digits_reach_both_ends_of_the_unit_interval() -> None:
    inputs = digits().train.batch(torch.arange(1442)).inputs
    assert (float(inputs.min()), float(inputs.max())) == (0.0, 1.0)


# ---- Parquet ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "layout", ["{part}-0000{n}-of-00002.parquet", "{part}/000{n}.parquet", "data/{part}{n}.parquet"]
)
def test_shards_are_joined_in_order_whatever_the_layout_of_the_folder(
    tmp_path: Path, layout: str, channels: int
) -> None:
    pixels, labels = pictures(9, channels), [0, 1, 2, 0, 1, 2, 0, 1, 2]
    for part, n, rows in (("train", 0, slice(0, 4)), ("train", 1, slice(4, 7)), ("test", 0, slice(7, 9))):
        file = tmp_path / layout.format(part=part, n=n)
        write_parquet(file, [encoded(p) for p in pixels[rows]], labels[rows])
    splits = parquet(tmp_path)
    assert torch.equal(splits.train.images, as_nchw(pixels[:7]))
    assert torch.equal(splits.test.images, as_nchw(pixels[7:]))
    assert splits.train.labels.tolist() == labels[:7]
    assert splits.train.classes == NAMES
    assert splits.train.name == tmp_path.name


def test_columns_without_features_are_known_by_their_usual_names_or_given(tmp_path: Path) -> None:
    pixels = pictures(4)
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", [encoded(p) for p in pixels], [0, 1, 2, 1], image="img", names=None)
    assert parquet(tmp_path).train.classes == ("0", "1", "2")
    by_id = parquet(tmp_path, label="id", title="by id").train
    assert (by_id.labels.tolist(), by_id.name) == ([0, 1, 2, 3], "by id")


def test_plain_bytes_and_class_names_as_labels_are_understood(tmp_path: Path) -> None:
    pixels = pictures(4)
    for part, labels in (("train", ["owl", "cat", "owl", "dog"]), ("validation", ["dog", "dog", "cat", "owl"])):
        file = tmp_path / f"{part}.parquet"
        write_parquet(file, [encoded(p) for p in pixels], labels, names=None, struct=False)
    splits = parquet(tmp_path, test="validation")
    assert splits.train.classes == NAMES
    assert splits.train.labels.tolist() == [2, 0, 2, 1]
    assert splits.test.labels.tolist() == [1, 1, 0, 2]
    assert torch.equal(splits.test.images, as_nchw(pixels))


GOOD = [encoded(p) for p in pictures(4)]


def good_parquet(folder: Path) -> None:
    for part in ("train", "test"):
        write_parquet(folder / f"{part}.parquet", GOOD, [0, 1, 2, 0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": "training"}, r"no Parquet file for train='training'; there is: test\.parquet, train\.parquet"),
        ({"test": "tes"}, "no Parquet file for test='tes'"),
        ({"test": "train"}, r"train\.parquet belongs to train='train' and to test='train'"),
        ({"image": "picture"}, "no column 'picture'; set image to one of: id, image, label"),
        ({"label": "class"}, "no column 'class'"),
        ({"image": "label"}, "column 'label' holds int64, not encoded images"),
    ],
)
def test_settings_that_do_not_fit_the_files_are_refused(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    good_parquet(tmp_path)
    with pytest.raises(TrivetError, match=message):
        parquet(tmp_path, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("test_file", "message"),
    [
        ({"labels": [0, 1, 2, 3]}, "labels run from 0 to 3, but there are 3"),
        ({"labels": [0, 1, 2, -1]}, "labels run from -1"),
        ({"labels": [0, 1, 2, None]}, r"test\.parquet: 1 records have no 'label'"),
        ({"labels": [0.5, 1, 2, 0]}, "whole numbers or names, got float64"),
        ({"images": [*GOOD[:3], None]}, r"test\.parquet, record 3 holds no image"),
        ({"images": [*GOOD[:3], GOOD[3][:60]]}, r"test\.parquet, record 3 cannot be read"),
        ({"images": [*GOOD[:3], encoded(pictures(1)[0, 1:])]}, r"test\.parquet, record 3 is 4x4 RGB but .* 0 is 5x4"),
        ({"images": [encoded(p[1:]) for p in pictures(4)]}, "training and test parts differ"),
        ({"names": ("x", "y", "z")}, "files differ in"),
        ({"image": "img"}, "files differ in"),
        ({"images": [], "labels": []}, "the test part of 'set' is empty"),
    ],
)
def test_bad_files_are_refused_with_their_place(tmp_path: Path, test_file: dict[str, Any], message: str) -> None:
    good_parquet(tmp_path)
    parquet(tmp_path)
    write_parquet(tmp_path / "test.parquet", **{"images": GOOD, "labels": [0, 1, 2, 0], **test_file})
    with pytest.raises(BadValue, match=message):
        parquet(tmp_path, title="set")


def test_a_missing_folder_and_a_damaged_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(TrivetError, match=r"there is no folder .*nowhere; set path"):
        parquet(tmp_path / "nowhere")
    with pytest.raises(TrivetError, match="there is: no Parquet file at all"):
        parquet(tmp_path)
    good_parquet(tmp_path)
    (tmp_path / "test.parquet").write_bytes((tmp_path / "train.parquet").read_bytes()[:-9])
    with pytest.raises(TrivetError, match=r"test\.parquet cannot be read as Parquet"):
        parquet(tmp_path)


def test_a_column_that_cannot_be_told_apart_is_asked_for(tmp_path: Path) -> None:
    names = {"fine": {"_type": "ClassLabel", "names": ["a"]}, "coarse": {"_type": "ClassLabel", "names": ["b"]}}
    features = {"image": {"_type": "Image"}, **names, "boxes": [{"_type": "Value"}]}
    table = pa.table({"image": [{"bytes": encoded(pictures(1)[0])}], "fine": [0], "coarse": [0], "boxes": [[1]]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    for part in ("train", "test"):
        pq.write_table(table, tmp_path / f"{part}.parquet")
    with pytest.raises(BadValue, match=r"several label columns \(fine, coarse\)"):
        parquet(tmp_path)
    assert parquet(tmp_path, label="coarse").train.classes == ("b",)


def test_a_missing_package_is_asked_for_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good_parquet(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(TrivetError) as refusal:
        parquet(tmp_path)
    assert str(refusal.value) == "reading Parquet needs pyarrow and pillow: pip install 'trivet[parquet]'."


def test_the_register_of_sources_loads_no_heavy_reader() -> None:
    program = (
        "import sys; from trivet.methods import methods; assert len(methods('data')) >= 9; "
        "print(*sorted({'PIL', 'pyarrow', 'sklearn', 'datasets', 'pandas'} & sys.modules.keys()))"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == ""


# ---- image folders ------------------------------------------------------------------------------------------------


def write_folder(root: Path, pixels: np.ndarray[Any, Any]) -> None:
    for part, offset in (("train", 0), ("test", 4)):
        for position, label in enumerate(("dog", "cat", "dog", "cat")):
            file = root / part / label / f"{position}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded(pixels[offset + position]))


def test_an_image_folder_gives_its_pixels_class_by_class(tmp_path: Path) -> None:
    pixels = pictures(8, channels=1)
    write_folder(tmp_path, pixels)
    (tmp_path / "train" / "cat" / ".DS_Store").write_bytes(b"left by a file manager")
    splits = image_folder(tmp_path)
    assert splits.train.classes == ("cat", "dog")
    assert splits.train.labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(splits.train.images, as_nchw(pixels[[1, 3, 0, 2]]))
    assert torch.equal(splits.test.images, as_nchw(pixels[[5, 7, 4, 6]]))


def test_size_and_mode_convert_what_differs_and_only_when_asked(tmp_path: Path) -> None:
    write_folder(tmp_path, pictures(8))
    odd = tmp_path / "test" / "dog" / "9.png"
    odd.write_bytes(encoded(pictures(1, channels=1)[0].repeat(2, 0)))
    with pytest.raises(BadValue, match=r"9\.png is 10x4 L but .*1\.png is 5x4 RGB; set size \(and mode\)"):
        image_folder(tmp_path)
    with pytest.raises(BadValue, match=r"9\.png is 10x4 RGB but"):
        image_folder(tmp_path, mode="RGB")
    splits = image_folder(tmp_path, mode="L", size=(5, 4))
    assert splits.train.input_shape == (1, 5, 4)
    reference = Image.fromarray(pictures(1)[0]).convert("L")
    assert torch.equal(splits.train.images[2, 0], torch.from_numpy(np.array(reference)))
    spec = {"name": "image_folder", "path": str(tmp_path), "mode": "RGB", "size": [3, 7]}
    assert build("data", spec).test.input_shape == (3, 3, 7)


def test_transparency_is_refused_unless_a_mode_is_asked_for(tmp_path: Path) -> None:
    write_folder(tmp_path, pictures(8, channels=4))
    with pytest.raises(BadValue, match=r"1\.png has colour mode RGBA"):
        image_folder(tmp_path)
    assert image_folder(tmp_path, mode="RGB").train.input_shape == (3, 5, 4)


@pytest.mark.parametrize("content", [b"", b"hello", encoded(pictures(1)[0])[:60]])
def test_an_unreadable_image_is_named(tmp_path: Path, content: bytes) -> None:
    write_folder(tmp_path, pictures(8))
    (tmp_path / "train" / "dog" / "bad.png").write_bytes(content)
    with pytest.raises(BadValue, match=r"train/dog/bad\.png cannot be read as an image"):
        image_folder(tmp_path)


def test_a_format_that_needs_an_outside_program_is_not_even_recognised(tmp_path: Path) -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 5\n%%EndComments\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"  # power: without a list of formats it would be
    write_folder(tmp_path, pictures(8))
    (tmp_path / "train" / "dog" / "bad.png").write_bytes(eps)
    with pytest.raises(BadValue, match=r"bad\.png cannot be read as an image \(no known format\)"):
        image_folder(tmp_path)


@given(st.data(), st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF"]))
@settings(deadline=None, max_examples=60)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_image_is_read_or_refused_but_nothing_else_happens(data: st.DataObject, kind: str) -> None:
    damaged = bytearray(encoded(pictures(1)[0], kind))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BadValue):
        images = decode([("damaged", bytes(damaged))], size=(4, 4), mode="RGB")
        assert images.shape == (1, 3, 4, 4)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_a_damaged_archive_is_read_or_refused_but_nothing_else_happens(data: st.DataObject) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **dict(zip(ARRAYS, (pictures(3), np.arange(3)) * 2, strict=True)))
    damaged = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(TrivetError):
        file = Path(folder) / "damaged.npz"
        file.write_bytes(damaged)
        assert len(npz(file, layout="NHWC").train) == 3


def test_missing_folders_and_classes_are_named(tmp_path: Path) -> None:
    with pytest.raises(TrivetError, match=r"there is no folder .*nowhere/train"):
        image_folder(tmp_path / "nowhere")
    write_folder(tmp_path, pictures(8))
    with pytest.raises(TrivetError, match=r"there is no folder .*/dev; set path and test"):
        image_folder(tmp_path, test="dev")
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "wolf")
    with pytest.raises(BadValue, match="'wolf' is none of the classes cat, dog"):
        image_folder(tmp_path)
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(BadValue, match=r"the test part of .* is empty"):
        image_folder(tmp_path, test="empty")
    (tmp_path / "flat").mkdir()
    with pytest.raises(BadValue, match="has no sub-folders"):
        image_folder(tmp_path, train="flat")
    (tmp_path / "train" / "cat" / "deeper").mkdir()
    with pytest.raises(TrivetError, match="deeper cannot be read"):
        image_folder(tmp_path, test="empty")


# ---- NumPy archives -----------------------------------------------------------------------------------------------

ARRAYS = ("x_train", "y_train", "x_test", "y_test")


def write_npz(file: Path, images: Any, labels: Any, keys: tuple[str, ...] = ARRAYS) -> Path:
    np.savez(file, **dict(zip(keys, (images, labels, images, labels), strict=True)))
    return file


def inputs_of(splits: Splits) -> torch.Tensor:
    return splits.train.batch(torch.arange(len(splits.train))).inputs


def test_an_archive_gives_the_same_inputs_in_every_layout_and_number_format(tmp_path: Path) -> None:
    pixels, labels = pictures(6), np.array([0, 1, 2, 0, 1, 2], np.uint8)
    expected = as_nchw(pixels).float() / 255
    for images, fields in (
        (pixels.transpose(0, 3, 1, 2), {}),
        (pixels, {"layout": "NHWC"}),
        (pixels.astype(np.int32), {"layout": "NHWC"}),
        (pixels / np.float32(255), {"layout": "NHWC"}),
        (pixels.astype(np.float64), {"layout": "NHWC", "scale": 255}),
    ):
        spec = {"name": "npz", "path": str(write_npz(tmp_path / "mine.npz", images, labels)), **fields}
        splits = build("data", spec)
        torch.testing.assert_close(inputs_of(splits), expected, rtol=0, atol=6e-8)
        assert splits.train.labels.tolist() == labels.tolist()
        assert (splits.train.name, splits.train.classes) == ("mine", ("0", "1", "2"))


def test_grey_images_medical_keys_and_a_declared_scale_are_understood(tmp_path: Path) -> None:
    pixels = pictures(3, channels=1) % 17
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    file = write_npz(tmp_path / "m.npz", pixels, np.array([[0], [1], [0]]), keys)
    splits = npz(file, layout="NHW", scale=16, classes=("benign", "malignant"))
    assert torch.equal(inputs_of(splits), as_nchw(pixels).float() / 16)
    assert splits.test.classes == ("benign", "malignant")
    assert splits.test.labels.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("images", "labels", "settings", "message"),
    [
        (np.full((2, 1, 2, 2), 1.5), [0, 1], {}, "values run from 1.5 to 1.5, outside the declared range 0 to 1"),
        (np.full((2, 1, 2, 2), -0.1), [0, 1], {}, "outside the declared range"),
        (np.full((2, 1, 2, 2), np.nan), [0, 1], {}, "run from nan to nan"),
        (np.full((2, 1, 2, 2), np.inf), [0, 1], {}, "run from inf"),
        (np.full((2, 1, 2, 2), 17, np.uint8), [0, 1], {"scale": 16}, "outside the declared range 0 to 16"),
        (np.full((2, 1, 2, 2), 256), [0, 1], {}, "run from 256 to 256; whole numbers"),
        (np.full((2, 1, 2, 2), -1), [0, 1], {}, "run from -1 to -1; whole numbers"),
        (np.zeros((2, 1, 2, 2), bool), [0, 1], {}, "are bool"),
        (np.zeros((2, 2, 2)), [0, 1], {}, "have 3 axes, but layout=NCHW has 4"),
        (np.zeros((2, 1, 2, 2)), [0, 1, 1], {}, r"2 images but labels of shape \(3,\)"),
        (np.zeros((2, 1, 2, 2)), [[0, 1], [1, 0]], {}, r"2 images but labels of shape \(2, 2\)"),
        (np.zeros((2, 1, 2, 2)), [0.0, 1.0], {}, "whole numbers or names, got float64"),
        (np.zeros((2, 1, 2, 2)), [0, -1], {}, "labels run from -1 to 0"),
        (np.zeros((2, 1, 2, 2)), [0, 10**9], {}, "labels run up to 1000000000"),
        (np.zeros((2, 1, 2, 2)), np.array([0, 2**63], np.uint64), {}, "is no class"),
        (np.zeros((2, 1, 2, 2)), [0, 1], {"classes": ("only",)}, "labels run from 0 to 1, but there are 1 classes"),
        (np.zeros((2, 1, 2, 2)), ["a", "b"], {"classes": ("a", "c")}, "'b' is none of the classes a, c"),
        (np.zeros((2, 1, 2, 2)), [0, 1], {"scale": 0}, "scale=0 must be a positive number"),
        (np.zeros((0, 1, 2, 2)), [], {}, "training part of .* is empty"),
    ],
)
def test_bad_archives_are_refused(
    tmp_path: Path, images: Any, labels: Any, settings: dict[str, Any], message: str
) -> None:
    file = write_npz(tmp_path / "bad.npz", images, np.asarray(labels))
    with pytest.raises(BadValue, match=message):
        npz(file, **settings)


def test_files_that_are_no_archives_of_plain_arrays_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrivetError, match="there is no file"):
        npz(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(TrivetError, match=r"text\.npz cannot be read"):
        npz(tmp_path / "text.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(TrivetError, match="a single array"):
        npz(tmp_path / "one.npy")
    np.savez(tmp_path / "keys.npz", a=np.zeros(3), x_train=np.zeros(3))
    with pytest.raises(BadValue, match="needs the arrays x_train, y_train, x_test, y_test; it has: a, x_train"):
        npz(tmp_path / "keys.npz")
    whole = write_npz(tmp_path / "whole.npz", np.zeros((9, 1, 8, 8)), np.arange(9)).read_bytes()
    (tmp_path / "part.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TrivetError, match=r"part\.npz cannot be read"):
        npz(tmp_path / "part.npz")


class Exploit:
    """Unpickling this would create the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_a_pickle_in_an_archive_is_refused_and_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    write_npz(tmp_path / "evil.npz", np.array([Exploit(mark)], object), np.zeros(1, int))
    with pytest.raises(TrivetError, match=r"evil\.npz cannot be read as an archive of plain arrays"):
        npz(tmp_path / "evil.npz")
    assert not mark.exists()
    with np.load(tmp_path / "evil.npz", allow_pickle=True) as archive:  # power: the file would have done it
        archive["x_train"]
    assert mark.exists()


# ---- sets known by name -------------------------------------------------------------------------------------------


def test_a_missing_named_set_says_both_ways_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "here"
    empty.mkdir()
    monkeypatch.chdir(empty)
    monkeypatch.delenv("TRIVET_DATA", raising=False)
    with pytest.raises(
        TrivetError, match=r"TRIVET_DATA is not set; set TRIVET_DATA .*\{name: hub, dataset: ylecun/mnist\}"
    ):
        mnist()
    monkeypatch.setenv("TRIVET_DATA", str(tmp_path / "there"))
    with pytest.raises(TrivetError, match=r"cifar10_jpeg was not found in .*there/cifar10_jpeg; .*uoft-cs/cifar10\}"):
        cifar10()
    with pytest.raises(TrivetError, match=r"there is no folder .*mine; set path"):
        mnist(tmp_path / "mine")


def test_the_variable_comes_before_the_neighbouring_folder_and_another_set_is_not_mnist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good_parquet(tmp_path / "shared" / "data" / "mnist")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("TRIVET_DATA", raising=False)
    with pytest.raises(BadValue, match=r"this is not MNIST: it has 4 and 4 records of shape \(3, 5, 4\) in 3 classes"):
        mnist()
    monkeypatch.setenv("TRIVET_DATA", str(tmp_path))
    with pytest.raises(TrivetError, match="mnist was not found in"):
        mnist()


@pytest.mark.parametrize(("kind", "title"), [("PNG", "CIFAR-10"), ("JPEG", r"CIFAR-10 \(JPEG copy\)")])
def test_pixels_that_went_through_jpeg_never_bear_the_plain_name(tmp_path: Path, kind: str, title: str) -> None:
    write_parquet(tmp_path / "train.parquet", GOOD, [0, 1, 2, 0])
    write_parquet(tmp_path / "test.parquet", [*GOOD[:3], encoded(pictures(1)[0], kind)], [0, 1, 2, 0])
    with pytest.raises(BadValue, match=f"this is not {title}:"):
        cifar10(tmp_path)


def test_mnist_is_the_canonical_one_to_the_last_bit(real_data: Path) -> None:
    splits = mnist(real_data / "mnist")
    for records, canonical in (
        (splits.train, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
        (splits.test, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    ):
        header = np.array([0x0803, len(records), 28, 28], ">i4").tobytes()  # IDX: unsigned bytes, three axes
        assert hashlib.sha256(header + records.images.numpy().tobytes()).hexdigest() == canonical
    assert splits.train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]


@pytest.mark.slow
def test_the_jpeg_copy_of_cifar_10_is_whole_and_called_what_it_is(real_data: Path) -> None:
    splits = cifar10(real_data / "cifar10_jpeg")
    assert splits.train.name == splits.test.name == "CIFAR-10 (JPEG copy)"
    assert splits.train.labels.bincount().tolist() == [5000] * 10
    assert splits.test.labels.bincount().tolist() == [1000] * 10
    # Known channel means of the CIFAR-10 training set; JPEG keeps means to about 1/255.
    means = torch.stack([splits.train.images[:, channel].float().mean() for channel in range(3)]) / 255
    torch.testing.assert_close(means, torch.tensor([0.4914, 0.4822, 0.4465]), rtol=0, atol=0.004)

"""Datasets in memory: what they refuse, how they are divided, and the fingerprint a privacy ledger relies on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trivet.data.dataset import Dataset, Splits
from trivet.errors import BadValue


def ten_images(**changes: object) -> Dataset:
    images = torch.arange(10 * 2 * 3 * 4).remainder(256).to(torch.uint8).view(10, 2, 3, 4)
    return replace(Dataset(images, torch.arange(10) % 3, ("a", "b", "c"), "ten"), **changes)  # type: ignore[arg-type]


def test_a_batch_holds_the_chosen_records_as_floats_in_0_1() -> None:
    dataset = ten_images()
    index = torch.tensor([7, 0, 7])
    batch = dataset.batch(index)
    assert batch.inputs.dtype == torch.float32
    assert torch.equal(batch.inputs, torch.stack([dataset.images[i].float() / 255 for i in (7, 0, 7)]))
    assert batch.labels.tolist() == [1, 0, 1]
    assert torch.equal(batch.index, index)


def test_a_batch_shares_no_memory_with_a_float_dataset() -> None:
    images = torch.rand(4, 1, 2, 2)
    before = images.clone()
    Dataset(images, torch.zeros(4, dtype=torch.int64), ("a",), "floats", scale=1.0).batch(
        torch.arange(4)
    ).inputs.zero_()
    assert torch.equal(images, before)


def test_an_empty_batch_is_possible_because_poisson_sampling_draws_some() -> None:
    assert ten_images().batch(torch.empty(0, dtype=torch.int64)).inputs.shape == (0, 2, 3, 4)


@given(size=st.integers(1, 12))
@settings(deadline=None, max_examples=12)
def test_batches_cover_every_record_once_in_order(size: int) -> None:
    batches = list(ten_images().batches(size))
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(10))
    assert all(len(batch) == size for batch in batches[:-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(10, 3, 4, dtype=torch.uint8)}, r"must be \[N, C, H, W\]"),
        ({"images": torch.zeros(10, 0, 3, 4, dtype=torch.uint8)}, r"must be \[N, C, H, W\]"),
        ({"images": torch.zeros(10, 2, 3, 4, dtype=torch.int64)}, "uint8 or float32"),
        ({"labels": torch.zeros(9, dtype=torch.int64)}, r"int64 \[10\]"),
        ({"labels": torch.zeros(10, dtype=torch.int32)}, r"int64 \[10\]"),
        ({"labels": torch.full((10,), 3)}, "labels run from 3 to 3, but there are 3 classes"),
        ({"labels": torch.full((10,), -1)}, "labels run from -1"),
        ({"classes": ("a", "a", "b")}, "a name of its own"),
        ({"classes": ()}, "a name of its own"),
        ({"scale": 16.0}, "outside the declared range 0 to 16"),
        ({"scale": 0.0}, "must be positive"),
        ({"scale": float("nan")}, "must be positive"),
        ({"images": torch.rand(10, 2, 3, 4)}, "1 for float images"),
        ({"images": torch.rand(10, 2, 3, 4) + 0.5, "scale": 1.0}, "outside the declared range"),
        ({"images": torch.rand(10, 2, 3, 4) - 0.5, "scale": 1.0}, "outside the declared range"),
        ({"images": torch.full((10, 2, 3, 4), float("nan")), "scale": 1.0}, "outside the declared range"),
    ],
)
def test_bad_datasets_are_refused_in_one_sentence_that_names_them(changes: dict[str, object], message: str) -> None:
    with pytest.raises(BadValue, match=message) as refusal:
        ten_images(**changes)
    assert "dataset 'ten'" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_one_nan_pixel_among_good_ones_is_refused() -> None:
    images = torch.rand(10, 2, 3, 4)
    images[4, 1, 2, 3] = float("nan")
    with pytest.raises(BadValue, match="nan"):
        ten_images(images=images, scale=1.0)


@given(n=st.integers(1, 9), seed=st.integers(0, 2**40))
@settings(deadline=None, max_examples=30)
def test_a_split_divides_the_records_without_loss_or_overlap(n: int, seed: int) -> None:
    dataset = ten_images()
    rest, held = dataset.split(n, torch.Generator().manual_seed(seed))
    assert (len(rest), len(held)) == (10 - n, n)
    numbers = [int(image[0, 0, 0]) // 24 for image in torch.cat([rest.images, held.images])]
    assert sorted(numbers) == sorted(int(image[0, 0, 0]) // 24 for image in dataset.images)
    again = dataset.split(n, torch.Generator().manual_seed(seed))
    assert (rest.digest(), held.digest()) == (again[0].digest(), again[1].digest())


def test_every_record_is_held_out_equally_often() -> None:
    # 2000 draws of 3 from 10: each record is held 600 times on average, standard deviation 20.5.
    dataset = Dataset(torch.zeros(10, 1, 1, 1, dtype=torch.uint8), torch.arange(10), tuple("abcdefghij"), "counted")
    generator = torch.Generator().manual_seed(5)
    held = torch.cat([dataset.split(3, generator)[1].labels for _ in range(2000)])
    assert (held.bincount(minlength=10) - 600).abs().max() < 5 * 20.5


@pytest.mark.parametrize("n", [0, 10, 11, -1])
def test_a_split_that_leaves_a_part_empty_is_refused(n: int) -> None:
    with pytest.raises(BadValue, match=f"n={n} "):
        ten_images().split(n, torch.Generator())


def test_the_digest_changes_with_every_pixel_label_shape_and_scale_but_not_with_names() -> None:
    dataset = ten_images(scale=255.0)
    pixels, labels = dataset.images.clone(), dataset.labels.clone()
    pixels[9, 1, 2, 3] ^= 1
    labels[9] = 2
    assert dataset.labels[9] != 2
    changed = [
        replace(dataset, images=pixels),
        replace(dataset, labels=labels),
        replace(dataset, images=dataset.images.view(10, 2, 4, 3)),
        replace(dataset, scale=256.0),
        dataset.select(slice(9)),
    ]
    assert len({dataset.digest(), *(other.digest() for other in changed)}) == 6
    assert replace(dataset, name="other", classes=("x", "y", "z")).digest() == dataset.digest()


def test_the_digest_does_not_depend_on_how_the_pixels_lie_in_memory() -> None:
    dataset = ten_images()
    strided = replace(dataset, images=dataset.images.contiguous(memory_format=torch.channels_last))
    assert not strided.images.is_contiguous()
    assert strided.digest() == dataset.digest()
    assert replace(dataset, scale=255).digest() == dataset.digest()


def test_limits_keep_the_first_records() -> None:
    splits = Splits(ten_images(), ten_images())
    limited = splits.limited(train=4)
    assert (len(limited.train), len(limited.test)) == (4, 10)
    assert torch.equal(limited.train.images, splits.train.images[:4])


@pytest.mark.parametrize("limit", [0, -1, 11])
def test_a_limit_that_cannot_be_met_is_refused_by_its_recipe_name(limit: int) -> None:
    with pytest.raises(BadValue, match=f"test_limit={limit} must lie between 1 and the 10"):
        Splits(ten_images(), ten_images()).limited(test=limit)


def test_parts_that_do_not_fit_together_are_refused() -> None:
    train = ten_images()
    floats = ten_images(images=torch.rand(10, 2, 3, 4), scale=1.0)
    for test, message in (
        (replace(train, classes=("a", "b", "d")), "differ"),
        (ten_images(images=train.images[:, :1]), "differ"),
        (floats, "same range"),
        (train.select(slice(0)), "the test part of 'ten' is empty"),
    ):
        with pytest.raises(BadValue, match=message):
            Splits(train, test)

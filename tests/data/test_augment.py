"""Augmentations against brute force: the same crops and flips, drawn from the generator alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trivet.data.augment import Augmentation, HorizontalFlip, RandomCrop
from trivet.errors import BadValue
from trivet.methods import build, spec_of

shapes = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6))
both = pytest.mark.parametrize("augmentation", [RandomCrop(padding=2), HorizontalFlip()])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def possible_crops(image: Tensor, padding: int) -> list[Tensor]:
    _, height, width = image.shape
    padded = F.pad(image, (padding,) * 4)
    places = range(2 * padding + 1)
    return [padded[:, top : top + height, left : left + width] for top in places for left in places]


@given(shape=shapes, padding=st.integers(0, 4), seed=st.integers(0, 2**40))
@settings(deadline=None, max_examples=40)
def test_a_crop_is_a_slice_of_the_padded_image(shape: tuple[int, ...], padding: int, seed: int) -> None:
    inputs = torch.rand(shape, generator=seeded(seed))
    crops = RandomCrop(padding)(inputs, seeded(seed))
    assert crops.shape == inputs.shape
    for image, crop in zip(inputs, crops, strict=True):
        assert any(torch.equal(crop, possible) for possible in possible_crops(image, padding))


def test_all_places_are_equally_likely_and_drawn_for_each_image() -> None:
    # 9 places, 9000 draws: 1000 each on average, standard deviation 29.8.
    image = torch.arange(1.0, 10.0).view(1, 3, 3) / 9
    crops = RandomCrop(padding=1)(image.expand(9000, 1, 3, 3), seeded())
    counts = torch.tensor([(crops == crop).flatten(1).all(1).sum() for crop in possible_crops(image, 1)])
    assert counts.sum() == 9000
    assert (counts - 1000).abs().max() < 5 * 29.8


@given(shape=shapes, seed=st.integers(0, 2**40))
@settings(deadline=None, max_examples=25)
def test_a_flip_mirrors_an_image_or_leaves_it(shape: tuple[int, ...], seed: int) -> None:
    inputs = torch.rand(shape, generator=seeded(seed))
    for image, flipped in zip(inputs, HorizontalFlip()(inputs, seeded(seed)), strict=True):
        assert torch.equal(flipped, image) or torch.equal(flipped, image[:, :, range(shape[3] - 1, -1, -1)])


def test_the_share_of_flips_is_the_probability() -> None:
    inputs = torch.tensor([0.0, 1.0]).expand(10_000, 1, 1, 2)
    flips = int(HorizontalFlip(0.3)(inputs, seeded())[:, 0, 0, 0].sum())
    assert abs(flips - 3000) < 5 * 45.8  # one standard deviation is sqrt(10000 * 0.3 * 0.7)


def test_no_padding_no_chance_and_no_records_change_nothing() -> None:
    inputs = torch.rand(6, 3, 5, 4)
    assert torch.equal(RandomCrop(0)(inputs, seeded()), inputs)
    assert torch.equal(HorizontalFlip(0.0)(inputs, seeded()), inputs)
    assert torch.equal(HorizontalFlip(1.0)(inputs, seeded()), inputs.flip(3))
    for augmentation in (RandomCrop(), HorizontalFlip()):
        assert augmentation(inputs[:0], seeded()).shape == (0, 3, 5, 4)


@both
def test_the_generator_alone_decides(augmentation: Augmentation) -> None:
    inputs = torch.rand(32, 1, 6, 6)
    first = augmentation(inputs, seeded(1))
    torch.manual_seed(99)
    assert torch.equal(first, augmentation(inputs, seeded(1)))
    assert not torch.equal(first, augmentation(inputs, seeded(2)))


@both
def test_records_do_not_mix(augmentation: Augmentation) -> None:
    inputs = torch.rand(8, 2, 6, 6)
    other = inputs.clone()
    other[3] = 0.5
    changed = (augmentation(inputs, seeded()) != augmentation(other, seeded())).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [3]


@both
def test_the_range_is_kept_the_inputs_too_and_memory_order_does_not_matter(augmentation: Augmentation) -> None:
    inputs = torch.rand(8, 3, 6, 6).round()
    before = inputs.clone()
    outputs = augmentation(inputs, seeded())
    assert torch.equal(inputs, before)
    assert outputs.min() >= 0
    assert outputs.max() <= 1
    assert torch.equal(outputs, augmentation(inputs.contiguous(memory_format=torch.channels_last), seeded()))


def test_recipes_build_augmentations_by_name_and_refuse_bad_settings() -> None:
    assert build("data", {"name": "random_crop", "padding": 2}) == RandomCrop(2)
    assert spec_of(build("data", "horizontal_flip")) == {"name": "horizontal_flip", "probability": 0.5}
    with pytest.raises(BadValue, match="padding=-1"):
        RandomCrop(-1)
    with pytest.raises(BadValue, match="probability=nan"):
        HorizontalFlip(float("nan"))

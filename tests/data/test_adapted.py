"""A source made to fit: the right classes, pixels by an independent rule, and what is refused."""

from __future__ import annotations

import pytest
import torch

from trivet.data.dataset import Splits
from trivet.data.digits import digits
from trivet.errors import BadValue
from trivet.methods import build


def adapted(**settings: object) -> Splits:
    made: Splits = build("data", {"name": "adapted", "of": "digits", **settings})
    return made


def test_without_settings_it_is_the_source() -> None:
    for part, same in zip((adapted().train, adapted().test), (digits().train, digits().test), strict=True):
        assert part.digest() == same.digest()
        assert (part.name, part.classes) == (same.name, same.classes)


def test_classes_are_kept_in_the_order_given_and_counted_anew() -> None:
    made, whole = adapted(classes=["7", 2]), digits()
    assert made.train.classes == ("7", "2")
    assert made.train.name == "digits, 7 2"
    for part, all_of_it in ((made.train, whole.train), (made.test, whole.test)):
        expected = [(int(label != 7), image) for label, image in zip(all_of_it.labels, all_of_it.images, strict=True)]
        expected = [each for each, label in zip(expected, all_of_it.labels, strict=True) if int(label) in (2, 7)]
        assert part.labels.tolist() == [label for label, _ in expected]
        assert torch.equal(part.images, torch.stack([image for _, image in expected]))


def test_halving_the_size_is_the_triangle_filter_of_imaging_libraries() -> None:
    """Linear interpolation over all pixels a new one covers, as Pillow does it."""
    image = pytest.importorskip("PIL.Image")
    made, whole = adapted(size=4), digits()
    assert made.train.input_shape == (1, 4, 4)
    assert made.train.scale == 1.0
    for number in (0, 100, 1441):
        pixels = (whole.train.images[number, 0].float() / 16).numpy()
        small = image.fromarray(pixels, mode="F").resize((4, 4), image.BILINEAR)
        found = made.train.images[number, 0].flatten().tolist()
        expected = [small.getpixel((column, row)) for row in range(4) for column in range(4)]
        assert found == pytest.approx(expected, abs=1e-5)


def test_enlarging_keeps_the_range_and_inverting_turns_it_over() -> None:
    large, inverted = adapted(size=14), adapted(size=14, invert=True)
    torch.testing.assert_close(inverted.test.images, 1 - large.test.images)
    assert float(large.train.images.min()) >= 0
    assert float(large.train.images.max()) <= 1
    whole = adapted(invert=True).train
    assert torch.equal(whole.images.int(), 16 - digits().train.images.int())
    assert whole.images.dtype == torch.uint8


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(BadValue, match=r"classes=\['7', '12'\] must name different classes of digits: 0, 1, 2"):
        adapted(classes=[7, 12])
    with pytest.raises(BadValue, match=r"classes=\['7', '7'\] must name different classes"):
        adapted(classes=[7, "7"])
    with pytest.raises(BadValue, match=r"classes=\[\] must name"):
        adapted(classes=[])
    with pytest.raises(BadValue, match="size=0 must be at least 1"):
        adapted(size=0)
    with pytest.raises(BadValue, match=r"of\.path: npz needs this setting"):
        build("data", {"name": "adapted", "of": "npz"})

"""The tanh network of private learning: its published size, its layers in order, and that it mixes no records."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trivet.errors import BadValue
from trivet.models.tanh_cnn import tanh_cnn


def test_it_has_the_published_number_of_parameters() -> None:
    assert sum(p.numel() for p in tanh_cnn((1, 28, 28), 10).parameters()) == 26_010


def test_it_is_the_published_chain_of_layers() -> None:
    model, x = tanh_cnn((1, 28, 28), 10, mean=[0.2], std=[0.5]), torch.rand(3, 1, 28, 28)
    weights = dict(model.named_parameters())
    h = F.conv2d((x - 0.2) / 0.5, weights["conv1.weight"], weights["conv1.bias"], stride=2, padding=2).tanh()
    assert h.shape == (3, 16, 13, 13)
    h = F.conv2d(F.max_pool2d(h, 2, 1), weights["conv2.weight"], weights["conv2.bias"], stride=2).tanh()
    assert h.shape == (3, 32, 5, 5)
    h = F.max_pool2d(h, 2, 1).flatten(1)
    h = F.linear(h, weights["fc1.weight"], weights["fc1.bias"]).tanh()
    torch.testing.assert_close(model(x), F.linear(h, weights["logits.weight"], weights["logits.bias"]))


def test_it_treats_every_record_alone() -> None:
    model, x = tanh_cnn((1, 28, 28), 10).train(), torch.rand(4, 1, 28, 28)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))


@pytest.mark.parametrize("side", [16, 17, 18, 19, 31, 32])
def test_the_linear_layer_fits_every_size(side) -> None:
    assert tanh_cnn((3, side, side + 1), 4)(torch.rand(2, 3, side, side + 1)).shape == (2, 4)


def test_too_small_an_image_is_refused_in_a_sentence() -> None:
    with pytest.raises(BadValue, match="tanh_cnn needs images of at least 16x16 pixels"):
        tanh_cnn((1, 15, 16), 10)

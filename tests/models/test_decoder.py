"""Decoders draw images of every size, learn to undo a layer, and go on from a saved state as if never stopped."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trivet.errors import BadValue
from trivet.models.decoder import LearningDecoder, decoder
from trivet.randomness import generator


@given(st.integers(1, 20), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40))
def test_it_draws_images_of_every_shape_in_the_unit_range(
    features: int, channels: int, rows: int, columns: int
) -> None:
    net = decoder(features, (channels, rows, columns), width=2)
    images = net(10 * torch.randn(3, features))
    assert images.shape == (3, channels, rows, columns)
    assert ((images >= 0) & (images <= 1)).all()


def test_every_feature_reaches_every_pixel() -> None:
    net = decoder(5, (2, 13, 9), generator=generator(0, "test"))
    z = torch.randn(1, 5)
    moved = torch.stack([net(z + step) - net(z) for step in 3 * torch.eye(5)])
    assert (moved != 0).all()


def test_each_row_is_drawn_alone() -> None:
    net, z = decoder(6, (1, 20, 20)), torch.randn(4, 6)
    torch.testing.assert_close(net(z)[2:3], net(z[2:3]))


def test_the_first_weights_are_a_function_of_the_generator() -> None:
    first, again, other = (decoder(4, (1, 8, 8), generator=generator(seed, "test"))[0].weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_first_step_of_adam_moves_every_weight_by_the_rate_against_its_gradient() -> None:
    maker = LearningDecoder(6, (1, 8, 8), rate=0.01, generator=generator(0, "test"))
    z, x = torch.randn(16, 6), torch.rand(16, 1, 8, 8)
    before = [p.detach().clone() for p in maker.net.parameters()]
    expected = (maker.net(z) - x).square().mean()
    gradients = torch.autograd.grad(expected, list(maker.net.parameters()))
    assert float(maker.learn(z, x)) == pytest.approx(expected.item())
    for old, new, gradient in zip(before, maker.net.parameters(), gradients, strict=True):
        clear = gradient.abs() > 1e-5  # against the 1e-8 that Adam adds to the divisor
        torch.testing.assert_close((new - old)[clear], -0.01 * gradient.sign()[clear], rtol=2e-3, atol=1e-7)


def test_it_learns_to_undo_a_linear_layer() -> None:
    maker = LearningDecoder(16, (1, 4, 4), rate=0.01, generator=generator(0, "test"))
    layer, draw = torch.randn(16, 16, generator=generator(1, "layer")), generator(1, "images")

    def error() -> float:
        x = torch.rand(64, 1, 4, 4, generator=draw)
        return float(maker.learn(x.flatten(1) @ layer, x))

    first = error()  # of grey: 1/12, the variance of a pixel
    for _ in range(250):
        last = error()
    assert first > 0.08
    assert last < 0.02


def taught(maker: LearningDecoder, turns: range) -> LearningDecoder:
    for turn in turns:
        draw = generator(turn, "turn")
        maker.learn(torch.randn(8, 5, generator=draw), torch.rand(8, 2, 6, 6, generator=draw))
    return maker


def test_a_restored_decoder_learns_on_as_if_it_had_not_stopped() -> None:
    z = torch.randn(3, 5)
    whole = taught(LearningDecoder(5, (2, 6, 6), generator=generator(0, "test")), range(6))
    half = taught(LearningDecoder(5, (2, 6, 6), generator=generator(0, "test")), range(3))
    saved = half.state()
    kept = {name: tensor.clone() for name, tensor in saved.items()}
    resumed = taught(LearningDecoder.restored(saved), range(3, 6))
    taught(half, range(9, 12))
    assert resumed.image_shape == (2, 6, 6)
    assert torch.equal(resumed.draw(z), whole.draw(z))
    assert all(torch.equal(saved[name], kept[name]) for name in kept)
    assert not torch.equal(half.draw(z), whole.draw(z))


def test_what_it_draws_carries_no_graph_and_features_get_no_gradient() -> None:
    maker = LearningDecoder(5, (1, 4, 4))
    z: Tensor = torch.randn(2, 5, requires_grad=True)
    with torch.no_grad():
        maker.learn(z, torch.rand(2, 1, 4, 4))
    assert z.grad is None
    assert not maker.draw(z).requires_grad


@pytest.mark.parametrize(
    ("features", "shape", "width", "said"),
    [(0, (1, 8, 8), 4, "features=0"), (3, (1, 0, 8), 4, "image_shape="), (3, (1, 8, 8), 0, "width=0")],
)
def test_numbers_below_one_are_refused(features, shape, width, said) -> None:
    with pytest.raises(BadValue, match=said):
        decoder(features, shape, width)

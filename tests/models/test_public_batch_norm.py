"""Public batch normalisation, bare normalisation and weight noise: what they compute, and that records stay apart."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call, grad, vmap

from trivet.data.dataset import Batch
from trivet.errors import BadValue, TrivetError
from trivet.models.bare_norms import bare_norm, public_rows
from trivet.models.lenet5 import lenet5
from trivet.models.modes import evaluating
from trivet.models.normalized_mlp import normalized_mlp
from trivet.models.public_batch_norm import PublicBatchNorm, WithPublicRows
from trivet.models.surrogate import surrogate
from trivet.models.weight_noise import NoisyConv2d, NoisyLinear
from trivet.objectives.objective import Losses
from trivet.privacy.engines import Name, engine_for
from trivet.privacy.mechanism import Clip

SHAPE = (1, 12, 12)


def small(norm: str, **settings: object) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    return lenet5(SHAPE, 4, norm=norm, generator=generator, **settings)


def test_statistics_of_public_rows_are_those_of_batch_norm_on_them() -> None:
    """`F.batch_norm` in training mode on the public rows alone must be what the public rows become."""
    x, public = torch.randn(3, 5, 4, 4), torch.randn(7, 5, 4, 4)
    mine, theirs = PublicBatchNorm(spatial=True)(x, public)
    torch.testing.assert_close(theirs, F.batch_norm(public, None, None, training=True))
    mean, variance = public.mean((0, 2, 3)), public.var((0, 2, 3), correction=0)
    torch.testing.assert_close(mine, F.batch_norm(x, mean, variance))


def test_mixed_statistics_are_those_of_batch_norm_on_all_rows() -> None:
    x, public = torch.randn(3, 5), torch.randn(7, 5)
    both = torch.cat(PublicBatchNorm(spatial=False, mixed=True)(x, public))
    torch.testing.assert_close(both, F.batch_norm(torch.cat([x, public]), None, None, training=True))


def gradient_of_the_first(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of record 0's loss by all parameters, as found in a batch with the others."""
    losses = F.cross_entropy(model(x), y, reduction="none")
    return torch.cat([g.flatten() for g in torch.autograd.grad(losses[0], list(model.parameters()))])


@pytest.mark.parametrize("norm", ["none", "layer", "group", "public_batch"])
@pytest.mark.parametrize("training", [True, False])
def test_a_records_gradient_does_not_move_when_another_record_is_exchanged(norm: str, training: bool) -> None:
    model = small(norm).double().train(training)
    x, y = torch.rand(3, *SHAPE, dtype=torch.float64), torch.tensor([0, 1, 2])
    others = x.clone()
    others[1:] = 5.0 * (1 - others[1:])
    here = gradient_of_the_first(model, x, y)
    torch.testing.assert_close(gradient_of_the_first(model, others, y), here)
    torch.testing.assert_close(gradient_of_the_first(model, x[:1], y[:1]), here)
    assert here.abs().sum() > 0


def test_the_isolation_test_sees_the_coupling_of_mixed_statistics() -> None:
    model = small("mixed_batch").double()
    x, y = torch.rand(3, *SHAPE, dtype=torch.float64), torch.tensor([0, 1, 2])
    others = torch.cat([x[:1], 5.0 * (1 - x[1:])])
    here = gradient_of_the_first(model, x, y)
    assert not torch.allclose(gradient_of_the_first(model, others, y), here, rtol=1e-2)


def test_training_and_eval_mode_are_one_function() -> None:
    model, x = small("public_batch"), torch.rand(2, *SHAPE)
    assert torch.equal(model.train()(x), model.eval()(x))


def test_no_gradient_comes_from_public_rows() -> None:
    """The same rows, normalised by constants of the same values, must have the same gradients."""
    model, x = small("public_batch"), torch.rand(2, *SHAPE)
    model(x).sum().backward()
    fixed = copy.deepcopy(model)
    fixed.zero_grad()
    public, rows = model.public, x
    for layer in fixed.get_submodule("layers"):
        if isinstance(layer, PublicBatchNorm):
            mean, variance = public.mean(layer.axes, keepdim=True), public.var(layer.axes, correction=0, keepdim=True)
            scale = (variance + layer.eps).sqrt()
            rows, public = (rows - mean) / scale, (public - mean) / scale
        else:
            rows, public = layer(rows), layer(public).detach()
    rows.sum().backward()
    for mine, reference in zip(model.parameters(), fixed.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ["book_keeping", "materialised"])
@pytest.mark.parametrize("norm", ["none", "layer", "group", "public_batch"])
def test_engines_clip_records_as_if_each_were_alone(engine: Name, norm: str) -> None:
    model = small(norm).double()
    batch = Batch(torch.rand(3, *SHAPE, dtype=torch.float64), torch.tensor([0, 1, 2]), torch.arange(3))

    def losses(model: nn.Module, batch: Batch, perturbed: Tensor) -> Losses:
        return Losses(F.cross_entropy(model(perturbed), batch.labels, reduction="none"))

    alone = [gradient_of_the_first(model, batch.inputs[i : i + 1], batch.labels[i : i + 1]) for i in range(3)]
    clip = Clip(float(alone[0].norm()) * 0.9)
    found = engine_for(model, engine).clipped_sum(model, batch, batch.inputs, losses, clip.factors)
    expected = sum(g * min(1.0, clip.max_grad_norm / float(g.norm())) for g in alone)
    torch.testing.assert_close(torch.cat([each.flatten() for each in found.total]), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("engine", ["auto", "book_keeping", "materialised"])
def test_engines_refuse_mixed_statistics(engine: Name) -> None:
    with pytest.raises(BadValue, match="normalises records by each other; use public statistics"):
        engine_for(small("mixed_batch"), engine)


def test_per_record_gradients_by_vmap_are_those_of_records_alone() -> None:
    model = small("public_batch").double()
    x, y = torch.rand(3, *SHAPE, dtype=torch.float64), torch.tensor([0, 1, 2])
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, values, (one[None],)), label[None])

    rows = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    for i in range(3):
        alone = gradient_of_the_first(model, x[i : i + 1], y[i : i + 1])
        torch.testing.assert_close(torch.cat([rows[name][i].flatten() for name in parameters]), alone)


@pytest.mark.parametrize("norm", ["public_batch", "mixed_batch"])
def test_public_rows_are_traced_and_the_fast_stand_in_agrees(norm: str) -> None:
    model, x = small(norm, mean=[0.4], std=[0.3]), torch.rand(3, *SHAPE)
    with evaluating(model), torch.no_grad():
        torch.testing.assert_close(fx.symbolic_trace(model)(x), model(x))
        torch.testing.assert_close(surrogate(model, "fp32")(x), model(x), rtol=1e-4, atol=1e-4)


def test_public_rows_are_saved_with_the_weights() -> None:
    model, other = small("public_batch"), lenet5(SHAPE, 4, norm="public_batch")
    other.load_state_dict(model.state_dict())
    x = torch.rand(2, *SHAPE)
    torch.testing.assert_close(other(x), model(x))


def test_public_images_are_read_from_a_file_of_pixels_or_floats(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, *SHAPE), dtype=np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    np.save(tmp_path / "floats.npy", pixels / 255)
    read = public_rows(SHAPE, tmp_path / "pixels.npy", None)
    assert read.dtype == torch.float32
    torch.testing.assert_close(read, torch.from_numpy(pixels / 255).float())
    torch.testing.assert_close(public_rows(SHAPE, tmp_path / "floats.npy", None), read)
    model = normalized_mlp(SHAPE, 4, norm="public_batch", public_images=tmp_path / "pixels.npy")
    assert isinstance(model, WithPublicRows)
    assert torch.equal(model.public, read)


def test_public_images_that_do_not_fit_are_refused(tmp_path) -> None:
    np.save(tmp_path / "one.npy", np.zeros((1, *SHAPE), np.uint8))
    np.save(tmp_path / "wide.npy", np.full((3, *SHAPE), 2.0))
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(BadValue, match="at least two images"):
        public_rows(SHAPE, tmp_path / "one.npy", None)
    with pytest.raises(BadValue, match=r"must lie in \[0, 1\]"):
        public_rows(SHAPE, tmp_path / "wide.npy", None)
    for missing in ("text.npy", "none.npy"):
        with pytest.raises(TrivetError, match="cannot read public images"):
            public_rows(SHAPE, tmp_path / missing, None)
    with pytest.raises(BadValue, match="has no use for it"):
        lenet5(SHAPE, 4, norm="layer", public_images=tmp_path / "one.npy")


@pytest.mark.parametrize("norm", ["layer", "group", "public_batch"])
def test_scaling_a_layer_before_its_normalisation_changes_nothing(norm: str) -> None:
    """f(c W, c b) = f(W, b) for c > 0, as eps goes to 0: here eps / variance is about 1e-5 before and 1e-9 after."""
    model = normalized_mlp((1, 4, 4), 3, hidden=[16, 16], norm=norm).double()
    chain = model.get_submodule("layers") if norm == "public_batch" else model
    for module in chain:
        if hasattr(module, "eps"):
            module.eps = 1e-12
    x = torch.rand(6, 1, 4, 4, dtype=torch.float64)
    before = model(x).detach()
    with torch.no_grad():
        for parameter in chain.get_submodule("fc1").parameters():
            parameter.mul_(100.0)
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-5, atol=1e-6)


def test_bare_norms_have_no_parameters() -> None:
    for norm in ("none", "layer", "group", "public_batch", "mixed_batch"):
        for shape in ((6, 4, 4), (84,)):
            assert not list(bare_norm(norm, shape).parameters())
    with pytest.raises(BadValue, match="norm='group'"):
        bare_norm("group", (4,))


def test_lenet5_has_the_published_number_of_parameters() -> None:
    """6 (25 + 1) + 16 (150 + 1) + 120 (400 + 1) + 84 (120 + 1) + 10 (84 + 1) = 61,706."""
    assert sum(p.numel() for p in lenet5((1, 28, 28), 10).parameters()) == 61_706


def test_weight_noise_has_its_deviation_in_training_and_is_absent_otherwise() -> None:
    """Of a linear layer on a unit input the output's deviation is std sqrt(2); 40,000 draws: within 3 % but for
    odds below 1e-15 (a chi-squared deviation of 8.5 sigma)."""
    layer = NoisyLinear(4, 40_000, 0.3)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    x = torch.eye(4)[:1]
    assert float(layer(x).detach().std()) == pytest.approx(0.3 * 2**0.5, rel=0.03)
    assert not torch.equal(layer(x), layer(x))
    assert not layer.eval()(x).any()
    convolution = NoisyConv2d(2, 3, 5, 0.3, padding=2)
    plain = nn.Conv2d(2, 3, 5, padding=2)
    plain.load_state_dict(convolution.state_dict())
    images = torch.rand(2, 2, 6, 6)
    assert not torch.allclose(convolution(images), plain(images), atol=1e-2)
    torch.testing.assert_close(convolution.eval()(images), plain(images))


def test_weight_noise_is_a_setting_of_the_networks() -> None:
    x = torch.rand(2, *SHAPE)
    for model in (lenet5(SHAPE, 4, weight_noise=0.1), normalized_mlp(SHAPE, 4, weight_noise=0.1)):
        assert not torch.equal(model.train()(x), model(x))
        assert torch.equal(model.eval()(x), model(x))
    with pytest.raises(BadValue, match="weight_noise=-1"):
        normalized_mlp(SHAPE, 4, weight_noise=-1.0)

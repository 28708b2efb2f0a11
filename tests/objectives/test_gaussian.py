"""Training under Gaussian noise: the noise itself, and the average over its draws."""

from __future__ import annotations

import torch

from trivet.data.dataset import Batch
from trivet.objectives.gaussian import Gaussian
from trivet.objectives.objective import Progress
from trivet.objectives.plain import Plain


def test_the_noise_is_standard_normal_times_sigma_and_is_not_clipped(mlp, progress) -> None:
    from scipy.stats import kstest

    x = torch.rand(64, 2, 4, 4)
    batch = Batch(x, torch.zeros(64, dtype=torch.int64), torch.arange(64))
    views = Gaussian(sigma=0.5, samples=3).perturb(mlp, batch, progress)
    assert views.shape == (64, 3, 2, 4, 4)
    noise = ((views - x[:, None]) / 0.5).flatten().double().numpy()
    assert kstest(noise, "norm").pvalue > 0.01
    assert kstest(1.1 * noise, "norm").pvalue < 0.01  # the test would see ten percent
    assert views.min() < 0
    assert views.max() > 1


def test_every_view_and_record_has_its_own_noise(mlp, batch, progress) -> None:
    noise = (Gaussian(sigma=1.0, samples=2).perturb(mlp, batch, progress) - batch.inputs[:, None]).flatten(0, 1)
    assert len({tuple(row.flatten().tolist()) for row in noise}) == 16


def test_the_loss_is_the_mean_over_the_views_of_the_right_record(mlp, batch, progress) -> None:
    objective = Gaussian(sigma=0.3, samples=3)
    views = objective.perturb(mlp, batch, progress)
    each = [Plain().losses(mlp, batch, views[:, k], progress).per_example for k in range(3)]
    found = objective.losses(mlp, batch, views, progress).per_example
    assert torch.allclose(found, torch.stack(each).mean(0), atol=1e-6)
    assert not torch.allclose(found, found.flip(0), atol=1e-2)


def test_without_noise_it_is_plain_training(mlp, batch, progress) -> None:
    ours = Gaussian(sigma=0.0)(mlp, batch, progress).per_example
    assert torch.equal(ours, Plain()(mlp, batch, progress).per_example)


def test_noise_is_fresh_in_every_step(mlp, batch) -> None:
    objective = Gaussian(sigma=0.3)
    first, second = (objective.perturb(mlp, batch, Progress(step, 10, 0.0, 1)) for step in (0, 1))
    assert not torch.equal(first, second)

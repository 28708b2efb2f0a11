"""EnResNet: without noise a pre-activation ResNet; with it, noise of the stated size, per record."""

from __future__ import annotations

import pytest
import torch

from trivet.errors import BadValue
from trivet.models.en_resnet import NoisyPreActBlock, en_resnet
from trivet.models.preact_resnet import preact_network

SHAPE = (1, 8, 8)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_one_silent_member_is_a_preactivation_resnet() -> None:
    ours = en_resnet(SHAPE, 10, blocks=1, channels=4, noise=0.0, generator=generator()).eval()
    stages = [(1, 4), (1, 8), (1, 16)]
    theirs = preact_network(SHAPE, 10, 4, stages, "batch", None, None, generator()).eval()
    x = torch.rand(5, *SHAPE)
    assert torch.equal(ours(x), theirs(x))


def test_an_ensemble_answers_with_the_mean_of_its_members() -> None:
    model = en_resnet(SHAPE, 10, members=3, blocks=1, channels=4, noise=0.0, draws=2).eval()
    x = torch.rand(5, *SHAPE)
    torch.testing.assert_close(model(x), torch.stack([member(x) for member in model.members]).mean(0))
    assert len({float(member.conv.weight.detach()[0, 0, 0, 0]) for member in model.members}) == 3


@pytest.mark.parametrize("over", ["sample", "batch"])
def test_the_noise_of_a_block_has_the_stated_deviation(over: str) -> None:
    """4,000 draws: the deviation is known to 1.2 %, and 6 % off fails with a chance below 1e-6."""
    torch.manual_seed(0)
    block = NoisyPreActBlock(3, 3, 1, "none").eval()
    x = torch.rand(2, 3, 4, 4) * torch.tensor([1.0, 5.0])[:, None, None, None]
    block.noise = 0.0
    block.over = over  # type: ignore[assignment]
    still = block(x).detach()
    block.noise = 0.1
    with torch.no_grad():
        deviation = torch.stack([block(x) for _ in range(4000)]).sub(still).square().mean(0).sqrt()
    expected = still.std().expand(2) if over == "batch" else still.flatten(1).std(1)
    torch.testing.assert_close(deviation.flatten(1).mean(1), 0.1 * expected, rtol=0.06, atol=0)


def test_by_record_an_answer_does_not_depend_on_its_batch_mates() -> None:
    model = en_resnet(SHAPE, 10, blocks=1, channels=4, norm="none").eval()
    x = torch.rand(3, *SHAPE)
    other = torch.cat([x[:1], 5 * torch.rand(2, *SHAPE)])
    torch.manual_seed(1)
    first = model(x)
    torch.manual_seed(1)
    torch.testing.assert_close(model(other)[0], first[0])


def test_more_draws_mean_less_noise() -> None:
    torch.manual_seed(0)
    x = torch.rand(1, *SHAPE).expand(300, *SHAPE)
    spread = []
    for draws in (1, 16):
        model = en_resnet(SHAPE, 10, blocks=1, channels=4, draws=draws, generator=generator()).eval()
        with torch.no_grad():
            spread.append(float(model(x).std(0).mean()))
    assert spread[1] == pytest.approx(spread[0] / 4, rel=0.3)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(BadValue, match="members=0 must be at least 1"):
        en_resnet(SHAPE, 10, members=0)

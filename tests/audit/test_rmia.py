"""RMIA's score against its definition, pair by pair, and the ends of its settings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trivet.audit.membership import halves
from trivet.audit.rmia import Rmia
from trivet.errors import BadValue
from trivet.randomness import generator


def _probabilities(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=generator(seed, "probabilities"), dtype=torch.float64)


@pytest.mark.parametrize("mode", ["offline", "online"])
@pytest.mark.parametrize(("a", "gamma"), [(0.3, 1.0), (0.0, 2.0), (1.0, 0.5)])
def test_the_score_is_the_share_of_pairs_that_the_definition_counts(mode: str, a: float, gamma: float) -> None:
    shadows, n, m = 4, 9, 13
    x, z = _probabilities(n, seed=0), _probabilities(m, seed=1)
    x_shadow, z_shadow = _probabilities(shadows, n, seed=2), _probabilities(shadows, m, seed=3)
    inside = halves(n, shadows, 0)
    found = Rmia(shadows=shadows, mode=mode, a=a, gamma=gamma).scores(x, x_shadow, inside, z, z_shadow)

    for i in range(n):
        outs = [float(x_shadow[s, i]) for s in range(shadows) if not inside[s, i]]
        ins = [float(x_shadow[s, i]) for s in range(shadows) if inside[s, i]]
        p_out, p_in = sum(outs) / len(outs), sum(ins) / len(ins)
        if mode == "offline":
            p_in = a * p_out + 1 - a
        beaten = 0
        for j in range(m):
            p_z = float(z_shadow[:, j].mean())
            if mode == "offline":
                p_z = 0.5 * (p_z + a * p_z + 1 - a)
            ratio = (float(x[i]) / (0.5 * (p_in + p_out))) / (float(z[j]) / p_z)
            beaten += ratio >= gamma
        assert float(found[i]) == pytest.approx(beaten / m)


def test_a_record_the_model_favours_more_scores_no_lower() -> None:
    x = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    z, z_shadow = _probabilities(30, seed=1), _probabilities(2, 30, seed=2)
    scores = Rmia(shadows=2).scores(x, torch.full((2, 50), 0.5).double(), halves(50, 2, 0), z, z_shadow)
    assert (scores.diff() >= 0).all()
    assert 0 <= float(scores[0]) < float(scores[-1]) <= 1


def test_a_tie_counts_as_beaten() -> None:
    half, shadow = torch.tensor([0.5]).double(), torch.tensor([[0.25], [0.25]]).double()
    test = Rmia(shadows=2)
    assert test.scores(half, shadow, torch.tensor([[True], [False]]), half, shadow).tolist() == [1.0]


def test_a_record_favoured_by_every_model_is_no_member_for_that() -> None:
    """What a likelihood threshold would call the surest member is ordinary beside the shadow models."""
    x = torch.tensor([0.99, 0.5]).double()
    shadow = torch.tensor([[0.99, 0.1], [0.99, 0.1]]).double()
    z, z_shadow = torch.full((10,), 0.4).double(), torch.full((2, 10), 0.3).double()
    easy, odd = Rmia(shadows=2, a=1.0).scores(x, shadow, torch.tensor([[True, True], [False, False]]), z, z_shadow)
    assert (float(easy), float(odd)) == (0.0, 1.0)


def test_probabilities_that_round_to_nothing_give_scores_all_the_same() -> None:
    nothing = torch.zeros(3, dtype=torch.float64)
    for mode in ("offline", "online"):
        test = Rmia(shadows=2, mode=mode, a=1.0)
        scores = test.scores(nothing, torch.zeros(2, 3).double(), halves(3, 2, 0), nothing, torch.zeros(2, 3).double())
        assert scores.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shadows": 3}, "shadows=3 must be even"),
        ({"shadows": 0}, "shadows=0 must be even"),
        ({"a": 1.5}, "a=1.5 must lie"),
        ({"gamma": 0.0}, "gamma=0.0 must be positive"),
        ({"mode": "both"}, "mode='both' must be"),
        ({"population": 0}, "population=0 must be at least 1"),
        ({"records": 2}, "records=2 must be at least 4"),
        ({"confidence": 1.0}, "confidence=1.0 must lie"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(BadValue, match=message):
        Rmia(**settings)  # type: ignore[arg-type]

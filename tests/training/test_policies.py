"""Policies learn, repeatably, from noisy frames; the last stage certifies them and claims no more than was proved."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from trivet.certify.policy_smoothing import PolicySmoothing
from trivet.claims import CertificateClaim
from trivet.control.cartpole import CartPole
from trivet.control.environment import Environment
from trivet.control.episodes import Episodes, play
from trivet.errors import BadValue, TrivetError
from trivet.methods import build, spec_of
from trivet.models.mlp import mlp
from trivet.randomness import generator
from trivet.threats.l2 import L2
from trivet.threats.linf import Linf
from trivet.training import dqn as dqn_module
from trivet.training.certify_policy import CertifyPolicy, floored
from trivet.training.cross_entropy_search import CrossEntropySearch
from trivet.training.dqn import Dqn
from trivet.training.fit import Fit
from trivet.training.folder import RunFolder
from trivet.training.pipeline import run_stages
from trivet.training.stage import Checkpoint, Stage


@dataclass(frozen=True)
class Match(Environment):
    """Rewarded is the action that says whether the number observed, which wanders chaotically, is positive."""

    observations: ClassVar[int] = 1
    start_numbers: ClassVar[int] = 1

    @property
    def num_classes(self) -> int:
        return 2

    @property
    def returns(self) -> tuple[float, ...]:
        return tuple(float(k) for k in range(1, self.horizon + 1))

    @property
    def decided_by(self) -> tuple[int, ...]:
        return (self.horizon,) * self.horizon

    def start(self, uniform: Any) -> Any:
        return uniform

    def observe(self, states: Any) -> Any:
        return 2 * states - 1

    def step(self, states: Any, actions: Any) -> Any:
        right = (states[:, 0] > 0.5) == (actions == 1)
        return 4 * states * (1 - states), right.astype(float), np.zeros(len(states), dtype=bool)


SHORT = Match(frames=2, sigma=0.1, horizon=10)


def network(environment: Any, hidden: tuple[int, ...] = (16,)) -> nn.Module:
    shape, actions = environment.input_shape, environment.num_classes
    return mlp(shape, actions, hidden=hidden, generator=torch.Generator().manual_seed(0))


def ran(stages: list[Stage], model: nn.Module, folder: Path, seed: int = 0) -> Checkpoint:
    run = RunFolder.create(folder, "recipe")
    named = [(str(spec_of(stage)["name"]), stage) for stage in stages]
    return run_stages(named, model, None, run, seed=seed, device=torch.device("cpu"))


def mean(environment: Any, model: nn.Module, episodes: int = 300) -> float:
    return float(play(environment, model, episodes, seed=9, purpose="test").returns.mean())


QUICK = Dqn(
    SHORT,
    1536,
    lr=1e-2,
    gamma=0.5,
    learning_starts=100,
    batch_size=32,
    gradient_steps=32,
    target_rollouts=2,
    exploration=0.4,
    evaluate_every=512,
    evaluation=20,
)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("dqn") / "run"
    return ran([QUICK, CertifyPolicy(SHORT, L2(0.05), episodes=500)], network(SHORT), folder)


def test_dqn_learns_from_noisy_frames(learnt: Checkpoint) -> None:
    """Guessing is right half the time; the noise leaves at most 97 %."""
    assert mean(SHORT, network(SHORT)) < 7
    assert 8.5 < mean(SHORT, learnt.model) < 9.9
    assert not learnt.model.training


def test_the_same_seed_gives_the_same_weights_and_another_gives_others(tmp_path: Path) -> None:
    short = replace(QUICK, steps=512)
    first, again, other = (
        ran([short], network(SHORT), tmp_path / str(number), seed).artefact for number, seed in enumerate((1, 1, 2))
    )
    assert first == again != other


def test_the_weights_with_the_best_evaluation_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three evaluations, made to say 3, 9 and 5, the second's weights."""
    seen: list[torch.Tensor] = []

    def scripted(environment: Environment, policy: nn.Module, count: int, **_: Any) -> Episodes:
        seen.append(nn.utils.parameters_to_vector(policy.parameters()).detach().clone())
        returns = torch.full((count,), (3.0, 9.0, 5.0)[len(seen) - 1])
        return Episodes(returns, returns.long(), returns)

    monkeypatch.setattr(dqn_module, "play", scripted)
    found = ran([QUICK], network(SHORT), tmp_path / "run")
    kept = nn.utils.parameters_to_vector(found.model.parameters()).detach()
    assert [torch.equal(kept, each) for each in seen] == [False, True, False]
    assert found.history[0]["best_evaluation"] == 9.0


def test_a_replayed_step_holds_what_was_seen_with_its_noise_and_what_came_after() -> None:
    """One step later, what came after is what is seen, frame by frame, unless the episode ended."""
    source = generator(0, "test")
    actors = dqn_module._Actors(CartPole(frames=3, sigma=0.5, horizon=6), 8, source)
    model = network(actors.environment)
    with torch.no_grad():
        steps = [actors.step(model, 1.0) for _ in range(12)]
    cut = 0
    for number, (before, after) in enumerate(pairwise(steps)):
        over = (before.after != after.seen).flatten(1).any(1)
        assert torch.equal(before.after[:, :-1], before.seen[:, 1:])
        assert bool(over[before.ended].all())
        cut += int((over & ~before.ended).sum())
        assert torch.equal(after.seen[over][:, 0], after.seen[over][:, 2]), "the stack holds the first frame"
        assert number < 5 or cut > 0, "episodes are cut at the horizon"


def test_the_target_counts_what_follows_unless_the_episode_ended() -> None:
    """One gradient step of tiny rate on a linear Q moves it by the gradient of the Huber loss, computed by hand."""
    environment = CartPole()
    q = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)).double()
    with torch.no_grad():
        q[1].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]))
    replay = dqn_module._Replay(2, environment)
    seen, after = torch.zeros(2, 1, 4), torch.zeros(2, 1, 4)
    seen[:, 0, 0], after[:, 0, 1] = 0.5, 2.0
    ended = torch.tensor([False, True])
    replay.add(dqn_module._Steps(seen, torch.tensor([0, 0]), torch.tensor([1.0, 1.0]), after, ended))
    rule = Dqn(environment, batch_size=4000, gradient_steps=1, gamma=0.5)
    q = q.float()
    optimizer = torch.optim.SGD(q.parameters(), lr=1.0)
    loss = dqn_module._improve(rule, q, copy.deepcopy(q), optimizer, replay, generator(0, "test"))
    # Q = 0.5; targets 1 + 0.5 * 2 = 2 and 1; Huber losses 1.5 - 0.5 and 0.5^2 / 2, drawn about equally often.
    share = (float(loss) - 0.125) / (1.0 - 0.125)
    assert 0.4 < share < 0.6
    assert float(q[1].weight[0, 0].detach()) == pytest.approx(1 + 0.5 * (share + 0.5 * (1 - share)), abs=1e-4)


def test_cross_entropy_search_learns_and_repeats_itself(tmp_path: Path) -> None:
    search = CrossEntropySearch(SHORT, iterations=5, population=20, elite=4, episodes=6)
    first, again = (ran([search], network(SHORT, ()), tmp_path / name) for name in ("first", "again"))
    assert 8.5 < mean(SHORT, first.model) < 9.9
    assert first.artefact == again.artefact


def test_each_candidate_is_scored_as_if_it_played_alone() -> None:
    """Against the plain loop over weights: zero noise, the same starts."""
    cart = CartPole(horizon=30)
    search = CrossEntropySearch(cart, population=5, elite=2, episodes=7)
    model, drawn = network(cart, ()), torch.randn(5, 10, generator=generator(0, "drawn"))
    weights = {"logits.weight": drawn[:, :8].view(5, 2, 4), "logits.bias": drawn[:, 8:]}
    with torch.no_grad():
        scores = search._scores(model, weights, generator(0, "test"))
        uniform = torch.rand(7, 4, generator=generator(0, "test"), dtype=torch.float64).numpy()
        for number in range(5):
            model.load_state_dict({name: values[number] for name, values in weights.items()})
            total = 0.0
            for row in uniform:
                state, over, steps = cart.start(row[None]), False, 0
                while not over and steps < 30:
                    seen = torch.from_numpy(cart.observe(state)).float().view(1, 1, 1, 4)
                    state, reward, ended = cart.step(state, model(seen).argmax(1).numpy())
                    total, over, steps = total + float(reward[0]), bool(ended[0]), steps + 1
            assert float(scores[number]) == pytest.approx(total / 7)


# Certification as a stage.


def test_the_claim_is_what_its_own_episodes_prove(learnt: Checkpoint) -> None:
    (claim,) = learnt.ledger.holding
    assert isinstance(claim, CertificateClaim)
    returns = play(SHORT, learnt.model, 500, seed=0, purpose="certification").returns
    found = PolicySmoothing(0.1, SHORT.returns, episodes=500).certify(returns)
    assert claim.value == found.mean(0.05)
    assert claim.interval == (claim.value, 10.0)
    assert (claim.norm, claim.radius, claim.points, claim.confidence) == ("L2", 0.05, 500, 0.95)
    assert claim.artefact == learnt.artefact
    assert claim.conditions == found.conditions
    assert floored(claim.value) in claim.statement
    record = learnt.history[1]
    assert dict(map(tuple, record["curve"]))[0.1] == found.mean(0.1)
    assert record["artefact"] == learnt.artefact


def test_training_further_voids_the_certificate(learnt: Checkpoint) -> None:
    ledger = copy.deepcopy(learnt.ledger)
    ledger.apply("certify_policy", CertifyPolicy(SHORT, L2(0.05)).effect())
    assert ledger.holding
    ledger.apply("dqn", QUICK.effect())
    assert not ledger.holding


@pytest.mark.parametrize("value", [0.0, 1e-7, 0.99999, 123.4567, 199.99999, -0.12345])
def test_a_certified_return_is_never_rounded_up(value: float) -> None:
    assert value - 1e-3 * abs(value) <= float(floored(value)) <= value


def test_what_cannot_be_certified_is_refused_before_training() -> None:
    with pytest.raises(BadValue, match="threat='linf' must be l2"):
        CertifyPolicy(SHORT, Linf(0.1))
    with pytest.raises(BadValue, match=r"sigma=0\.0 must be positive and finite: an agent without noise"):
        CertifyPolicy(CartPole(), L2(0.1))
    with pytest.raises(BadValue, match="budgets="):
        CertifyPolicy(SHORT, L2(0.1), budgets=(-1.0,))


CART = CartPole(5, 0.2)


@pytest.mark.parametrize(
    "stage",
    [Dqn(CART), CrossEntropySearch(CART), CertifyPolicy(CART, L2(0.1), (0.1, 0.2))],
    ids=lambda s: type(s).__name__,
)
def test_a_stage_is_made_again_from_its_spec(stage: Stage) -> None:
    assert build("training", spec_of(stage)) == stage


@pytest.mark.parametrize(
    ("made", "settings", "words"),
    [
        (Dqn, {"steps": 0}, "steps=0"),
        (Dqn, {"evaluation": 0}, "evaluation=0"),
        (Dqn, {"lr": 0.0}, "lr=0"),
        (Dqn, {"gamma": 1.1}, "gamma=1.1"),
        (Dqn, {"exploration": 0.0}, "exploration=0"),
        (Dqn, {"parallel": 3}, "rollout=256 must be a multiple of parallel=3"),
        (CrossEntropySearch, {"elite": 61}, "elite=61"),
        (CrossEntropySearch, {"elite": 1}, "elite=1"),
        (CrossEntropySearch, {"spread": 0.0}, "spread=0"),
        (CrossEntropySearch, {"gamma": 0.0}, "gamma=0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(made: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadValue, match=words):
        made(SHORT, **settings)


def test_a_stage_for_records_says_that_there_are_none(tmp_path: Path) -> None:
    fit: Fit = build("training", {"name": "fit", "objective": "plain"})
    with pytest.raises(TrivetError, match="fit trains on records, and the recipe names an environment instead"):
        ran([fit], network(SHORT), tmp_path / "run")

"""Policy smoothing on CartPole and Mountain Car: certified, attacked and clean return against budget and noise.

    python bench/policy_smoothing.py --out results/policy-smoothing.json

For each noise an agent is trained by the recipe's stage, certified from 10,000 episodes, and attacked at every budget
by greedy action flips and by steady pushes, of which the worst counts. Agents without noise have no certificate; they
show what the attack can do.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
from trivet.audit.policy_audit import PolicyAudit
from trivet.audit.policy_findings import PolicyFindings
from trivet.certify.policy_smoothing import PolicySmoothing
from trivet.control.environment import Environment
from trivet.control.episodes import play
from trivet.control.greedy_flip import GreedyFlip
from trivet.control.steady_push import SteadyPush
from trivet.errors import require
from trivet.recipes.plan import plan
from trivet.recipes.recipe import load
from trivet.threats.l2 import L2
from trivet.training.folder import RunFolder
from trivet.training.stage import Checkpoint, Context

BUDGETS = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
LINEAR = ("model.hidden=[]", "stages=[{cross_entropy_search: {}}]")
AGENTS: dict[str, tuple[str, tuple[str, ...], tuple[float, ...]]] = {
    "CartPole, DQN": ("cartpole-policy-smoothing", (), (0.0, 0.2, 0.4, 0.6)),
    "Mountain Car, linear": ("mountain-car-policy-smoothing", (), (0.0, 0.2, 0.4)),
    "CartPole, linear": ("cartpole-policy-smoothing", LINEAR, (0.2, 0.4)),
}
THRESHOLDS, PUSHES = (0.0, 2.0), (5, 20, 100)


def trained(recipe: str, overrides: tuple[str, ...], sigma: float, seed: int) -> tuple[Environment, Any, float]:
    """The environment with its noise, the policy, and the seconds its training took."""
    # A certification stage would refuse an agent without noise; it is done below, for both bounds at once.
    source = load(recipe, [*overrides, f"environment.sigma={sigma}"])
    recipe_stages = [stage for stage in source.recipe.stages if "certify_policy" not in stage]
    source = replace(source, recipe=source.recipe.model_copy(update={"stages": recipe_stages, "seed": seed}))
    settings = plan(source)
    assert settings.environment is not None
    ((name, stage),) = settings.stages
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder) / "run", source.dump())
        began = time.perf_counter()
        done = stage.run(Checkpoint(settings.model(settings.environment)), Context(None, seed, run.stage(0, name)))
    return settings.environment, done.model, time.perf_counter() - began


def certified(environment: Environment, policy: Any, episodes: int, seed: int) -> dict[str, list[float]]:
    """The certified mean return at each budget, by each bound."""
    returns = play(environment, policy, episodes, seed=seed, purpose="certification").returns
    smoothing = PolicySmoothing(environment.sigma, environment.returns, environment.r_min, episodes)
    others = {bound: replace(smoothing, bound=bound, thresholds=()) for bound in ("dkw", "dkw_one_sided")}
    made = {"clopper_pearson": smoothing, **others}
    return {
        bound: [found.mean(budget) for budget in BUDGETS]
        for bound, found in ((bound, each.certify(returns)) for bound, each in made.items())
    }


def audited(environment: Environment, policy: Any, options: Any) -> PolicyFindings:
    flips = tuple(GreedyFlip(each, options.draws, options.step) for each in THRESHOLDS)
    attacks = (*flips, *(SteadyPush(steps) for steps in PUSHES))
    audit = PolicyAudit(environment, L2(max(BUDGETS)), attacks, BUDGETS, options.attacked, options.clean)
    return audit.run(policy, seed=options.seed, name=environment.title, source="bench")


def rows(options: Any) -> Iterator[dict[str, Any]]:
    for name in options.only:
        recipe, overrides, sigmas = AGENTS[name]
        for sigma in sigmas:
            began = time.perf_counter()
            environment, policy, seconds = trained(recipe, overrides, sigma, options.seed)
            bounds = certified(environment, policy, options.episodes, options.seed) if sigma else {}
            found = audited(environment, policy, options)
            for place, point in enumerate(found.points):
                worst = point.worst
                bound = bounds["clopper_pearson"][place] if bounds else None
                at_most = point.at_most if point.at_most is not None else found.clean.high
                require(bound is None or bound <= at_most, f"certificate={bound} lies above the attack's {at_most}.")
                yield {
                    "agent": name,
                    "sigma": sigma,
                    "budget": point.budget,
                    "certified": bound,
                    "certified_dkw": bounds["dkw"][place] if bounds else None,
                    "certified_dkw_one_sided": bounds["dkw_one_sided"][place] if bounds else None,
                    "attacked": worst.left.mean if worst else found.clean.mean,
                    "attacked_low": worst.left.low if worst else found.clean.low,
                    "attacked_high": worst.left.high if worst else found.clean.high,
                    "worst_attack": worst.spec if worst else None,
                    "least_high": at_most,
                    "spent": worst.spent if worst else 0.0,
                    "clean": found.clean.mean,
                    "clean_low": found.clean.low,
                    "clean_high": found.clean.high,
                    "training_seconds": seconds,
                    "seconds": time.perf_counter() - began,
                }


def main() -> None:
    parser = harness.arguments(__doc__, rounds=1)
    parser.add_argument("--episodes", type=int, default=10_000, help="of each certificate")
    parser.add_argument("--clean", type=int, default=1_000, help="episodes without attack, beside those")
    parser.add_argument("--attacked", type=int, default=100, help="episodes under each attack")
    parser.add_argument("--draws", type=int, default=4, help="of noise that flips average; 128 in the paper")
    parser.add_argument("--step", type=float, default=0.05, help="of flips; 0.01 in the paper")
    parser.add_argument("--only", nargs="*", choices=AGENTS, default=list(AGENTS))
    options = parser.parse_args()
    harness.prepare(options)
    table = []
    for row in rows(options):
        table.append(row)
        bound = "no certificate" if row["certified"] is None else f"certified {row['certified']:.4g}"
        left = f"attacked {row['attacked']:.4g}, clean {row['clean']:.4g}, after {row['seconds']:.0f} s"
        print(f"{row['agent']}, sigma {row['sigma']:g}, budget {row['budget']:g}: {bound}, {left}", flush=True)
        harness.save(options, {"rows": table})


if __name__ == "__main__":
    main()

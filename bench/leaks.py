"""Every private recipe for the digits attacked by one-run audits, and the two methods whose published claims are void.

    python bench/leaks.py --out results/leaks.json

For each recipe, models are trained with canaries planted (Dirac gradients seen in the weights, and mislabelled records
seen through the losses) and the lower bound on epsilon is set against the claim: the accountant's for what is private,
the authors' for what is not. A bound above the claim refutes it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import harness
from trivet.audit.leak_test import StageTrainer
from trivet.audit.one_run import OneRun
from trivet.privacy.accounting import account
from trivet.privacy.dp_sgd import DpSgd
from trivet.privacy.mechanism import Event
from trivet.privacy.sidp import Sidp
from trivet.recipes.plan import Plan, plan
from trivet.recipes.recipe import load
from trivet.training.fit import Fit

VARIANTS = ("gaussian", "stability", "macer", "smooth_adv", "consistency")
RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "DP-SGD": ("digits-dp-sgd", ()),
    "DP-SGD, discrete Gaussian noise": ("digits-dp-sgd", ("fit.rule.noise=discrete_gaussian", "fit.epochs=4")),
    "DP-SGD, shuffled batches": ("digits-dp-sgd", ("fit.rule.sampling=shuffled", "fit.rule.epsilon=8")),
    "DP-SGD with PGD": ("digits-dp-pgd-at", ()),
    "DP-SGD with TRADES": ("digits-dp-pgd-at", ("fit.objective={name: trades, steps: 10}",)),
    **{f"DP-CERT, {v}": ("digits-dp-cert", (f"fit.objective.variant={v}",)) for v in VARIANTS},
    "DP-SGD with normalisation": ("digits-dp-layer-norm", ()),
    "SecureSGD, sound form": ("digits-secure-sgd", ()),
    "StoBatch, sound form": ("digits-stobatch-sound", ()),
    "SIDP as published": ("digits-sidp", ()),
    "StoBatch as published": ("digits-stobatch", ("fit.epochs=20",)),
}
STOBATCH_CLAIM = 2.0
"""Total epsilon that the digits recipe's settings were chosen to have, by the authors' formula."""


@dataclass(frozen=True)
class Claimed:
    epsilon: float
    delta: float
    by: str


def claimed(settings: Plan, records: int) -> Claimed:
    """What is claimed for the recipe, by its accountant or by its authors."""
    ((_, stage),) = settings.stages
    assert isinstance(stage, Fit)
    rule = stage.rule
    if isinstance(rule, DpSgd):
        made = rule.plan(records, stage.batch_size, stage.epochs, seed=0)
        spent = [(made.mechanism.event, stage.epochs * made.per_epoch)]
        return Claimed(account(spent, rule.delta).epsilon, rule.delta, "accountant")
    if isinstance(rule, Sidp):
        event = Event("poisson", stage.batch_size / records, rule.noise_multiplier)
        steps = stage.epochs * -(-records // stage.batch_size)
        return Claimed(account([(event, steps)], 1e-5).epsilon, 1e-5, "authors")
    return Claimed(STOBATCH_CLAIM, 1e-5, "authors")


def rows(name: str, canaries: int, seed: int) -> Iterator[dict[str, Any]]:
    recipe, overrides = RECIPES[name]
    settings = plan(load(recipe, overrides))
    splits = settings.splits()
    goal = claimed(settings, len(splits.train))
    trainer = StageTrainer(settings.stages, lambda seed: settings.model(splits.train, seed), splits.test, seed)
    tests = (
        OneRun(canaries, "dirac", "white_box", delta=goal.delta),
        OneRun(canaries, "mislabelled", "black_box", delta=goal.delta),
    )
    for test in tests:
        found = test.run(trainer, splits, seed=seed)
        yield {
            "method": name,
            "claimed": goal.epsilon,
            "delta": goal.delta,
            "claimed_by": goal.by,
            "canaries": f"{found.canaries}, {found.access}",
            "right": f"{found.right} of {found.guesses}",
            "lower_bound": found.lower,
            "if_gaussian": found.gaussian_lower,
            "refuted": found.lower is not None and found.lower > goal.epsilon,
            "seconds": found.seconds,
        }


def main() -> None:
    parser = harness.arguments(__doc__, rounds=1)
    parser.add_argument("--canaries", type=int, default=500, help="planted in one training run")
    parser.add_argument("--only", nargs="*", choices=RECIPES, default=list(RECIPES))
    options = parser.parse_args()
    harness.prepare(options)
    table = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRIVET_BUDGET"] = folder  # these are no runs of the user's
        for name in options.only:
            for row in rows(name, options.canaries, options.seed):
                table.append(row)
                print(f"{name}: {row['canaries']}: {row['lower_bound']:.3f} of {row['claimed']:.3f}", flush=True)
    harness.show("one-run audits of private training on the digits, lower bounds at 95 %", table)
    harness.save(options, {"rows": table})


if __name__ == "__main__":
    main()

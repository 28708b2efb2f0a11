"""The accounts of a private training stage: budget written down before it is spent, and the claim at the end."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from trivet.claims import PrivacyClaim
from trivet.data.dataset import Dataset
from trivet.methods import spec_of
from trivet.privacy.accounting import Account, account
from trivet.privacy.budget import Spender, Spending, spendings, totals
from trivet.privacy.dp_sgd import PrivatePlan
from trivet.privacy.mechanism import Event
from trivet.training.stage import Checkpoint, Context

NOT_PRIVATE = "reproducible, not private"
NEIGHBOURS = {
    "add_remove": "added or removed",
    "replace": "exchanged for any other",
    "zero_out": "replaced by one that contributes nothing",
}
"""What happens to the one record whose traces epsilon bounds, by the claim's adjacency."""


class PrivateStage:
    """One stage's spending on `train`, whose SHA-256 is `digest`, over at most `steps` steps."""

    def __init__(self, plan: PrivatePlan, train: Dataset, digest: str, context: Context, steps: int) -> None:
        self.plan, self.files, self.planned = plan, context.files, steps
        self.digest, self.records = context.budget_of or digest, len(train)
        self.diagnostics = plan.rule.diagnostics
        self.event, self.delta = plan.mechanism.event, plan.rule.delta
        self.spender: Spender | None = None
        if plan.secret:
            # Each stage has an account of its own, also where several of a run have the same name.
            stage = f"{self.files.name}-{self.files.number}" if self.files.number else self.files.name
            run, purpose = self.files.run, "training" if context.budget_of is None else "leak test"
            spending = Spending(
                data=self.digest,
                name=train.name,
                records=len(train),
                run=run.identity,
                stage=stage,
                path=str(run.path.resolve()),
                event=self.event,
                steps=0,
                purpose=purpose,
            )
            self.spender = Spender(spending, steps)
        else:
            print(f"{self.files.name}: noise_seed is set, so this run is {NOT_PRIVATE}.", file=sys.stderr)

    def resume(self, step: int) -> int:
        """The step to go on from, having saved the state of `step`: what was spent after it cannot be spent again."""
        if self.spender is None:
            return step
        self.spender.at_least(step)
        spent = min(self.spender.steps, self.planned)
        if spent > step:
            print(
                f"{self.files.name}: {spent - step} steps were paid for and lost when the run was stopped; it goes on "
                f"from step {spent}, so that no more than the planned privacy is spent.",
                file=sys.stderr,
            )
        return spent

    def reserve(self) -> None:
        """Return once the next step is durably written down as spent."""
        if self.spender is not None:
            self.spender.reserve()

    def record(self, history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What the stage leaves in the checkpoint's history: enough to compute its epsilon again."""
        unprotected = [each["stage"] for each in history if "data" in each and "privacy" not in each]
        standing = NOT_PRIVATE if self.spender is None else "private"
        if unprotected or any(each.get("privacy", {}).get("standing", "private") != "private" for each in history):
            standing = "not private: an earlier stage trained on the records without protection"
        spent = self.planned if self.spender is None else self.spender.steps
        return {"event": asdict(self.event), "steps": spent, "delta": self.delta, "standing": standing}

    def claims(self, checkpoint: Checkpoint) -> list[PrivacyClaim]:
        """The claim about the trained weights, all private stages together; none where there is no privacy."""
        stages = [each["privacy"] for each in checkpoint.history if "privacy" in each]
        if any(each["standing"] != "private" for each in stages):
            return []
        spent = [(Event(**each["event"]), each["steps"]) for each in stages]
        found = account(spent, self.delta)
        if not math.isfinite(found.epsilon):
            return []
        return [self._claim(found, stages, checkpoint)]

    def _claim(self, found: Account, stages: list[dict[str, Any]], checkpoint: Checkpoint) -> PrivacyClaim:
        adjacency = self.event.adjacency
        return PrivacyClaim(
            statement=f"({rounded_up(found.epsilon)}, {delta_text(self.delta)})-differentially private for each of the "
            f"{self.records:,} training records, {NEIGHBOURS[adjacency]}.",
            value=found.epsilon,
            unit="epsilon",
            obtained={
                "name": "dp_sgd",
                "stages": stages,
                "accountant": found.accountant,
                "grid": found.grid,
                "lower": found.lower,
                "rdp": found.rdp,
                "rule": spec_of(self.plan.rule),
                "expected_batch": self.plan.mechanism.expected,
                "noise_multiplier": self.plan.mechanism.noise_multiplier,
            },
            recheck=f"trivet privacy {self.files.run.path}",
            artefact=checkpoint.artefact,
            conditions=(*self._conditions(found), *_sources(checkpoint.history)),
            made_by=self.files.name,
            delta=self.delta,
            adjacency=adjacency,
        )

    def _conditions(self, found: Account) -> list[str]:
        said = ["covers the weights and every checkpoint of this run; no loss coupled records, as probed beforehand"]
        if self.event.noise == "gaussian":
            said.append(
                "noise and samples come from a generator seeded by the operating system and stored nowhere; it is no "
                "cryptographic one, and the last bits of floating-point noise may betray more than the mathematics does"
            )
        else:
            said.append(
                "noise is exact, on a grid, and comes from the operating system; samples from a seeded generator"
            )
        if self.event.sampler == "shuffled":
            said.append("batches were shuffled, not Poisson samples: accounted without amplification")
        if self.diagnostics:
            said.append("diagnostics not private: the training log holds exact losses, keep it with the records")
        if self.delta > 0.1 / self.records:
            said.append(f"delta is above a tenth of 1 / {self.records}, more than is customary")
        if found.epsilon > 10:
            said.append("an epsilon above 10 promises little: a record may be e^10 times as likely given the model")
        return said + self._elsewhere()

    def _elsewhere(self) -> list[str]:
        """What other runs spent on the same records: choosing among models by their quality spends it all."""
        everything = spendings(self.digest)
        others = {each.run: each.purpose for each in everything if each.run != self.files.run.identity}
        if not others:
            return []
        together = in_all(everything, self.delta)
        tests = list(others.values()).count("leak test")
        count = f"{len(others)} other run{'s' * (len(others) > 1)}" + f" ({tests} of them leak tests)" * (tests > 0)
        return [
            f"{count} used the same records; if their models or results are published or guided this one, all "
            f"together spend epsilon {rounded_up(together)}"
        ]


def _sources(history: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the claim leaves out: the records of other data that the network was trained on first."""
    for each in history:
        if "source" in each:
            source = each["source"]
            said = " ".join(source["privacy"]) or "which were not protected"
            yield f"says nothing of the {source['records']:,} records of {source['name']} it was pre-trained on: {said}"


def in_all(spent: Sequence[Spending], delta: float) -> float:
    """The epsilon that all of `spent` costs together at `delta`, an upper bound that is quick to compute.

    Guarantees about different neighbours are accounted apart, each at its share of delta, and their epsilons added.
    """
    events = list(totals(spent))
    kinds = {event.adjacency for event, _ in events}
    return sum(
        account([each for each in events if each[0].adjacency == kind], delta / len(kinds), refine=False).epsilon
        for kind in kinds
    )


def delta_text(delta: float) -> str:
    """E.g. "1e-5"."""
    return f"{delta:g}".replace("e-0", "e-")


def rounded_up(epsilon: float) -> str:
    """`epsilon` with three digits, never less than it is."""
    if not math.isfinite(epsilon) or epsilon <= 0:
        return f"{epsilon:g}"
    unit = 10.0 ** (math.floor(math.log10(epsilon)) - 2)
    return f"{math.ceil(epsilon / unit - 1e-9) * unit:.3g}"

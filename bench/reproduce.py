"""A recipe from data to audited model, and what came out as one JSON file: the evidence behind a figure we state.

    python bench/reproduce.py mnist-pgd-at --run runs/mnist-pgd-at --out results/mnist-pgd-at.json

A run that was interrupted goes on; one that is finished is audited again.
"""

from __future__ import annotations

from pathlib import Path

import torch

import harness
import trivet
from trivet.claims import PrivacyClaim


@torch.no_grad()
def accuracy(run: trivet.Run) -> float:
    """Clean accuracy on the whole test set; the audit may look at fewer records."""
    test = run.plan.splits().test
    model = run.model(test)
    return sum(int((model(b.inputs).argmax(1) == b.labels).sum()) for b in test.batches(1000)) / len(test)


def main() -> None:
    parser = harness.arguments(__doc__, rounds=1)
    parser.add_argument("recipe", help="a shipped recipe's name, or a YAML file")
    parser.add_argument("--run", type=Path, required=True, help="the run folder")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override the audit, not training"
    )
    options = parser.parse_args()
    harness.prepare(options)
    run = trivet.train_model(options.recipe, out=options.run, resume=True)
    subject = trivet.audit_model(options.run, overrides=options.set)
    harness.save(
        options,
        {
            "recipe": subject.recipe,
            "sessions": run.folder.status["sessions"],
            "log": [line for number, line in enumerate(subject.log) if number % 10 == 0],
            "accuracy_on_all_test_records": accuracy(run),
            "privacy": [
                claim.model_dump(mode="json")
                for claim in subject.claims
                if isinstance(claim, PrivacyClaim) and claim.holds
            ],
            "findings": subject.findings.model_dump(mode="json"),
        },
    )


if __name__ == "__main__":
    main()

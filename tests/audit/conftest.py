"""A plainly trained network on the digits, and what a quick audit finds about it."""

from __future__ import annotations

import pytest
from defences import QUICK, trained
from torch import Tensor, nn

from trivet.audit.findings import Findings
from trivet.data.dataset import Dataset
from trivet.data.digits import digits


@pytest.fixture(scope="session")
def test_part() -> Dataset:
    return digits().test


@pytest.fixture(scope="session")
def plain() -> nn.Module:
    return trained(digits().train)


@pytest.fixture(scope="session")
def plain_audit(plain: nn.Module, test_part: Dataset) -> tuple[Findings, dict[str, Tensor]]:
    return QUICK.run(plain, test_part, seed=0, name="plain", source="memory")


@pytest.fixture(scope="session")
def plain_findings(plain_audit: tuple[Findings, dict[str, Tensor]]) -> Findings:
    return plain_audit[0]

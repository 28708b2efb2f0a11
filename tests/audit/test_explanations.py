"""What the audit says of explanations, against models whose explanations are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from defences import QUICK, THREAT, Defence
from torch import Tensor, nn

from trivet.audit.explanations import explain, overlap
from trivet.audit.findings import Findings
from trivet.audit.report import Subject, render
from trivet.data.dataset import Batch, Dataset
from trivet.threats.linf import Linf

FEW = replace(QUICK, points=60, curve_points=20, explanations=12)


def linear(weights: Tensor) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(weights.shape[1], len(weights), bias=False))
    net[1].weight.data = weights
    return net


def records(n: int = 6) -> Batch:
    x = 0.3 + 0.4 * torch.rand(n, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    return Batch(x, torch.arange(n) % 2, torch.arange(n))


def test_a_model_that_looks_at_one_pixel_is_as_concise_as_can_be_and_stable() -> None:
    weights = torch.zeros(2, 20)
    weights[0, 3] = weights[1, 11] = 2.0
    found = explain(linear(weights), records(), THREAT, seed=0, batch_size=4)
    assert found.gini == pytest.approx([1 - 1 / 20] * 6)
    assert found.unaccounted < 1e-5
    assert len(found.overlap) == 6


def test_a_model_that_weighs_every_pixel_alike_is_as_concise_as_the_pictures_are() -> None:
    batch = records()
    grey = Batch(torch.full_like(batch.inputs, 0.5), batch.labels, batch.index)
    grey.inputs[:, :, 2:] = 0.0
    found = explain(linear(torch.ones(2, 20)), grey, THREAT, seed=0, batch_size=10)
    assert found.gini == pytest.approx([0.5] * 6)  # half the pixels are black, the others count alike
    assert found.gini_lit == pytest.approx([0.0] * 6, abs=1e-6)


def test_without_a_radius_nothing_moves() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 2))
    assert explain(net, records(), Linf(0.0), seed=0, batch_size=10).overlap == (1.0,) * 6
    assert sum(explain(net, records(), Linf(0.3), seed=0, batch_size=10).overlap) < 6


def test_the_overlap_counts_the_common_largest_tenth_in_size() -> None:
    first, second = torch.zeros(2, 20), torch.zeros(2, 20)
    first[0, [3, 4]] = torch.tensor([5.0, -6.0])
    second[0, [4, 9]] = torch.tensor([1.0, 2.0])
    first[1, [0, 1]] = second[1, [0, 1]] = torch.tensor([1.0, -1.0])
    assert overlap(first, second).tolist() == [0.5, 1.0]


@pytest.fixture(scope="module")
def audited(plain: nn.Module, test_part: Dataset) -> tuple[Findings, dict[str, Tensor]]:
    return FEW.run(plain, test_part, seed=0, name="plain", source="memory")


def test_an_audit_measures_the_records_it_was_told_to_and_the_file_keeps_them(audited, tmp_path) -> None:
    found = audited[0]
    assert found.explanations is not None
    assert len(found.explanations.gini) == 12
    assert all(0 < value < 1 for value in found.explanations.gini)
    assert all(low < high for low, high in zip(found.explanations.gini_lit, found.explanations.gini, strict=True))
    assert found.explanations.unaccounted < 0.05
    found.save(tmp_path / "audit.json")
    assert Findings.load(tmp_path / "audit.json").explanations == found.explanations


def test_the_page_shows_numbers_and_pictures(audited) -> None:
    found, examples = audited
    page = render([Subject("plain", found, examples=examples)])
    assert 'id="explanations"' in page
    assert page.count("attribution of the attacked record") == len(examples["index"]) > 0
    assert examples["clean_attribution"].shape == examples["clean"].shape
    silent = render([Subject("plain", found.model_copy(update={"explanations": None}))])
    assert 'id="explanations"' not in silent


def test_models_without_gradient_or_with_noise_are_not_explained(plain: nn.Module, test_part: Dataset) -> None:
    for before in (lambda x: x.detach(), lambda x: x + 0.1 * torch.randn_like(x)):
        model = Defence(plain, before, lambda logits: logits)
        found, examples = FEW.run(model, test_part, seed=0, name="defended", source="memory")
        assert found.explanations is None
        assert "clean_attribution" not in examples
    assert replace(FEW, explanations=0).run(plain, test_part, seed=0, name="p", source="m")[0].explanations is None

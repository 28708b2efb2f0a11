"""How concise a model's explanations are, and how stable: Gini indices of attributions (Chalasani et al., ICML 2020).

l_inf adversarial training makes attributions sparser; proved for one layer, measured for deep networks. None of these
numbers is evidence of robustness.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trivet.audit import charts
from trivet.audit.cells import key, right
from trivet.audit.explanation_finding import ExplanationFinding
from trivet.audit.html import Html, section, table, tag
from trivet.audit.subject import Subject
from trivet.data.dataset import Batch
from trivet.models.attribution import explain_class, gini
from trivet.models.modes import evaluating
from trivet.randomness import generator
from trivet.threats.threat import ThreatModel

STEPS = 50
_PARTS = 25


def explain(
    model: nn.Module, batch: Batch, threat: ThreatModel, *, seed: int, batch_size: int, steps: int = STEPS
) -> ExplanationFinding | None:
    """Measure the explanations of a differentiable `model` with fixed answers at all records of `batch`.

    None where logits or gradients are not finite, so that there is nothing to explain.
    """
    began = time.perf_counter()
    x = batch.inputs
    near = threat.random_start(x, generator(seed, "explanations", device=x.device))
    here, there = (_attributions(model, points, batch.labels, batch_size, steps) for points in (x, near))
    change = _logits(model, x, batch.labels, batch_size) - _logits(model, torch.zeros_like(x), batch.labels, batch_size)
    if not all(bool(each.isfinite().all()) for each in (here, there, change)):
        return None
    missing = (here.flatten(1).double().sum(1) - change).abs() / change.abs().clamp(min=1e-12)
    return ExplanationFinding(
        steps=steps,
        gini=tuple(gini(here).tolist()),
        gini_lit=tuple(
            float(gini(each[lit][None])) if lit.any() else 0.0 for each, lit in zip(here, x != 0, strict=True)
        ),
        overlap=tuple(overlap(here, there).tolist()),
        unaccounted=float(missing.median()),
        seconds=time.perf_counter() - began,
    )


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """[B]: of the tenth of entries (at least one) largest in size in `first` [B, ...], the share that is in `second`'s.

    The top-k intersection of Ghorbani et al. (AAAI 2019).
    """
    k = max(1, first[0].numel() // 10)
    marked = [
        torch.zeros_like(each.flatten(1)).scatter(1, each.flatten(1).abs().topk(k, dim=1).indices, 1.0)
        for each in (first, second)
    ]
    return (marked[0] * marked[1]).sum(1) / k


def _attributions(model: nn.Module, x: Tensor, y: Tensor, batch_size: int, steps: int) -> Tensor:
    parts = zip(x.split(batch_size), y.split(batch_size), strict=True)
    return torch.cat([explain_class(model, inputs, labels, steps) for inputs, labels in parts])


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> Tensor:
    """Of the right classes, [B] float64."""
    with evaluating(model):
        rows = torch.cat([model(part) for part in x.split(batch_size)])
    return rows.gather(1, y[:, None]).squeeze(1).double()


def section_of(subjects: Sequence[Subject]) -> Html:
    """The part of the report about explanations: a row and a histogram for each model."""
    found = [(n, s, made) for n, s in enumerate(subjects) if (made := s.findings.explanations) is not None]
    if not found:
        return Html("")
    rows, figures = [], []
    for number, subject, made in found:
        mean = {name: sum(values) / len(values) for name, values in _columns(made).items()}
        numbers = [tag("td", f"{value:.3f}", class_="number") for value in mean.values()]
        rows.append([key(number, subject.name), *numbers, tag("td", f"{made.unaccounted:.2g}", class_="number")])
        counts = [0] * _PARTS
        for value in made.gini:
            counts[min(int(value * _PARTS), _PARTS - 1)] += 1
        chart = charts.histogram(counts, number, x_title="Gini index of attributions", y_title="records")
        figures.append(tag("figure", tag("h3", key(number, subject.name)), chart))
    heads = [right(name) for name in (*_columns(found[0][2]), "unaccounted for")]
    lead = (
        f"Integrated gradients of the right class's logit from the black image, on {len(found[0][2].gini)} records: "
        "means of how concise they are (Gini index, Chalasani et al., ICML 2020) and of how many of the most important "
        "tenth of pixels stay so at a random point of the threat set. Unaccounted for: the integral's median error. "
        "None of it is evidence of robustness."
    )
    parts = [table(["model", *heads], rows), tag("div", figures, class_="grid")]
    return section("explanations", "Explanations", *parts, lead=lead)


def _columns(made: ExplanationFinding) -> dict[str, tuple[float, ...]]:
    return {"Gini": made.gini, "Gini, not black": made.gini_lit, "overlap nearby": made.overlap}

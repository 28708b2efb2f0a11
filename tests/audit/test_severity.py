"""Severity against brute force over random trees, its identities, and what an audit with a hierarchy adds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from defences import QUICK, THREAT, Defence
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trivet.audit.findings import Findings
from trivet.audit.masking import Behaviour
from trivet.audit.report import Subject, comparison, render
from trivet.audit.severity import CLEAN, FIRST, attacks, interval, mistakes, ranked
from trivet.data.dataset import Dataset
from trivet.data.hierarchy import Hierarchy, digits_hierarchy
from trivet.errors import BadValue
from trivet.recipes.plan import plan
from trivet.recipes.recipe import load
from trivet.statistics import Rate
from trivet.threats.l2 import L2
from trivet.threats.pgd import PGD
from trivet.threats.rotation_translation import RotationTranslation
from trivet.threats.union import Union

TREES = {
    "three levels": Hierarchy(tuple("abcdef"), [[["a", "b"], "c"], ["d", "e"], "f"]),
    "flat": Hierarchy(tuple("abcdef"), list("abcdef")),
    "two classes": Hierarchy(("a", "b"), ["a", "b"]),
}
TREE = TREES["three levels"]
HIERARCHY = digits_hierarchy()
FEW = replace(QUICK, points=80, curve_points=10, curve=(0.1,), explanations=0, hierarchy=HIERARCHY)


@st.composite
def answered(draw: st.DrawFn) -> tuple[Hierarchy, Tensor, Tensor]:
    """A tree, answers and labels."""
    tree = TREES[draw(st.sampled_from(sorted(TREES)))]
    label = st.integers(0, len(tree.classes) - 1)
    pairs = draw(st.lists(st.tuples(label, label), min_size=1, max_size=30))
    said, labels = torch.tensor(pairs).T
    return tree, said, labels


@settings(deadline=None)
@given(answered())
def test_severity_is_the_mean_over_mistakes_and_error_times_severity_the_mean_over_all(drawn) -> None:
    tree, said, labels = drawn
    apart = [int(tree.distances[y, j]) for y, j in zip(labels.tolist(), said.tolist(), strict=True)]
    wrong = [each for each in apart if each]
    made = mistakes("x", said, labels, tree, 0.95)
    assert made.by_height == tuple(wrong.count(height) for height in range(1, tree.height + 1))
    assert made.error.successes == len(wrong)
    assert made.hdist == sum(apart) / len(apart)
    if wrong:
        assert made.severity == sum(wrong) / len(wrong)
        assert made.error.value * made.severity == pytest.approx(made.hdist, rel=1e-15)
        assert made.interval[0] <= made.severity <= made.interval[1]
    else:
        assert made.severity is made.interval is None


def test_a_perfect_model_has_no_severity_and_hdist_0() -> None:
    made = mistakes("x", torch.arange(6), torch.arange(6), TREE, 0.95)
    assert (made.severity, made.interval, made.hdist, made.error.successes) == (None, None, 0.0, 0)


@pytest.mark.parametrize("tree", [*TREES.values(), HIERARCHY])
def test_mistakes_spread_evenly_have_the_severity_of_chance(tree: Hierarchy) -> None:
    classes = len(tree.classes)
    labels, said = torch.cartesian_prod(torch.arange(classes), torch.arange(classes)).T
    wrong = labels != said
    assert mistakes("x", said[wrong], labels[wrong], tree, 0.95).severity == pytest.approx(tree.chance)


def test_in_a_flat_tree_every_severity_is_1() -> None:
    made = mistakes("x", torch.tensor([1, 2, 3, 0]), torch.tensor([0, 0, 3, 5]), TREES["flat"], 0.95)
    assert (made.severity, made.interval, made.hdist) == (1.0, (1.0, 1.0), 0.75)


def test_answers_that_are_no_class_are_the_most_severe_mistakes() -> None:
    assert mistakes("x", torch.tensor([-1, 0, 1]), torch.tensor([0, 0, 0]), TREE, 0.95).by_height == (1, 0, 1)


def test_with_two_heights_the_interval_is_that_of_one_rate() -> None:
    low, high = Rate(7, 20, 0.95).interval
    assert interval((13, 7), 0.95) == pytest.approx((1 + low, 1 + high))


@pytest.mark.parametrize("shares", [(0.2, 0.3, 0.5), (0.9, 0.02, 0.08), (0.02, 0.96, 0.02)])
def test_the_interval_covers_the_mean_as_often_as_it_says(shares: tuple[float, ...]) -> None:
    """Of 2,000 samples 10 % may miss; 15 % is 7 standard deviations more, so that a false alarm is below 1e-10."""
    draws = np.random.default_rng(0).multinomial(40, shares, size=2000)
    mean = sum(height * share for height, share in enumerate(shares, 1))
    known = {tuple(each): interval(each, 0.9) for each in {tuple(map(int, row)) for row in draws}}
    missed = [not (known[row][0] <= mean <= known[row][1]) for row in (tuple(map(int, row)) for row in draws)]
    assert np.mean(missed) < 0.15


@pytest.mark.parametrize("tree", [*TREES.values(), HIERARCHY])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_ranked_measures_are_those_of_loops(tree: Hierarchy, k: int) -> None:
    classes = len(tree.classes)
    k = min(k, classes)
    draw = torch.Generator().manual_seed(k)
    logits, labels = torch.randn(30, classes, generator=draw), torch.randint(classes, (30,), generator=draw)
    D, height = tree.distances.tolist(), tree.height
    hdist, best, wrong, precision = [], [], [], []
    for row, y in zip(logits.tolist(), labels.tolist(), strict=True):
        order = sorted(range(classes), key=lambda j: -row[j])
        apart = [D[y][j] for j in order]
        hdist.append(sum(apart[:k]) / k)
        best.append(min(apart[:k]))
        wrong += [hdist[-1]] if order[0] != y else []
        ideal = sorted((1 - d / height for d in D[y]), reverse=True)
        precision.append([sum(1 - d / height for d in apart[:n]) / sum(ideal[:n]) for n in range(1, k + 1)])
    made = ranked(logits, labels, tree, k)
    assert made.hdist == pytest.approx(sum(hdist) / 30)
    assert made.best == pytest.approx(sum(best) / 30)
    assert made.mistakes == pytest.approx(sum(wrong) / len(wrong))
    assert made.hprecision == pytest.approx(sum(each[-1] for each in precision) / 30)
    assert made.hmap == pytest.approx(sum(sum(each) / k for each in precision) / 30)
    if k == 1:
        assert made.hdist == pytest.approx(mistakes("x", logits.argmax(1), labels, tree, 0.95).hdist)


def test_the_best_possible_ranking_has_precision_1_and_no_mistakes() -> None:
    made = ranked(-TREE.distances.float(), torch.arange(6), TREE, 4)
    assert (made.hprecision, made.hmap, made.best, made.mistakes) == (1.0, 1.0, 0.0, None)


@pytest.fixture(scope="module")
def audited(plain: nn.Module, test_part: Dataset) -> Findings:
    return FEW.run(plain, test_part, seed=0, name="plain", source="memory")[0]


def test_an_audit_states_severity_without_attack_and_under_each(audited: Findings, tmp_path) -> None:
    found = audited.severity
    assert found is not None
    by_label = {each.label: each for each in found.conditions}
    assert list(by_label) == [CLEAN, *(each.label for each in audited.attacks), FIRST]
    assert (found.height, found.chance) == (3, HIERARCHY.chance)
    assert by_label[CLEAN].error.successes == 80 - audited.clean.successes
    for attack in audited.attacks:
        assert by_label[attack.label].error.successes == 80 - attack.accuracy.successes
    assert by_label[FIRST].error.successes == 80 - audited.worst_case.successes
    assert [each.k for each in found.ranked] == [1, 5, 10]
    assert found.ranked[0].hdist == pytest.approx(by_label[CLEAN].hdist)
    audited.save(tmp_path / "audit.json")
    assert Findings.load(tmp_path / "audit.json").severity == found


def test_the_audit_adds_an_attack_that_forces_more_severe_mistakes_and_marks_it(audited: Findings) -> None:
    usual, forced = audited.severity.conditions[1:3]
    assert "Hierarchy-targeted" in forced.label
    assert (usual.aimed, forced.aimed) == (False, True)
    assert forced.hdist > usual.hdist > 0
    assert forced.by_height[-1] > usual.by_height[-1]


def test_the_first_success_counts_where_several_attacks_succeed(audited: Findings) -> None:
    usual, _, first = audited.severity.conditions[1:]
    extra = first.error.successes - usual.error.successes
    assert sum(a - b for a, b in zip(first.by_height, usual.by_height, strict=True)) == extra
    assert all(a >= b for a, b in zip(first.by_height, usual.by_height, strict=True))


def test_the_page_and_the_comparison_show_it(audited: Findings) -> None:
    page = render([Subject("plain", audited)])
    assert 'id="severity"' in page
    assert f"{audited.severity.conditions[1].severity:.3f}" in page
    assert "Hierarchy-targeted PGD-20 *" in page
    (row,) = comparison([Subject("plain", audited)])
    made = audited.severity.conditions
    assert (row["hdist"], row["hdist under attack"]) == (round(made[0].hdist, 3), round(made[-1].hdist, 3))
    silent = audited.model_copy(update={"severity": None})
    assert 'id="severity"' not in render([Subject("plain", silent)])
    assert "hdist" not in comparison([Subject("plain", silent)])[0]


def test_each_geometry_of_a_union_is_aimed_at_but_not_rotations() -> None:
    union = Union((THREAT, L2(0.5), RotationTranslation(1.0, 10.0)))
    seen = Behaviour(10, 0.0, 0.0, False, False, True)
    made = attacks(union, HIERARCHY, seen, 20)
    assert [each.threat for each in made] == [THREAT, L2(0.5)]
    assert attacks(union, None, seen, 20) == attacks(union, HIERARCHY, replace(seen, differentiable=False), 20) == ()


def test_models_that_are_no_numbers_or_random_or_without_gradient(plain: nn.Module, test_part: Dataset) -> None:
    def audit(before, after=lambda logits: logits) -> Findings:
        made = Defence(plain, before, after)
        return replace(FEW, points=10, attacks=(PGD(THREAT, 2),)).run(made, test_part, seed=0, name="d", source="m")[0]

    assert audit(lambda x: x + 0.1 * torch.randn_like(x)).severity is None
    hidden = audit(lambda x: x.detach())
    assert "hierarchy_pgd" not in [each.spec["name"] for each in hidden.attacks]
    assert hidden.severity is not None
    broken = audit(lambda x: x, lambda logits: logits * torch.nan).severity
    assert broken.conditions[0].by_height == (0, 0, 10)
    assert broken.ranked == ()


def test_a_tree_of_other_classes_or_in_another_order_is_refused(plain: nn.Module, test_part: Dataset) -> None:
    turned = Hierarchy(HIERARCHY.classes[::-1], HIERARCHY.tree)
    with pytest.raises(BadValue, match="must name the classes of 'digits' in the order of the labels: 0, 1, 2"):
        replace(FEW, hierarchy=turned).run(plain, test_part, seed=0, name="p", source="m")


def test_a_recipe_names_the_hierarchy_of_its_audit_and_of_its_objective() -> None:
    made = plan(load("digits-mistake-severity"))
    assert made.audit.hierarchy == HIERARCHY
    assert made.stages[0][1].objective.hierarchy == HIERARCHY
    text = "{name: hierarchy, classes: [a, b], tree: [a, b]}"
    given_in_place = plan(load("digits-plain", [f"audit.hierarchy={text}"]))
    assert given_in_place.audit.hierarchy == Hierarchy(("a", "b"), ["a", "b"])

"""Class trees: distances by brute force over random trees, what any such distance obeys, and files."""

from __future__ import annotations

import json
from itertools import combinations, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trivet.data.cifar10 import CLASSES
from trivet.data.hierarchy import Hierarchy, cifar10_hierarchy, digits_hierarchy, hierarchy_file
from trivet.errors import BadValue, TrivetError
from trivet.methods import build, spec_of

SHIPPED = {"digits": digits_hierarchy, "cifar10": cifar10_hierarchy}


@st.composite
def trees(draw: st.DrawFn) -> tuple[Any, int]:
    """A tree of nested lists whose leaves are c0, c1, …, with single children among them; and how many leaves."""
    shape = draw(st.recursive(st.none(), lambda node: st.lists(node, min_size=1, max_size=4), max_leaves=9))
    leaves: list[str] = []

    def filled(node: Any) -> Any:
        if node is None:
            leaves.append(f"c{len(leaves)}")
            return leaves[-1]
        return [filled(child) for child in node]

    tree = filled(shape)
    return ([tree, "c1"], 2) if len(leaves) == 1 else (tree, len(leaves))


def named(count: int) -> tuple[str, ...]:
    return tuple(f"c{number}" for number in range(count))


def paths(node: Any, above: tuple[int, ...] = ()) -> dict[str, tuple[int, ...]]:
    """Of each leaf the inner nodes above it that branch, from the root down, as places in the tree."""
    if isinstance(node, str):
        return {node: above}
    here = above if len(node) == 1 else (*above, id(node))
    return {leaf: path for child in node for leaf, path in paths(child, here).items()}


def brute_force(tree: Any, classes: tuple[str, ...]) -> torch.Tensor:
    """The lowest common ancestor is the last node two paths share; its height is the longest way down from there."""
    above = paths(tree)

    def distance(first: str, second: str) -> int:
        if first == second:
            return 0
        common = [node for node in above[first] if node in above[second]][-1]
        return max(len(path) - path.index(common) for path in above.values() if common in path)

    return torch.tensor([[distance(first, second) for second in classes] for first in classes])


@settings(deadline=None)
@given(trees())
def test_distances_are_those_of_brute_force(drawn: tuple[Any, int]) -> None:
    tree, count = drawn
    classes = named(count)[1::2] + named(count)[::2]  # in another order than the leaves
    assert torch.equal(Hierarchy(classes, tree).distances, brute_force(tree, classes))


@settings(deadline=None)
@given(trees())
def test_distances_are_a_symmetric_ultrametric(drawn: tuple[Any, int]) -> None:
    tree, count = drawn
    hierarchy = Hierarchy(named(count), tree)
    apart = hierarchy.distances
    assert torch.equal(apart, apart.T)
    assert torch.equal(apart == 0, torch.eye(count, dtype=torch.bool))
    assert bool((apart[:, :, None] <= torch.maximum(apart[:, None, :], apart.T[None])).all())
    pairs = [int(apart[i, j]) for i, j in combinations(range(count), 2)]
    assert hierarchy.chance == pytest.approx(sum(pairs) / len(pairs))
    assert hierarchy.height == max(pairs)


@settings(deadline=None)
@given(trees())
def test_single_children_names_of_nodes_and_the_order_of_siblings_change_nothing(drawn: tuple[Any, int]) -> None:
    tree, count = drawn

    def dressed(node: Any) -> Any:
        if isinstance(node, str):
            return {node: None}
        return {f"node {number}": [dressed(child)] for number, child in enumerate(reversed(node))}

    plain = Hierarchy(named(count), tree)
    other = Hierarchy(named(count), dressed(tree))
    assert torch.equal(plain.distances, other.distances)
    assert build("data", json.loads(json.dumps(spec_of(plain))), expects=Hierarchy) == plain
    assert len({plain, build("data", spec_of(plain))}) == 1


def test_the_order_of_the_classes_orders_the_distances() -> None:
    tree = [["a", "b"], "c"]
    there = Hierarchy(("c", "b", "a"), tree).distances
    assert there.tolist() == [[0, 2, 2], [2, 0, 1], [2, 1, 0]]
    assert torch.equal(there.flip(0).flip(1), Hierarchy(("a", "b", "c"), tree).distances)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_trees_have_three_levels_and_ten_classes(name: str) -> None:
    made = SHIPPED[name]()
    assert (made.height, len(made.classes)) == (3, 10)
    assert build("data", f"{name}_hierarchy", expects=Hierarchy) == made


def test_the_shipped_trees_say_what_their_pages_say() -> None:
    cifar, digits = cifar10_hierarchy(), digits_hierarchy()
    assert cifar.classes == CLASSES
    assert cifar.chance == pytest.approx(2.42, abs=0.005)
    wheels = {"airplane", "ship", "automobile", "truck"}
    pairs = [{"airplane", "ship"}, {"automobile", "truck"}, {"cat", "dog"}, {"deer", "horse"}, {"bird", "frog"}]
    for (i, first), (j, second) in product(enumerate(CLASSES), repeat=2):
        kin = 1 if {first, second} in pairs else 2 if (first in wheels) == (second in wheels) else 3
        assert cifar.distances[i, j] == (0 if i == j else kin)
    assert digits.classes == tuple("0123456789")
    assert digits.distances[4].tolist() == [3, 2, 3, 3, 0, 3, 3, 1, 3, 1]
    assert digits.chance == pytest.approx(2.378, abs=0.0005)


def test_files_in_yaml_and_json_are_read_alike(tmp_path) -> None:
    content = {"classes": ["cat", "dog", "ship"], "tree": {"animals": ["cat", "dog"], "vehicles": ["ship"]}}
    (tmp_path / "tree.json").write_text(json.dumps(content))
    (tmp_path / "tree.yaml").write_text("classes: [cat, dog, ship]\ntree:\n  animals: {cat: , dog: }\n  ship:\n")
    made = [hierarchy_file(tmp_path / name) for name in ("tree.json", "tree.yaml")]
    assert made[0] == made[1] == Hierarchy(("cat", "dog", "ship"), [["cat", "dog"], "ship"])


@pytest.mark.parametrize(
    ("classes", "tree", "said"),
    [
        ("a", "a", "classes=.* must be two"),
        ("aa", ["a"], "classes=.* must all differ"),
        ("ab", ["a", "b", "a"], "'a' comes twice"),
        ("ab", ["a", "b", "c"], "have more than these: c"),
        ("abc", ["a", "b"], "lack these: c"),
        ("ab", ["a", "b", []], "without children"),
        ("ab", ["a", 3], "not 3; quote it"),
    ],
)
def test_trees_that_do_not_fit_are_refused(classes: str, tree: Any, said: str) -> None:
    with pytest.raises(BadValue, match=said):
        Hierarchy(tuple(classes), tree)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yaml", "[a, b]", "must hold a list of classes and a tree"),
        ("a.yaml", "{classes: [a, b], tree: [a, b], more: 1}", "nothing else"),
        ("a.yaml", "{classes: [0, 1], tree: [0, 1]}", "quote numbers"),
        ("a.yaml", "{classes: [a, b], tree: [a]}", r"a\.yaml: tree"),
        ("a.yaml", "{classes: [a, b], tree: &t [a, *t]}", "deeper than 100|comes twice"),
        ("a.yaml", "classes: [a", "neither YAML nor JSON"),
        ("a.json", "{classes: [a, b]}", "neither YAML nor JSON"),
    ],
)
def test_files_that_hold_something_else_are_refused_by_name(tmp_path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(TrivetError, match=said):
        hierarchy_file(tmp_path / name)
    with pytest.raises(TrivetError, match="cannot be read"):
        hierarchy_file(tmp_path / "absent.yaml")

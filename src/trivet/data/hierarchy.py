"""Class hierarchies: how akin two classes are, as the height of their lowest common ancestor in a tree."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from torch import Tensor

from trivet.errors import BadValue, TrivetError, require
from trivet.methods import method

_DEEPEST = 100
"""Levels; far beyond WordNet's twenty, and what a file that contains itself runs into."""
_EXAMPLE = "{classes: [cat, dog, ship], tree: {animals: [cat, dog], vehicles: [ship]}}"


@method(title="Class hierarchy", paper="Bertinetto et al., CVPR 2020", year=2020, legs="robust")
@dataclass(frozen=True)
class Hierarchy:
    """A tree with the classes as leaves. D_ij is the height of the lowest common ancestor of classes i and j.

    A leaf has height 0, another node is one above the highest of its children: siblings that are leaves have D = 1.
    D is symmetric, 0 on the diagonal and there alone, and an ultrametric: D_ij <= max(D_ik, D_kj). Nodes with one
    child are no level of their own and are taken out. D counts levels and nothing else, so that it means as much as
    the tree does.

    Attributes:
        classes: the names in the order of the labels; at least two.
        tree: nested lists, or mappings whose keys are names for readers; a string, or a key without value, is a leaf.
            Kept as nested tuples without the names of inner nodes.
    """

    room: ClassVar[str] = "data"
    classes: tuple[str, ...]
    tree: Any

    def __post_init__(self) -> None:
        require(len(self.classes) >= 2, f"classes={list(self.classes)} must be two at least.")
        require(len(set(self.classes)) == len(self.classes), f"classes={list(self.classes)} must all differ.")
        leaves: set[str] = set()
        object.__setattr__(self, "tree", _tidy(self.tree, leaves, 0))
        for kind, odd in (("lack", set(self.classes) - leaves), ("have more than", leaves - set(self.classes))):
            require(not odd, f"tree=… must have exactly the classes as leaves; its leaves {kind} these: {_few(odd)}.")

    @property
    def distances(self) -> Tensor:
        """D, [K, K] int64, in the order of `classes`. The same tensor each time: copy it before changing it."""
        return _distances(self)

    @property
    def height(self) -> int:
        """The greatest D: that of classes which only the root has in common."""
        return int(self.distances.max())

    @property
    def chance(self) -> float:
        """The mean of D over all pairs of different classes: the severity of mistakes made uniformly at random."""
        classes = len(self.classes)
        return int(self.distances.sum()) / (classes * (classes - 1))


@method(title="Class hierarchy from a file")
def hierarchy_file(path: Path) -> Hierarchy:
    """The hierarchy in a YAML or JSON file with the fields `classes` and `tree`.

    Raises:
        TrivetError: no such file, or it holds something else.
    """
    try:
        text = path.read_text()
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise TrivetError(f"{path} cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise TrivetError(f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}.") from None
    fits = isinstance(content, dict) and set(content) == {"classes", "tree"} and isinstance(content["classes"], list)
    require(fits, f"{path} must hold a list of classes and a tree and nothing else, like {_EXAMPLE}.")
    named = all(isinstance(name, str) for name in content["classes"])
    require(named, f"{path}: classes={content['classes']} must be names; quote numbers.")
    try:
        return Hierarchy(tuple(content["classes"]), content["tree"])
    except BadValue as error:
        raise BadValue(f"{path}: {error}") from None


@method(title="Digits by the shape of their strokes")
def digits_hierarchy() -> Hierarchy:
    """Three levels for the digits and MNIST: groups of like shape, straight or round strokes, all. The choice is ours.

    {4, 7, 9}, 1 are straight; {3, 5, 8}, {0, 6}, 2 are round. Chance: 2.378.
    """
    return _shipped("digits")


@method(title="Classes of CIFAR-10")
def cifar10_hierarchy() -> Hierarchy:
    """Three levels: pairs, vehicles or animals, all. The pairs are ours.

    {airplane, ship}, {automobile, truck}; {cat, dog}, {deer, horse}, {bird, frog}. Chance: 2.422.
    """
    return _shipped("cifar10")


def _shipped(name: str) -> Hierarchy:
    return hierarchy_file(Path(str(resources.files(__package__).joinpath(f"{name}_hierarchy.yaml"))))


def _tidy(node: Any, leaves: set[str], depth: int) -> Any:
    """`node` as nested tuples without single children; its leaves are added to `leaves`, none may come twice."""
    require(depth < _DEEPEST, f"tree=… must not be deeper than {_DEEPEST} levels.")
    if isinstance(node, str):
        require(node not in leaves, f"tree=… must have every class once; {node!r} comes twice.")
        leaves.add(node)
        return node
    if isinstance(node, Mapping):
        children = [name if below is None else below for name, below in node.items()]
    else:
        require(isinstance(node, (list, tuple)), f"tree=… must hold names, lists and mappings, not {node!r}; quote it.")
        children = list(node)
    require(len(children) > 0, "tree=… must not have inner nodes without children.")
    made = tuple(_tidy(child, leaves, depth + 1) for child in children)
    return made[0] if len(made) == 1 else made


def _few(names: set[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


@cache
def _distances(hierarchy: Hierarchy) -> Tensor:
    label = {name: number for number, name in enumerate(hierarchy.classes)}
    matrix = torch.zeros(len(label), len(label), dtype=torch.int64)

    def fill(node: Any) -> tuple[int, list[int]]:
        """Height and labels of the leaves below `node`, after entering the distances between them."""
        if isinstance(node, str):
            return 0, [label[node]]
        parts = [fill(child) for child in node]
        height = 1 + max(tall for tall, _ in parts)
        for number, (_, mine) in enumerate(parts):
            others = [each for _, theirs in parts[:number] for each in theirs]
            here, there = torch.tensor(mine)[:, None], torch.tensor(others, dtype=torch.int64)[None]
            matrix[here, there] = height
            matrix[there.T, here.T] = height
        return height, [each for _, below in parts for each in below]

    fill(hierarchy.tree)
    return matrix

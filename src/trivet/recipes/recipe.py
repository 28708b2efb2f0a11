"""Recipes: YAML checked against types, with the file, line and field named when something is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from trivet import errors
from trivet.errors import FieldError, TrivetError, dotted

Spec = Annotated[dict[str, Any], BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value)]
"""A method and its settings, or its name alone."""
Settings = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)]
Lines = dict[errors.Path, int | str]
"""The line of each field, or the --set argument that gave it."""


class Recipe(BaseModel):
    """What a recipe may say. Each `Spec` names a method and its settings: `{name: pgd_at, steps: 10}`.

    Attributes:
        name: of the run, and of its folder unless --out is given.
        about: one sentence; paper: whose setting it is.
        seed: of every random draw.
        data: a source of the data room, with `train_limit` and `test_limit` for its first records only; left out
            where --data must say.
        environment: instead of data, what a policy learns in.
        model: a model, built for the data's input shape and number of classes; left out in recipes that only audit.
        threat: the perturbation set, for training and audit alike.
        stages: in order, each `{fit: {...}}` or another stage's name with its settings.
        audit: the settings of the audit.
    """

    model_config = ConfigDict(extra="forbid")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)
    about: str = ""
    paper: str = ""
    seed: int = Field(default=0, ge=0)
    data: Spec | None = None
    environment: Spec | None = None
    model: Spec | None = None
    threat: Spec
    stages: list[dict[str, Settings]] = []
    audit: Settings = Field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A validated recipe, where it came from, and where each of its fields was set.

    `trusted` says whether code that the recipe names by import path may run.
    """

    recipe: Recipe
    where: str
    lines: Lines
    trusted: bool

    def located(self, error: FieldError) -> TrivetError:
        """The same error, with file, line and field."""
        return _located(error.path, error.text, self.where, self.lines)

    def dump(self) -> str:
        """The recipe as YAML, every override applied."""
        return yaml.safe_dump(self.recipe.model_dump(exclude_defaults=True), sort_keys=False, allow_unicode=True)

    def imports(self) -> list[str]:
        """The user's code this recipe names, wherever it stands."""
        return list(_imports(self.recipe.model_dump()))


def shipped() -> dict[str, Path]:
    """The recipes that come with Trivet, by name."""
    folder = Path(str(resources.files(__package__)))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load(recipe: str | Path, overrides: Sequence[str] = (), *, data: str | None = None, trust: bool = False) -> Source:
    """Read a recipe: the name of a shipped one, a YAML file, or a run folder's.

    Args:
        recipe: name, file or run folder.
        overrides: `key=value` strings; keys are paths such as `threat.eps`, `stages[0].fit.epochs`, or
            `fit.epochs` for every stage of that name; values are YAML.
        data: replaces the recipe's data, as `data_spec` reads it.
        trust: whether a recipe inside a run folder, which may be somebody else's, may run code that it names by
            import path. A recipe elsewhere is the user's own.

    Raises:
        TrivetError: with file, line and field.
    """
    path = shipped().get(str(recipe), Path(recipe))
    inside_run = path.is_dir() or (path.name == "recipe.yaml" and (path.parent / "run.json").exists())
    if path.is_dir():
        path = path / "recipe.yaml"
    if not path.is_file():
        raise TrivetError(f"there is no recipe {str(recipe)!r}; give a YAML file or one of: {', '.join(shipped())}.")
    try:
        text = path.read_text()
        node = yaml.compose(text, Loader=_Loader)
        _refuse_duplicates(node, str(path))
        content = yaml.load(text, Loader=_Loader)  # noqa: S506  a SafeLoader that also reads 8/255 and 1e-4
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TrivetError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    lines: Lines = dict(_lines(node)) if node is not None else {}
    if not isinstance(content, dict):
        raise TrivetError(f"{path} must hold a mapping with name, data, model and stages; see `trivet recipes`.")
    for override in overrides:
        for path_set in _override(content, override):
            lines = _moved(lines, path_set, f"--set {override}")
    if data is not None:
        content["data"] = data_spec(data)
        lines = _moved(lines, ("data",), f"--data {data}")
    where = str(path)
    try:
        return Source(Recipe.model_validate(content), where, lines, trust or not inside_run)
    except ValidationError as error:
        first = error.errors()[0]
        text = first["msg"].removeprefix("Value error, ").rstrip(".")
        if first["type"] == "extra_forbidden":
            text = f"there is no such field; a recipe has {', '.join(Recipe.model_fields)}"
        raise _located(first["loc"], text + ".", where, lines) from None


def data_spec(argument: str) -> dict[str, Any]:
    """What `--data` means: a source's name, an .npz file, a folder of Parquet files or images, or hub:NAME."""
    if argument.startswith("hub:"):
        return {"name": "hub", "dataset": argument.removeprefix("hub:")}
    path = Path(argument)
    if path.suffix == ".npz":
        return {"name": "npz", "path": argument}
    if path.suffix == ".parquet" or (path.is_dir() and any(path.rglob("*.parquet"))):
        return {"name": "parquet", "path": argument}
    if path.is_dir():
        return {"name": "image_folder", "path": argument}
    return {"name": argument}


class _Loader(yaml.SafeLoader):
    """YAML without surprises: 5e-4 is a number, and so is 8/255."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
_Loader.add_implicit_resolver("!ratio", re.compile(r"^\d+(\.\d+)?/\d+(\.\d+)?$"), list("0123456789"))


def _ratio(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    above, below = str(loader.construct_scalar(node)).split("/")
    if float(below) == 0:
        raise yaml.constructor.ConstructorError(None, None, f"{node.value} divides by zero", node.start_mark)
    return float(above) / float(below)


_Loader.add_constructor("!ratio", _ratio)


def _lines(node: yaml.Node, path: errors.Path = ()) -> Iterator[tuple[errors.Path, int]]:
    yield path, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _lines(value, (*path, str(key.value)))
            yield (*path, str(key.value)), key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _lines(value, (*path, number))


def _moved(lines: Lines, path: errors.Path, place: str) -> Lines:
    """`lines` after the field at `path`, with all below it, was set elsewhere."""
    return {each: line for each, line in lines.items() if each[: len(path)] != path} | {path: place}


def _refuse_duplicates(node: yaml.Node | None, where: str) -> None:
    """YAML lets the last of two equal keys win, silently."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                raise TrivetError(f"{where}, line {key.start_mark.line + 1}: {key.value} is given twice; keep one.")
            seen.add(key.value)
            _refuse_duplicates(value, where)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_duplicates(value, where)


def _override(content: dict[str, Any], override: str) -> list[errors.Path]:
    """Apply one override to the recipe's content; the paths it set."""
    key, equals, text = override.partition("=")
    path: errors.Path = tuple(
        int(part) if part.isdigit() else part for part in key.strip().replace("[", ".").replace("]", "").split(".")
    )
    if not equals or "" in path:
        raise TrivetError(f"--set {override}: write it as key=value, for example --set threat.eps=8/255.")
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506  see load
    except yaml.YAMLError as error:
        why = getattr(error, "problem", None) or "it cannot be read"
        raise TrivetError(f"--set {override}: {text!r} is not a YAML value ({why}).") from None
    stages = content.get("stages") or []
    numbers = [n for n, stage in enumerate(stages) if isinstance(stage, dict) and path[0] in stage]
    targets: list[errors.Path] = [path] if path[0] in Recipe.model_fields else [("stages", n, *path) for n in numbers]
    if not targets:
        raise TrivetError(
            f"--set {override}: there is no field or stage {path[0]!r}; a recipe has {', '.join(Recipe.model_fields)}."
        )
    for target in targets:
        _put(content, target, value, override)
    return targets


def _put(content: Any, path: errors.Path, value: Any, override: str) -> None:
    for depth, part in enumerate(path[:-1]):
        inner = content.get(part) if isinstance(content, dict) else None
        if isinstance(content, list) and isinstance(part, int) and part < len(content):
            inner = content[part]
        elif isinstance(content, dict) and inner is None:
            inner = content[part] = {}
        if not isinstance(inner, (dict, list)):
            raise TrivetError(f"--set {override}: {dotted(path[: depth + 1])} is not a group of settings.")
        content = inner
    last = path[-1]
    if isinstance(content, list) and not (isinstance(last, int) and last < len(content)):
        raise TrivetError(
            f"--set {override}: {dotted(path[:-1])} is a list of {len(content)}; number its entries from 0."
        )
    content[last] = value


def _located(path: errors.Path, text: str, where: str, lines: Lines) -> TrivetError:
    known = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    place = known if isinstance(known, str) else f"{where}, line {known}" if known else where
    return TrivetError(f"{place}: {dotted(path)}: {text}" if path else f"{place}: {text}")


def _imports(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "import" in value:
            yield str(value["import"])
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _imports(each)

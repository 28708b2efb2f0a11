"""The register of methods: one decorator, and a method is known to recipes, the command line and the docs.

    @method(title="TRADES", paper="Zhang et al., ICML 2019", year=2019, legs="robust")
    @dataclass(frozen=True)
    class Trades(Objective): ...

A method is a dataclass, or a function with typed arguments, in a room (a sub-package) of Trivet. Rooms are scanned,
not listed: a new file in a room is a new method, with no other file to touch. Its arguments are the fields a recipe
may set; they are validated with pydantic against their annotations, unknown ones are errors.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar

from trivet.errors import BadValue, FieldError, Path

Leg = Literal["robust", "private", "small"]
Made = TypeVar("Made", bound=Callable[..., Any])

ROOMS = ("data", "models", "control", "threats", "certify", "privacy", "compression", "objectives", "training", "audit")
_LEGS: tuple[Leg, ...] = ("robust", "private", "small")
_METHODS: dict[tuple[str, str], Method] = {}


@dataclass(frozen=True)
class Method:
    """What the register knows of one method. `name` is how recipes call it; `make` builds it from its settings."""

    name: str
    room: str
    title: str
    paper: str
    year: int | None
    legs: tuple[Leg, ...]
    note: str
    make: Callable[..., Any]

    @property
    def settings(self) -> dict[str, inspect.Parameter]:
        """The arguments a recipe may give, by name."""
        return dict(inspect.signature(self.make).parameters)

    def makes(self, expected: type) -> bool:
        """Whether this builds values of a type, by its class or by what its signature says it returns."""
        made = self.make if isinstance(self.make, type) else typing.get_type_hints(self.make).get("return")
        return isinstance(made, type) and issubclass(made, expected)


def method(
    *, title: str, paper: str = "", year: int | None = None, legs: str = "", name: str = "", note: str = ""
) -> Callable[[Made], Made]:
    """Register the decorated dataclass or function under `name` (default: its own name in snake case).

    Args:
        title: the name the field uses, e.g. "PGD adversarial training".
        paper: authors and venue, empty for what no paper owns.
        year: of the paper.
        legs: which of "robust private small" it serves, separated by spaces.
        note: what a user must know before trusting it ("reconstruction", "historical: broken by …").
    """
    served = tuple(leg for leg in _LEGS if leg in legs.split())

    def register(made: Made) -> Made:
        package, _, inside = made.__module__.partition(".")
        room = inside.partition(".")[0]
        if package != __package__ or room not in ROOMS:
            raise BadValue(
                f"{made.__module__} is in no room of Trivet, so {made.__qualname__} cannot be registered; "
                "recipes name code from elsewhere as {import: package.module:attribute}."
            )
        key = name or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", made.__name__).lower()
        _make_strict(made)
        other = _METHODS.get((room, key))
        if other is not None and other.make.__module__ != made.__module__:
            raise BadValue(f"{made.__module__} and {other.make.__module__} both register {key!r} in {room}.")
        _METHODS[room, key] = Method(key, room, title, paper, year, served, note, made)
        return made

    return register


def _make_strict(made: Callable[..., Any]) -> None:
    """Tell pydantic how to read a recipe for a dataclass: unknown fields are errors, protocols are checked by type."""
    if isinstance(made, type):
        made.__pydantic_config__ = {"extra": "forbid", "arbitrary_types_allowed": True}  # type: ignore[attr-defined]


@cache
def _scan(room: str) -> None:
    package = importlib.import_module(f"trivet.{room}")
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)


def methods(room: str | None = None) -> list[Method]:
    """All registered methods, or those of one room, in order of room and name."""
    for each in (room,) if room else ROOMS:
        _scan(each)
    return [
        _METHODS[key] for key in sorted(_METHODS, key=lambda k: (ROOMS.index(k[0]), k[1])) if room in (None, key[0])
    ]


def find(room: str, name: str, expects: type | None = None) -> Method:
    """The method called `name` in `room` that makes an `expects`, or an error that lists those there are."""
    offered = [each for each in methods(room) if expects is None or each.makes(expects)]
    for each in offered:
        if each.name == name:
            return each
    known = ", ".join(each.name for each in offered)
    known_elsewhere = any(each.name == name for each in methods(room))
    text = f"{name} is no {expects.__name__}" if expects and known_elsewhere else f"there is no {name!r} in {room}"
    raise FieldError(("name",), f"{text}; choose one of: {known}.")


def build(room: str, spec: Mapping[str, Any] | str, *, expects: type | None = None, **context: Any) -> Any:
    """Make the method that `spec` describes: `{"name": "pgd_at", "steps": 10}`, or just its name.

    `{"import": "package.module:attribute", …}` names the user's own code instead: the attribute is called with the
    other settings. Whoever calls `build` has decided that this code may run.

    `expects` is the type of value wanted, for rooms that make several (threat models and attacks).
    `context` offers values (the recipe's threat, the input shape) that are used where the method has an argument
    of that name and `spec` does not set it. A nested spec is built by the room of the field's type
    (the class attribute `room` of `ThreatModel`, `Attack`, `Objective`, …).

    Raises:
        FieldError: unknown method, unknown or missing setting, or a value of the wrong type or range.
    """
    settings: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
    found = _imported(room, settings) if "import" in settings else _named(room, settings, expects)
    hints = typing.get_type_hints(found.make)
    for field, value in settings.items():
        inner = _protocol_of(hints.get(field))
        if inner is None:
            continue
        if isinstance(value, (Mapping, str)):
            settings[field] = _built_field((field,), inner, value, context)
        elif isinstance(value, (list, tuple)):
            settings[field] = tuple(
                _built_field((field, number), inner, each, context) if isinstance(each, (Mapping, str)) else each
                for number, each in enumerate(value)
            )
    offered = {key: value for key, value in context.items() if key in found.settings and key not in settings}
    made = _validated(found, settings | offered)
    if expects is not None and not isinstance(made, expects):
        raise FieldError((), f"{found.name} made a {type(made).__name__}, not a {expects.__name__}.")
    return made


def _named(room: str, settings: dict[str, Any], expects: type | None) -> Method:
    name = settings.pop("name", None)
    if not isinstance(name, str):
        offered = [each.name for each in methods(room) if expects is None or each.makes(expects)]
        raise FieldError((), f"needs a name, one of: {', '.join(offered)}.")
    return find(room, name, expects)


def _imported(room: str, settings: dict[str, Any]) -> Method:
    path = settings.pop("import")
    module, _, attribute = str(path).partition(":")
    try:
        make = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise FieldError(
            ("import",), f"cannot import {path!r} ({error}); write it as package.module:attribute."
        ) from None
    if isinstance(make, type) and dataclasses.is_dataclass(make):
        _make_strict(make)
    return Method(str(path), room, str(path), "", None, (), "the user's own", make)


def _protocol_of(annotation: Any) -> Any:
    """The type with a room that builds values for a field: of `Attack`, `Attack | None`, `tuple[Attack, ...]`."""
    options = (annotation, *typing.get_args(annotation))
    return next((option for option in options if isinstance(getattr(option, "room", None), str)), None)


def _built_field(path: Path, protocol: Any, spec: Mapping[str, Any] | str, context: Mapping[str, Any]) -> Any:
    try:
        return build(protocol.room, spec, expects=protocol, **context)
    except FieldError as error:
        raise FieldError((*path, *error.path), error.text) from None


def _validated(found: Method, settings: Mapping[str, Any]) -> Any:
    from pydantic import ConfigDict, TypeAdapter, ValidationError, validate_call

    try:
        if dataclasses.is_dataclass(found.make):
            return TypeAdapter(found.make).validate_python(dict(settings))
        if isinstance(found.make, type):  # a user's plain class: it checks its own arguments
            return found.make(**settings)
        return validate_call(config=ConfigDict(arbitrary_types_allowed=True))(found.make)(**settings)
    except TypeError as error:
        raise FieldError((), f"{found.name} cannot be made: {error}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            text = f"{found.name} has no such setting; it has: {', '.join(found.settings)}."
        elif first["type"] in ("missing", "missing_argument"):
            text = f"{found.name} needs this setting."
        else:
            text = first["msg"].removeprefix("Value error, ").rstrip(".") + "."
        # A check of our own names its field at the start of the sentence, "epochs=0 must be …".
        named = re.match(r"(\w+)=", text)
        own = (named[1],) if named and not first["loc"] and named[1] in found.settings else ()
        raise FieldError((*first["loc"], *own), text) from None


def spec_of(made: Any) -> dict[str, Any]:
    """The spec from which `build` makes an equal object, as JSON values: for run folders, claims and reports."""
    found = next((m for m in _METHODS.values() if m.make is type(made)), None)
    # The user's own class is known by where it lives.
    spec = {"name": found.name} if found else {"import": f"{type(made).__module__}:{type(made).__qualname__}"}
    for field in dataclasses.fields(made):
        if field.init:
            spec[field.name] = _plain(getattr(made, field.name))
    return spec


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    return spec_of(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value

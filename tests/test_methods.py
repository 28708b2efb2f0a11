"""The register: what is in a room is known, what is asked for is checked, and a spec makes an equal object again."""

from __future__ import annotations

import inspect

import pytest

from trivet import methods
from trivet.errors import BadValue, FieldError
from trivet.objectives.objective import Objective
from trivet.objectives.pgd_at import PgdAt
from trivet.threats.linf import Linf
from trivet.threats.pgd import PGD

THREAT = Linf(0.1)


def test_a_spec_builds_a_method_and_the_context_fills_what_is_not_set() -> None:
    attack = methods.build("threats", {"name": "pgd", "steps": 7}, threat=THREAT)
    assert attack == PGD(THREAT, steps=7)


def test_what_a_spec_sets_wins_over_the_context() -> None:
    attack = methods.build("threats", {"name": "pgd", "threat": {"name": "linf", "eps": 0.2}}, threat=THREAT)
    assert attack.threat == Linf(0.2)


@pytest.mark.parametrize("name", ["plain", "pgd_at", "trades", "mart", "alp", "fast_at", "gaussian"])
def test_spec_of_is_the_inverse_of_build(name: str) -> None:
    settings = {"sigma": 0.1} if name == "gaussian" else {}
    made = methods.build("objectives", {"name": name, **settings}, threat=THREAT)
    assert methods.build("objectives", methods.spec_of(made)) == made


def test_lists_of_specs_are_built_one_by_one() -> None:
    fit = methods.build(
        "training",
        {"name": "fit", "objective": "plain", "augment": ["horizontal_flip", {"name": "random_crop", "padding": 2}]},
    )
    assert [type(each).__name__ for each in fit.augment] == ["HorizontalFlip", "RandomCrop"]
    assert methods.build("training", methods.spec_of(fit)) == fit


@pytest.mark.parametrize(
    ("spec", "path", "words"),
    [
        ({"name": "pdg"}, ("name",), "there is no 'pdg' in threats; choose one of: affine, apgd"),
        ({"name": "pgd", "stepz": 3}, ("stepz",), "has no such setting; it has: threat, steps"),
        ({"name": "pgd", "steps": "many"}, ("steps",), "integer"),
        ({"name": "pgd", "steps": 0}, ("steps",), "steps=0 must be at least 1"),
        ({"name": "pgd", "threat": {"name": "linf", "eps": 2}}, ("threat", "eps"), "eps=2"),
        ({"name": "pgd", "threat": "fgsm"}, ("threat", "name"), "fgsm is no ThreatModel; choose one of: l1, l2, linf"),
        ({"name": "pgd", "threat": {"name": "linf"}}, ("threat", "eps"), "needs this setting"),
        ({"steps": 3}, (), "needs a name"),
        ({"import": "no.such.module:x"}, ("import",), "cannot import"),
        ({"import": "math"}, ("import",), "cannot import"),
    ],
)
def test_a_wrong_spec_names_the_field_and_the_mend(spec: dict, path: tuple, words: str) -> None:
    with pytest.raises(FieldError) as caught:
        methods.build("threats", spec, threat=THREAT)
    assert caught.value.path == path
    assert words in str(caught.value)


def test_errors_in_lists_carry_their_position() -> None:
    with pytest.raises(FieldError) as caught:
        methods.build("training", {"name": "fit", "objective": "plain", "augment": ["random_crop", "no_such"]})
    assert caught.value.path == ("augment", 1, "name")


def test_values_are_never_evaluated() -> None:
    with pytest.raises(FieldError):
        methods.build("threats", {"name": "pgd", "steps": "__import__('os').getpid()"}, threat=THREAT)


class Squared(Objective):
    """A user's objective."""

    def losses(self, model, batch, perturbed, progress):
        raise NotImplementedError


def test_the_users_own_code_is_named_by_import_path() -> None:
    made = methods.build("objectives", {"import": f"{__name__}:Squared"})
    assert isinstance(made, Squared)


def test_what_an_import_makes_must_be_what_is_wanted() -> None:
    with pytest.raises(FieldError, match="made a Recorder, not a Objective"):
        methods.build("objectives", {"import": f"{__name__}:Recorder"}, expects=Objective)


class Recorder:
    """No objective."""


def test_what_lies_outside_the_rooms_cannot_be_registered() -> None:
    with pytest.raises(BadValue, match="is in no room of Trivet"):
        methods.method(title="x")(Recorder)


def test_two_files_cannot_register_one_name() -> None:
    def other() -> None: ...

    other.__module__ = "trivet.threats.elsewhere"
    with pytest.raises(BadValue, match="both register 'pgd'"):
        methods.method(title="x", name="pgd")(other)


@pytest.mark.parametrize("each", methods.methods(), ids=lambda m: f"{m.room}/{m.name}")
def test_every_method_is_documented_and_typed(each: methods.Method) -> None:
    assert each.title
    assert each.make.__doc__
    assert not each.make.__doc__.startswith(each.make.__name__ + "("), "a dataclass's generated docstring says nothing"
    for name, parameter in each.settings.items():
        assert parameter.annotation is not inspect.Parameter.empty, f"{name} of {each.name} has no type"
    if each.paper:
        assert each.year, f"{each.name} names a paper but no year"


def test_the_objectives_of_the_baselines_are_all_here() -> None:
    names = {each.name for each in methods.methods("objectives")}
    assert names >= {"plain", "fast_at", "free_at", "pgd_at", "trades", "mart", "alp", "awp", "gaussian"}
    assert methods.find("objectives", "pgd_at").make is PgdAt

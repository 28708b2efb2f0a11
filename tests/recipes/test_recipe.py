"""Recipes: what is wrong is named by file, line and field; overrides are checked like the file itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from trivet.errors import TrivetError
from trivet.recipes.plan import plan
from trivet.recipes.recipe import Recipe, data_spec, load, shipped

GOOD = """\
name: tiny
data: {name: digits, train_limit: 100, test_limit: 50}
model: {name: mlp}
threat: {name: linf, eps: 8/255}
stages:
  - fit:
      objective: {name: pgd_at, steps: 3}
      epochs: 2
      optimizer:
        name: sgd
        lr: 5e-2
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_is_valid_and_says_what_it_is(name: str) -> None:
    built = plan(load(name))
    assert built.recipe.name == name
    assert built.recipe.about


def test_ratios_and_exponents_are_numbers(tmp_path: Path) -> None:
    built = plan(load(written(tmp_path, GOOD)))
    assert built.threat.eps == 8 / 255
    assert built.stages[0][1].optimizer.lr == 0.05  # type: ignore[attr-defined]


def test_the_threat_of_the_recipe_reaches_objective_and_audit(tmp_path: Path) -> None:
    built = plan(load(written(tmp_path, GOOD)))
    assert built.stages[0][1].objective.threat == built.audit.threat == built.threat  # type: ignore[attr-defined]


def test_a_dumped_recipe_is_the_same_recipe(tmp_path: Path) -> None:
    source = load(written(tmp_path, GOOD), ["fit.epochs=7", "seed=3"])
    again = load(written(tmp_path, source.dump()))
    assert again.recipe == source.recipe


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("epochs: 2", "epochs: 0", ["line 8", "stages[0].fit.epochs", "epochs=0 must be at least 1"]),
        ("epochs: 2", "epochs: soon", ["line 8", "stages[0].fit.epochs", "integer"]),
        ("epochs: 2", "epoch: 2", ["line 8", "stages[0].fit.epoch", "no such setting"]),
        ("name: pgd_at", "name: pgd_ta", ["line 7", "stages[0].fit.objective.name", "there is no 'pgd_ta'", "pgd_at"]),
        ("lr: 5e-2", "lr: -1", ["line 11", "stages[0].fit.optimizer.lr", "lr=-1"]),
        ("eps: 8/255", "eps: 3", ["line 4", "threat.eps", "eps=3"]),
        ("eps: 8/255", "eps: 8/0", ["divides by zero"]),
        ("eps: 8/255", "eps: \"__import__('os').getpid()\"", ["line 4", "threat.eps", "valid number"]),
        ("name: linf", "name: pgd", ["line 4", "threat.name", "pgd is no ThreatModel; choose one of: l1, l2, linf"]),
        ("name: linf", "size: 1", ["line 4", "threat", "needs a name, one of: l1, l2, linf"]),
        ("name: tiny", "name: ../../etc", ["line 1", "name"]),
        ("name: tiny", "name: tiny\nspeed: 11", ["line 2", "speed", "there is no such field", "stages"]),
        ("name: tiny", "name: tiny\nname: again", ["line 2", "name is given twice"]),
        ("model: {name: mlp}", "model: [mlp]", ["line 3", "model", "dictionary"]),
        ("  - fit:", "  - fat:", ["line 6", "stages[0].fat", "there is no 'fat'"]),
        ("  - fit:", "  - cosine:", ["line 6", "stages[0].cosine.name", "cosine is no Stage; choose one of", "fit,"]),
        ("threat: {name: linf, eps: 8/255}", "", ["threat", "Field required"]),
        ("threat:", "threat: [", ["not valid YAML"]),
        ("epochs: 2", "epochs: !!python/object/apply:os.getpid []", ["not valid YAML"]),
    ],
)
def test_what_is_wrong_is_named_by_line_and_field(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    assert old in GOOD
    path = written(tmp_path, GOOD.replace(old, new))
    with pytest.raises(TrivetError) as caught:
        plan(load(path))
    message = str(caught.value)
    assert "\n" not in message
    for word in [str(path), *words]:
        assert word in message


def test_a_name_alone_is_a_method_and_nothing_its_defaults(tmp_path: Path) -> None:
    lines = (
        "name: s",
        "data: digits",
        "model: mlp",
        "threat: {name: linf, eps: 0.1}",
        "stages: [fit: {objective: pgd_at}]",
        "audit:",
    )
    short = written(tmp_path, "\n".join(lines))
    recipe = plan(load(short)).recipe
    assert (recipe.data, recipe.model, recipe.audit) == ({"name": "digits"}, {"name": "mlp"}, {})


def test_an_override_is_set_and_checked(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    source = load(path, ["stages[0].fit.epochs=5", "fit.optimizer.lr=1e-3", "threat.eps=4/255", "data.train_limit=60"])
    fit = plan(source).stages[0][1]
    assert (fit.epochs, fit.optimizer.lr) == (5, 1e-3)  # type: ignore[attr-defined]
    assert source.recipe.data == {"name": "digits", "train_limit": 60, "test_limit": 50}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("fit.epochs=zero", "--set fit.epochs=zero: stages[0].fit.epochs"),
        ("fit.epocs=3", "stages[0].fit.epocs"),
        ("fit.epochs", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("fat.epochs=3", "there is no field or stage 'fat'"),
        ("stages[4].fit.epochs=3", "not a group of settings"),
        ("name.x=3", "not a group of settings"),
        ("threat.eps=[1", "not a YAML value"),
        ("seed=-1", "--set seed=-1: seed"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(TrivetError) as caught:
        plan(load(written(tmp_path, GOOD), [override]))
    assert words in str(caught.value)


def test_an_unknown_recipe_lists_those_there_are() -> None:
    with pytest.raises(TrivetError, match="digits-pgd-at"):
        load("no-such-recipe")


def test_data_arguments_mean_what_help_says(tmp_path: Path) -> None:
    (tmp_path / "a.npz").touch()
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "train.parquet").touch()
    (tmp_path / "i").mkdir()
    assert data_spec("digits") == {"name": "digits"}
    assert data_spec("hub:ylecun/mnist") == {"name": "hub", "dataset": "ylecun/mnist"}
    assert data_spec(str(tmp_path / "a.npz"))["name"] == "npz"
    assert data_spec(str(tmp_path / "p"))["name"] == "parquet"
    assert data_spec(str(tmp_path / "i"))["name"] == "image_folder"


CODE = """\
from torch import nn
import pathlib
pathlib.Path("ran").touch()

def net(input_shape, num_classes, width: int = 3):
    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[1] * input_shape[2], width), nn.Linear(width, num_classes))

def no_net(input_shape, num_classes):
    return "net"
"""


@pytest.fixture
def with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "users_nets", raising=False)
    (tmp_path / "users_nets.py").write_text(CODE)
    return written(tmp_path, GOOD.replace("{name: mlp}", '{import: "users_nets:net", width: 5}'))


def test_the_users_model_is_imported_by_name_and_said_aloud(
    with_code: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built = plan(load(with_code))
    model = built.model(built.splits().train)
    assert model[1].out_features == 5  # type: ignore[index]
    assert "importing users_nets:net" in capsys.readouterr().err


def test_a_recipe_in_a_run_folder_imports_nothing_unless_trusted(with_code: Path) -> None:
    with pytest.raises(TrivetError, match="--trust-code"):
        plan(load(with_code.parent))
    assert not Path("ran").exists()


def test_an_import_that_makes_no_model_is_refused(with_code: Path) -> None:
    built = plan(load(with_code, ["model={import: users_nets:no_net}"]))
    with pytest.raises(TrivetError, match="made a str"):
        built.model(built.splits().train)


def test_a_recipe_has_the_fields_it_documents() -> None:
    documented = Recipe.__doc__ or ""
    assert all(f"{field}:" in documented for field in Recipe.model_fields)

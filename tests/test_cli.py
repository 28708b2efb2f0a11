"""The command line as a user meets it: every command, wrong arguments included, with status and one sentence."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import trivet
from trivet import cli
from trivet.cli import main
from trivet.files import load_tensors

RECIPE = """\
name: tiny
about: A recipe for tests.
data: {name: digits, train_limit: 200, test_limit: 60}
model: {name: small_cnn}
threat: {name: linf, eps: 0.1}
stages:
  - fit:
      objective: {name: fast_at}
      epochs: 4
      batch_size: 50
      optimizer: {name: adam, lr: 5e-3}
audit:
  attacks: [{name: pgd, steps: 3}]
  points: 40
  curve_points: 20
  latency: [1]
  certificate: {name: smoothing, sigma: 0.1, n: 200}
  certificate_points: 10
"""


class Result(NamedTuple):
    status: int
    out: str
    err: str


class Shell:
    """Runs `trivet` in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> Result:
        self.monkeypatch.setattr(sys, "argv", ["trivet", "--no-keep-memory", *map(str, arguments)])
        self.capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        return Result(status, *self.capsys.readouterr())

    def json(self, *arguments: object) -> object:
        result = self(*arguments, "--json")
        assert result.status == 0, result.err
        return json.loads(result.out)


@pytest.fixture
def sh(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(monkeypatch, capsys)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained and audited."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE)
    run = trivet.train_model(recipe, out=folder / "tiny")
    trivet.audit_model(run.folder.path)
    return run.folder.path


COMMANDS = ("recipes", "methods", "train", "audit", "certify", "compare", "report", "demo")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(sh: Shell, command: str) -> None:
    result = sh(command, "--help")
    assert result.status == 0
    assert f"trivet {command}" in result.out
    assert (getattr(cli, command).__doc__ or "?")[:30] in result.out


def test_help_lists_every_command(sh: Shell) -> None:
    result = sh("--help")
    assert all(command in result.out for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "no-such-recipe"], "there is no recipe 'no-such-recipe'"),
        (["train", "digits-plain", "--set", "fit.epochs=0"], "--set fit.epochs=0: stages[0].fit.epochs: epochs=0 must"),
        (["train", "digits-plain", "--set", "nonsense"], "write it as key=value"),
        (
            ["train", "digits-plain", "--data", "no-such-data"],
            "--data no-such-data: data.name: there is no 'no-such-data' in data; choose one of: adapted, cifar10,",
        ),
        (["train", "digits-plain", "--data", "absent.npz"], "absent.npz"),
        (["train", "digits-plain", "--device", "toaster"], "there is no device 'toaster'"),
        (["train", "audit", "--data", "digits"], "no stages"),
        (["audit", "no-such-run"], "there is no run folder or model file no-such-run"),
        (["audit", "digits-plain"], "train it first: trivet train digits-plain"),
        (["audit", "."], "is not a run folder"),
        (["certify", "no-such-run", "--sigma", "0.1"], "there is no run folder"),
        (["train", "digits-plain", "--out", "/proc/nowhere"], "cannot make /proc/nowhere"),
        (["train", "digits-plain", "--set", "threat=pgd"], "--set threat=pgd: threat.name: pgd is no ThreatModel"),
        (["train", "digits-plain", "--set", "threat.eps=2"], "--set threat.eps=2: threat.eps: eps=2"),
        (["train", "digits-plain", "--set", "threat.eps=1/0"], "divides by zero"),
        (["compare", "no-such-run"], "is not a run folder"),
        (["report", "no-such-run"], "is not a run folder"),
        (["methods", "--room", "cellar"], "there is no room 'cellar'"),
    ],
)
def test_a_mistake_is_one_sentence_and_a_status(sh: Shell, arguments: list[str], words: str) -> None:
    result = sh(*arguments)
    assert result.status == 2
    assert result.err.startswith("trivet: ")
    assert words in result.err
    assert result.err.count("\n") == 1
    assert not result.out
    assert not Path("runs").exists(), "a refused run leaves nothing behind"


@pytest.mark.parametrize("arguments", [["fly"], ["train"], ["train", "x", "--fast"], ["certify", "x", "--n", "many"]])
def test_a_wrong_spelling_shows_usage(sh: Shell, arguments: list[str]) -> None:
    result = sh(*arguments)
    assert result.status == 2
    assert "Usage" in result.err


def test_recipes_and_methods_are_listed_for_people_and_machines(sh: Shell) -> None:
    names = [row["recipe"] for row in sh.json("recipes")]  # type: ignore[attr-defined]
    assert names == list(trivet.list_recipes())
    assert "digits-pgd-at" in sh("recipes").out
    rows = sh.json("methods", "--room", "objectives")
    assert {"trades", "pgd_at", "awp"} <= {row["name"] for row in rows}  # type: ignore[attr-defined]
    assert "TRADES" in sh("methods", "--room", "objectives").out


def test_a_run_is_trained_once_and_only_resumed_when_asked(sh: Shell, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE)
    first = sh("train", recipe, "--set", "fit.epochs=1")
    assert first.status == 0
    assert "trivet audit runs/tiny" in first.out
    again = sh("train", recipe)
    assert (again.status, again.err.count("\n")) == (2, 1)
    assert "--resume" in again.err
    resumed = sh.json("train", "runs/tiny", "--resume")
    assert len(resumed["history"]) == 1  # type: ignore[index]
    for others in (["--set", "fit.epochs=2"], []):  # the second: the file as it stands, which would train longer
        other = sh("train", recipe, *others, "--resume")
        assert other.status == 2
        assert "other settings" in other.err
    assert sh("train", recipe, "--set", "fit.epochs=1", "--resume").status == 0


def test_somebody_elses_run_imports_nothing_when_resumed_or_audited(sh: Shell, tmp_path: Path) -> None:
    code = "from pathlib import Path\nPath('ran').touch()\nfrom trivet.models.mlp import mlp\n"
    (tmp_path / "their_net.py").write_text(code)
    sys.path.insert(0, str(tmp_path))
    run = tmp_path / "theirs"
    run.mkdir()
    (run / "recipe.yaml").write_text(RECIPE.replace("{name: small_cnn}", '{import: "their_net:mlp"}'))
    try:
        (run / "run.json").write_text("{}")
        calls = (["train", run, "--resume"], ["train", run / "recipe.yaml", "--out", "x"], ["audit", run])
        for arguments in calls:
            result = sh(*arguments)
            assert (result.status, "--trust-code" in result.err) == (2, True), arguments
        assert not Path("ran").exists()
        trusted = sh("train", run / "recipe.yaml", "--out", "mine", "--set", "fit.epochs=1", "--trust-code")
        assert trusted.status == 0
        assert Path("ran").exists(), "the test could not have failed"
    finally:
        sys.path.remove(str(tmp_path))


def test_a_run_of_the_users_own_data(sh: Shell, tmp_path: Path) -> None:
    import numpy as np

    images = np.random.default_rng(0).integers(0, 256, (40, 1, 12, 12), dtype=np.uint8)
    labels = np.arange(40) % 3
    np.savez(tmp_path / "mine.npz", x_train=images, y_train=labels, x_test=images[:9], y_test=labels[:9])
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    result = sh("train", "tiny.yaml", "--data", "mine.npz", "--set", "fit.epochs=1", "--json")
    assert result.status == 0, result.err
    assert load_tensors(Path("runs/tiny/weights.safetensors"))[1]["history"][0]["steps"] == 1


def test_a_run_is_audited_compared_and_reported(sh: Shell, trained: Path, tmp_path: Path) -> None:
    findings = sh.json("audit", trained)
    assert findings["data"]["points"] == 40  # type: ignore[index]
    rows = sh.json("compare", trained, trained)
    assert len(rows) == 2  # type: ignore[arg-type]
    assert "worst case" in sh("compare", trained).out
    page = tmp_path / "page.html"
    assert sh("report", trained, "--out", page).out.strip() == str(page)
    assert "<html" in page.read_text()


def test_an_audit_enters_claims_and_a_second_one_supersedes_them(trained: Path, sh: Shell) -> None:
    before = trivet.Run.open(trained).claims
    kinds = {claim.kind for claim in before.holding}  # type: ignore[attr-defined]
    assert kinds == {"accuracy", "attack", "certificate", "cost"}
    assert sh("audit", trained).status == 0
    after = trivet.Run.open(trained).claims
    exact = [c for c in after.holding if c.kind in ("accuracy", "attack", "certificate")]  # type: ignore[attr-defined]
    assert [c.value for c in exact] == [
        c.value
        for c in before.holding
        if c.kind in ("accuracy", "attack", "certificate")  # type: ignore[attr-defined]
    ]
    assert all(claim.voided for claim in after.claims if claim not in after.holding)
    assert len(after.claims) > len(before.claims)


def test_resuming_a_finished_run_changes_nothing(trained: Path, sh: Shell) -> None:
    before = {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    assert sh("train", trained, "--resume").status == 0
    assert {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()} == before


def test_a_claim_names_the_command_that_checks_it(trained: Path, sh: Shell, tmp_path: Path) -> None:
    model = tmp_path / "weights.safetensors"
    model.write_bytes((trained / "weights.safetensors").read_bytes())
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    out = tmp_path / "found"
    arguments = ["audit", model, "--recipe", "tiny.yaml", "--set", "audit.points=20", "--out", out]
    assert sh(*arguments).status == 0
    (command,) = {claim.recheck for claim in trivet.Run.open(out).claims.holding}
    assert shlex.split(command)[1:] == [str(each) for each in arguments]
    result = sh("audit", model, "--recipe", "tiny.yaml", "--out", trained)
    assert result.status == 2
    assert "the folder of a training run" in result.err


def test_options_that_would_be_ignored_are_refused(trained: Path, sh: Shell) -> None:
    for arguments, words in (
        (["audit", trained, "--recipe", "digits-plain"], "has its own recipe"),
        (["certify", trained, "--n", "50"], "--n goes with --sigma"),
        (["certify", trained, "--points", "0"], "points=0 must be at least 1"),
    ):
        result = sh(*arguments)
        assert (result.status, words in result.err) == (2, True), result.err


def test_certificates_go_on_where_they_were(trained: Path, sh: Shell) -> None:
    few = sh.json("certify", trained, "--points", "4")
    assert few["points"] == 4  # type: ignore[index]
    stored = json.loads((trained / "certificates.json").read_text())["points"]
    more = sh.json("certify", trained, "--points", "8")
    assert more["points"] == 8  # type: ignore[index]
    assert json.loads((trained / "certificates.json").read_text())["points"][:4] == stored
    fewer = sh.json("certify", trained, "--points", "3")
    assert fewer["points"] == 3  # type: ignore[index]
    assert len(json.loads((trained / "certificates.json").read_text())["points"]) == 8
    assert "deploy it by sampling" in sh("certify", trained, "--sigma", "0.2", "--n", "100", "--points", "3").out


def test_a_run_that_is_not_audited_says_how(sh: Shell, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    assert sh("train", "tiny.yaml", "--set", "fit.epochs=1").status == 0
    result = sh("compare", "runs/tiny")
    assert result.status == 2
    assert "trivet audit runs/tiny" in result.err


def test_weights_of_another_model_are_refused(sh: Shell, trained: Path, tmp_path: Path) -> None:
    weights = trained / "weights.safetensors"
    (tmp_path / "wide.yaml").write_text(RECIPE.replace("{name: small_cnn}", "{name: small_cnn, width: 2}"))
    result = sh("audit", weights, "--recipe", "wide.yaml")
    assert result.status == 2
    assert "has shape" in result.err
    nameless = sh("audit", weights)
    assert nameless.status == 2
    assert "--recipe" in nameless.err


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's exporter warns of itself
@pytest.mark.parametrize("kind", [".safetensors", ".pt2", ".onnx"])
def test_a_model_file_is_audited_like_the_run_it_came_from(kind: str, sh: Shell, trained: Path, tmp_path: Path) -> None:
    run = trivet.Run.open(trained)
    like = run.plan.splits().test
    model = run.model(like)
    path = tmp_path / f"model{kind}"
    example = (like.batch(torch.arange(2)).inputs,)
    if kind == ".safetensors":
        path.write_bytes((trained / "weights.safetensors").read_bytes())
    elif kind == ".pt2":
        dynamic = ({0: torch.export.Dim("batch", min=1)},)
        torch.export.save(torch.export.export(model, example, dynamic_shapes=dynamic), path)
    else:
        pytest.importorskip("onnxscript", reason="exporting to ONNX needs onnxscript")
        torch.onnx.export(model, example, str(path), dynamo=True, verbose=False, dynamic_shapes=({0: "batch"},))
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    found = sh.json("audit", path, "--recipe", "tiny.yaml")
    assert found["clean"] == json.loads((trained / "audit.json").read_text())["clean"]  # type: ignore[index]
    assert (tmp_path / f"model{kind}.audit" / "report.html").exists()


def test_a_pickle_is_refused_with_the_way_out(sh: Shell, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "model.pt")
    result = sh("audit", "model.pt", "--data", "digits")
    assert result.status == 2
    assert "may hold a pickle" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_a_module_in_memory_is_audited(sh: Shell, trained: Path, tmp_path: Path) -> None:
    run = trivet.Run.open(trained)
    model = run.model(run.plan.splits().test)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    subject = trivet.audit_model(model, recipe="tiny.yaml", out=tmp_path / "found")
    assert subject.findings.clean == run.findings.clean
    assert not model.training


def test_an_interrupt_is_said_and_has_its_own_status(sh: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        main(interrupted)
    assert end.value.code == 130


def test_the_names_of_the_package_are_what_they_say() -> None:
    assert set(trivet.__all__) == set(dir(trivet))
    for name in trivet.__all__:
        assert callable(getattr(trivet, name)), name
    with pytest.raises(AttributeError, match="it has Run"):
        _ = trivet.fly  # type: ignore[attr-defined]


def test_radii_are_decided_about_with_as_many_copies_as_each_input_needs(trained: Path, sh: Shell) -> None:
    found = sh.json("certify", trained, "--sigma", "0.2", "--n", "1000", "--radii", "0,0.1,0.3", "--points", "4")
    assert [row["radius"] for row in found["curve"]] == ["0", "0.1", "0.3"]  # type: ignore[index, call-overload]
    stored = json.loads((trained / "certificates.json").read_text())
    assert stored["certifier"]["name"] == "adaptive_smoothing"
    assert {point["radius"] for point in stored["points"]} <= {0.0, 0.1, 0.3}
    wrong = sh("certify", trained, "--sigma", "0.2", "--radii", "0;1")
    assert (wrong.status, "must be numbers with commas between" in wrong.err) == (2, True)
    alone = sh("certify", trained, "--radii", "0,1")
    assert (alone.status, "--radii goes with --sigma" in alone.err) == (2, True)

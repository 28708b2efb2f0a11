"""The documentation is true: its code runs, its commands parse, its links lead somewhere, its tables are complete."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml

import trivet
from trivet import api, cli, runs
from trivet.audit import findings
from trivet.methods import ROOMS, find, methods
from trivet.recipes.plan import plan
from trivet.recipes.recipe import Source, load, shipped

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
QUICK = (
    "data.train_limit=96",
    "data.test_limit=12",
    "fit.epochs=1",
    "fit.batch_size=24",
    "audit.attacks=[{name: pgd, steps: 2}]",
    "audit.curve=[0.1]",
    "audit.curve_points=8",
    "audit.points=8",
    "audit.certificate_points=4",
    "audit.latency=[1]",
)


QUICK_POLICY = (
    "dqn.steps=2000",
    "dqn.evaluation=2",
    "certify_policy.episodes=20",
    "audit.attacks=[{name: steady_push, steps: 2}]",
    "audit.episodes=4",
)


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


class Block(NamedTuple):
    """A fenced block: its language, its text, and the file it shows, if its first line is a comment with a path."""

    language: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        found = re.match(r"# ([\w./-]+\.(?:py|yaml))\n", self.text)
        return found[1] if found else None

    @property
    def commands(self) -> list[list[str]]:
        """The arguments of its `trivet` lines; in a console, those behind a prompt."""
        prompt = r"\$ " if self.language == "console" else ""
        found = re.findall(rf"^{prompt}trivet (.*)$", self.text, re.MULTILINE)
        return [shlex.split(line, comments=True) for line in found] if self.language in ("bash", "console") else []


def blocks(path: Path) -> list[Block]:
    text = path.read_text()
    fenced = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(found[1], found[2], text[: found.start()].count("\n") + 2) for found in fenced]


def parsed(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The command and its parameters as the command line reads them, without running it; errors as it raises them."""
    group = typer.main.get_command(cli.app)
    name, *rest = arguments
    command = group.commands[name]  # type: ignore[attr-defined]
    return name, command.make_context(name, rest).params


PAGES_WITH_COMMANDS = [page for page in [*PAGES, CONTRIBUTING] if any(block.commands for block in blocks(page))]


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS, ids=page_id)
def test_every_command_on_a_page_parses_and_every_setting_in_it_exists(page: Path) -> None:
    for block in blocks(page):
        for arguments in block.commands:
            name, given = parsed(arguments)
            overrides, recipe = given.get("override") or [], given.get("recipe")
            if name == "train" and recipe in shipped():
                plan(load(recipe, overrides))
            elif name == "audit":
                plan(load(recipe or "digits-plain", overrides))


def test_a_wrong_command_would_be_noticed() -> None:
    with pytest.raises(KeyError):
        parsed(["trian", "digits-plain"])
    with pytest.raises(Exception, match="--point"):
        parsed(["certify", "runs/x", "--point", "3"])
    with pytest.raises(trivet.TrivetError, match="epoch"):
        plan(load("digits-plain", ["fit.epoch=3"]))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty present folder, and every recipe cut to a few records and steps, whatever the page asks for."""

    def loaded(*arguments: Any, **named: Any) -> Source:
        source = load(*arguments, **named)
        limits = QUICK if (source.recipe.data or {}).get("name") == "digits" else QUICK[2:]
        if source.recipe.environment:
            limits = QUICK_POLICY
        if source.recipe.audit.get("leaks"):
            limits = (*limits, "audit.leaks=[{name: one_run, canaries: 20}]")
        if not source.recipe.stages:
            limits = [each for each in limits if not each.startswith("fit")]
        given = {key: value for key, value in named.items() if key != "overrides"}
        overrides = [*(named.get("overrides") or (arguments[1] if len(arguments) > 1 else ())), *limits]
        return load(arguments[0], overrides, **given)

    monkeypatch.setattr(api, "load", loaded)
    monkeypatch.setattr(runs, "load", loaded)
    monkeypatch.chdir(tmp_path)
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]


def status_of(program: Callable[[], object]) -> int:
    try:
        program()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def run_page(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Follow a page from top to bottom: save the files it shows, run its Python, type its console."""
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        if block.file:
            Path(block.file).write_text(block.text)
        elif block.language == "python":
            padded = "\n" * (block.line - 1) + block.text  # so that a traceback names the page's own line
            exec(compile(padded, str(page), "exec"), namespace)  # noqa: S102  our own documentation
        elif block.language == "console":
            for arguments in block.commands:
                monkeypatch.setattr(sys, "argv", ["trivet", "--no-keep-memory", *arguments])
                assert status_of(cli.main) == 0, f"trivet {shlex.join(arguments)} failed"


PAGES_TO_RUN = [page for page in PAGES if any(block.language in ("python", "console") for block in blocks(page))]


@pytest.mark.parametrize("page", PAGES_TO_RUN, ids=page_id)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.export uses deprecated parts of torch
def test_a_page_runs_from_top_to_bottom(page: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    run_page(page, monkeypatch)


def test_a_page_that_is_wrong_would_fail(quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nimport trivet\n```\n\n```python\ntrivet.train(1)\n```\n")
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        run_page(page, monkeypatch)
    page.write_text("```console\n$ trivet train no-such-recipe\n```\n")
    with pytest.raises(AssertionError, match="no-such-recipe failed"):
        run_page(page, monkeypatch)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.language == "yaml" for b in blocks(page))], ids=page_id
)
def test_every_recipe_on_a_page_can_be_built(page: Path, quick: None) -> None:
    shown = [block for block in blocks(page) if block.file]
    for block in shown:
        Path(str(block.file)).write_text(block.text)
    sys.path.insert(0, str(Path.cwd()))
    for block in shown:
        if block.language == "yaml":
            assert plan(load(str(block.file))).recipe.name == Path(str(block.file)).stem


@pytest.mark.slow
def test_the_example_of_contributing_works_as_written(tmp_path: Path) -> None:
    """In a copy of the package: the method, its tests, the contract of all objectives, and the recipe."""
    copied = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src" / "trivet", tmp_path / "src" / "trivet", ignore=copied)
    (tmp_path / "tests" / "objectives").mkdir(parents=True)
    for name in ("conftest.py", "objectives/conftest.py", "objectives/test_objective_contract.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests" / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shown = [block for block in blocks(CONTRIBUTING) if block.file]
    assert [Path(str(block.file)).suffix for block in shown] == [".py", ".py", ".yaml"]
    for block in shown:
        (tmp_path / str(block.file)).write_text(block.text)
    method, test, recipe = (Path(str(block.file)) for block in shown)

    def python(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": "src", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    contract = "tests/objectives/test_objective_contract.py"
    ran = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", str(test), contract, "-k", method.stem)
    assert int(re.findall(r"(\d+) passed", ran)[0]) > shown[1].text.count("\ndef test_"), "the contract was not run"
    quickly = ["--set", "fit.epochs=1", "--set", "data.train_limit=64", "--out", "run"]
    train = (
        f"import sys; sys.argv = ['trivet', 'train', '{recipe.stem}', *{quickly}]; from trivet.cli import main; main()"
    )
    assert "trained: run" in python("-c", train)


@pytest.mark.parametrize("page", [*PAGES, CONTRIBUTING, ROOT / "CHANGELOG.md"], ids=page_id)
def test_every_link_within_the_repository_leads_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", prose)
    for link in links:
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            assert link.startswith("https://"), link
            continue
        found = (page.parent / target).resolve() if target else page
        assert found.is_file(), f"{page_id(page)} links to {link}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", found.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads}, link


REFERENCES = [page for page in PAGES if "\n::: " in page.read_text()]


@pytest.mark.parametrize("page", REFERENCES, ids=page_id)
def test_everything_the_reference_asks_for_exists(page: Path) -> None:
    wanted = re.findall(r"^::: ([\w.]+)$(?:\n    options:\n      members: \[(.*)\])?", page.read_text(), re.MULTILINE)
    assert wanted
    for name, members in wanted:
        module = importlib.import_module(name)
        for member in members.split(", ") if members else ():
            assert getattr(module, member).__doc__, f"{name}.{member}"


def test_every_page_is_in_the_contents() -> None:
    def pages(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for each in entry.values() if isinstance(entry, dict) else entry:
                yield from pages(each)

    listed = set(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.parent != ROOT}


def test_the_picture_of_the_report_is_small() -> None:
    assert (ROOT / "docs" / "images" / "report.png").stat().st_size < 300_000


@pytest.fixture(scope="module")
def tables() -> Any:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["README.md", "docs/methods.md", "docs/recipes.md"])
def test_the_tables_equal_the_register(name: str, tables: Any) -> None:
    page = (ROOT / name).read_text()
    assert any(f"<!-- end {table} -->" in page for table in tables.TABLES)
    assert page == tables.refreshed(page), "a table is out of date: run python docs/tables.py"


def test_a_missing_method_would_be_noticed(tables: Any) -> None:
    page = (ROOT / "README.md").read_text()
    assert tables.refreshed(page.replace("PGD (2018)", "")) == tables.refreshed(page) != page.replace("PGD (2018)", "")


def test_readme_names_every_method_and_room() -> None:
    """Independent of the generator."""
    page = (ROOT / "README.md").read_text()
    assert [room for room in ROOMS if f"| `{room}` |" not in page] == []
    assert [each.title for each in methods() if each.title not in page] == []


def test_every_shipped_recipe_is_in_the_documentation() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert [name for name in shipped() if f"| `{name}` |" not in page] == []


def test_every_check_of_an_audit_is_explained() -> None:
    page, folder = (ROOT / "docs" / "auditing.md").read_text(), Path(findings.__file__).parent
    names = set()
    for path in (folder / "masking.py", folder / "consistency.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("_check", "_comparison")
            ):
                names |= {node.args[0].value} if isinstance(node.args[0], ast.Constant) else set()
    assert len(names) > 15
    assert [name for name in names if f"`{name}`" not in page] == []


def test_every_setting_of_an_audit_is_explained() -> None:
    page = (ROOT / "docs" / "auditing.md").read_text()
    audit = find("audit", "audit")
    assert [name for name in audit.settings if name != "threat" and f"`{name}`" not in page] == []


def test_the_version_is_in_the_changelog() -> None:
    version = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[0]
    assert f"## [{version}] - " in (ROOT / "CHANGELOG.md").read_text()


def test_the_install_commands_name_real_extras() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page in PAGES:
        for named in re.findall(r"\.\[([\w,]+)\]", page.read_text()):
            assert set(named.split(",")) <= extras.keys(), page_id(page)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150

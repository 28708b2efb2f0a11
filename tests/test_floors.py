"""The house stands: rooms import only from floors below them, and nothing heavy is loaded before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "trivet"

FLOORS = [
    {"errors", "randomness", "files", "statistics", "machine", "display", "methods", "claims"},
    {"data", "models"},
    {"control"},
    {"threats", "certify", "privacy", "compression"},
    {"objectives"},
    {"training"},
    {"audit"},
    {"recipes"},
    {"runs"},
    {"exporting"},
    {"api", "estimators"},
    {"cli"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The rooms of Trivet that a file imports, at whatever depth of indentation."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "trivet":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trivet."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("trivet.")}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_room_imports_only_from_floors_below_it(path: Path) -> None:
    own = room_of(path)
    for other in imported_rooms(path) - {own}:
        assert other in FLOOR_OF, f"{other} has no floor: add it to FLOORS"
        same_ground = FLOOR_OF[own] == FLOOR_OF[other] == 0
        assert FLOOR_OF[other] < FLOOR_OF[own] or same_ground, f"{own} must not import {other}"


def test_every_folder_of_the_package_is_a_room() -> None:
    assert {path.parent.name for path in SOURCE.glob("*/__init__.py")} <= FLOOR_OF.keys()


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import trivet", ("torch", "numpy", "pydantic", "rich")),
        ("import trivet.cli", ("torch", "numpy", "pydantic", "yaml")),
        ("import trivet.recipes.recipe", ("torch", "numpy", "scipy")),
        (
            "import trivet.api",
            ("scipy.stats", "sklearn", "matplotlib", "PIL", "pyarrow", "onnx", "torch._dynamo.eval_frame"),
        ),
    ],
)
def test_heavy_libraries_are_imported_only_by_what_needs_them(statement: str, absent: tuple[str, ...]) -> None:
    code = f"{statement}\nimport sys\nprint([name for name in {absent!r} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"


def test_nothing_unpickles_or_evaluates() -> None:
    forbidden = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name.split(".")[0] for alias in node.names} | {
                    str(getattr(node, "module", "")).split(".")[0]
                }
                assert not names & forbidden, f"{path} imports {names & forbidden}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec"}, f"{path} calls {node.func.id}"

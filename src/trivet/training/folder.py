"""A run folder: everything needed to judge, resume and repeat a run, written so that a kill leaves it whole.

recipe.yaml          the recipe with every override applied
run.json             status, seed, versions, hardware and command of each session that worked on it
identity             what the run is called in the budget of its records, if it is private
log.jsonl            one line of JSON per logged step
stages/00-fit.safetensors     the checkpoint after each finished stage
stages/00-fit.state           the present state inside an unfinished stage
stages/00-pretrain/           of a stage that consists of others: a folder such as this one, for these
weights.safetensors  the final weights
claims.json          the ledger
audit.json, examples.safetensors, certificates.json, report.html    added by later commands
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trivet.errors import TrivetError
from trivet.files import load_tensors, read_json, save_tensors, write_bytes, write_json, write_text

FORMAT = 1


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run."""

    path: Path

    @classmethod
    def create(cls, path: Path, recipe: str) -> RunFolder:
        """Make a new run folder; one that already holds something is refused."""
        if path.exists() and (not path.is_dir() or any(each.name != ".lock" for each in path.iterdir())):
            raise TrivetError(f"{path} already exists; add --resume to go on with it, or choose another --out.")
        folder = cls(path)
        try:
            folder.stages.mkdir(parents=True)
        except OSError as error:
            raise TrivetError(f"cannot make {path} ({error.strerror}); choose another --out.") from None
        write_text(folder.recipe, recipe)
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run folder."""
        folder = cls(path)
        if not folder.recipe.is_file():
            raise TrivetError(f"{path} is not a run folder (it has no recipe.yaml); `trivet train` makes one.")
        return folder

    @property
    def identity(self) -> str:
        """The run's own name for itself, which it keeps when the folder is moved; drawn when first asked for."""
        path = self.path / "identity"
        if not path.exists():
            write_text(path, f"{uuid.uuid4().hex}\n")
        return path.read_text().strip()

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def stages(self) -> Path:
        return self.path / "stages"

    @property
    def weights(self) -> Path:
        return self.path / "weights.safetensors"

    @property
    def claims(self) -> Path:
        return self.path / "claims.json"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def audit(self) -> Path:
        return self.path / "audit.json"

    @property
    def examples(self) -> Path:
        return self.path / "examples.safetensors"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def certificates(self) -> Path:
        return self.path / "certificates.json"

    def stage(self, number: int, name: str) -> StageFiles:
        return StageFiles(self, number, name)

    def record(self, status: str, seed: int, session: Mapping[str, Any] | None = None) -> None:
        """Write run.json: the present `status`, and one more working session if given."""
        path = self.path / "run.json"
        sessions = read_json(path)["sessions"] if path.exists() else []
        if session is not None:
            sessions = [*sessions, dict(session)]
        write_json(path, {"format": FORMAT, "status": status, "seed": seed, "sessions": sessions})

    @property
    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = read_json(self.path / "run.json")
        if status.get("format") != FORMAT:
            raise TrivetError(
                f"{self.path} was written in format {status.get('format')}, this Trivet reads {FORMAT}; "
                "use the version named in its run.json."
            )
        return status

    def read_log(self) -> list[dict[str, Any]]:
        """The log's whole lines; one torn by a kill is left out."""
        if not self.log.exists():
            return []
        lines = self.log.read_text().splitlines()
        whole = []
        for line in lines:
            try:
                whole.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return whole


@dataclass(frozen=True)
class StageFiles:
    """The files one stage of a run writes."""

    run: RunFolder
    number: int
    name: str

    @property
    def _stem(self) -> Path:
        return self.run.stages / f"{self.number:02d}-{self.name}"

    @property
    def finished(self) -> Path:
        return self._stem.with_suffix(".safetensors")

    @property
    def _state(self) -> Path:
        return self._stem.with_suffix(".state")

    def inside(self) -> RunFolder:
        """The folder for the stages that this one consists of, made if it is not there."""
        folder = RunFolder(self._stem)
        folder.stages.mkdir(parents=True, exist_ok=True)
        return folder

    def save_state(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Replace the state an interrupted stage resumes from."""
        save_tensors(self._state, tensors, {"format": FORMAT, **metadata})

    def load_state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `save_state` saved last, or None at a fresh start."""
        if not self._state.exists():
            return None
        tensors, metadata = load_tensors(self._state)
        if metadata.get("format") != FORMAT:
            raise TrivetError(f"{self._state} has another format; delete it to start the stage again.")
        return tensors, metadata

    def clear_state(self) -> None:
        self._state.unlink(missing_ok=True)

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line; `step` and the stage number order the log."""
        with self.run.log.open("a") as handle:
            handle.write(json.dumps({"stage": self.number, **line}, allow_nan=False) + "\n")

    def rewind_log(self, step: int) -> None:
        """Drop lines of this stage at or after `step`, which will be done again."""
        kept = [
            line
            for line in self.run.read_log()
            if line["stage"] < self.number or (line["stage"] == self.number and line["step"] < step)
        ]
        write_bytes(self.run.log, "".join(json.dumps(line) + "\n" for line in kept).encode())

"""From a list of stages to a finished run: each stage's checkpoint is kept, so that a killed run goes on from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trivet import machine
from trivet.claims import Ledger
from trivet.compression.packing import unpack
from trivet.compression.structure import finish, restructure
from trivet.data.dataset import Splits
from trivet.errors import TrivetError
from trivet.files import load_tensors, save_tensors, sole_writer
from trivet.training.folder import RunFolder, StageFiles
from trivet.training.stage import Checkpoint, Context, Stage


def run_stages(
    stages: Sequence[tuple[str, Stage]],
    model: nn.Module,
    splits: Splits | None,
    folder: RunFolder,
    *,
    seed: int,
    device: torch.device,
    budget_of: str | None = None,
) -> Checkpoint:
    """Take `model` through the named `stages`, from wherever `folder` says an earlier session got to.

    `splits` is None for recipes that learn from an environment; `budget_of` is as in `Context`.

    Raises:
        TrivetError: another process is writing the folder, or a stage refuses to go on; what was saved stays.
    """
    with sole_writer(folder.path):
        checkpoint = Checkpoint(model.to(device))
        over = folder.claims.exists() and all(each.finished.exists() for each in _files(stages, folder))
        if not over:
            folder.record("running", seed, machine.describe())
        checkpoint = advance(stages, checkpoint, splits, folder, seed=seed, device=device, budget_of=budget_of)
        if over:  # later audits may have added claims
            return replace(_finished(checkpoint), ledger=Ledger.load(folder.claims))
        checkpoint = _finished(checkpoint)
        save_tensors(
            folder.weights,
            checkpoint.model.state_dict(),
            {"history": checkpoint.history, "structure": checkpoint.structure},
        )
        checkpoint.ledger.save(folder.claims)
        folder.record("finished", seed)
    return checkpoint


def advance(
    stages: Sequence[tuple[str, Stage]],
    checkpoint: Checkpoint,
    splits: Splits | None,
    folder: RunFolder,
    *,
    seed: int,
    device: torch.device,
    budget_of: str | None = None,
) -> Checkpoint:
    """`checkpoint` after the named `stages`, compressed weights as they are; each is kept in `folder`.

    Where `folder` says that some are over, it goes on after them, and of `checkpoint` only the model's form counts.
    """
    files = _files(stages, folder)
    done = sum(each.finished.exists() for each in files)
    if done:
        checkpoint = _load(files[done - 1], checkpoint)
    for (name, stage), each in list(zip(stages, files, strict=True))[done:]:
        checkpoint.ledger.apply(name, stage.effect())  # before it runs: what it claims itself is not to be voided
        checkpoint = stage.run(checkpoint, Context(splits, seed, each, device, budget_of))
        checkpoint.ledger.rebind("privacy", checkpoint.artefact)
        _save(each, checkpoint)
        each.clear_state()
    return checkpoint


def _files(stages: Sequence[tuple[str, Stage]], folder: RunFolder) -> list[StageFiles]:
    return [folder.stage(number, name) for number, (name, _) in enumerate(stages)]


def _finished(checkpoint: Checkpoint) -> Checkpoint:
    """With plain weights, of the same values, in place of compressed ones."""
    structure = finish(checkpoint.model, checkpoint.structure)
    # The same function in another form: what was proved of one holds for the other.
    checkpoint.ledger.rebind("privacy", checkpoint.artefact)
    return replace(checkpoint, structure=structure)


def _save(files: StageFiles, checkpoint: Checkpoint) -> None:
    metadata = {
        "ledger": checkpoint.ledger.dump(),
        "history": checkpoint.history,
        "structure": checkpoint.structure,
    }
    save_tensors(files.finished, checkpoint.model.state_dict(), metadata)


def _load(files: StageFiles, checkpoint: Checkpoint) -> Checkpoint:
    metadata = load_into(checkpoint.model, files.finished)
    ledger = Ledger.parse(metadata["ledger"], str(files.finished))
    return Checkpoint(checkpoint.model, ledger, metadata["history"], metadata.get("structure", []))


def load_into(model: nn.Module, path: Path) -> dict[str, Any]:
    """Make of a fresh `model` the one saved at `path`, packed or not: its structure, then its weights.

    Returns what else is there.

    Raises:
        TrivetError: the file was written by another model.
    """
    tensors, metadata = load_tensors(path)
    if "packed" in metadata:
        tensors = unpack(tensors, metadata.pop("packed"), str(path))
    restructure(model, metadata.get("structure", []), str(path))
    load_weights(model, tensors, str(path))
    return metadata


def load_weights(model: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Put `tensors` into `model`; names and shapes must be the model's own."""
    own = model.state_dict()
    for name in own.keys() ^ tensors.keys():
        side = "lacks" if name in own else "has an unknown"
        raise TrivetError(f"{where} {side} tensor {name!r}: it was written by another model than the recipe describes.")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise TrivetError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, the recipe's model wants {tuple(own[name].shape)}."
            )
    model.load_state_dict(tensors)

"""Certificates that are written down as they are obtained, by one process or by several that share the work."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch
from torch import Tensor, nn

from trivet.certify.certificate_file import CertificateFile
from trivet.certify.certifier import Certificates, Certifier, Resumable, join
from trivet.data.dataset import Dataset
from trivet.display import Advance
from trivet.errors import TrivetError
from trivet.models.modes import device_of

_PORTION = 100
"""Records handed to the certifier at once: it forms its own batches, this only bounds what a kill may cost."""

_POLL = 0.1
"""Seconds between two looks at the workers."""


@dataclass(frozen=True)
class Stored:
    """The certificates of some of a dataset's records in the file `path`, all obtained in one way.

    Attributes:
        path: of the file, which need not exist yet.
        certifier, seed: how they are obtained.
        artefact: the fingerprint of the model.
        data: whose records they are about.
    """

    path: Path
    certifier: Certifier
    seed: int
    artefact: str
    data: Dataset

    def read(self, path: Path | None = None) -> Certificates | None:
        """What `path` (None: the file itself) holds; None where that was obtained otherwise, or does not exist."""
        path = path or self.path
        if not path.exists():
            return None
        found = CertificateFile.load(path)
        same = (found.artefact, found.certifier, found.seed) == (self.artefact, self.certifier, self.seed)
        return found.certificates if same else None

    def file_of(self, certificates: Certificates) -> CertificateFile:
        targets = self.data.labels[certificates.index]
        return CertificateFile(certificates, targets, self.certifier, self.seed, self.artefact)

    def missing(self, known: Certificates | None, wanted: int) -> Tensor:
        """The positions below `wanted` whose certificates are not finished."""
        open_ = torch.ones(wanted, dtype=torch.bool)
        if known is not None:
            if isinstance(self.certifier, Resumable):
                known = known.select(self.certifier.finished(known))
            open_[known.index[known.index < wanted]] = False
        return open_.nonzero().flatten()

    def extend(
        self,
        model: nn.Module,
        positions: Tensor,
        known: Certificates | None,
        advance: Advance,
        path: Path | None = None,
    ) -> Certificates | None:
        """Certify the records at `positions`, going on from what is `known` of them; every portion is written down.

        With `path`, only the new certificates are written, to there.
        """
        kept = known if path is None else None
        for index in positions.split(_PORTION):
            inputs = self.data.batch(index).inputs.to(device_of(model))
            write = partial(self._write, kept, path or self.path)
            if isinstance(self.certifier, Resumable):
                part = self.certifier.go_on(
                    model, inputs, seed=self.seed, index=index, advance=advance, earlier=known, save=write
                )
            else:
                part = self.certifier.certify(model, inputs, seed=self.seed, index=index, advance=advance)
            kept = write(part)
        return kept

    def _write(self, kept: Certificates | None, path: Path, part: Certificates) -> Certificates:
        whole = overridden(kept, part)
        self.file_of(whole).save(path)
        return whole

    def shards(self) -> list[Path]:
        """The files of workers, of this run or of one that was interrupted."""
        return sorted(self.path.parent.glob(f"{self.path.stem}.shard-*{self.path.suffix}"))

    def shard(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.stem}.shard-{number}{self.path.suffix}")

    def gather(self) -> Certificates | None:
        """All that is known, with what workers left behind moved into the one file."""
        known, shards = self.read(), self.shards()
        for path in shards:
            part = self.read(path)
            known = known if part is None else overridden(known, part)
        if known is not None and shards:
            self.file_of(known).save(self.path)
        for path in shards:
            path.unlink()
        return known


def overridden(known: Certificates | None, part: Certificates) -> Certificates:
    """`known` and `part` together; where both are about a record, `part`, which went on from there, counts."""
    if known is None:
        return part
    others = known.select(~torch.isin(known.index, part.index))
    return join([others, part])


Task = Callable[[int, Advance], None]
"""What a worker runs: told its number, and whom to tell of its progress."""


def in_processes(task: Task, workers: int, advance: Advance) -> None:
    """Run `task` in fresh processes, numbered from 0, until all are done.

    Raises:
        TrivetError: a worker failed; the others are stopped.
    """
    context = multiprocessing.get_context("spawn")  # a forked child may hang in the parent's thread pool
    progress, errors = context.Value("d", 0.0), context.SimpleQueue()
    threads = max(1, torch.get_num_threads() // workers)
    processes = [
        context.Process(target=_work, args=(task, number, threads, os.getpid(), progress, errors), daemon=True)
        for number in range(workers)
    ]
    try:
        for process in processes:
            process.start()
        told = 0.0
        while any(process.is_alive() for process in processes) and not _failed(processes):
            time.sleep(_POLL)
            advance(progress.value - told)
            told = progress.value
        if _failed(processes):
            said = errors.get() if not errors.empty() else "it was killed."
            raise TrivetError(f"a worker stopped: {said} What was certified is kept; the same command goes on.")
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
            if process.pid is not None:
                process.join()


def _failed(processes: Sequence[BaseProcess]) -> bool:
    return any(process.exitcode not in (None, 0) for process in processes)


def _work(task: Task, number: int, threads: int, parent: int, progress: object, errors: SimpleQueue[str]) -> None:
    def advance(amount: float = 1, /, note: str = "") -> None:  # noqa: ARG001 (the protocol's)
        if os.getppid() != parent:  # killed without a word: nobody waits for this any more
            raise SystemExit(1)
        with progress.get_lock():  # type: ignore[attr-defined]
            progress.value += amount  # type: ignore[attr-defined]

    torch.set_num_threads(threads)
    try:
        task(number, advance)
    except TrivetError as error:
        errors.put(str(error))
        raise SystemExit(1) from None
    except KeyboardInterrupt:  # the terminal interrupts all; the one who waits says so
        raise SystemExit(1) from None

"""Votes under noise, block by block: each block of copies has a name, so that it can be counted anywhere, anytime."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trivet.certify.compiled import compiled
from trivet.certify.smoothing import Smoothing, require_separate_rows
from trivet.models.modes import evaluating
from trivet.models.surrogate import Logits, surrogate
from trivet.randomness import generator

BLOCK = 100
"""Copies in a block; the last of a stage may hold fewer."""


class Block(NamedTuple):
    """Copies `BLOCK * number` onwards of a stage of input `image`; `rows` of them."""

    image: int
    stage: str
    number: int
    rows: int = BLOCK


@dataclass(frozen=True)
class NoisyVotes:
    """A frozen classifier and the inputs [N, ...] whose noisy copies it is asked about.

    The noise of a block is drawn from the generator (seed, "smoothing", position of the input, stage, number): what
    it votes for does not depend on what else is counted, in which order, or in which process.
    """

    smoothing: Smoothing
    f: Logits
    classes: int
    clean: Tensor
    index: tuple[int, ...]
    seed: int
    note: str

    @property
    def capacity(self) -> int:
        """Rows of the buffer that copies are drawn into: whole batches, and at least a block."""
        return self.smoothing.batch_size * math.ceil(BLOCK / self.smoothing.batch_size)

    @property
    def at_once(self) -> int:
        """Blocks that fit into the buffer."""
        return self.capacity // BLOCK

    @torch.no_grad()
    def count(self, blocks: Iterable[Block]) -> Tensor:
        """How often each class won in each of `blocks`, [len(blocks), K + 1] int64 (last: no class)."""
        wanted, parts = list(blocks), []
        batch = self.clean.new_zeros(self.capacity, *self.clean.shape[1:])
        for start in range(0, len(wanted), self.at_once):
            group, filled = wanted[start : start + self.at_once], 0
            for block in group:
                name = ("smoothing", self.index[block.image], block.stage, block.number)
                source = generator(self.seed, *name, device=self.clean.device)
                rows = batch[filled : filled + block.rows]
                self.smoothing.draw(rows, source).add_(self.clean[block.image])
                filled += block.rows
            owner = torch.arange(len(group)).repeat_interleave(torch.tensor([block.rows for block in group]))
            parts.append(self._tally(batch, filled, owner.to(batch.device), len(group)))
        return torch.cat(parts).cpu() if parts else torch.zeros(0, self.classes + 1, dtype=torch.int64)

    def _tally(self, batch: Tensor, filled: int, owner: Tensor, blocks: int) -> Tensor:
        asked = len(batch) if self.smoothing.compile else filled  # a compiled f knows one shape
        noisy = batch[:asked].movedim(-1, 1)
        logits = torch.cat([self.f(part) for part in noisy.split(self.smoothing.batch_size)])[:filled]
        winners = logits.argmax(1).where(logits.isfinite().all(1), self.classes)
        found = torch.bincount(owner * (self.classes + 1) + winners, minlength=blocks * (self.classes + 1))
        return found.view(blocks, self.classes + 1)


@contextmanager
def noisy_votes(smoothing: Smoothing, model: nn.Module, x: Tensor, index: Tensor, seed: int) -> Iterator[NoisyVotes]:
    """`model` in eval mode and frozen, ready to be asked about noisy copies of `x` [N, ...], N at least 1."""
    with evaluating(model), torch.no_grad():
        frozen = surrogate(model, smoothing.precision)
        classes = require_separate_rows(frozen, x)
        clean = x.float().movedim(1, -1).contiguous()
        f: Logits = frozen
        note = ""
        if smoothing.compile:
            f, note = compiled(frozen, clean.new_zeros(smoothing.batch_size, *clean.shape[1:]).movedim(-1, 1))
        yield NoisyVotes(smoothing, f, classes, clean, tuple(index.tolist()), seed, note)


def blocks_of(image: int, stage: str, copies: int) -> list[Block]:
    """All blocks of a stage of `copies`."""
    count = math.ceil(copies / BLOCK)
    return [Block(image, stage, number, min(BLOCK, copies - BLOCK * number)) for number in range(count)]

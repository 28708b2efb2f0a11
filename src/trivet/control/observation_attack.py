"""The protocol of an attack on a policy's observations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from trivet.control.episodes import View


class ObservationAttack(ABC):
    """Chooses, step by step, what is added to the observations of running episodes: an `Adversary` with settings."""

    room: ClassVar[str] = "control"

    @abstractmethod
    def __call__(self, view: View) -> Tensor:
        """The shifts [n, D] float64, of squared lengths of at most `view.left`."""

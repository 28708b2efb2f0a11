"""The protocol of a certifier: what is proved about a model at each input, and under which conditions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from trivet.display import Advance
from trivet.errors import require

ABSTAIN = -1
"""The label of an input about which nothing is claimed."""


@dataclass(frozen=True, eq=False)
class Certificates:
    """For each of N inputs: the classifier's label is constant on the open ball of that radius.

    Attributes:
        index: [N] int64, the position of each input in its dataset.
        labels: [N] int64, the certified label, or `ABSTAIN`.
        radii: [N] float64, in input units, 0 where nothing beyond the point itself is proved. Never rounded up.
        norm: the geometry of the ball, "Linf", "L2" or "L1".
        alpha: how likely each single certificate may be wrong, over the certifier's own randomness; 0 for a proof.
        conditions: what must hold for the certificates to be true, one sentence each; they belong to every claim.
        evidence: numbers per input [N] from which the radii follow, e.g. the counts of a sampling certifier.

    Raises:
        BadValue: shapes or types that do not fit, a radius that is negative or not finite, an abstention with one.
    """

    index: Tensor
    labels: Tensor
    radii: Tensor
    norm: str
    alpha: float
    conditions: tuple[str, ...]
    evidence: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        per_input = {"index": self.index, "labels": self.labels, "radii": self.radii, **self.evidence}
        for name, values in per_input.items():
            require(
                values.shape == self.labels.shape and values.ndim == 1,
                f"certificates: {name} must be [{len(self.labels)}], got {tuple(values.shape)}.",
            )
        require(self.radii.dtype == torch.float64, f"certificates: radii must be float64, got {self.radii.dtype}.")
        # Written so that NaN, which compares false with everything, is refused too.
        sound = (self.radii >= 0) & (self.radii < torch.inf) & ((self.labels >= 0) | (self.radii == 0))
        require(
            bool(sound.all()),
            f"certificates: input {self.index[~sound][:1].tolist()} has label {self.labels[~sound][:1].tolist()} and "
            f"radius {self.radii[~sound][:1].tolist()}; radii must be finite, at least 0, and 0 for abstentions.",
        )
        require(0 <= self.alpha < 1, f"alpha={self.alpha} must lie in [0, 1).")

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Certificates:
        """Those of the first `count` inputs."""
        return self.select(slice(0, count))

    def select(self, rows: Tensor | slice) -> Certificates:
        """Those in some rows: [N] bool, or a range."""
        evidence = {name: values[rows] for name, values in self.evidence.items()}
        index, labels, radii = self.index[rows], self.labels[rows], self.radii[rows]
        return replace(self, index=index, labels=labels, radii=radii, evidence=evidence)

    @property
    def abstained(self) -> Tensor:
        """[N] bool."""
        return self.labels == ABSTAIN


def join(parts: Sequence[Certificates]) -> Certificates:
    """The certificates of all `parts` (shards, or a resumed run), in order of index; one certificate per input.

    Raises:
        BadValue: no parts, parts that were obtained under different conditions, or an input in two of them.
    """
    require(len(parts) > 0, "there are no certificates to join.")
    first = parts[0]
    for part in parts[1:]:
        require(
            (part.norm, part.alpha, part.conditions, part.evidence.keys())
            == (first.norm, first.alpha, first.conditions, first.evidence.keys()),
            "certificates with different norms, alphas or conditions cannot be joined; certify all inputs alike.",
        )
    index, order = torch.cat([part.index for part in parts]).sort()
    require(
        bool((index.diff() > 0).all()), "the parts certify some input twice; picking either after the fact is not fair."
    )
    return Certificates(
        index,
        torch.cat([part.labels for part in parts])[order],
        torch.cat([part.radii for part in parts])[order],
        first.norm,
        first.alpha,
        first.conditions,
        {name: torch.cat([part.evidence[name] for part in parts])[order] for name in first.evidence},
    )


class Certifier(ABC):
    """Proves, for each input, a ball on which a classifier is constant.

    Which classifier is said by the class and by the conditions it issues.

    Class attributes say what holds for every instance:
        about: "model", whose own answers are certified, so that attacks on it may refute a certificate; or "smoothed",
            for classifiers built around the model by averaging over noise.
    """

    room: ClassVar[str] = "certify"
    about: ClassVar[Literal["model", "smoothed"]] = "model"

    @abstractmethod
    def certify(
        self, model: nn.Module, x: Tensor, *, seed: int, index: Tensor | None = None, advance: Advance | None = None
    ) -> Certificates:
        """Certificates for `x` [N, ...] in [0, 1]; the model's modes, buffers and gradients stay as they are.

        Args:
            seed: of the run. With `index` it names the random numbers of each input, so that the result does not
                depend on batch size, sharding or interruption. Certifiers without randomness ignore it.
            index: [N] int64, the positions of the inputs in their dataset; 0..N-1 if None.
            advance: told of progress, in inputs.

        Raises:
            BadValue: inputs outside [0, 1], or a model about which this certifier can prove nothing.
        """

    def follows(self, certificates: Certificates) -> bool:
        """Whether the radii follow from the evidence: what a reader of stored certificates can check without the model.

        True where a certifier leaves no evidence.
        """
        return True

    def shares(self, certificates: Certificates) -> Tensor | None:
        """[N] the share of the noisy copies that voted for each input's class; None where nothing is sampled."""
        return None


class Resumable(Certifier):
    """A certifier that may stop inside an input, and go on from what its evidence says was counted."""

    @abstractmethod
    def go_on(
        self,
        model: nn.Module,
        x: Tensor,
        *,
        seed: int,
        index: Tensor | None = None,
        advance: Advance | None = None,
        earlier: Certificates | None = None,
        save: Callable[[Certificates], object] | None = None,
    ) -> Certificates:
        """As `certify`, from `earlier` certificates of some of these inputs, by the same certifier, model and seed.

        `save` is told every few seconds what stands by then, of all inputs. The result is that of an undisturbed run.
        """

    @abstractmethod
    def finished(self, certificates: Certificates) -> Tensor:
        """[N] bool: of which inputs nothing more would be counted."""

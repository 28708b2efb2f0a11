"""One pass over the records for each attack: who still stands, how near the rest fell, and pictures of some."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trivet import display
from trivet.audit.findings import AttackFinding
from trivet.audit.gradients import lacks_gradient
from trivet.data.dataset import Batch, Dataset
from trivet.methods import spec_of
from trivet.models.modes import device_of, evaluating
from trivet.randomness import generator
from trivet.statistics import Rate
from trivet.threats.attack import Attack
from trivet.threats.autoattack import AutoAttack

_PORTION = 2048
"""Records handed to a composed attack at once: enough for full batches of what still stands, and bounded."""

P = {"Linf": math.inf, "L2": 2.0, "L1": 1.0}


@dataclass
class Sweep:
    """The state of an audit while attacks come and go.

    Attributes:
        norm: in which distances are kept; keep: how many adversarial examples.
        predicted: [N] int64, the model's labels without attack.
        standing: by attack, [N] bool: still classified correctly. Attacks that look beyond the threat are left out.
        white_box: the same after those of its parts that follow gradients; attacks that follow none are left out.
        answers: by attack, [N] int64: the model's labels for what the attack found, or `predicted` where it found
            nothing; -1 where logits are no numbers. Attacks that look beyond the threat are left out.
        distance: [N] float64, how near the nearest adversarial point found lies; 0 where wrong without attack.
        fallen: adversarial points kept for pictures, by position.
    """

    model: nn.Module
    data: Dataset
    seed: int
    confidence: float
    batch_size: int
    norm: str
    keep: int
    predicted: Tensor = field(init=False)
    standing: dict[str, Tensor] = field(default_factory=dict)
    white_box: dict[str, Tensor] = field(default_factory=dict)
    answers: dict[str, Tensor] = field(default_factory=dict)
    distance: Tensor = field(init=False)
    fallen: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device = device_of(self.model)
        self.predicted = torch.cat([self._answers(batch.inputs) for batch in self.data.batches(self.batch_size)])
        self.distance = torch.where(self.right, torch.inf, 0.0).double()

    @property
    def right(self) -> Tensor:
        """[N] bool: classified correctly without attack."""
        return self.predicted == self.data.labels

    @property
    def worst(self) -> Tensor | None:
        """[N] bool: points that no attack broke; None before the first attack."""
        return torch.stack(list(self.standing.values())).all(0) if self.standing else None

    def rate(self, hits: Tensor) -> Rate:
        return Rate(int(hits.sum()), len(hits), self.confidence)

    def by_class(self, hits: Tensor) -> tuple[Rate, ...]:
        """The rate among the records of each class."""
        labels = self.data.labels
        return tuple(self.rate(hits[labels == label]) for label in range(self.data.num_classes))

    def attack(self, attack: Attack, label: str) -> AttackFinding:
        """Run one attack on every record."""
        began = time.perf_counter()
        try:
            left, broke = (
                self._composed(attack, label) if isinstance(attack, AutoAttack) else self._plain(attack, label)
            )
        except RuntimeError as error:
            if not lacks_gradient(error):
                raise
            note = "not possible: the model has no input gradient"
            return AttackFinding(label=label, spec=spec_of(attack), accuracy=None, seconds=0.0, note=note)
        if not attack.outside:
            self.standing[label] = left
        return AttackFinding(
            label=label,
            spec=spec_of(attack),
            accuracy=self.rate(left),
            seconds=time.perf_counter() - began,
            broke=broke,
            outside=attack.outside,
        )

    def _plain(self, attack: Attack, label: str) -> tuple[Tensor, dict[str, int]]:
        """Who stands after an attack that goes batch by batch."""
        left = torch.zeros(len(self.data), dtype=torch.bool)
        with display.progress(label, len(self.data)) as advance:
            for number, batch in enumerate(self.data.batches(self.batch_size)):
                here = batch.to(self.device)
                source = generator(self.seed, "audit", label, number, device=self.device)
                found = attack.run(self.model, here.inputs, here.labels, generator=source, batch_size=self.batch_size)
                left[batch.index] = ~found.broken.cpu()
                if not attack.outside:
                    self._remember(label, batch, found.x_adv.cpu(), found.broken.cpu())
                done = int(batch.index[-1]) + 1
                advance(len(batch), note=f"{100 * float(left[:done].float().mean()):.1f} % left")
        if not (attack.gradient_free or attack.outside):
            self.white_box[label] = left
        return left, {}

    def _composed(self, attack: AutoAttack, label: str) -> tuple[Tensor, dict[str, int]]:
        """Who stands after AutoAttack, and how many points each component broke. It shows its own progress."""
        by, names = torch.zeros(len(self.data), dtype=torch.int64), tuple(attack.components())
        for number, batch in enumerate(self.data.batches(_PORTION)):
            here = batch.to(self.device)
            source = generator(self.seed, "audit", label, number, device=self.device)
            found = attack.run_detailed(
                self.model, here.inputs, here.labels, generator=source, batch_size=self.batch_size
            )
            by[batch.index] = found.by.cpu()
            self._remember(label, batch, found.x_adv.cpu(), found.broken.cpu())
        square = names.index("square") + 1 if "square" in names else len(names) + 1
        self.white_box[label] = (by == -1) | (by == square)
        return by == -1, {name: int((by == part).sum()) for part, name in enumerate(names, 1)}

    @torch.no_grad()
    def _answers(self, inputs: Tensor) -> Tensor:
        """[B] int64: the model's labels, -1 where its logits are no numbers."""
        said = [torch.empty(0, dtype=torch.int64)]
        with evaluating(self.model):
            for part in inputs.split(self.batch_size) if len(inputs) else ():
                logits = self.model(part.to(self.device)).cpu()
                said.append(logits.argmax(1).where(logits.isfinite().all(1), -1))
        return torch.cat(said)

    def _remember(self, label: str, batch: Batch, x_adv: Tensor, broken: Tensor) -> None:
        """Keep answers, distances, and pictures of the first points that fell."""
        new = broken & self.right[batch.index]
        said = self.answers.setdefault(label, self.predicted.clone())
        said[batch.index[new]] = self._answers(x_adv[new])
        apart = torch.linalg.vector_norm((x_adv.double() - batch.inputs.double()).flatten(1), ord=P[self.norm], dim=1)
        index = batch.index[new]
        self.distance[index] = torch.minimum(self.distance[index], apart[new])
        for row in new.nonzero().squeeze(1).tolist():
            if len(self.fallen) >= self.keep:
                break
            self.fallen.setdefault(int(batch.index[row]), x_adv[row])

    def examples(self) -> dict[str, Tensor]:
        """The kept adversarial points as tensors: index, clean, adversarial, label and both predictions."""
        index = torch.tensor(sorted(self.fallen), dtype=torch.int64)
        batch = self.data.batch(index)
        adversarial = torch.stack([self.fallen[i] for i in index.tolist()]) if len(index) else batch.inputs
        with torch.no_grad(), evaluating(self.model):
            said = self.model(adversarial.to(self.device)).argmax(1).cpu() if len(index) else batch.labels
        return {
            "index": index,
            "clean": batch.inputs,
            "adversarial": adversarial,
            "label": batch.labels,
            "clean_prediction": self.predicted[index],
            "adversarial_prediction": said,
        }

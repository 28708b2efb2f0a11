"""The protocol of an attack: a search over a threat model, whose finds are checked by nobody but the base class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor, nn

from trivet import randomness
from trivet.errors import require
from trivet.models.inputs import require_unit_range
from trivet.models.modes import evaluating
from trivet.models.surrogate import Logits, Precision, surrogate
from trivet.threats.threat import ThreatModel


class Outcome(NamedTuple):
    """What an attack achieved on a batch.

    Attributes:
        x_adv: [B, ...] a point of S(x) that the model misclassifies where `broken`, else `x` itself.
        broken: [B] bool, judged on the model itself and on the very tensor returned.
    """

    x_adv: Tensor
    broken: Tensor


@dataclass(frozen=True)
class Target:
    """The model under attack as a search sees it: fast logits to differentiate, an exact verdict on what was found.

    Attributes:
        gradients: the stand-in asked for gradients and losses.
        model: the model itself, in eval mode.
        batch_size: how many inputs the caller allows in one query; searches that multiply inputs keep to it.
    """

    gradients: Logits
    model: Logits
    batch_size: int = 512

    def __call__(self, x: Tensor) -> Tensor:
        """The stand-in's logits [B, K]."""
        return self.gradients(x)

    def misclassifies(self, x: Tensor, y: Tensor) -> Tensor:
        """[B] bool, the model's own verdict."""
        return misclassified(self.model, x, y)


@dataclass(frozen=True)
class Attack(ABC):
    """A search for points of `threat` that a model misclassifies. Subclasses implement `search` alone.

    Calling the attack returns adversarial points and nothing else: whatever `search` proposes is checked to lie in
    the set and to be misclassified by the model in eval mode, and replaced by the clean input otherwise. The
    model's weights, gradients, modes and buffers are as before, also after an error.
    """

    room: ClassVar[str] = "threats"
    gradient_free: ClassVar[bool] = False
    """Whether it asks for outputs alone, so that masked gradients do not hinder it."""
    outside: ClassVar[bool] = False
    """Whether it looks beyond `threat`, so that what it leaves is no bound on the accuracy under `threat`."""
    threat: ThreatModel
    precision: Precision = field(default="fp32", kw_only=True)
    """The arithmetic in which gradients are asked for; success is always judged in the model's own."""

    @abstractmethod
    def search(self, model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The strongest points found for `x` [B, ...] with labels `y` [B], adversarial or not; all in the set.

        `model` maps inputs to logits; its state is the caller's business.
        """

    def succeeds(self, model: Target, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """[B] bool: which points lie in S(x) and are misclassified by the model itself."""
        return self.threat.contains(x_adv, x) & model.misclassifies(x_adv, y)

    @final
    def run(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        batch_size: int = 512,
    ) -> Outcome:
        """Attack inputs `x` [N, ...] in [0, 1] with labels `y` [N], `batch_size` at a time.

        Without a generator the same random numbers are drawn every time; PyTorch's global stream is left alone.

        Raises:
            BadValue: inputs outside [0, 1] or not finite, or shapes that do not fit.
        """
        require(len(x) == len(y), f"{len(x)} inputs but {len(y)} labels.")
        require(batch_size >= 1, f"batch_size={batch_size} must be at least 1.")
        require_unit_range(x)
        generator = generator or randomness.generator(0, "attack", device=x.device)
        x_adv, broken = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        with evaluating(model):
            target = Target(surrogate(model, self.precision), model, batch_size)
            for part in torch.arange(len(x), device=x.device).split(batch_size):
                clean, labels = x[part], y[part]
                wrong = misclassified(model, clean, labels)
                open_ = (~wrong).nonzero().squeeze(1)
                if len(open_):
                    found = self.search(target, clean[open_], labels[open_], generator).detach()
                    hit = self.succeeds(target, found, clean[open_], labels[open_])
                    x_adv[part[open_[hit]]] = found[hit]
                    wrong[open_[hit]] = True
                broken[part] = wrong
        return Outcome(x_adv, broken)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial points for `x` [N, ...] where the attack found some, the clean inputs elsewhere."""
        return self.run(model, x, y, generator=generator).x_adv


@torch.no_grad()
def misclassified(model: Logits, x: Tensor, y: Tensor) -> Tensor:
    """[B] bool. A row of logits that is not finite counts as misclassified: it can certify nothing."""
    return fooled(model(x), y)


def fooled(logits: Tensor, y: Tensor) -> Tensor:
    """[B] bool, from logits [B, K]; see `misclassified`."""
    return (logits.argmax(1) != y) | ~logits.isfinite().all(1)


def input_gradient(
    model: Logits, x: Tensor, loss: Callable[[Tensor], Tensor], samples: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient [B, ...] of the summed `loss` by the input, the losses [B] and the logits [B, K], all detached.

    For a randomised model `samples` forward passes are averaged (expectation over transformation, Athalye et
    al. 2018). Weight gradients are never computed.
    """
    gradient, losses, logits = _one_gradient(model, x, loss)
    for _ in range(samples - 1):
        more = _one_gradient(model, x, loss)
        gradient, losses, logits = gradient + more[0], losses + more[1], logits + more[2]
    return (gradient, losses, logits) if samples == 1 else (gradient / samples, losses / samples, logits / samples)


def _one_gradient(model: Logits, x: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    point = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(point)
        losses = loss(logits)
        (gradient,) = torch.autograd.grad(losses.sum(), point)
    return gradient, losses.detach(), logits.detach()

"""TAPS and STAPS (Mao et al., NeurIPS 2023): intervals through the first layers, attacks through the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from trivet.certify.bounds.activations import Activation
from trivet.certify.bounds.interval import Interval
from trivet.certify.bounds.layer import Layer
from trivet.certify.bounds.network import Network
from trivet.data.dataset import Batch
from trivet.errors import require
from trivet.methods import method
from trivet.objectives.certified import Robust, Step, layers, robust_cross_entropy
from trivet.objectives.inner_attack import AttackedTraining
from trivet.objectives.objective import Progress
from trivet.objectives.sabr import small_box

_LINK = 0.5
"""c of the rectified linear link: how far from an end of the box, in widths, a point still moves that end."""


@method(title="TAPS and STAPS", paper="Mao et al., NeurIPS 2023", year=2023, legs="robust")
@dataclass(frozen=True)
class Taps(AttackedTraining):
    """CE_TAPS * CE_IBP, with the gradient of the first factor multiplied by `weight`. While eps_t grows, that of `ibp`.

    The network is split behind a ReLU into an extractor E and a classifier H. Interval bounds through E give a box of
    latent values; in it a PGD of its own for each rival class j raises z_j - z_y of H. CE_TAPS is the cross-entropy of
    these K - 1 values, each at the best point found for it; CE_IBP that of interval bounds through the whole network.
    Their weighted product holds neither bound: certificates come from verification afterwards, by more than intervals.

    PGD starts uniformly in the box; a step is max(0.2, 2 / steps) of the box's width by signs, a fifth of that after
    70 % of 10 steps or more. A latent point p sends its gradient to the ends of the box and stays where it is (the
    rectified linear link): to the upper end u with weight clamp((p - u + w / 2) / (w / 2), 0, 1), w the box's width, to
    the lower one likewise.

    With `lam` below 1 it is STAPS: the input box is the small one of `sabr`, around the point found by `steps` of PGD.

    Published, clean / certified: MNIST 0.1 99.19 / 98.39 %, MNIST 0.3 97.94 / 93.62 %; CIFAR-10 2/255 75.09 / 61.56 %,
    8/255 49.76 / 35.10 %; STAPS 79.76 / 62.98 % and 52.82 / 34.65 % on CIFAR-10.

    Attributes:
        activations: how many layers of ReLUs (or other activations) H has. Of the six of CNN7, CTBench gives it 3 at
            MNIST 0.1, 2 at 0.3, 5 and 1 on CIFAR-10 2/255 and 8/255.
        weight: see above; 4, and 2 on CIFAR-10 8/255.
        latent_steps: of PGD in the latent box; each class and record takes one pass through H for every step.
        lam: of the small box; 1 is TAPS.
    """

    # Of single records, too, but the attack inside of `losses` differentiates for a whole batch, not record by record.
    record_isolated: ClassVar[bool] = False

    kappa_end: float = 0.0
    activations: int = 1
    weight: float = 4.0
    latent_steps: int = 20
    lam: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.activations >= 0, f"activations={self.activations} must not be negative.")
        require(self.weight >= 0, f"weight={self.weight} must not be negative.")
        require(self.latent_steps >= 1, f"latent_steps={self.latent_steps} must be at least 1.")
        require(0 <= self.lam <= 1, f"lam={self.lam} must lie in [0, 1].")

    def perturb(self, model: nn.Module, batch: Batch, progress: Progress) -> Tensor:
        return batch.inputs if self.lam == 1 else super().perturb(model, batch, progress)

    def robust(self, step: Step) -> Robust:
        box = step.box if self.lam == 1 else small_box(step, self.lam)
        intervals = step.network.intervals(box)
        lower = step.network.margins(box, step.batch.labels, method="ibp", intervals=intervals)
        bound = robust_cross_entropy(lower)
        if step.grown < 1:
            return Robust(bound, intervals)
        split = split_node(step.network, self.activations)
        classifier = layers(step.network)[split:]
        attacked = robust_cross_entropy(self._found(step, classifier, split, intervals[split]))
        scaled = self.weight * attacked + (1 - self.weight) * attacked.detach()
        return Robust(scaled * bound, intervals)

    def _found(
        self, step: Step, classifier: Sequence[tuple[Layer, tuple[int, ...]]], split: int, box: Interval
    ) -> Tensor:
        """The smallest margins z_y - z_j [B, K - 1] that PGD in the latent `box` finds for each rival."""
        rivals = step.network.classes - 1
        low, high = (each.repeat_interleave(rivals, 0) for each in (box.lower, box.upper))
        rows = step.rows.flatten(0, 1)

        def margins(point: Tensor) -> Tensor:
            values = {split: point}
            for node, (layer, sources) in enumerate(classifier, split + 1):
                values[node] = layer(*(values[each] for each in sources))
            return (rows * values[split + len(classifier)]).sum(1)

        with torch.no_grad():
            fixed_low, fixed_high = low.detach(), high.detach()
            width = fixed_high - fixed_low
            draw = step.progress.generator("latent start", width.device)
            point = fixed_low + width * torch.empty_like(width).uniform_(generator=draw)
            best, least = point, torch.full_like(rows[:, 0], torch.inf)
            length = max(0.2, 2 / self.latent_steps)
            for number in range(self.latent_steps + 1):
                with torch.enable_grad():
                    point = point.requires_grad_()
                    found = margins(point)
                    (gradient,) = torch.autograd.grad(found.sum(), point)
                point, found = point.detach(), found.detach()
                better = found < least
                best = point.where(better.view(-1, *[1] * (point.ndim - 1)), best)
                least = torch.minimum(least, found)
                late = self.latent_steps >= 10 and number >= 0.7 * self.latent_steps
                stride = length * (0.2 if late else 1.0) * width
                point = torch.clamp(point - stride * gradient.sign(), fixed_low, fixed_high)
        return margins(_Linked.apply(low, high, best)).view(-1, rivals)


def split_node(network: Network, count: int) -> int:
    """The node behind which exactly `count` activation layers lie; 0 is the input, where H is the whole network.

    Raises:
        BadValue: more of them than the network has, or a value from before the split that is used behind it.
    """
    steps = enumerate(layers(network), 1)
    active = [node for node, (layer, _) in steps if isinstance(layer, Activation)]
    require(count <= len(active), f"activations={count} must be at most {len(active)}, as many as this network has.")
    split = active[-count - 1] if count < len(active) else 0
    require(
        all(node >= split for step in network.steps[split:] for node in step.inputs),
        f"activations={count} splits this network inside a residual block; choose another number.",
    )
    return split


class _Linked(torch.autograd.Function):
    """A point of a box that passes its gradient on to the ends of the box near it."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, low: Tensor, high: Tensor, point: Tensor) -> Tensor:
        ctx.save_for_backward(low, high, point)
        return point.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        low, high, point = ctx.saved_tensors  # type: ignore[attr-defined]
        reach = (_LINK * (high - low)).clamp(min=torch.finfo(low.dtype).tiny)
        to_high = ((point - (high - reach)) / reach).clamp(0, 1)
        to_low = (((low + reach) - point) / reach).clamp(0, 1)
        return gradients[0] * to_low, gradients[0] * to_high, None

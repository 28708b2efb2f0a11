"""Probes: quick attacks on the first points whose agreement shows whether gradients lead anywhere.

None of them is the verdict; that is the audit's battery. They give the reliability curve and the evidence for the
checks on gradient masking.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from trivet.data.dataset import Batch
from trivet.display import Advance
from trivet.models.modes import evaluating
from trivet.randomness import generator
from trivet.threats.attack import Attack, misclassified
from trivet.threats.pgd import PGD, fgsm
from trivet.threats.rotation_translation import RotationTranslation
from trivet.threats.threat import ThreatModel
from trivet.threats.union import Union, over_members

STEPS = 20
LONG_STEPS = 100
RANDOM_DIRECTIONS = 100


@dataclass(frozen=True)
class Probes:
    """Which of the N probed points still stand, [N] bool each.

    Attributes:
        clean: classified correctly without any attack.
        one_step, ce, margin, longer: after FGSM, PGD on the cross-entropy, PGD on the margin, and PGD on the
            cross-entropy with five times the steps, all at the threat's radius.
        curve: after both PGDs, by radius, ascending. whole: after PGD on the cross-entropy at `whole_range`.
        white_box: after every attack here and in the battery that follows gradients.
        black_box: of those, after attacks that only ask for outputs.
    """

    clean: Tensor
    one_step: Tensor
    ce: Tensor
    margin: Tensor
    longer: Tensor
    curve: dict[float, Tensor]
    whole: Tensor | None
    white_box: Tensor
    black_box: Tensor


def whole_range(threat: ThreatModel, pixels: int) -> float | None:
    """The radius at which every image of [0, 1]^pixels lies in the set around every other, where that is known.

    Of a union: the scale at which that holds of its first member.
    """
    if isinstance(threat, Union):
        once = replace(threat, eps=1.0).members
        radii = [(radius, each.eps) for each in once if each.eps and (radius := whole_range(each, pixels)) is not None]
        scale = min((radius / eps for radius, eps in radii), default=None)
        # Rounding must not push that member's radius over the range.
        return scale and next(
            scale
            for scale in (scale, math.nextafter(scale, 0.0))
            if all(scale * eps <= radius for radius, eps in radii)
        )
    return {"Linf": 1.0, "L2": math.sqrt(pixels), "L1": float(pixels)}.get(threat.norm)


def resized(threat: ThreatModel, radius: float) -> ThreatModel:
    """The same set with another radius, never a rounding error above it."""
    factor = radius / threat.eps
    while factor * threat.eps > radius:
        factor = math.nextafter(factor, 0.0)
    return threat.scaled(factor)


def default_curve(threat: ThreatModel, pixels: int) -> tuple[float, ...]:
    """0, half, once, one and a half times and twice the radius, and the whole range."""
    whole = whole_range(threat, pixels)
    radii = {factor * threat.eps for factor in (0.0, 0.5, 1.0, 1.5, 2.0)} | ({whole} if whole else set())
    return tuple(sorted(radius for radius in radii if whole is None or radius <= whole))


def probe(
    model: nn.Module,
    batch: Batch,
    threat: ThreatModel,
    radii: Sequence[float],
    *,
    seed: int,
    samples: int,
    standing: Tensor,
    batch_size: int,
    black_box: Sequence[Attack] = (),
    advance: Advance,
) -> Probes:
    """Attack `batch`; `standing` [N] says which points the battery's gradient-following attacks have left.

    Args:
        radii: of the curve. samples: forward passes averaged per gradient. black_box: attacks that only ask for
            outputs, run on the points that all others leave, after random directions.
    """

    def stands(attack: Attack, purpose: str, among: Tensor | None = None) -> Tensor:
        chosen = torch.ones_like(batch.labels, dtype=torch.bool) if among is None else among
        source = generator(seed, "probe", purpose, device=batch.inputs.device)
        found = attack.run(
            model, batch.inputs[chosen], batch.labels[chosen], generator=source, batch_size=batch_size
        ).broken
        advance(1)
        left = torch.zeros_like(chosen)
        left[chosen] = ~found
        return left

    def pgd(radius: float, loss: str, steps: int = STEPS) -> Tensor:
        attack = partial(PGD, steps=steps, loss=loss, samples=samples)  # type: ignore[arg-type]
        return stands(over_members(resized(threat, radius), attack), f"{loss} {steps} {radius!r}")

    clean = ~_misclassified(model, batch, batch_size)
    if threat.eps == 0:
        return Probes(clean, clean, clean, clean, clean, {0.0: clean}, None, standing & clean, standing & clean)
    pixels = batch.inputs[0].numel()
    asked = {radius for radius in radii if radius > 0} | {threat.eps}
    ce, margin = ({radius: pgd(radius, loss) for radius in sorted(asked)} for loss in ("ce", "margin"))
    one_step, longer = stands(over_members(threat, fgsm, draws=1), "fgsm"), pgd(threat.eps, "ce", LONG_STEPS)
    white_box = standing & one_step & ce[threat.eps] & margin[threat.eps] & longer
    left = _after_random_directions(model, batch, threat, white_box, seed, batch_size)
    for number, attack in enumerate(black_box):
        if bool(left.any()):
            left = stands(attack, f"black box {number}", among=left)
    curve = {0.0: clean} | {radius: ce[radius] & margin[radius] for radius in sorted(asked)}
    return Probes(
        clean,
        one_step,
        ce[threat.eps],
        margin[threat.eps],
        longer,
        {radius: curve[radius] for radius in sorted(curve) if radius in radii},
        ce.get(whole_range(threat, pixels) or -1.0),
        white_box,
        left,
    )


def count(radii: Sequence[float], black_box: Sequence[Attack] = ()) -> int:
    """How many attacks `probe` runs."""
    return 2 * len({*radii} - {0.0}) + 2 + len(black_box)


def _misclassified(model: nn.Module, batch: Batch, batch_size: int) -> Tensor:
    with evaluating(model):
        parts = zip(batch.inputs.split(batch_size), batch.labels.split(batch_size), strict=True)
        return torch.cat([misclassified(model, x, y) for x, y in parts])


def _after_random_directions(
    model: nn.Module, batch: Batch, threat: ThreatModel, standing: Tensor, seed: int, batch_size: int
) -> Tensor:
    """Which of the `standing` points survive full steps along random directions (for l_inf: random corners)."""
    source = generator(seed, "probe", "random directions", device=batch.inputs.device)
    left = standing.clone()
    with evaluating(model):
        for _ in range(RANDOM_DIRECTIONS):
            index = left.nonzero().squeeze(1)
            for part in index.split(batch_size):
                x, y = batch.inputs[part], batch.labels[part]
                direction = torch.randn(x.shape, generator=source, device=x.device)
                broken = torch.zeros_like(y, dtype=torch.bool)
                for member in threat.members:
                    if isinstance(member, RotationTranslation):  # no directions, and the search tried all of it
                        continue
                    proposed = member.project(member.ascend(x, direction, member.eps), x)
                    broken |= member.contains(proposed, x) & misclassified(model, proposed, y)
                left[part] = ~broken
    return left

"""Rotations and translations: small movements of the whole image (Engstrom et al., ICML 2019)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trivet.errors import BadValue, require
from trivet.methods import method
from trivet.models.surrogate import Logits
from trivet.threats.attack import Attack, Target, fooled
from trivet.threats.losses import cross_entropy
from trivet.threats.threat import ThreatModel


@method(
    title="Rotation and translation",
    paper="Engstrom et al., ICML 2019; Tramer & Boneh, NeurIPS 2019",
    year=2019,
    legs="robust",
)
@dataclass(frozen=True)
class RotationTranslation(ThreatModel):
    """S(x) = { T(x; v, h, a) : (v, h, a) on a grid }, a finite set that holds x itself.

    T turns the image about its centre by `a` degrees, then moves it `v` pixels down and `h` pixels right; both
    interpolate bilinearly, and what comes in from outside is black. As the set is finite, trying all of it decides
    the accuracy under this threat, which no search over a norm ball can. The transforms between the points of the
    grid are not in the set; training draws from them too (see `random_moves`).

    There is no direction of ascent here: attacks that follow input gradients refuse this threat.

    Attributes:
        shift: the largest movement along each axis, in pixels.
        angle: the largest rotation, in degrees.
        shifts, angles: points of the grid along each axis, odd so that 0 is among them; published: 5, 5 and 31.
        padding: black pixels put around the image before, and cut off after, so that corners turned out of the frame
            come back when it moves; published: 16 for CIFAR-10, 0 for MNIST.
        eps: scales `shift` and `angle`; this threat has no radius.
    """

    shift: float = 3.0
    angle: float = 30.0
    shifts: int = 5
    angles: int = 31
    padding: int = 0
    eps: float = 1.0
    norm: ClassVar[str] = "RT"

    def __post_init__(self) -> None:
        for name in ("shift", "angle", "eps"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name}={value} must be a finite number, not negative.")
        for name in ("shifts", "angles"):
            value = getattr(self, name)
            require(value >= 1 and value % 2 == 1, f"{name}={value} must be odd, so that no movement is a choice too.")
        require(self.padding >= 0, f"padding={self.padding} must not be negative.")

    def grid(self) -> list[Tensor]:
        """Every transform (down, right, degrees) of the set, [1, 3] float64 each."""
        steps = [value * self.eps * self.shift for value in _spread(self.shifts)]
        turns = [value * self.eps * self.angle for value in _spread(self.angles)]
        return list(
            torch.tensor([(v, h, a) for v in steps for h in steps for a in turns], dtype=torch.float64)[:, None]
        )

    def random_moves(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One transform [B, 3] for each record, uniform within the limits and not bound to the grid."""
        limits = torch.tensor([self.shift, self.shift, self.angle], dtype=torch.float64, device=x.device) * self.eps
        draws = torch.rand(len(x), 3, generator=generator, dtype=torch.float64, device=x.device)
        return (2 * draws - 1) * limits

    def moved(self, x: Tensor, moves: Tensor) -> Tensor:
        """T(x) [B, C, H, W] of images `x` for `moves` [B, 3], or [1, 3] for all of them; in [0, 1] if `x` is."""
        require(x.ndim == 4, f"rotations need images [B, C, H, W], got inputs of shape {tuple(x.shape)}.")
        padded = F.pad(x, [self.padding] * 4)
        height, width = padded.shape[2:]
        # From Python's own functions, so that a transform is the same numbers in every batch it is made in.
        turns = [(math.cos(a), math.sin(a)) for a in (math.radians(each) for each in moves[:, 2].tolist())]
        cosine, sine = torch.tensor(turns, dtype=torch.float64, device=x.device).T[:, :, None, None]
        down = torch.arange(height, dtype=torch.float64, device=x.device).view(1, -1, 1)
        right = torch.arange(width, dtype=torch.float64, device=x.device).view(1, 1, -1)
        v, h = down - (height - 1) / 2, right - (width - 1) / 2
        turned = bilinear(padded, v * cosine + h * sine + (height - 1) / 2, h * cosine - v * sine + (width - 1) / 2)
        by = moves.to(x.device)[:, :2, None, None]
        shape = (len(moves), height, width)
        shifted = bilinear(turned, (down - by[:, 0]).expand(shape), (right - by[:, 1]).expand(shape))
        inner = slice(self.padding, height - self.padding), slice(self.padding, width - self.padding)
        return shifted[..., inner[0], inner[1]].clamp(0.0, 1.0)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The transform of `x` nearest to `x_adv` in l_2, by trying all."""
        best, least = x.clone(), torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
        for moves in self.grid():
            point = self.moved(x, moves)
            apart = (point.double() - x_adv.double()).square().flatten(1).sum(1)
            best = torch.where((apart < least).view(-1, 1, 1, 1), point, best)
            least = torch.minimum(apart, least)
        return best

    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A uniformly random element of the set for each record."""
        grid = torch.cat(self.grid())
        return self.moved(x, grid[torch.randint(len(grid), (len(x),), generator=generator, device=x.device).cpu()])

    def ascend(self, x_adv: Tensor, grad: Tensor, step: float | Tensor) -> Tensor:
        raise BadValue(
            "rotations and translations have no direction of ascent; search with rotation_translation_search."
        )

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        found = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for moves in self.grid():
            open_ = (~found).nonzero().squeeze(1)
            if not len(open_):
                break
            found[open_] = (self.moved(x[open_], moves) == x_adv[open_]).flatten(1).all(1)
        return found


def bilinear(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`images` [B, C, H, W] read at the coordinates [M, h, w] (M = B, or 1 for all), 0 outside: [B, C, h, w].

    At whole coordinates the pixels themselves come back, to the last bit; `torch.nn.functional.grid_sample`, whose
    coordinates run from -1 to 1, does not promise that. Differentiable in `images`.
    """
    batch, channels, height, width = images.shape
    top, left = rows.floor(), columns.floor()
    below, beside = (rows - top).to(images.dtype), (columns - left).to(images.dtype)
    total = images.new_zeros(batch, channels, *rows.shape[1:])
    for row, weight_row in ((top, 1 - below), (top + 1, below)):
        for column, weight_column in ((left, 1 - beside), (left + 1, beside)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long().flatten(1)
            read = images.flatten(2).gather(2, index[:, None].expand(batch, channels, -1)).view_as(total)
            total = total + read * (weight_row * weight_column * inside)[:, None]
    return total


def _spread(count: int) -> list[float]:
    """`count` evenly spaced numbers from -1 to 1, symmetric to the last bit; only 0 if it is one."""
    half = count // 2
    return [number / half if half else 0.0 for number in range(-half, half + 1)]


@torch.no_grad()
def worst_transform(ask: Logits, threat: RotationTranslation, x: Tensor, y: Tensor, tries: Iterable[Tensor]) -> Tensor:
    """The worst image [B, C, H, W] among the transforms `tries`, [B, 3] or [1, 3] each.

    A misclassified one beats one that is not; among equals the higher cross-entropy wins.
    """
    best, wrong, most = (
        x.clone(),
        torch.zeros_like(y, dtype=torch.bool),
        torch.full(y.shape, -torch.inf, device=x.device),
    )
    for moves in tries:
        point = threat.moved(x, moves)
        logits = ask(point)
        loss, fell = cross_entropy(logits, y).float(), fooled(logits, y)
        better = (fell & ~wrong) | ((fell == wrong) & (loss > most))
        best = torch.where(better.view(-1, 1, 1, 1), point, best)
        most, wrong = torch.where(better, loss, most), wrong | fell
    return best


@method(
    title="Rotation and translation search",
    paper="Engstrom et al., ICML 2019",
    year=2019,
    legs="robust",
)
@dataclass(frozen=True)
class RotationTranslationSearch(Attack):
    """Try every transform of the set, or the worst of `draws` random ones. Asks for outputs alone.

    Without `draws` the accuracy it leaves is that under the threat, not a bound on it, as far as the model answers
    the same question twice alike.

    Attributes:
        draws: random elements of the set to try for each record; None for all of the set (775 as published).
    """

    threat: RotationTranslation
    draws: int | None = None
    gradient_free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(
            isinstance(self.threat, RotationTranslation),
            f"the search over transforms knows rotation_translation, not {self.threat.norm}; give it that threat.",
        )
        require(self.draws is None or self.draws >= 1, f"draws={self.draws} must be at least 1.")

    def search(self, model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        grid = self.threat.grid()
        if self.draws is not None:
            whole, places = torch.cat(grid), (self.draws, len(x))
            chosen = torch.randint(len(whole), places, generator=generator, device=x.device).cpu()
            return worst_transform(model, self.threat, x, y, whole[chosen])
        best, open_ = x.clone(), torch.arange(len(x), device=x.device)
        for moves in grid:
            point = self.threat.moved(x[open_], moves)
            fell = model.misclassifies(point, y[open_])
            best[open_[fell]], open_ = point[fell], open_[~fell]
            if not len(open_):
                break
        return best

    def succeeds(self, model: Target, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        # Made by the threat's own transforms; to look through all of them again for each find would cost far more.
        return model.misclassifies(x_adv, y)


def balls(threat: ThreatModel) -> tuple[ThreatModel, ...]:
    """The members of `threat` in which gradients can be followed: all but rotations and translations."""
    return tuple(member for member in threat.members if not isinstance(member, RotationTranslation))

"""K nearest neighbours under a Mahalanobis distance: a classifier whose answers can be certified in closed form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trivet.errors import require

_BLOCK = 2**24  # coordinates that are subtracted at once: 128 MiB


class MahalanobisKnn(nn.Module):
    """The class most frequent among the `k` points nearest to x under d(a, b) = || G (a - b) ||_2^2.

    M = G^T G is positive semi-definite whatever G is. Inputs [B, ...] are flattened to [B, D] and give votes [B, C],
    float64; equal distances favour the earlier point, equal votes the smaller class. Distances are sums of squared
    differences in float64, never expanded, which would lose the digits that separate near neighbours.

    The points are records: whoever has the model has them, and no differential privacy is claimed of it.

    Args:
        points: [N, ...] reference records, flattened to [N, D].
        labels: [N] int64, their classes, 0 to C - 1.
        k: odd, at most N.
        factor: G [R, D]; None: the identity, the Euclidean distance.

    Raises:
        BadValue: shapes that do not fit, values that are not finite, `k` even or out of range.
    """

    points: Tensor
    labels: Tensor
    factor: Tensor
    neighbours: Tensor

    def __init__(self, points: Tensor, labels: Tensor, k: int = 1, factor: Tensor | None = None) -> None:
        super().__init__()
        rows = points.detach().flatten(1).double()
        number, size = rows.shape
        chosen = torch.eye(size, dtype=torch.float64) if factor is None else factor.detach().double()
        require(number >= 1, "points: at least one reference record is needed.")
        require(labels.shape == (number,), f"labels must be [{number}] like the points, got {tuple(labels.shape)}.")
        require(bool((labels >= 0).all()), f"labels must be at least 0, got {int(labels.min())}.")
        require(k % 2 == 1 and 1 <= k <= number, f"k={k} must be odd, and at most the number of points, {number}.")
        require(chosen.ndim == 2 and chosen.shape[1] == size, f"factor must be [R, {size}], got {tuple(chosen.shape)}.")
        require(bool(rows.isfinite().all() and chosen.isfinite().all()), "points and factor must be finite.")
        # All that decides an answer is a buffer, so that a fingerprint of the model covers it.
        for name, value in (("points", rows), ("labels", labels.detach().long()), ("factor", chosen)):
            self.register_buffer(name, value.clone())
        self.register_buffer("neighbours", torch.tensor(k))

    @property
    def k(self) -> int:
        return int(self.neighbours)

    def forward(self, x: Tensor) -> Tensor:
        """Votes [B, C]: constant almost everywhere, so they have no gradient."""
        return self.votes(self.squared_distances(x))

    def votes(self, distances: Tensor) -> Tensor:
        """Votes [B, C] of the k nearest by `distances` [B, N]."""
        nearest = self.labels[distances.sort(dim=1, stable=True).indices[:, : self.k]]
        votes = torch.zeros(len(nearest), int(self.labels.max()) + 1, dtype=torch.float64, device=nearest.device)
        return votes.scatter_add_(1, nearest, torch.ones_like(nearest, dtype=torch.float64))

    @torch.no_grad()
    def squared_distances(self, x: Tensor) -> Tensor:
        """[B, N]: || G (x - point) ||_2^2, from `x` [B, ...] to every point."""
        ours, theirs = self.embed(x), self.embed(self.points)
        found = torch.empty(len(ours), len(theirs), dtype=torch.float64, device=ours.device)
        rows = max(1, _BLOCK // max(1, theirs.numel()))
        for start in range(0, len(ours), rows):
            difference = ours[start : start + rows, None] - theirs
            found[start : start + rows] = difference.square_().sum(-1)
        return found

    def embed(self, x: Tensor) -> Tensor:
        """G x [B, R]: between these, the distance is Euclidean."""
        rows = x.flatten(1).to(self.factor)
        size = self.factor.shape[1]
        require(rows.shape[1] == size, f"inputs have {rows.shape[1]} features, the reference points {size}.")
        return rows @ self.factor.T

    def extra_repr(self) -> str:
        return f"k={self.k}, points={len(self.points)}, factor={tuple(self.factor.shape)}"

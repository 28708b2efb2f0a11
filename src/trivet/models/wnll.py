"""WNLL, the weighted nonlocal Laplacian as output layer: labels interpolated on a graph of deep features.

Wang, Luo, Li, Zhu, Shi & Osher, "Deep Neural Nets with Interpolating Function as Output Activation", NeurIPS 2018;
Wang & Osher, "Graph interpolating activation improves both natural and robust accuracies in data-efficient deep
learning", 2020. Points X = S u U: templates S with targets g, queries U; features z. Each point is joined to its K
nearest, itself included, by

    w(i, j) = exp( -||z_i - z_j||^2 / s_i^2 ),   s_i^2 = ||z_i - z_(m-th nearest of i)||^2 + 1e-10,

which is not symmetric, and u = g on S, on U the minimiser of

    sum_{x in U, y in X} w(x,y) (u(x)-u(y))^2  +  mu sum_{x in S, y in X} w(x,y) (u(x)-u(y))^2,   mu = |X| / |S|,

in matrix form, with A = W[U,S] + mu W[S,U]^T and N = W[U,U] + W[U,U]^T,

    ( diag(A 1 + N 1) - N ) u_U = A g.

mu = 1 is the plain graph Laplacian (GL). Where every query hangs together with a template the system is a nonsingular
M-matrix: rows of u sum to those of g, and u lies between the extremes of g. All of it is in float64.

The authors' code differs: it squares the squared distances once more, and rounds mu - 1 down.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from trivet.errors import BadValue, require

Through = Literal["exact", "surrogate", "linear", "soft"]
THROUGH: tuple[Through, ...] = ("exact", "surrogate", "linear", "soft")

_NO_EDGE = 1e-12
"""Weights below it are none: they would hold the system together in name only, and it could not be solved."""
_SAME = 1e-10
_FLOOR = 1e-30
"""Added before the logarithm, so that a class nothing speaks for has a finite logit, -69."""
_BLOCK = 2**22
"""Distances held at once: 32 MiB."""


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """||a_i - b_j||^2, [A, B] from [A, D] and [B, D], as |a|^2 + |b|^2 - 2ab around the mean of b; at least 0."""
    middle = b.detach().mean(0)
    a, b = a - middle, b - middle
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)


def kernel(points: Tensor, neighbours: int, scale: int) -> Tensor:
    """W [n, n] of `points` [n, D]: the weights above, K = `neighbours` and m = `scale`, both counting the point itself.

    Differentiable, with the neighbours held fixed. The diagonal is 1.
    """
    require(neighbours <= len(points), f"neighbours={neighbours} must be at most the number of points, {len(points)}.")
    itself = torch.eye(len(points), dtype=torch.bool, device=points.device)
    apart = squared_distances(points, points).masked_fill(itself, 0.0)
    # Each point is its own nearest, whatever lies in the same place.
    nearest = apart.detach().masked_fill(itself, -1.0).topk(neighbours, largest=False).indices
    near = apart.gather(1, nearest)
    weights = (-near / (near[:, scale - 1 : scale] + _SAME)).exp()
    return torch.zeros_like(apart).scatter(1, nearest, weights)


def solve(w: Tensor, targets: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """u on the queries, and which of them hang together with a template.

    Args:
        w: [n, n] weights, templates first.
        targets: [T, C], a distribution over classes for each template.
        mu: the weight of the templates' own edges; 1 for the plain graph Laplacian.

    Returns:
        u [n - T, C] and reached [n - T] bool. Rows that no template reaches are zero: nothing is known there.
    """
    count = len(targets)
    w = w.where(w >= _NO_EDGE, 0.0)
    to_templates = w[count:, :count] + mu * w[:count, count:].T
    among = w[count:, count:]
    among = (among + among.T) * (1 - torch.eye(len(among), dtype=w.dtype, device=w.device))
    reached = (to_templates > 0).any(1)
    while bool((more := reached | ((among > 0) & reached).any(1)).ne(reached).any()):
        reached = more
    to_templates, among = to_templates[reached], among[reached][:, reached]
    degree = to_templates.sum(1) + among.sum(1)
    matrix = torch.eye(len(among), dtype=w.dtype, device=w.device) - among / degree[:, None]
    found = torch.linalg.solve(matrix, to_templates @ targets / degree[:, None])
    u = torch.zeros(len(reached), targets.shape[1], dtype=w.dtype, device=w.device)
    return u.index_put((reached.nonzero().squeeze(1),), found), reached


def interpolate(
    templates: Tensor, targets: Tensor, queries: Tensor, neighbours: int = 15, scale: int = 8, weighted: bool = True
) -> tuple[Tensor, Tensor]:
    """WNLL of all `queries` [U, D] together: u [U, C] float64 and which rows a template reaches, [U] bool.

    What is said of one query depends on the others, as in the paper. `templates` [T, D] with `targets` [T, C]; these
    may be soft, so that a result can serve as targets: to use unlabelled records, interpolate their labels first,
    then take both for templates. Dense: memory (T + U)^2. Exact gradients, with the neighbours held fixed.

    Args:
        neighbours, scale: K and m.
        weighted: mu = |X| / |S|; False for the plain graph Laplacian.
    """
    points = torch.cat([templates, queries]).double()
    mu = len(points) / len(templates) if weighted else 1.0
    return solve(kernel(points, neighbours, scale), targets.double(), mu)


class WnllHead(nn.Module):
    """The last linear layer of a network, and what may answer in its place: features [B, D] to logits [B, C].

    In eval mode, filled with templates, it returns log u: its softmax is u, its cross-entropy -log u. Each query is
    answered by itself (X = S and that one query), so that an answer depends on no other record, and the solve is one
    division:

        u = sum_y a(y) g(y) / sum_y a(y),   a(y) = w(x, y) + mu w(y, x),   mu = (|S| + 1) / |S|.

    With mu so near 1 this is all but the plain graph Laplacian: WNLL differs from it where many queries share few
    templates. `together` answers a batch as in the paper; rows that no template reaches are then the linear layer's
    softmax, and `unreached` holds how many there were in the latest pass.

    In training mode, and empty, it is the linear layer. Going into training mode forgets the templates: features of
    other weights are none. Templates are records: whoever has the model has their features and labels.

    It promises nothing about attacks. Near the templates u saturates and gradients vanish, so that attacks which follow
    them fail where points made for the linear layer succeed. `through` chooses what attacks differentiate instead:

        exact       log u, differentiated through the graph's weights
        surrogate   u, with the Jacobian of the linear layer (the authors' training and attacks)
        linear      the linear layer's logits
        soft        log sum_{y of class c} exp( -||z - z_y||^2 / t ) over all templates, t the median of their s_y^2

    The last is this library's: a twin that never saturates.

    Attributes:
        templates: [T, D] float64; targets: [T, C] float64; filled: whether they are any.
        rulers: [T, 3] float64: squared distances from a template to its (m-1)-th, m-th and K-th nearest template.
    """

    templates: Tensor
    targets: Tensor
    rulers: Tensor
    filled: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        templates: int,
        neighbours: int = 15,
        scale: int = 8,
        weighted: bool = True,
        together: bool = False,
    ) -> None:
        super().__init__()
        require(scale >= 2, f"scale={scale} must be at least 2: the nearest neighbour of a point is the point itself.")
        require(neighbours >= scale, f"neighbours={neighbours} must be at least scale={scale}.")
        require(templates >= neighbours, f"templates={templates} must be at least neighbours={neighbours}.")
        self.linear = linear
        self.neighbours, self.scale, self.weighted, self.together = neighbours, scale, weighted, together
        self.through: Through = "exact"
        self.unreached = 0
        sizes = {"templates": linear.in_features, "targets": linear.out_features, "rulers": 3}
        device = linear.weight.device
        for name, size in sizes.items():
            self.register_buffer(name, torch.zeros(templates, size, dtype=torch.float64, device=device))
        self.register_buffer("filled", torch.tensor(False, device=device))

    @torch.no_grad()
    def fill(self, features: Tensor, labels: Tensor) -> None:
        """Take `features` [T, D] with `labels` [T] for templates."""
        require(
            features.shape == self.templates.shape and labels.shape == features.shape[:1],
            f"templates must be {tuple(self.templates.shape)} with as many labels, got {tuple(features.shape)}.",
        )
        require(bool(features.isfinite().all()), "features of templates must be finite; the network overflows.")
        self.templates.copy_(features)
        self.targets.copy_(nn.functional.one_hot(labels, self.targets.shape[1]))
        places = torch.tensor([self.scale - 2, self.scale - 1, self.neighbours - 1], device=labels.device)
        step = max(1, _BLOCK // len(labels))
        for rows in torch.arange(len(labels), device=labels.device).split(step):
            apart = squared_distances(self.templates[rows], self.templates)
            apart[torch.arange(len(rows), device=rows.device), rows] = -1.0
            nearest = apart.topk(self.neighbours, largest=False).values.clamp_min(0)
            self.rulers[rows] = nearest[:, places]
        self.filled.fill_(True)

    def train(self, mode: bool = True) -> WnllHead:
        if mode and bool(self.filled):
            for tensor in (self.templates, self.targets, self.rulers, self.filled):
                tensor.zero_()
        super().train(mode)
        return self

    def forward(self, z: Tensor) -> Tensor:
        logits: Tensor = self.linear(z)
        if self.training or self.through == "linear" or not bool(self.filled):
            return logits
        if self.through == "surrogate":
            return logits + (self.shares(z.detach(), logits.detach()).to(logits) - logits).detach()
        if self.through == "soft":
            return self._soft(z.double()).to(logits)
        return (self.shares(z, logits) + _FLOOR).log().to(logits)

    def shares(self, z: Tensor, logits: Tensor) -> Tensor:
        """u [B, C], float64; `logits` [B, C] of the linear layer serve rows that no template reaches."""
        z = z.double()
        if not self.together:
            step = max(1, _BLOCK // len(self.templates))
            return torch.cat([self._alone(part) for part in z.split(step)])
        u, reached = interpolate(self.templates, self.targets, z, self.neighbours, self.scale, self.weighted)
        self.unreached = int((~reached).sum())
        return torch.where(reached[:, None], u, logits.double().softmax(1))

    def _alone(self, z: Tensor) -> Tensor:
        apart = squared_distances(z, self.templates.double())
        near, nearest = apart.topk(self.neighbours - 1, largest=False)
        ours = (-near / (near[:, self.scale - 2 : self.scale - 1] + _SAME)).exp()
        weights = torch.zeros_like(apart).scatter(1, nearest, ours)
        # What a query does to a template's neighbours: it may be the m-th of them, and it must be nearer than the K-th.
        inner, outer, last = self.rulers.double().T
        ruler = torch.minimum(torch.maximum(apart, inner), outer) + _SAME
        theirs = (-apart / ruler).exp().where(apart < last, 0.0)
        mu = (len(self.templates) + 1) / len(self.templates) if self.weighted else 1.0
        weights = weights.where(weights >= _NO_EDGE, 0.0) + mu * theirs.where(theirs >= _NO_EDGE, 0.0)
        u: Tensor = weights @ self.targets.double() / weights.sum(1, keepdim=True)
        return u

    def _soft(self, z: Tensor) -> Tensor:
        closeness = -squared_distances(z, self.templates.double()) / (self.rulers[:, 1].median() + _SAME)
        # Classes without a template stay finite and never come first.
        return torch.stack(
            [
                closeness[:, own].logsumexp(1) if bool(own.any()) else closeness.amin(1) - math.log(1 / _FLOOR)
                for own in (self.targets > 0).T
            ],
            1,
        )

    def extra_repr(self) -> str:
        kind = "WNLL" if self.weighted else "GL"
        filled = "filled" if bool(self.filled) else "empty"
        together = ", together" if self.together else ""
        return f"{kind}, {len(self.templates)} templates ({filled}), K={self.neighbours}, m={self.scale}{together}"


def head_of(model: nn.Module) -> WnllHead | None:
    """The WNLL head of `model`, if it has one."""
    return next((module for module in model.modules() if isinstance(module, WnllHead)), None)


def require_head(model: nn.Module) -> WnllHead:
    """The same.

    Raises:
        BadValue: there is none.
    """
    head = head_of(model)
    if head is None:
        raise BadValue("the model has no WNLL output layer; the stage `wnll` puts one on.")
    return head

"""Records of patches with robust and non-robust features (Li & Li, ICLR 2025): data whose right answer is known."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trivet.data.dataset import Dataset, Splits
from trivet.errors import require
from trivet.methods import method
from trivet.randomness import generator

UNIT = 1 / 8
"""What a length of 1 in the paper's coordinates measures in inputs: an image is 0.5 + UNIT * X."""


def features(classes: int, dimension: int, draw: int = 0) -> tuple[Tensor, Tensor]:
    """u and v, [K, d] float64 each: for every class its robust and its non-robust direction, all 2 K orthonormal."""
    gaussian = torch.randn(dimension, 2 * classes, generator=generator(draw, "patch features"), dtype=torch.float64)
    basis, _ = torch.linalg.qr(gaussian)
    return basis[:, :classes].T, basis[:, classes:].T


@method(title="Patches with two kinds of features", paper="Li & Li, ICLR 2025", year=2025)
def patches(
    classes: int = 3,
    dimension: int = 40,
    count: int = 12,
    robust: int = 1,
    strong: float = 1.5,
    weak: float = 0.5,
    noise: float = 0.02,
    train: int = 120,
    test: int = 200,
    draw: int = 0,
) -> Splits:
    """Records X [P, d] of P patches: `robust` patches chosen at random show u_y strongly, all others v_y weakly.

        X_p = alpha_p u_y + xi_p    alpha_p uniform in strong * [0.8, 1.2]    in the chosen patches
        X_p = beta_p  v_y + xi_p    beta_p  uniform in weak   * [0.8, 1.2]    in the others
        xi_p ~ N(0, noise^2 I),  y uniform in 0..K-1

    A patch is a row of the image: inputs are [B, 1, P, d] = 0.5 + X / 8, so that a model with mean 0.5 and std 0.125
    sees X itself, and a radius in the paper's coordinates is divided by 8 (`eps: 0.5/8`). A perturbation of length
    between `weak` and `strong` in every patch can wipe out v_y, but not u_y; that v_y stands in most patches makes it
    the easier one to learn. Whether it wins the early race in theory depends on the network's power q:
    (P - robust) weak^q > robust strong^q. The defaults, chosen so that robust accuracy is visible at small size, lie
    outside that regime for q = 3 (1.4 against 3.4); strong 1, weak 0.5, count 16 lie inside it (1.9 against 1).

    The data model is the paper's as far as its abstract and reviews tell; the sizes are ours.

    Args:
        classes: K.
        dimension: d, of a patch.
        count: P, patches in a record.
        robust: how many of them show the robust feature.
        strong, weak: the mean strengths of the two kinds of features.
        noise: standard deviation in each coordinate.
        train, test: numbers of records.
        draw: which features and which records; another number gives another problem of the same kind.
    """
    require(classes >= 2, f"classes={classes} must be at least 2.")
    require(
        dimension >= 2 * classes,
        f"dimension={dimension} must be at least {2 * classes}, to hold two orthogonal features of every class.",
    )
    require(1 <= robust < count, f"robust={robust} must lie between 1 and {count - 1}, one less than count={count}.")
    for name, value in {"strong": strong, "weak": weak}.items():
        require(0 < value < math.inf, f"{name}={value} must be positive and finite.")
    require(0 <= noise < math.inf, f"noise={noise} must be finite and not negative.")
    for name, number in {"train": train, "test": test}.items():
        require(number >= 1, f"{name}={number} must be at least 1.")
    u, v = features(classes, dimension, draw)

    def part(name: str, number: int) -> Dataset:
        stream = generator(draw, "patch records", name)
        labels = torch.randint(classes, (number,), generator=stream)
        chosen = torch.rand(number, count, generator=stream).argsort(1).argsort(1) < robust
        spread = 0.8 + 0.4 * torch.rand(number, count, 1, generator=stream, dtype=torch.float64)
        shown = torch.where(chosen[..., None], strong * u[labels][:, None], weak * v[labels][:, None])
        xi = noise * torch.randn(number, count, dimension, generator=stream, dtype=torch.float64)
        images = 0.5 + UNIT * (spread * shown + xi)
        reach = float((images - 0.5).abs().max()) / UNIT
        require(
            reach <= 0.5 / UNIT,
            f"strong={strong}, weak={weak} and noise={noise} reach {reach:.3g} in a coordinate, beyond the "
            f"{0.5 / UNIT:g} that fit into [0, 1]; choose smaller ones.",
        )
        return Dataset(images[:, None].float(), labels, tuple(map(str, range(classes))), "patches", scale=1.0)

    return Splits(part("train", train), part("test", test))

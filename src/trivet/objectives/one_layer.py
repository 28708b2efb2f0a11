"""Adversarial training of one layer in closed form (Chalasani et al., ICML 2020): an oracle, and a reason for l_1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivet.errors import require
from trivet.models.normalize import Normalize


def weights(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """W [K, D] and b [K] of a model that is z = W x + b in its inputs; differentiable in its parameters.

    Raises:
        BadValue: layers other than one linear layer, normalisation and flattening: the identities hold for no other.
    """
    layers = [module for module in model.modules() if not list(module.children())]
    linear = [module for module in layers if isinstance(module, nn.Linear)]
    rest = [module for module in layers if not isinstance(module, (nn.Linear, nn.Flatten, nn.Identity, Normalize))]
    require(
        len(linear) == 1 and not rest,
        f"the closed form is that of one linear layer; this model has {len(linear)}, and "
        f"{', '.join(sorted({type(module).__name__ for module in rest})) or 'no other layers'} besides.",
    )
    zero = linear[0].weight.new_zeros(1, *input_shape)
    b = model(zero)[0]
    unit = torch.eye(zero.numel(), dtype=zero.dtype, device=zero.device).view(-1, *input_shape)
    return (model(unit) - b).T, b


def worst_margin(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """max over ||d||_inf <= eps and t != y of z_t(x + d) - z_y(x + d), [B], of a one-layer network of K classes:

        max_t (W_t - W_y) . x + b_t - b_y + eps || W_t - W_y ||_1

    Exact where [0, 1] does not cut the ball, an upper bound elsewhere; positive means that some d misleads it.
    """
    W, b = weights(model, tuple(x.shape[1:]))
    difference = W[None] - W[y][:, None]
    gap = (difference @ x.flatten(1)[..., None]).squeeze(-1) + b[None] - b[y][:, None]
    return (gap + eps * difference.abs().sum(2)).scatter(1, y[:, None], -torch.inf).amax(1)


def worst_loss(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """max over ||d||_inf <= eps of CE(z(x + d), y), [B], of a one-layer network with two classes.

    With w = W_1 - W_0, b = b_1 - b_0, s = 2 y - 1 and g(u) = log(1 + e^u):

        g( -s (w . x + b) + eps ||w||_1 ),  attained at d = -s eps sign(w).

    So adversarial training of one layer is training with an l_1 penalty inside the loss. The same number is the
    objective with stable attributions, CE(x) + max || IG(x, x + d) ||_1, because g is convex and grows. Exact where
    [0, 1] does not cut the ball, an upper bound elsewhere.

    Raises:
        BadValue: another kind of model, or more classes: then the maximum has no closed form (`worst_margin` has).
    """
    W, _ = weights(model, tuple(x.shape[1:]))
    require(len(W) == 2, f"the worst loss has a closed form for 2 classes, not for {len(W)}; worst_margin has one.")
    return F.softplus(worst_margin(model, x, y, eps))

"""Attributions: how much each pixel contributed to an output. Integrated gradients, DeepSHAP, and their sparseness."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import grad

from trivet.errors import TrivetError, require
from trivet.models.modes import evaluating


def integrated_gradients(function: Callable[[Tensor], Tensor], x: Tensor, baseline: Tensor, steps: int = 50) -> Tensor:
    """IG_i = (x_i - u_i) int_0^1 dF(u + s (x - u)) / dx_i ds, shaped as `x` [B, ...] (Sundararajan et al., ICML 2017).

    `function` maps [B, ...] to [B], each row by itself; u is `baseline`. The integral is the mean over the midpoints
    of `steps` equal parts of [0, 1]. The attributions of a record add up to F(x) - F(u), up to the error of that sum:
    check it. Differentiable in x, u and whatever `function` depends on; works under `torch.func.vmap`.
    """
    return _summed(grad(lambda points: function(points).sum()), x, baseline, steps)


def _summed(slope: Callable[[Tensor], Tensor], x: Tensor, baseline: Tensor, steps: int) -> Tensor:
    require(steps >= 1, f"steps={steps} must be at least 1.")
    total = torch.zeros_like(x)
    for number in range(steps):
        total = total + slope(baseline + (number + 0.5) / steps * (x - baseline))
    return (x - baseline) * total / steps


def class_logit(model: nn.Module, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Inputs [B, ...] to z_y [B]: what is explained. Logits, because saturated probabilities look sparse."""

    def logit(x: Tensor) -> Tensor:
        return model(x).gather(1, y[:, None]).squeeze(1)

    return logit


def explain_class(model: nn.Module, x: Tensor, y: Tensor, steps: int = 50) -> Tensor:
    """Integrated gradients [B, ...] of the logits of classes `y` [B], in eval mode, from the black image; detached.

    Of any model that has a gradient, also where `torch.func` has no rule for one of its layers.
    """
    logit = class_logit(model, y)

    def slope(points: Tensor) -> Tensor:
        points = points.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(logit(points).sum(), points)[0]

    with evaluating(model):
        return _summed(slope, x.detach(), torch.zeros_like(x), steps)


def deep_shap(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """DeepSHAP [B, ...] of the logits of classes `y` [B], with the black image as its one reference; detached.

    DeepSHAP (Lundberg & Lee, NeurIPS 2017) with a single reference is DeepLIFT's rescale rule (Shrikumar et al., ICML
    2017), here as captum computes it. The rule replaces the derivative of every activation by its difference quotient
    between reference and input. `model` is left as it was; every activation must be a module of its own, used once.

    Raises:
        TrivetError: captum is not installed, or cannot take the model apart.
    """
    try:
        from captum.attr import DeepLift
    except ModuleNotFoundError:
        raise TrivetError("DeepSHAP needs captum: pip install 'trivet[explain]'.") from None
    rows = copy.deepcopy(model).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it sets hooks
        try:
            found: Tensor = DeepLift(rows).attribute(x, torch.zeros_like(x), target=y)
        except (AssertionError, RuntimeError) as error:
            raise TrivetError(f"captum cannot take this model apart: {' '.join(str(error).split())}.") from None
    return found.detach()


def gini(attribution: Tensor) -> Tensor:
    """[B]: the Gini index of |attribution| [B, ...] of each record: 0 if all n pixels count alike, 1 - 1/n if one does.

    G = sum_k (2 k - n - 1) v_k / (n ||v||_1), v_1 <= ... <= v_n. It does not depend on scale. Without any attribution
    it is 0: nothing is concentrated.
    """
    v = attribution.detach().flatten(1).double().abs().sort(1).values
    n = v.shape[1]
    rank = 2 * torch.arange(1, n + 1, dtype=v.dtype, device=v.device) - n - 1
    total = v.sum(1)
    return (v @ rank) / (n * total.clamp(min=torch.finfo(v.dtype).tiny))

"""Entropic retraining (Sperl & Böttinger, 2020): hidden layers with the entropy of adversarial training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trivet.data.dataset import Batch
from trivet.errors import require
from trivet.methods import method
from trivet.models.modes import evaluating
from trivet.models.taps import Read, tapped
from trivet.objectives.objective import Losses, Objective, Progress
from trivet.threats.losses import cross_entropy

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Sigmoid, nn.Tanh)
_TINY = 1e-8


def layer_entropy(activations: Tensor) -> Tensor:
    """H [B] in [0, 1] of a layer's activations [B, n] or, channels averaged over space, [B, n, ...].

        q = |a| / (sum_k |a_k| + 1e-8),   H = -sum_k q_k log(q_k + 1e-8) / log n

    1 if all units are equally active, 0 if one is active alone, and 0, without a slope, in a dead layer. It does not
    depend on the scale of `a`: it says how evenly activity is spread, not how large it is. In float32 or wider.
    """
    units = activations.shape[1]
    require(units >= 2, f"a layer of {units} unit has no entropy; name a wider one.")
    a = activations.to(torch.promote_types(activations.dtype, torch.float32)).abs()
    a = a.flatten(2).mean(2) if a.ndim > 2 else a
    q = a / (a.sum(1, keepdim=True) + _TINY)
    return -(q * (q + _TINY).log()).sum(1) / math.log(units)


def activation_layers(model: nn.Module) -> list[str]:
    """The names of the activation functions that are modules of `model`, in the order they are registered."""
    return [name for name, module in model.named_modules() if isinstance(module, _ACTIVATIONS)]


@torch.no_grad()
def entropies(model: nn.Module, x: Tensor) -> dict[str, float]:
    """The mean of `layer_entropy` over inputs [B, ...] for each of `activation_layers`, in eval mode."""
    with evaluating(model), ExitStack() as taps:
        reads = _reads(taps, model, activation_layers(model))
        model(x)
        return {name: float(layer_entropy(read()).mean()) for name, read in reads.items()}


def towards(natural: nn.Module, hardened: nn.Module, x: Tensor, weight: float = 0.3) -> dict[str, float]:
    """The `weights` that push each layer's entropy the way adversarial training took it: the paper's analysis.

    `weight` where it is lower in `hardened`, an adversarially trained network of the architecture of `natural`, and
    minus `weight` where it is higher.
    """
    before, after = entropies(natural, x), entropies(hardened, x)
    return {name: math.copysign(weight, before[name] - after[name]) for name in before}


@method(
    title="Entropic retraining",
    paper="Sperl & Böttinger, 2020",
    year=2020,
    legs="robust",
    note="reconstruction from the abstract; constants are ours",
)
@dataclass(frozen=True)
class EntropicRetraining(Objective):
    """min_theta E[ CE(z(x), y) + sum_l w_l H_l(x) ],   H_l the normalised entropy of the activations of layer l.

    For a network that has been trained already: the second `fit` of a recipe, at a tenth of the learning rate for 10
    to 30 epochs, on the original records. A positive weight lowers the entropy of a layer, a negative one raises it,
    so as to resemble an adversarially trained network (`towards` finds the signs) without adversarial examples.

    Reconstructed from the abstract: which entropy, which layers and all constants are ours. It promises nothing.

    The "significant increase in security" that the abstract speaks of was not seen (bench/entropic_retraining.py:
    perceptron (128, 64) on the digits, 20 epochs and 10 of retraining, 3 seeds; paired with plain retraining, means and
    95 % intervals). 10 epochs of PGD-AT do lower the mean entropies of both hidden layers (by 0.013, 0.008 to 0.018,
    and 0.015, 0.001 to 0.029), and this lowers the first by 0.028 (0.015 to 0.041). But AutoAttack at l_inf 0.1 leaves
    43.8 %, 1.4 points more (-0.4 to 3.3), where PGD-AT gains 19.6 (19.2 to 20.0). With both layers pushed it is 0.7
    more (-2.8 to 4.1), with an l_1 penalty on activity instead 2.2 (-1.0 to 5.3). Low entropy goes along with
    robustness here, it does not make it.

    Entropy has no scale, so combine it with weight decay; the log has the share of active units, for a dead layer has
    entropy 0 and no gradient. Activations with a sign (after BatchNorm, or of tanh) count by their size.

    Attributes:
        weights: w_l by the names of layers whose output is read; {} means 0.3 on the first activation function. All
            0 is plain training.
    """

    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for layer, weight in self.weights.items():
            require(math.isfinite(weight), f"weights={dict(self.weights)} must be finite, also that of {layer}.")

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, progress: Progress) -> Losses:
        weights = {layer: weight for layer, weight in self._weights(model).items() if weight}
        with ExitStack() as taps:
            reads = _reads(taps, model, list(weights))
            natural = cross_entropy(model(perturbed), batch.labels)
            activations = {layer: read() for layer, read in reads.items()}
        total, log = natural, {"natural": natural.detach()}
        for layer, a in activations.items():
            entropy = layer_entropy(a)
            total = total + weights[layer] * entropy
            log[f"entropy {layer}"] = entropy.detach()
            log[f"active {layer}"] = (a.detach() != 0).float().flatten(1).mean(1)
        return Losses(total, log)

    def _weights(self, model: nn.Module) -> Mapping[str, float]:
        if self.weights:
            return self.weights
        found = activation_layers(model)
        require(bool(found), "the model has no activation function as a module; name layers in weights.")
        return {found[0]: 0.3}


def _reads(taps: ExitStack, model: nn.Module, layers: list[str]) -> dict[str, Read]:
    return {layer: taps.enter_context(tapped(model, layer)) for layer in layers}

"""SingleProp (Boopathy et al., AAAI 2021): one radius beside every activation, instead of two bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from trivet.certify.bounds.activations import Rectifier
from trivet.certify.bounds.layer import Affine
from trivet.certify.bounds.network import Network
from trivet.data.dataset import Batch, Dataset
from trivet.errors import require
from trivet.methods import method
from trivet.models.batch_statistics import held_at, training_norms
from trivet.models.modes import device_of, evaluating
from trivet.objectives.certified import GrowingRadius, layers, network_of
from trivet.objectives.objective import Losses, Progress
from trivet.threats.losses import cross_entropy

Variant = Literal["zero", "fastlin", "crown"]


@method(
    title="SingleProp",
    paper="Boopathy et al., AAAI 2021",
    year=2021,
    legs="robust",
    note="trains for certificates and gives none: certify afterwards with ibp or crown",
)
@dataclass(frozen=True)
class SingleProp(GrowingRadius):
    """K_t CE(z, y) + (1 - K_t) CE(z + v (1 - 2 e_y), y), where v is carried along with z in one more forward pass:

        v = eps_t at the inputs,  v <- |W| v in affine layers,  v <- err(z, v) in ReLUs, with

        err = v where z - v >= 0,  0 where z + v <= 0,  else (unstable)
            zero        (z + v) / 2                                 the slope 0 of CNN-Cert-Zero
            fastlin     3 v / 4 + z / 2 - z^2 / (4 v + 1e-4)        the slope of Fast-Lin
            crown       v where z >= 0, else (z + v) / 2            the adaptive slope of CROWN

    err is half the width of the values between the two lines that relax a ReLU; z + v stands for the middle plus that
    half, although the middle is not relu(z). This saves a propagation (a step of plain training has one, this has
    two, interval bounds have three) and is why z - v and z + v are NOT bounds, not even where every step looks like
    one: with one hidden unit relu(x - 0.5), logits (0.3, h), x = 0 and eps = 1 it puts class 0 at 0.3, class 1 at
    0.25 at most, and f(1) = (0.3, 0.5). It promises nothing. What the trained weights are worth is said by a sound
    verifier, `ibp` or `crown`, run on them afterwards; a small training loss is no evidence.

    Written from the authors' code (the paper's table could not be had, so no published figure stands here). As there,
    the inputs' radius is not clipped to [0, 1] and the last layer is not merged with the margins. Departures: their
    "crown" tests z >= 0 for both halves, so that unstable units with z < 0 get 0; no published run used it, and it is
    corrected here. Max-pooling and activations other than ReLU follow the rule that their code has for max-pooling,
    (f(z + v) - f(z - v)) / 2. BatchNorm in training mode takes a clean pass more, for its statistics.

    The schedule is theirs for MNIST: eps_t grows from step 2,000 to 12,000 of 55,000, K_t falls from 1 to 0.5 with it.
    With `weight: adaptive`, K is 1 during the first epoch, and after each epoch L_spec / (L_spec + gamma L_fit), the
    summed robust and clean losses on the held-out records at the radius of that moment, so that the weighted robust
    term is gamma times the clean one. Set aside 5,000 records with `holdout`, as the authors do.

    Attributes:
        variant: see above; zero is theirs for MNIST, fastlin for CIFAR-10.
        weight: of the clean loss, "fixed" (the schedule) or "adaptive".
        gamma: of the adaptive weight; 10 in their code.
    """

    ramp: tuple[float, float] = (2 / 55, 12 / 55)
    variant: Variant = "zero"
    weight: Literal["fixed", "adaptive"] = "fixed"
    gamma: float = 10.0
    _carried: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.variant in ("zero", "fastlin", "crown"), f"variant={self.variant!r} must be zero, fastlin or crown."
        )
        require(self.weight in ("fixed", "adaptive"), f"weight={self.weight!r} must be fixed or adaptive.")
        require(self.gamma > 0, f"gamma={self.gamma} must be positive.")

    @property
    def needs_holdout(self) -> bool:
        return self.weight == "adaptive"

    def kappa(self, progress: Progress) -> float:
        """K_t."""
        if self.weight == "fixed":
            return super().kappa(progress)
        return float(self._carried.get("kappa", torch.ones(())))

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, progress: Progress) -> Losses:
        eps, kappa = self.grown(progress) * self.eps_max, self.kappa(progress)
        if eps == 0:
            return Losses(cross_entropy(model(batch.inputs), batch.labels))
        with held_at(model, batch.inputs) if training_norms(model) else evaluating(model):
            natural, robust = self._both(network_of(model, batch.inputs.shape[1:]), batch, eps)
        return Losses(kappa * natural + (1 - kappa) * robust, {"natural": natural.detach(), "robust": robust.detach()})

    def _both(self, network: Network, batch: Batch, eps: float) -> tuple[Tensor, Tensor]:
        """The clean loss and that of the worst of the logits z - v and z + v, [B] each."""
        with torch.autocast(batch.inputs.device.type, enabled=False):
            z, v = propagate(network, batch.inputs, eps, self.variant)
            own = torch.arange(z.shape[1], device=z.device) == batch.labels[:, None]
            signs = torch.ones_like(z).masked_fill(own, -1.0)
            return cross_entropy(z, batch.labels), cross_entropy(z + signs * v, batch.labels)

    def judge(self, model: nn.Module, held: Dataset, progress: Progress) -> Mapping[str, float]:
        found = dict(super().judge(model, held, progress))
        if self.weight == "adaptive":
            eps, device = self.grown(progress) * self.eps_max, device_of(model)
            network, sums = network_of(model, held.input_shape), torch.zeros(2, dtype=torch.float64)
            with torch.no_grad():
                for batch in held.batches(500):
                    both = self._both(network, batch.to(device), eps)
                    sums += torch.stack([each.double().sum().cpu() for each in both])
            fit, spec = sums.clamp(min=torch.finfo(torch.float64).tiny).tolist()
            found["kappa"] = spec / (spec + self.gamma * fit)
            self._carried["kappa"] = torch.tensor(found["kappa"], dtype=torch.float64)
        return found

    def state(self) -> dict[str, Tensor]:
        return dict(self._carried)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._carried.clear()
        self._carried.update(state)


def propagate(network: Network, x: Tensor, eps: float, variant: Variant) -> tuple[Tensor, Tensor]:
    """Logits z [B, K] of `x` [B, ...], and v [B, K]. Not bounds: z -+ v may be passed by inputs within `eps` of x."""
    values, radii = [x], [torch.full_like(x, eps)]
    for layer, sources in layers(network):
        z, v = [values[node] for node in sources], [radii[node] for node in sources]
        if isinstance(layer, Affine):
            radii.append(layer.spread(*v))
        elif isinstance(layer, Rectifier) and layer.leak == 0:
            radii.append(error_after_relu(z[0], v[0], variant))
        else:
            radii.append((layer(z[0] + v[0]) - layer(z[0] - v[0])) / 2)
        values.append(layer(*z))
    return values[-1], radii[-1]


def error_after_relu(z: Tensor, v: Tensor, variant: Variant) -> Tensor:
    """err(z, v), of one shape with both."""
    lower, upper = z - v, z + v
    if variant == "fastlin":
        unstable = 0.75 * v + z / 2 - z.square() / (4 * v + 1e-4)
    else:
        unstable = upper / 2
        if variant == "crown":
            unstable = v.where(z >= 0, unstable)
    return v.where(lower >= 0, unstable.where(upper > 0, torch.zeros_like(v)))

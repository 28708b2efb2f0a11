"""J-SIGR (Liu et al., Pattern Recognition 2024): a small Jacobian, and no input gradient where no pixel matters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vjp

from trivet.data.dataset import Batch
from trivet.errors import require
from trivet.methods import method
from trivet.models.modes import evaluating
from trivet.objectives.objective import Losses, Objective, Progress
from trivet.threats.losses import cross_entropy

Pull = Callable[[Tensor], tuple[Tensor]]
"""From weights v of the logits [B, K] to the input gradients J(x)^T v, shaped as the inputs."""


@torch.no_grad()
def perturbation_saliency(model: nn.Module, x: Tensor, grid: int = 8) -> Tensor:
    """S [B, 1, H, W] of images [B, C, H, W]: how much the answer changes when a patch is blurred; detached, eval mode.

        S_i = 1/2 || p(x) - p(x with patch i replaced) ||_2^2,  p = softmax z,  divided by its maximum over i,

    0 everywhere where no patch matters. Patches are squares of side ceil(max(H, W) / grid), those at the edge smaller;
    they are replaced by the mean over a square of twice that side plus one pixel around each pixel, inside the image.
    """
    batch, _, height, width = x.shape
    side = math.ceil(max(height, width) / grid)
    blurred = F.avg_pool2d(x, 2 * side + 1, stride=1, padding=side, count_include_pad=False)
    across = math.ceil(width / side)
    rows, columns = (torch.arange(size, device=x.device) // side for size in (height, width))
    patch = rows[:, None] * across + columns  # [H, W], the number of the patch that a pixel lies in
    numbers = torch.arange(math.ceil(height / side) * across, device=x.device)
    inside = (patch == numbers[:, None, None])[:, None]  # [P, 1, H, W]
    replaced = torch.where(inside, blurred[:, None], x[:, None]).flatten(0, 1)  # row by row of x
    with evaluating(model):
        p, other = model(x).softmax(1), model(replaced).softmax(1)
    change = 0.5 * (other.view(batch, len(numbers), -1) - p[:, None]).square().sum(2)
    change = change / change.amax(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return change[:, patch][:, None]


def _linearised(model: nn.Module, x: Tensor) -> tuple[Tensor, Pull]:
    """The logits z(x) [B, K] and the pull of J(x), both differentiable by the parameters."""
    found = vjp(model, x)
    return found[0], found[1]


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """J [B, K, D]: the derivatives of the K logits by the D numbers of each input, in eval mode; detached."""
    with evaluating(model):
        logits, pull = _linearised(model, x)
        rows = [pull(each.expand_as(logits))[0].flatten(1) for each in torch.eye(logits.shape[1]).to(logits)]
    return torch.stack(rows, 1).detach()


def linearised_margin(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """min_j (z_y - z_j) / || J_y - J_j ||_2, [B]: how far in l_2 the boundary would lie if the model were linear.

    Exact of a linear model, no bound of any other: a first-order estimate, never to be quoted as a certificate.
    Negative where the model errs.
    """
    with torch.no_grad(), evaluating(model):
        logits = model(x)
    slopes = jacobian(model, x)
    gap = logits.gather(1, y[:, None]) - logits
    steepness = torch.linalg.vector_norm(slopes[torch.arange(len(y)), y][:, None] - slopes, dim=2)
    distance = gap / steepness.clamp(min=torch.finfo(x.dtype).tiny)
    return distance.scatter(1, y[:, None], torch.inf).amin(1)


@method(
    title="J-SIGR",
    name="j_sigr",
    paper="Liu et al., Pattern Recognition 2024",
    year=2024,
    legs="robust",
    note="reconstruction from the abstract; constants are ours",
)
@dataclass(frozen=True)
class JSigr(Objective):
    """min_theta E[ CE(z(x), y) + lam_j / 2 ||J(x)||_F^2 + lam_s sum_i M_i |dCE/dx_i| ],   J = dz/dx [K, D].

    "Jacobian norm with selective input gradient regularization": the first penalty flattens the network, the second
    takes the input gradient away from pixels that do not matter to the model itself: M_i = 1 where
    `perturbation_saliency` at pixel i is below `tau`, else 0. What is left of the gradient is meant to be read as
    an explanation. No adversarial example is made. Both penalties are of logits and losses in eval mode and in
    float32 or wider, because BatchNorm would mix records and half precision loses second derivatives.

    The Jacobian term is estimated without bias (Hoffman et al. 2019): ||J||_F^2 = K E ||J^T v||_2^2 for v uniform on
    the unit sphere, drawn for each record and step. The selective term waits for `defer` of training, because masks of
    an untrained network are noise. Masks are made anew in each step, so that they fit augmented records; that costs
    about grid^2 forward passes.

    Reconstructed from the abstract: the paper's text and training code could not be had. The blur, the grid, the
    thresholds, the schedule and the constants are ours.

    Under a private gradient rule gradients are materialised, which is slower: the loss holds derivatives.

    It promises nothing. What the evidence shows (bench/j_sigr.py: perceptron (128, 64) on the digits, 20 epochs, means
    of 3 seeds; accuracy, left by AutoAttack at l_inf 0.1, left of examples transferred from plain networks at 0.1 | at
    0.2, share of the loss's gradient on pixels that do not matter):

        plain                  97.8    43.1    62.3 |  6.9    0.84
        Jacobian term alone    97.2    74.1    81.3 | 33.2    0.61
        J-SIGR                 96.9    78.6    84.1 | 42.2    0.59
        the same, unselective  96.7    78.5    84.5 | 42.8    0.60
        PGD-AT                 97.7    81.5    86.0 | 42.3    0.71

    So it withstands transferred attacks far better than plain training, as claimed, but not better than PGD-AT does,
    which the paper calls ineffective there; gradients stray less. The selection itself bought nothing in accuracy
    (0.2 points clean, 95 % interval -0.6 to 1.0). Gradients were not masked: Square broke 0.1 % after the others.

    Attributes:
        lam_j: weight of the Jacobian term, inputs in [0, 1] and logits as they are.
        lam_s: weight of the selective term; with `lam_j` 0 as well this is plain training.
        tau: saliency, as a share of the image's largest, below which a pixel is regularised; 0 none, above 1 all.
        projections: random directions in a step; None takes all K logits, which is exact.
        grid: patches along the longer side of an image.
        defer: fraction of training before the selective term comes in.
    """

    lam_j: float = 0.02
    lam_s: float = 0.1
    tau: float = 0.1
    projections: int | None = 1
    grid: int = 8
    defer: float = 1 / 6

    def __post_init__(self) -> None:
        require(self.lam_j >= 0, f"lam_j={self.lam_j} must not be negative.")
        require(self.lam_s >= 0, f"lam_s={self.lam_s} must not be negative.")
        require(self.tau >= 0, f"tau={self.tau} must not be negative.")
        require(
            self.projections is None or self.projections >= 1, f"projections={self.projections} must be at least 1."
        )
        require(self.grid >= 1, f"grid={self.grid} must be at least 1.")
        require(0 <= self.defer < 1, f"defer={self.defer} must lie in [0, 1).")

    def perturb(self, model: nn.Module, batch: Batch, progress: Progress) -> Tensor:
        """The inputs; with random projections [B, 2, ...], the second view noise from which directions are made."""
        if not self.lam_j or self.projections is None:
            return batch.inputs
        draw = progress.generator("projections", batch.inputs.device)
        return torch.stack([batch.inputs, torch.empty_like(batch.inputs).normal_(generator=draw)], 1)

    def losses(self, model: nn.Module, batch: Batch, perturbed: Tensor, progress: Progress) -> Losses:
        x = batch.inputs
        natural = cross_entropy(model(x), batch.labels)
        lam_s = self.lam_s if progress.fraction >= self.defer else 0.0
        total, log = natural, {"natural": natural.detach()}
        if not self.lam_j and not lam_s:
            return Losses(total, log)
        with evaluating(model), torch.autocast(x.device.type, enabled=False):
            logits, pull = _linearised(model, x)
            if self.lam_j:
                flat = _half_square(pull, self._directions(perturbed, logits))
                total, log["jacobian"] = total + self.lam_j * flat, flat.detach()
            if lam_s:
                # The gradient of the cross-entropy is J^T (p - e_y).
                truth = (torch.arange(logits.shape[1], device=x.device) == batch.labels[:, None]).to(logits)
                slope = pull(logits.softmax(1) - truth)[0].abs()
                if self.tau <= 1:
                    slope = slope * (perturbation_saliency(model, x, self.grid) < self.tau)
                stray = slope.flatten(1).sum(1)
                total, log["selective"] = total + lam_s * stray, stray.detach()
        return Losses(total, log)

    def _directions(self, perturbed: Tensor, logits: Tensor) -> Tensor:
        """Unit vectors [B, n, K]: the first numbers of the noise, to length 1; all K axes, if the term is exact."""
        records, classes = logits.shape
        if self.projections is None:
            return torch.eye(classes).to(logits).expand(records, -1, -1)
        noise, wanted = perturbed[:, 1].flatten(1), self.projections * classes
        require(
            wanted <= noise.shape[1],
            f"projections={self.projections} for {classes} classes need {wanted} numbers, more than an input has "
            f"({noise.shape[1]}); choose null, which is exact.",
        )
        return F.normalize(noise[:, :wanted].reshape(records, self.projections, classes), dim=2)


def _half_square(pull: Pull, directions: Tensor) -> Tensor:
    """K / (2 n) sum over n unit vectors v of ||J^T v||_2^2 [B], `directions` [B, n, K]; over an orthonormal basis it is
    1/2 ||J||_F^2, over random ones its estimate."""
    _, count, classes = directions.shape
    squares = [pull(v)[0].flatten(1).square().sum(1) for v in directions.unbind(1)]
    return classes / (2 * count) * torch.stack(squares).sum(0)

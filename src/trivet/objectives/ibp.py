"""Interval bound propagation as a training loss (Gowal et al., ICCV 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from trivet.methods import method
from trivet.objectives.certified import CertifiedTraining, Robust, Step, robust_cross_entropy


@method(title="Interval bound propagation (IBP)", paper="Gowal et al., ICCV 2019", year=2019, legs="robust")
@dataclass(frozen=True)
class Ibp(CertifiedTraining):
    """kappa CE(z(x), y) + (1 - kappa) CE(-m, y), with m_j a lower bound of z_y - z_j over the box, m_y = 0.

    m comes from interval arithmetic, centre and radius carried through the network, with the margin merged into the
    last layer. Wherever m > 0 in every rival class, the prediction is proved at that input, up to rounding: training
    and the certifier `ibp` compute the same bound. The loss is an upper bound of the worst loss in the box, a very
    loose one for networks that were not trained so; it grows with every layer. For deep networks with
    BatchNorm, such as `cnn7`, take the first weights and `regularizer: 0.5` of Shi et al. (NeurIPS 2021), or it looks
    worse than it is; without BatchNorm those weights let activations die away, and a short training of a small network
    ended lower with both. The cost is that of three passes of plain training, the clean one included.

    Published with those (Shi et al.), clean / certified: MNIST 0.1 98.84 / 97.95 %, MNIST 0.3 97.67 / 93.10 %; CIFAR-10
    2/255 66.84 / 52.85 %, 8/255 48.94 / 34.97 %.
    The schedule is that of the SingleProp code's IBP: 2,000 steps of 60,000 at radius 0, 10,000 steps of growth.
    """

    ramp: tuple[float, float] = (1 / 30, 1 / 5)

    def robust(self, step: Step) -> Robust:
        return Robust(robust_cross_entropy(step.lower), step.intervals)

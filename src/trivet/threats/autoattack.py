"""AutoAttack: the ensemble of parameter-free attacks by which robustness is reported (Croce & Hein, ICML 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from trivet import randomness
from trivet.display import progress
from trivet.errors import require
from trivet.methods import method
from trivet.models.inputs import require_unit_range
from trivet.models.modes import evaluating
from trivet.threats.apgd import APGD, APGDT
from trivet.threats.attack import Attack, Target, misclassified
from trivet.threats.fab import FAB, FABT
from trivet.threats.square import Square


class Detail(NamedTuple):
    """What each component of AutoAttack achieved.

    Attributes:
        x_adv: [N, ...] a verified adversarial point where `broken`, else the input.
        broken: [N] bool, misclassified before or after the attack.
        by: [N] int64: the component that broke the point, counted from 1; 0 where the clean input was already
            misclassified, -1 where the point still stands.
        components: the components' names, in the order they ran.
    """

    x_adv: Tensor
    broken: Tensor
    by: Tensor
    components: tuple[str, ...]

    @property
    def standing(self) -> dict[str, int]:
        """How many points stood at the start ("clean": those classified correctly) and after each component."""
        left = len(self.by) - int((self.by == 0).sum())
        counts = {"clean": left}
        for number, name in enumerate(self.components, 1):
            left -= int((self.by == number).sum())
            counts[name] = left
        return counts

    @property
    def square_gain(self) -> float:
        """Share of all points that Square, which sees no gradients, broke after the gradient attacks before it.

        Above 0.002 the gradients are likely to be masked, and the accuracy that is left means little.
        """
        square = self.components.index("square") + 1 if "square" in self.components else -2
        return int((self.by == square).sum()) / max(len(self.by), 1)


@method(title="AutoAttack", paper="Croce & Hein, ICML 2020", year=2020, legs="robust", name="autoattack")
@dataclass(frozen=True)
class AutoAttack(Attack):
    """Components in sequence, each on the points that still stand; the accuracy left is an upper bound, never a proof.

    standard: APGD-CE, APGD-T, FAB-T, Square; the one to report. plus: five restarts, and the untargeted DLR and
    FAB attacks as well. rand: APGD-CE and APGD-DLR on gradients averaged over `eot` draws, for randomised models,
    on which the others are void. With fewer than ten classes there are fewer targets; with two, APGD-T ascends the
    plain margin and FAB-T equals FAB.

    Attributes:
        version: "standard", "plus" or "rand".
        eot: forward passes averaged per gradient by the version "rand".
    """

    version: Literal["standard", "plus", "rand"] = "standard"
    eot: int = 20

    def __post_init__(self) -> None:
        require(
            self.version in ("standard", "plus", "rand"), f"version={self.version!r} must be standard, plus or rand."
        )
        require(self.eot >= 1, f"eot={self.eot} must be at least 1.")
        self.components()  # each refuses a geometry it does not know

    def components(self) -> dict[str, Attack]:
        """The attacks by name, in the order they run."""
        threat, precision = self.threat, self.precision
        sparse = threat.norm == "L1"
        if self.version == "rand":
            return {
                "apgd_ce": APGD(threat, samples=self.eot, precision=precision),
                "apgd_dlr": APGD(threat, loss="dlr", samples=self.eot, precision=precision),
            }
        targeted = {
            "apgd_t": APGDT(threat, targets=5 if sparse else 9, precision=precision),
            "fab_t": FABT(threat, precision=precision),
        }
        square = {"square": Square(threat, precision=precision)}
        if self.version == "standard":
            return {"apgd_ce": APGD(threat, restarts=5 if sparse else 1, precision=precision), **targeted, **square}
        return {
            "apgd_ce": APGD(threat, restarts=5, precision=precision),
            "apgd_dlr": APGD(threat, loss="dlr", restarts=5, precision=precision),
            "fab": FAB(threat, restarts=5, precision=precision),
            **square,
            **targeted,
        }

    def search(self, model: Target, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        best, open_ = x.clone(), torch.arange(len(x), device=x.device)
        for component in self.components().values():
            found = component.search(model, x[open_], y[open_], generator)
            won = component.succeeds(model, found, x[open_], y[open_])
            best[open_] = found
            open_ = open_[~won]
            if not len(open_):
                break
        return best

    def run_detailed(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        batch_size: int = 512,
    ) -> Detail:
        """Like `run`, and tells which component broke which point.

        Component by component instead of batch by batch, so that every component works on full batches.

        Raises:
            BadValue: as `run`.
        """
        require(len(x) == len(y), f"{len(x)} inputs but {len(y)} labels.")
        require_unit_range(x)
        generator = generator or randomness.generator(0, "attack", device=x.device)
        components = self.components()
        x_adv, by = x.clone(), torch.full_like(y, -1)
        with evaluating(model):
            for part in torch.arange(len(x), device=x.device).split(batch_size):
                by[part[misclassified(model, x[part], y[part])]] = 0
        for number, (name, component) in enumerate(components.items(), 1):
            standing = (by == -1).nonzero().squeeze(1)
            with progress(f"AutoAttack, {name}", len(standing)) as advance:
                for part in standing.split(batch_size):
                    found, broken = component.run(model, x[part], y[part], generator=generator, batch_size=batch_size)
                    x_adv[part], by[part[broken]] = found, number
                    advance(len(part), note=f"{int((by == -1).sum())} stand")
        return Detail(x_adv, by >= 0, by, tuple(components))
